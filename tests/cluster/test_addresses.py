"""Addresses of a cluster, used from a machine that is not one of its nodes, and from one that is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.machines import Machines, machines

TOP = Path(__file__).parents[2]
TINY = str(TOP / "tests" / "tiny.yaml")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with pytest.MonkeyPatch.context() as patch, machines() as cluster:
        cluster.add(num_cpus=1)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield cluster


def command(root: Path, address: str) -> list[str]:
    given = ("-s", f"root={root}", "-s", f"cluster.address={address}", "--until", "source")
    return [sys.executable, "-m", "flows.cli", "run", TINY, *given]


def test_a_machine_outside_drives_through_rays_client(cluster: Machines, tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, cluster.client), cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0 and "source done in" in done.stderr.replace("stage=", ""), done.stderr
    assert list((tmp_path / "source").glob("*/manifest.json"))


def test_a_machine_tells_its_node_from_all_others(cluster: Machines) -> None:
    """Ray's sockets have the same path on each."""
    if not cluster.isolated:
        pytest.skip("without namespaces all nodes are on this machine")
    asked = f"from cluster.draining import this_node; print(this_node({cluster.gcs!r}))"
    for machine in (cluster.head, *cluster.others):
        command = machine.command([sys.executable, "-c", asked])
        said = subprocess.run(command, env=cluster.environment, cwd=TOP, capture_output=True, text=True)
        assert said.stdout.split() == [machine.node_id], said.stderr


def test_the_address_of_the_head_is_for_its_nodes(cluster: Machines, tmp_path: Path) -> None:
    """Elsewhere Ray would end the process without a word that helps."""
    if not cluster.isolated:
        pytest.skip("without namespaces this machine is the cluster's")
    refused = subprocess.run(command(tmp_path, cluster.gcs), cwd=TOP, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    expected = f"cluster.address: '{cluster.gcs}': this machine is not a node of that cluster, so it cannot drive it"
    assert expected in refused.stderr and f"cluster.submit: http://{cluster.head.address}:8265" in refused.stderr
    inside = cluster.on_head(command(tmp_path, cluster.gcs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = inside.communicate(timeout=300)
    assert inside.returncode == 0, said.decode()
