"""A training on two machines whose workers, machines and drivers are killed every few seconds ends like a calm one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages import storage
from stages.audit import Result, verify
from stages.checkpoints import RECORD_NAME, Checkpoint
from stages.errors import NotFoundError
from stages.lease import lease_uri, read_lease
from stages.manifest import Manifest
from stages.metrics import METRICS_NAME, read_metrics
from tests.cluster.machines import Machines, machines
from tests.cluster.train_on import Slow, stage_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SEED = 4
NUM_STEPS = 60
MAX_WAIT_S = 200.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Machines]:
    with machines() as cluster:
        cluster.add_all(2, num_cpus=1)
        yield cluster


class Storm:
    """A training and what befalls it.

    Args:
        cluster: where it runs.
        root: its store.
        seed: of the moments and of who is struck.
        settings: of the training.
    """

    def __init__(self, cluster: Machines, root: Path, seed: int, settings: Mapping[str, Any]) -> None:
        self._cluster, self._root, self._settings = cluster, root, json.dumps(settings)
        self._random = random.Random(seed)
        self._log = root.with_suffix(".log")
        self._seen: set[str] = set()
        self._driver = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        what = (self._cluster.gcs, str(self._root), str(NUM_STEPS), self._settings)
        command = [sys.executable, "-m", "tests.cluster.train_on", *what]
        with self._log.open("ab") as log:
            return self._cluster.on_head(command, stdout=log, stderr=log)

    def blow(self) -> None:
        """Strike each kind of victim twice, in any order, shortly after the training has got going."""
        strikes: list[Callable[[], None]] = [self.kill_a_worker, self.kill_a_raylet, self.kill_the_driver]
        for _ in range(2):
            for strike in self._random.sample(strikes, len(strikes)):
                self._wait_for_new_steps()
                time.sleep(self._random.uniform(0.0, 2.0))
                self._seen = pids(self._root)
                strike()
                check_store(self._root)

    def wait(self) -> None:
        """Wait for the end."""
        assert self._driver.wait(timeout=2 * MAX_WAIT_S) == 0, self.said()

    def kill_a_worker(self) -> None:
        """Kill one of the ranks."""
        ranks = [process for machine in self._cluster.others for process in machine.find("ray::RayTrainWorker")]
        self._random.choice(ranks).kill()

    def kill_a_raylet(self) -> None:
        """Kill Ray's own process on a machine, with which all others there end; another machine comes."""
        machine = self._random.choice(self._cluster.others)
        machine.find("raylet")[0].kill()
        self._cluster.lose(machine)
        self._cluster.add(num_cpus=1)

    def kill_the_driver(self) -> None:
        """Kill it, and type the command again."""
        for process in psutil.Process(self._driver.pid).children(recursive=True):
            process.kill()
        self._driver.kill()
        self._driver.wait()
        self._driver = self._start()

    def said(self) -> str:
        return self._log.read_text()[-6000:]

    def _wait_for_new_steps(self) -> None:
        """Wait for a step made by a process that had made none at the strike before."""
        deadline = time.monotonic() + MAX_WAIT_S
        while pids(self._root) <= self._seen:
            assert time.monotonic() < deadline and self._driver.poll() is None, self.said()
            time.sleep(0.1)


def pids(root: Path) -> set[str]:
    """Tell who made the steps."""
    path = root / "steps.txt"
    return {" ".join(line.split()[1:]) for line in path.read_text().splitlines()} if path.exists() else set()


def check_store(root: Path) -> int:
    """Open everything on the store that counts, whoever is writing meanwhile; return how many checkpoints there are."""
    count = 0
    for name in storage.list_files(str(root)):
        uri = storage.join(str(root), name)
        try:
            if name.endswith(f"/{RECORD_NAME}"):
                for file, written in Checkpoint.read(uri).files.items():
                    assert storage.checksum(uri.replace(RECORD_NAME, file)) == written, f"{uri}: {file}"
                count += 1
            elif name.endswith(".json"):
                storage.read_json(uri)
            elif name.endswith(f"/{METRICS_NAME}"):
                read_metrics(storage.read_bytes(uri))
        except NotFoundError:  # deleted since the listing: an old checkpoint, its record first
            assert not storage.exists(uri), f"{uri}: a file is gone before its record"
    return count


def end_of(root: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Read the weights and the losses of all steps."""
    stage: Slow = stage_of(str(root), NUM_STEPS)
    manifest = Manifest.read(str(root), stage.name, stage.fingerprint({}))
    assert manifest is not None
    assert (
        verify(str(root), [Result(stage=stage.name, fingerprint=manifest.fingerprint)], {stage.name: Slow}).findings
        == []
    )
    (record,) = manifest.records
    path = root / stage.name / "shards" / record.shard_id / "checkpoints" / f"step-{NUM_STEPS:06d}" / METRICS_NAME
    lines = read_metrics(path.read_bytes())
    return record.files["weights"].read(str(root)), [{name: line[name] for name in ("step", "loss")} for line in lines]


@pytest.mark.parametrize(
    "settings",
    [{"engine": "torch"}, {"engine": "deepspeed", "zero_stage": 2}, {"engine": "deepspeed", "zero_stage": 3}],
    ids=["torch", "zero2", "zero3"],
)
def test_a_storm_changes_nothing(cluster: Machines, tmp_path: Path, settings: dict[str, Any]) -> None:
    calm = Storm(cluster, tmp_path / "calm", SEED, settings)
    calm.wait()
    storm = Storm(cluster, tmp_path / "stormy", SEED, settings)
    storm.blow()
    storm.wait()
    assert check_store(tmp_path / "stormy") == 2
    wanted, found = end_of(tmp_path / "calm"), end_of(tmp_path / "stormy")
    assert [line["step"] for line in found[1]] == list(range(1, NUM_STEPS + 1))
    assert found == wanted
    stage = stage_of(str(tmp_path / "stormy"), NUM_STEPS)
    lease = read_lease(lease_uri(stage.root, stage.name, stage.fingerprint({})))
    assert lease is not None and lease.is_free and lease.token == 3
    assert len(pids(tmp_path / "calm")) == 1 and len(pids(tmp_path / "stormy")) >= 7
