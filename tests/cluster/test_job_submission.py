"""Jobs handed to a real cluster through a proxy that swallows requests or answers: begun once, or an error in time."""

from __future__ import annotations

import threading
import urllib.parse
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray.job_submission import JobSubmissionClient

from cluster import jobs
from cluster.jobs import JobCluster
from stages.errors import ConfigError, StageError
from tests.cluster.machines import machines
from tests.s3_forwarding import ForwardingHandler, serving

pytestmark = pytest.mark.slow


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
    """Serve a dashboard; of the requests of a method the first get no answer: "before" or "after" they went on."""
    over = threading.Event()

    class Handler(ForwardingHandler):
        target = urllib.parse.urlsplit(dashboard).netloc

        def do_GET(self) -> None:
            body = self.body()
            fault = faults.popleft() if self.command == method and faults else ""
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
