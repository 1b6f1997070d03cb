"""A run as a Ray Job on machines that get lost, of orchestrators that are killed: the result is the same."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.job_submission import JobSubmissionClient

from cluster.jobs import CONFIG_NAME, _package
from stages import storage
from stages.config import load_config
from stages.graph import build_stages, fingerprints
from stages.lease import Holding, lease_uri, read_lease
from stages.manifest import Manifest
from tests.cluster.machines import Machine, Machines, machines
from tests.conftest import free_port

TOP = Path(__file__).parents[2]
TINY = TOP / "tests" / "tiny.yaml"
UNTIL = "prior"
# How far the last command goes on; all the way takes minutes more, and is for `make chaos` alone.
LAST = os.environ.get("UNCLIP_TEST_UNTIL", UNTIL)
# One kind of engine for all runs, since DeepSpeed rounds otherwise than plain torch; and time to strike.
SETTINGS = {
    "cluster.lease_ttl_s": 20,
    "source.rows_per_shard": 16,
    "clip.engine": "torch",
    "prior.engine": "torch",
    "prior.num_steps": 400,
    "prior.checkpoint_every_steps": 40,
    **{f"{model}.engine": "torch" for model in ("decoder", "upsampler_256", "upsampler_1024")},
}
KEEP_A_SERVER = "import sys; from flows.prefect_server import PrivateServer; PrivateServer().wait(); sys.stdin.read()"


@dataclass
class Drill:
    """A cluster and a store.

    Attributes:
        cluster: a head, which runs the job, and two machines with a core each.
        port: of the server of pictures; part of every fingerprint.
        environment: of the orchestrators, which are not on the cluster.
    """

    cluster: Machines
    port: int
    environment: dict[str, str]

    def settings(self, root: Path) -> list[str]:
        places = {"root": root, "source.shapes.port": self.port, "cluster.submit": self.cluster.dashboard}
        return [f"{name}={value}" for name, value in (SETTINGS | places).items()]

    def command(self, root: Path, command: str = "run", *extra: str) -> list[str]:
        settings = [part for setting in self.settings(root) for part in ("-s", setting)]
        return [sys.executable, "-m", "flows.cli", command, str(TINY), *settings, *extra]

    def submit(self, root: Path, until: str) -> subprocess.Popen[str]:
        """Start an orchestrator; what it says can be read from its standard error."""
        return subprocess.Popen(
            self.command(root, "run", "--until", until), **self.surroundings, stderr=subprocess.PIPE, text=True
        )

    @contextlib.contextmanager
    def run_calmly(self, root: Path, until: str) -> Iterator[subprocess.Popen[bytes]]:
        """Do an undisturbed run meanwhile, in one process with one thread, as a rank with one core has."""
        here = ("-s", "cluster.submit=null", "-s", "cluster.executor=local")
        command = self.command(root, "run", "--until", until, *here)
        process = self.cluster.on_head(["env", "OMP_NUM_THREADS=1", *command], stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @property
    def surroundings(self) -> dict[str, Any]:
        return {"env": self.environment, "cwd": TOP}

    def jobs(self, *statuses: str) -> list[str]:
        jobs = JobSubmissionClient(self.cluster.dashboard).list_jobs()
        return [job.submission_id for job in jobs if job.submission_id and job.status in statuses]

    def said(self) -> str:
        """Read the logs of the jobs that have failed."""
        client = JobSubmissionClient(self.cluster.dashboard)
        return "\n".join(client.get_job_logs(name)[-6000:] for name in self.jobs("FAILED"))

    def at_work(self, title: str) -> list[Machine]:
        """List the machines with a process of that title."""
        return [machine for machine in self.cluster.others if machine.find(title)]

    def fingerprints(self, root: Path) -> dict[str, str]:
        return dict(fingerprints(build_stages(load_config(TINY, self.settings(root)))))

    def digests(self, root: Path) -> dict[str, str]:
        names = self.fingerprints(root).items()
        found = {name: Manifest.read(str(root), name, mark) for name, mark in names}
        return {name: manifest.digest for name, manifest in found.items() if manifest is not None}

    def lease(self, root: Path, stage: str) -> Holding | None:
        return read_lease(lease_uri(str(root), stage, self.fingerprints(root)[stage]))


@pytest.fixture
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    # The job finds the running Prefect server in its environment.
    state = {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}
    with pytest.MonkeyPatch.context() as patch, machines(state) as cluster:
        keeper = cluster.on_head([sys.executable, "-c", KEEP_A_SERVER], stdin=subprocess.PIPE)
        cluster.add_all(2, num_cpus=1)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("no_proxy", cluster.head.address)
        yield Drill(cluster, free_port(), dict(os.environ))
        keeper.communicate()


def wait_for(condition: Callable[[], Any], drill: Drill, timeout_s: float = 200.0) -> None:
    """Wait for what a job is to do."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline and drill.jobs("PENDING", "RUNNING"), drill.said()
        time.sleep(0.2)


@contextlib.contextmanager
def orchestrator(drill: Drill, root: Path, said: str, until: str = UNTIL) -> Iterator[subprocess.Popen[str]]:
    """Run one, from the moment it has said what is expected; it is killed hard at the end, if it still lives."""
    process = drill.submit(root, until)
    try:
        read_until(process, said)
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], said: str) -> str:
    """Read what an orchestrator says up to a line with ``said``; return all that."""
    assert process.stderr is not None
    lines = []
    while not lines or said not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    return "".join(lines)


def has_file(root: Path, stage: str, ending: str) -> bool:
    return any(name.endswith(ending) for name in storage.list_files(f"{root}/{stage}/shards"))


def disturb(drill: Drill, root: Path) -> None:
    """Run to the end, by four commands and two jobs."""
    cluster = drill.cluster
    with orchestrator(drill, root, "submitted"):
        wait_for(lambda: has_file(root, "clip", "/checkpoint.json"), drill)
        cluster.lose(drill.at_work("ray::RayTrainWorker")[0], silently=True)
        assert "clip" not in drill.digests(root)
        cluster.add(num_cpus=1)
    with orchestrator(drill, root, "is running already; attached"):
        wait_for(lambda: has_file(root, "embed", ".json"), drill)
        cluster.lose(drill.at_work("ray::_Worker")[0])
        assert "embed" not in drill.digests(root)
        cluster.add(num_cpus=1)
    with orchestrator(drill, root, "is running already; attached") as process:
        wait_for(lambda: has_file(root, "prior", "/checkpoint.json"), drill)
        (leaving,) = drill.at_work("ray::RayTrainWorker")
        cluster.give_notice(leaving)
        said = read_until(process, "prior: a node is going away; the training moves on at step")
        assert "prior: the training group died" not in said  # its checkpoint is that of the step in progress
        cluster.lose(leaving)
        cancelled = subprocess.run(drill.command(root, "cancel"), **drill.surroundings, capture_output=True, text=True)
        assert ": stopped; everything committed is kept" in cancelled.stdout, cancelled.stderr
        process.communicate(timeout=60)
        assert process.returncode == 130
    held = drill.lease(root, "prior")
    assert held is not None and held.is_free  # stopped in order: nobody has to wait for its lease
    with orchestrator(drill, root, "submitted", LAST) as process:
        _, errors = process.communicate(timeout=_timeout_s())
        assert process.returncode == 0, errors


def _timeout_s() -> float:
    return 200 if LAST == UNTIL else 500


@pytest.mark.chaos
@pytest.mark.timeout(900 if LAST == UNTIL else 1500)
def test_the_orchestrator_dies_twice_and_machines_are_lost(drill: Drill, tmp_path: Path) -> None:
    """One falls silent in a training, one dies under embed, one has its notice in the other training; and once the job
    is cancelled. The last command of all just says that everything is done."""
    root, calm = tmp_path / "disturbed", tmp_path / "calm"
    with drill.run_calmly(calm, LAST) as undisturbed:
        disturb(drill, root)
        assert undisturbed.wait(timeout=_timeout_s()) == 0
    found = drill.digests(root)
    assert found == drill.digests(calm) and {"clip", "embed", "prior", LAST} <= set(found)
    leases = {stage: drill.lease(root, stage) for stage in found}
    tokens = {stage: lease.token for stage, lease in leases.items() if lease is not None and lease.is_free}
    assert tokens == dict.fromkeys(found, 1) | {"prior": 2}  # by nobody else, and by nobody at the same time
    detached = drill.command(root, "run", "--detach", "--until", LAST)
    assert subprocess.run(detached, **drill.surroundings, capture_output=True).returncode == 0
    assert (len(drill.jobs("STOPPED")), len(drill.jobs("SUCCEEDED"))) == (1, 1)  # nothing to do: no third job


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_the_head_is_lost_and_with_it_the_job(drill: Drill, tmp_path: Path) -> None:
    """Nobody tells the ranks: they train on beside those of the next job, until Ray on their machines gives up the head
    or they find that the lease has another owner."""
    root, calm, cluster = tmp_path / "beheaded", tmp_path / "calm", drill.cluster
    with orchestrator(drill, root, "submitted", "clip"):
        wait_for(lambda: has_file(root, "clip", "/checkpoint.json"), drill)
        (bereft,) = drill.at_work("ray::RayTrainWorker")
        cluster.head.power_off()
    orphans = bereft.find("raylet") + bereft.find("ray::RayTrainWorker")
    cluster.others.clear()
    cluster.start()
    cluster.add_all(2, num_cpus=1)
    with drill.run_calmly(calm, "clip") as undisturbed:
        with orchestrator(drill, root, "submitted", "clip") as process:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
        assert undisturbed.wait(timeout=200) == 0
    found = drill.digests(root)
    assert found == drill.digests(calm) and "clip" in found
    lease = drill.lease(root, "clip")
    assert lease is not None and lease.is_free and lease.token == 2
    assert orphans and not psutil.wait_procs(orphans, timeout=150)[1]


def test_a_job_carries_its_code_and_version(tmp_path: Path) -> None:
    program = (
        "import flows, importlib.metadata as m; from pathlib import Path\n"
        "for path in (flows.__file__, m.distribution('unclip-pipeline').locate_file('')): print(Path(path).resolve())"
    )
    with _package("root: x\n", with_code=True) as folder:
        assert (folder / CONFIG_NAME).read_text() == "root: x\n"
        child = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
        assert all(path.startswith(str(folder)) for path in child.stdout.split()), child.stdout + child.stderr
