"""Jobs handed to a real cluster through a proxy that swallows requests or answers: begun once, or an error in time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from cluster import jobs
from cluster.jobs import JobCluster
from flows.cli import main
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
        process = subprocess.Popen(
            [sys.executable, *program, str(TINY), *settings(tmp_path, address)],
            cwd=TOP,
            stderr=subprocess.PIPE,
            text=True,
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


def settings(root: Path, address: str) -> list[str]:
    return ["-s", f"root={root}", "-s", f"cluster.submit={address}"]


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
        faults.append("before")
        with pytest.raises(StageError, match=rf"cluster.submit: {address} does not list its jobs: .*timed out"):
            cluster.submit("mute", [], config="", environment={})
    assert not faults


@pytest.fixture
def sleeper(dashboard: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a job that does nothing for a long time; its name is that of the test."""
    client = JobSubmissionClient(dashboard)
    name = f"unclip-{request.node.name.replace('[', '').replace(']', '')}-1"
    client.submit_job(entrypoint="exec sleep 1000", submission_id=name)
    eventually(lambda: client.get_job_status(name) == "RUNNING", 60, name)
    yield name
    client.stop_job(name)


def test_a_cluster_that_falls_silent_is_told_and_waited_for(
    dashboard: str, sleeper: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "_SAY_AFTER_S", 2.0)
    monkeypatch.setattr(jobs, "_ANSWER_S", 3.0)
    faults: deque[str] = deque()
    with mute_proxy(dashboard, faults, method="GET") as address, ThreadPoolExecutor(1) as threads:
        cluster = JobCluster(address)
        faults.extend(["before"] * 1000)
        following = threads.submit(cluster.follow, sleeper, lambda text: None)
        eventually(lambda: "waiting for up to 120 s" in caplog.text, 30, "a line about the silence")
        faults.clear()
        JobSubmissionClient(dashboard).stop_job(sleeper)
        assert following.result(60).status == "STOPPED"
        monkeypatch.setattr(jobs, "_LOST_CONTACT_S", 5.0)
        faults.extend(["before"] * 1000)
        with pytest.raises(StageError, match=rf"job {sleeper}: {address} does not answer \(.*timed out.*attaches"):
            cluster.follow(sleeper, lambda text: None)
    warnings = [record for record in caplog.records if "does not answer" in record.message]
    assert [record.message.partition(": ")[0] for record in warnings] == [f"job {sleeper}"] * 2  # once a silence


def test_a_cluster_where_nobody_listens_any_more_is_given_up_sooner(
    dashboard: str, sleeper: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "_SAY_AFTER_S", 1.0)
    monkeypatch.setattr(jobs, "_REFUSED_S", 4.0)
    with mute_proxy(dashboard, deque()) as address:
        cluster = JobCluster(address)
    began_at = time.monotonic()
    with pytest.raises(StageError, match=rf"job {sleeper}: {address} does not answer \(.*refused.*attaches"):
        cluster.follow(sleeper, lambda text: None)
    assert 4.0 < time.monotonic() - began_at < jobs._LOST_CONTACT_S / 2
    assert caplog.text.count("waiting for up to 4 s") == 1


@pytest.mark.parametrize(
    ("method", "first", "said"),
    [
        ("GET", [], "jobs {prefix}-: none was stopped: {address} does not answer"),
        ("POST", [], "job {name}: could not be stopped: {address} does not answer"),
        ("GET", [""], "job {name}: told to stop, whether it has ended is not known: {address} does not answer"),
    ],
    ids=["list", "stop", "state"],
)
def test_a_dashboard_that_falls_mute_while_it_stops_a_job_is_asked_again_and_named(
    dashboard: str, sleeper: str, method: str, first: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: deque[str] = deque()
    what = sleeper.removeprefix("unclip-").removesuffix("-1")
    with mute_proxy(dashboard, faults, method=method) as address:
        cluster = JobCluster(address)
        monkeypatch.setattr(jobs, "_ANSWER_S", 1.0)
        faults.extend([*first, *["before"] * 100])
        expected = said.format(prefix=f"unclip-{what}", name=sleeper, address=address)
        with pytest.raises(StageError, match=rf"^{expected} \(.*timed out.*`unclip cancel` stops what goes on"):
            cluster.stop_all(what, timeout_s=4.0)
        assert 90 < len(faults) < 100  # it was asked more than once
        faults.clear()
        faults.extend([*first, "before", "before"])
        cluster.stop_all(what)  # the job has ended where only the answers were lost
    assert JobSubmissionClient(dashboard).get_job_status(sleeper) == "STOPPED"


def test_a_run_that_cannot_stop_its_job_says_so(dashboard: str, tmp_path: Path) -> None:
    faults: deque[str] = deque()
    with mute_proxy(dashboard, faults) as address:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "run", str(TINY), *settings(tmp_path, address)],
            cwd=TOP,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            said = next(line for line in lines if "submitted" in line)
            faults.extend(["before"] * 100)
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
    (name,) = (job.submission_id for job in JobSubmissionClient(dashboard).list_jobs() if of_store(job, tmp_path))
    assert process.returncode == 130 and f"job {name} at" in said
    assert f"job {name}: could not be stopped: {address} does not answer" in rest
    assert "`unclip cancel` stops what goes on" in rest and "this is a bug" not in rest
    JobSubmissionClient(dashboard).stop_job(str(name))


def test_cancel_stops_all_jobs_of_a_config_and_store(
    dashboard: str, sleeper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that began with another list, without the list, and from another folder; no others."""
    monkeypatch.chdir(tmp_path)
    urls = tmp_path / "urls.csv"
    urls.write_text("url,caption\nhttp://127.0.0.1:9/1.jpg,one\n")
    lists = ("-s", "source.kind=urls", "-s", f"source.lists=[{urls}]")
    for root in ("store", "elsewhere", "store"):
        assert main(["run", str(TINY), *settings(Path(root), dashboard), *lists, "--detach"]) == 0
        urls.write_text(urls.read_text() + "http://127.0.0.1:9/2.jpg,two\n")
    urls.unlink()
    monkeypatch.chdir("/")
    capsys.readouterr()
    client = JobSubmissionClient(dashboard)

    def statuses(root: Path) -> list[str]:
        return [str(job.status) for job in client.list_jobs() if of_store(job, root)]

    assert len(statuses(tmp_path / "store")) == 2
    assert main(["cancel", str(TINY), *settings(tmp_path / "store", dashboard), *lists]) == 0
    assert capsys.readouterr().out.count(": stopped; everything committed is kept") == 2
    assert statuses(tmp_path / "store") == ["STOPPED"] * 2
    assert "STOPPED" not in statuses(tmp_path / "elsewhere") and client.get_job_status(sleeper) == "RUNNING"
    assert main(["cancel", str(TINY), *settings(tmp_path / "elsewhere", dashboard), *lists]) == 0
