"""Jobs handed to a real cluster through a proxy that swallows requests or answers: begun once, or an error in time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import urllib.parse
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from cluster import jobs
from cluster.jobs import JobCluster
from stages.errors import ConfigError, StageError
from tests.cluster.machines import machines
from tests.flows.prefect_setup import eventually
from tests.s3_forwarding import ForwardingHandler, serving

pytestmark = pytest.mark.slow
TOP = Path(__file__).parents[2]
TINY = TOP / "tests" / "tiny.yaml"
# As a flow run does it, whose signals are handled by Prefect and arrive as exceptions.
FOLLOW = """
import argparse, signal, sys
from flows.cli_jobs import run_as_job
from flows.interrupt import Cancelled
from flows.project import open_project
from flows.selection import select
from stages.graph import STAGE_NAMES

def end(number, frame):
    raise Cancelled

signal.signal(signal.SIGINT, end)
of_run = argparse.Namespace(config="tiny", detach=False, json=False)
project = open_project(sys.argv[1], sys.argv[3::2])
run_as_job(of_run, project, select(STAGE_NAMES), takes_signals=False)
"""


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNCLIP_TEST_MACHINES", "processes")  # a head is enough, and its address is this machine's
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with machines() as cluster:
            patch.setenv("no_proxy", f"127.0.0.1,localhost,{cluster.head.address}")
            yield cluster.dashboard


@contextmanager
def mute_proxy(dashboard: str, faults: deque[str], *, method: str = "POST") -> Iterator[str]:
    """Serve a dashboard; of the requests of a method the first get no answer: "before" or "after" they went on.

    Those that are "late" go on after two seconds, whether or not anybody waits for them.
    """
    over = threading.Event()

    class Handler(ForwardingHandler):
        target = urllib.parse.urlsplit(dashboard).netloc

        def do_GET(self) -> None:
            body = self.body()
            fault = faults.popleft() if self.command == method and faults else ""
            if fault == "late":
                over.wait(2.0)
            if fault != "before":
                answer = self.forward(body)
            if not fault:
                return self.answer(answer)
            self.close_connection = True
            over.wait()

    with serving(Handler) as address:
        try:
            yield address
        finally:
            over.set()


def submitted(cluster: JobCluster, what: str) -> tuple[str, bool]:
    return cluster.submit(what, ["--help"], config="{}\n", environment={}, with_code=False)


def names(dashboard: str, what: str) -> list[str | None]:
    found = [job.submission_id for job in JobSubmissionClient(dashboard).list_jobs()]
    return [name for name in found if name and name.startswith(f"unclip-{what}-")]


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_submission_without_an_answer_is_repeated_and_begins_one_job(
    dashboard: str, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "_ANSWER_S", 8.0)
    faults = deque([fault])
    with mute_proxy(dashboard, faults) as address:
        name, is_new = submitted(JobCluster(address), f"lost{fault}")
    assert not faults and is_new
    assert names(dashboard, f"lost{fault}") == [name]
    assert ("its submission was not answered" in caplog.text) == (fault == "before")


@pytest.mark.parametrize(
    ("program", "fault", "code"), [(["-m", "flows.cli", "run"], "late", 130), (["-c", FOLLOW], "after", 1)]
)
def test_a_run_cancelled_while_it_submits_leaves_no_job(
    dashboard: str, program: list[str], fault: str, code: int, tmp_path: Path
) -> None:
    """What is cut off is the wait for an answer: the cluster begins the job, or has begun it."""
    faults = deque([fault])
    with mute_proxy(dashboard, faults) as address:
        given = ("-s", f"root={tmp_path}", "-s", f"cluster.submit={address}")
        process = subprocess.Popen(
            [sys.executable, *program, str(TINY), *given], cwd=TOP, stderr=subprocess.PIPE, text=True
        )
        try:
            eventually(lambda: not faults, 60, "the submission")
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code and "stopping the job" in said, said
    statuses = [job.status for job in JobSubmissionClient(dashboard).list_jobs() if of_store(job, tmp_path)]
    assert statuses == ["STOPPED"]


def of_store(job: Any, root: Path) -> bool:
    return (job.metadata or {}).get("root") == str(root)


def test_a_cluster_that_never_answers_a_submission_is_an_error(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with mute_proxy(dashboard, deque(["before"] * 100)) as address:
        cluster = JobCluster(address)
        monkeypatch.setattr(jobs, "_ANSWER_S", 3.0)
        monkeypatch.setattr(jobs, "_LOST_CONTACT_S", 4.0)
        with pytest.raises(
            StageError, match=rf"cluster.submit: {address} takes no job \(.*timed out.*its agent are up"
        ):
            submitted(cluster, "never")
    assert names(dashboard, "never") == []


def test_a_dashboard_that_is_mute_is_named(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_ANSWER_S", 1.0)
    with (
        mute_proxy(dashboard, deque(["before"] * 100), method="GET") as address,
        pytest.raises(ConfigError, match=rf"cluster.submit: '{address}': .*timed out.*see that it is up"),
    ):
        JobCluster(address)


def test_a_dashboard_that_falls_mute_is_named(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: deque[str] = deque()
    with mute_proxy(dashboard, faults, method="GET") as address:
        cluster = JobCluster(address)
        monkeypatch.setattr(jobs, "_ANSWER_S", 1.0)
        faults.extend(["before"] * 2)
        for ask in (cluster.stop_all, lambda what: cluster.submit(what, [], config="", environment={})):
            with pytest.raises(StageError, match=rf"cluster.submit: {address} does not list its jobs: .*timed out"):
                ask("mute")
    assert not faults
