"""A run as a Ray Job on two nodes: the orchestrator is killed twice, a node is lost twice, the result is the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from cluster.jobs import CONFIG_NAME, _package
from stages import storage
from stages.config import load_config
from stages.graph import build_stages, fingerprints
from stages.lease import Holding, lease_uri, read_lease
from stages.manifest import Manifest
from tests.conftest import free_port

TOP = Path(__file__).parents[2]
TINY = TOP / "tests" / "tiny.yaml"
UNTIL = "embed"
NODE: dict[str, Any] = {"object_store_memory": 80 << 20}


@dataclass
class Drill:
    """A cluster of two nodes, the head without cores, and a store.

    Attributes:
        cluster: the cluster.
        worker: its node with cores.
        disks: where every node has a folder of its own.
        address: of its dashboard.
        port: of the server of pictures; part of every fingerprint.
        environment: of every process here.
    """

    cluster: Cluster
    worker: Any
    disks: Path
    address: str
    port: int
    environment: dict[str, str]

    def settings(self, root: Path) -> list[str]:
        # One kind of engine for all runs: DeepSpeed rounds otherwise than plain torch.
        given = {"root": root, "source.shapes.port": self.port, "clip.engine": "torch", "cluster.submit": self.address}
        return [f"{name}={value}" for name, value in given.items()]

    def command(self, root: Path, command: str = "run", *extra: str) -> list[str]:
        settings = [part for setting in self.settings(root) for part in ("-s", setting)]
        return [sys.executable, "-m", "flows.cli", command, str(TINY), *settings, *extra]

    def submit(self, root: Path) -> subprocess.Popen[str]:
        """Start an orchestrator; what it says can be read from its standard error."""
        command = self.command(root, "run", "--until", UNTIL)
        return subprocess.Popen(command, **self.surroundings, stderr=subprocess.PIPE, text=True)

    @property
    def surroundings(self) -> dict[str, Any]:
        return {"env": self.environment, "cwd": TOP}

    def jobs(self, *statuses: str) -> list[str]:
        jobs = JobSubmissionClient(self.address).list_jobs()
        return [job.submission_id for job in jobs if job.submission_id and job.status in statuses]

    def lose_a_node(self) -> None:
        """End the node with the cores without warning; another one comes."""
        self.cluster.remove_node(self.worker, allow_graceful=False)
        self.worker = add_worker(self.cluster, self.disks)

    def fingerprints(self, root: Path) -> dict[str, str]:
        return dict(fingerprints(build_stages(load_config(TINY, self.settings(root)))))

    def digests(self, root: Path) -> dict[str, str]:
        names = self.fingerprints(root).items()
        found = {name: Manifest.read(str(root), name, mark) for name, mark in names}
        return {name: manifest.digest for name, manifest in found.items() if manifest is not None}

    def lease(self, root: Path, stage: str) -> Holding | None:
        return read_lease(lease_uri(str(root), stage, self.fingerprints(root)[stage]))


def add_worker(cluster: Cluster, disks: Path) -> Any:
    """Add a node with cores and a disk of its own: nodes that share one delete each other's copies of the code."""
    return cluster.add_node(num_cpus=2, temp_dir=tempfile.mkdtemp(dir=disks), **NODE)


@pytest.fixture(scope="module")
def drill(prefect_state: Path) -> Iterator[Drill]:
    # The processes of the cluster inherit the environment: the job finds the running Prefect server in it.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"XDG_STATE_HOME": str(prefect_state), "RAY_AUTH_MODE": "disabled", "PATH": path}
    # Not below pytest's folder: the names of Ray's sockets must be short.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        disks = Path(scratch)
        for name, value in environment.items():
            patch.setenv(name, value)
        dashboard = free_port()
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": dashboard, **NODE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield Drill(
                cluster,
                add_worker(cluster, disks),
                disks,
                f"http://127.0.0.1:{dashboard}",
                free_port(),
                dict(os.environ),
            )
        finally:
            cluster.shutdown()


def wait_for(condition: Callable[[], Any], drill: Drill, timeout_s: float = 200.0) -> None:
    """Wait for what a job is to do."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline and drill.jobs("PENDING", "RUNNING")
        time.sleep(0.2)


@contextlib.contextmanager
def orchestrator(drill: Drill, root: Path, said: str) -> Iterator[subprocess.Popen[str]]:
    """Run one, from the moment it has said what is expected; it is killed hard at the end, if it still lives."""
    process = drill.submit(root)
    assert process.stderr is not None
    try:
        lines = []
        while said not in (line := process.stderr.readline()):
            lines.append(line)
            assert line, "".join(lines)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def has_file(root: Path, stage: str, ending: str) -> bool:
    return any(name.endswith(ending) for name in storage.list_files(f"{root}/{stage}/shards"))


@pytest.mark.chaos
def test_the_orchestrator_dies_twice_and_two_nodes_are_lost(drill: Drill, tmp_path: Path) -> None:
    """And once the job is cancelled; the last command of all just says that everything is done."""
    root, calm = tmp_path / "disturbed", tmp_path / "calm"
    with orchestrator(drill, root, "submitted"):
        wait_for(lambda: has_file(root, "clip", "/checkpoint.json"), drill)
        drill.lose_a_node()
    with orchestrator(drill, root, "is running already; attached"):
        wait_for(lambda: has_file(root, "embed", ".json"), drill)
        drill.lose_a_node()
    with orchestrator(drill, root, "is running already; attached") as process:
        cancelled = subprocess.run(drill.command(root, "cancel"), **drill.surroundings, capture_output=True, text=True)
        assert ": stopped; everything committed is kept" in cancelled.stdout, cancelled.stderr
        process.communicate(timeout=60)
        assert process.returncode == 130
    held = drill.lease(root, "embed")
    assert held is not None and held.is_free  # stopped in order: nobody has to wait for its lease
    with orchestrator(drill, root, "submitted") as process:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    local = drill.command(calm, "run", "--until", UNTIL, "-s", "cluster.submit=null", "-s", "cluster.executor=local")
    drill.environment["OMP_NUM_THREADS"] = "1"  # as a rank with one core has
    assert subprocess.run(local, **drill.surroundings, capture_output=True).returncode == 0
    found = drill.digests(root)
    assert list(found) == ["source", "download", "filter", "clip", "embed"]
    assert found == drill.digests(calm)
    leases = {stage: drill.lease(root, stage) for stage in found}
    tokens = {stage: lease.token for stage, lease in leases.items() if lease is not None and lease.is_free}
    assert tokens == dict.fromkeys(found, 1) | {"embed": 2}  # by nobody else, and by nobody at the same time
    detached = drill.command(root, "run", "--detach", "--until", UNTIL)
    assert subprocess.run(detached, **drill.surroundings, capture_output=True).returncode == 0
    assert (len(drill.jobs("STOPPED")), len(drill.jobs("SUCCEEDED"))) == (1, 1)  # nothing to do: no third job


def test_a_job_carries_its_code_and_version(tmp_path: Path) -> None:
    program = (
        "import flows, importlib.metadata as m; from pathlib import Path\n"
        "for path in (flows.__file__, m.distribution('unclip-pipeline').locate_file('')): print(Path(path).resolve())"
    )
    with _package("root: x\n", with_code=True) as folder:
        assert (folder / CONFIG_NAME).read_text() == "root: x\n"
        child = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
        assert all(path.startswith(str(folder)) for path in child.stdout.split()), child.stdout + child.stderr
