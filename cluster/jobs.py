"""A whole run as a Ray Job: our own command line, started on a cluster that goes on when this machine does not.

A job's name is made of what it is to make, so that a second orchestrator, or the first one after it died, finds the job
instead of starting another::

    unclip-<what: 12 hex digits>-<how often this was begun>

The cluster gives a name to one job only: of two that submit at the same moment, one is refused and attaches.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import math
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from stages.errors import ConfigError, StageError, first_line

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONFIG_NAME = "config.yaml"
STOP_WAIT_S = 12  # for trainings to write a checkpoint once the job is stopped; then it is killed
_JOB_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "RAY_TRAIN_METRICS_ENABLED": "0"}
_PACKAGES = ("flows", "cluster", "stages", "unclip_models")
_PREFIX = "unclip"
_POLL_S = 1.0
_ANSWER_S = 30.0
_STOP_ANSWER_S = 5.0  # the same while somebody waits for the end
_LOST_CONTACT_S = 120.0
_REFUSED_S = 45.0  # the same where nobody listens any more: a dashboard that is started anew is back sooner
_SAY_AFTER_S = 5.0
_ARRIVES_S = 5.0  # for a submission that was cut off to be listed, if it has arrived at all
_NO_AGENT = "No available agent"  # the head's, which starts jobs: it comes up later than the dashboard


@dataclass(frozen=True, kw_only=True)
class JobState:
    """How a job stands.

    Attributes:
        status: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
        message: what the cluster says about it.
        exit_code: of our command line, once it has ended by itself.
    """

    status: str
    message: str = ""
    exit_code: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobCluster:
    """A cluster that takes jobs.

    Args:
        address: of its dashboard, such as ``http://head:8265``.

    Raises:
        ConfigError: if it does not answer.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._unanswered = ""  # the job whose submission has had no answer so far
        try:
            self._client = _client(address)
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"cluster.submit: '{address}': {first_line(error)}; give the address of the cluster's dashboard, such "
                "as http://head:8265, and see that it is up"
            ) from error

    def submit(
        self,
        what: str,
        arguments: Sequence[str],
        *,
        config: str,
        environment: Mapping[str, str],
        with_code: bool = True,
        labels: Mapping[str, str] | None = None,
    ) -> tuple[str, bool]:
        """Start a job, or find the one that does the same.

        Args:
            what: names the work; letters and digits.
            arguments: of ``unclip``, with the config as ``CONFIG_NAME``.
            config: the resolved config, YAML.
            environment: variables of the job and all its workers; whoever may look at the cluster can read them.
            with_code: whether our packages travel with the job; else the cluster's own are used.
            labels: shown beside the job.

        Returns:
            The job's name, and whether it was begun just now.

        Raises:
            StageError: if the cluster refuses it, or does not answer for two minutes.
        """
        jobs = self._jobs(what)
        for name, state in jobs:
            if not state.is_over:
                return name, False
        name = f"{_PREFIX}-{what}-{1 + max((_number(name) for name, _ in jobs), default=0)}"
        with _package(config, with_code=with_code) as folder:
            is_new = self._submit(
                name,
                entrypoint=shlex.join(["python", "-m", "flows.cli", *arguments]),
                runtime_env={"working_dir": str(folder), "env_vars": {**environment, **_JOB_ENVIRONMENT}},
                metadata=dict(labels or {}),
            )
        return name, is_new

    def state(self, name: str) -> JobState:
        """Ask how a job stands.

        Raises:
            StageError: if there is no such job.
        """
        found = self._find(name)
        if found is None:
            raise StageError(f"job {name}: {self._address} does not know it; the cluster has been started anew")
        return found

    def follow(self, name: str, show: Callable[[str], None]) -> JobState:
        """Pass on a job's log until it ends.

        Raises:
            StageError: if the cluster does not answer for two minutes, or refuses connections for 45 seconds; the job
                may go on nevertheless.
        """
        silence = _Silence(f"job {name}: {self._address}")
        with _Log(self._client, name, show):
            while True:
                # A slow answer is waited for once the user knows.
                self._client.answer_s = _ANSWER_S if silence.is_told else _SAY_AFTER_S
                try:
                    state = self.state(name)
                    if state.is_over:
                        return state
                    silence.end()
                except OSError as error:
                    silence.go_on(error)
                time.sleep(_POLL_S)

    def stop_all(
        self,
        what: str = "",
        *,
        is_meant: Callable[[Mapping[str, str]], bool] = lambda labels: True,
        timeout_s: float = STOP_WAIT_S + 20,
    ) -> dict[str, JobState]:
        """Stop the jobs whose names begin with ``what`` and wait for their end.

        They get SIGTERM, which lets them write checkpoints and give back leases, and later SIGKILL. A job whose
        submission was cut off is waited for: the cluster may begin it a moment later.

        Args:
            what: as for ``submit``; empty: all of ours.
            is_meant: chooses among them by their labels.
            timeout_s: how long to wait, and to ask a cluster that does not answer.

        Returns:
            Name -> how it stands in the end.

        Raises:
            StageError: if the cluster does not answer.
        """
        deadline = time.monotonic() + timeout_s

        def running() -> list[str]:
            jobs = _ours(self._client.list_jobs(), what)
            return [name for name, job in jobs if not _state_of(job).is_over and is_meant(job.metadata or {})]

        names = self._until_answered(running, deadline, f"jobs {_beginning(what)}: none was stopped")
        arrives_at = min(deadline, time.monotonic() + _ARRIVES_S)
        while self._unanswered and self._unanswered not in names and time.monotonic() < arrives_at:
            time.sleep(_POLL_S / 4)
            names = self._until_answered(running, deadline, f"job {self._unanswered}: not stopped")
        listed = f"job {', '.join(names)}"
        for name in names:
            self._until_answered(partial(self._client.stop_job, name), deadline, f"{listed}: could not be stopped")
        while True:
            unknown = f"{listed}: told to stop, whether it has ended is not known"
            states = {name: self._until_answered(partial(self.state, name), deadline, unknown) for name in names}
            if all(state.is_over for state in states.values()) or time.monotonic() > deadline:
                return states
            time.sleep(_POLL_S / 4)

    def _until_answered(self, ask: Callable[[], T], deadline: float, otherwise: str) -> T:
        """Ask, again if no answer comes until the deadline.

        Raises:
            StageError: if none has come; it begins with ``otherwise``.
        """
        while True:
            self._client.answer_s = min(_STOP_ANSWER_S, max(_POLL_S / 2, deadline - time.monotonic()))
            try:
                return ask()
            except (RuntimeError, OSError) as error:
                if time.monotonic() + _POLL_S > deadline:
                    raise StageError(
                        f"{otherwise}: {self._address} does not answer ({first_line(error)}); `unclip cancel` stops "
                        "what goes on once it answers again"
                    ) from error
            time.sleep(_POLL_S)

    def _submit(self, name: str, **job: Any) -> bool:
        """Hand a job in, again if no answer comes: the cluster takes a name once. False: somebody else was faster."""
        deadline = time.monotonic() + _LOST_CONTACT_S
        is_unanswered = False
        while True:
            try:
                self._unanswered = name
                self._client.submit_job(submission_id=name, **job)
                self._unanswered = ""
                return True
            except (RuntimeError, OSError) as error:
                passes = isinstance(error, OSError) or _NO_AGENT in str(error)
                is_unanswered |= passes
                with contextlib.suppress(OSError):
                    if self._find(name) is not None:
                        return is_unanswered
                if not passes:
                    raise StageError(f"cluster.submit: {self._address} refuses the job: {first_line(error)}") from error
                if time.monotonic() > deadline:
                    raise StageError(
                        f"cluster.submit: {self._address} takes no job ({first_line(error)}); see that Ray's dashboard "
                        "and its agent are up on the head, and run again: a job that was begun is attached to"
                    ) from error
                logger.warning("job %s: its submission was not answered (%s); it is repeated", name, first_line(error))
            time.sleep(_POLL_S)

    def _jobs(self, what: str) -> list[tuple[str, JobState]]:
        try:
            return [(name, _state_of(job)) for name, job in _ours(self._client.list_jobs(), what)]
        except (RuntimeError, OSError) as error:
            raise StageError(f"cluster.submit: {self._address} does not list its jobs: {first_line(error)}") from error

    def _find(self, name: str) -> JobState | None:
        try:
            return _state_of(self._client.get_job_info(name))
        except RuntimeError as error:
            if "does not exist" in str(error):
                return None
            raise ConnectionError(first_line(error)) from error


def _client(address: str) -> Any:
    """Make Ray's client of a dashboard, which by itself waits for an answer for ever."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        answer_s = math.inf  # for whoever has less patience

        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, timeout=min(self.answer_s, _ANSWER_S), **kwargs)

    return Client(address)


class _Silence:
    """How long a cluster has not answered; says so after seconds and gives up after minutes.

    Args:
        who: begins every line.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self.end()

    def end(self) -> None:
        """Take an answer."""
        self._began_at = self._refused_at = time.monotonic()
        self.is_told = False

    def go_on(self, error: OSError) -> None:
        """Take a request without an answer.

        Raises:
            StageError: if it is time to give up.
        """
        now = time.monotonic()
        is_refused = _is_refused(error)
        if not is_refused:
            self._refused_at = now
        if now - self._began_at > _LOST_CONTACT_S or (is_refused and now - self._refused_at > _REFUSED_S):
            raise StageError(
                f"{self._who} does not answer ({first_line(error)}); the job may go on: the same command attaches to "
                "it again"
            ) from error
        if not self.is_told and now - self._began_at >= _SAY_AFTER_S:
            self.is_told = True
            patience_s = _REFUSED_S if is_refused else _LOST_CONTACT_S
            logger.warning(
                "%s does not answer (%s); waiting for up to %.0f s, the job may go on meanwhile",
                *(self._who, first_line(error), patience_s),
            )


def _is_refused(error: BaseException | None) -> bool:
    """Tell whether nobody listened at the address, from all that an error was made of."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Log:
    """Shows what a job prints, from its beginning; a broken connection is made anew and shows nothing twice."""

    def __init__(self, client: Any, name: str, show: Callable[[str], None]) -> None:
        self._client, self._name, self._show = client, name, show
        self._num_shown = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job log", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2 * _POLL_S)  # the last lines; a log that hangs keeps nobody

    def _run(self) -> None:
        while True:
            over = self._ended.is_set()
            with contextlib.suppress(Exception):  # a log that cannot be shown is no reason to end the work
                asyncio.run(self._tail())
            if over:
                return
            self._ended.wait(_POLL_S)

    async def _tail(self) -> None:
        num_seen = 0
        async for text in self._client.tail_job_logs(self._name):
            fresh = text[max(0, self._num_shown - num_seen) :]
            num_seen += len(text)
            if fresh:
                self._num_shown += len(fresh)
                self._show(fresh)


@contextlib.contextmanager
def _package(config: str, *, with_code: bool) -> Iterator[Path]:
    """Put what a job needs into a folder: the config, and our packages with their version."""
    top = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="unclip-job-") as scratch:
        folder = Path(scratch)
        (folder / CONFIG_NAME).write_text(config)
        if with_code:
            for name in _PACKAGES:
                shutil.copytree(top / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            version = importlib.metadata.version("unclip-pipeline")
            information = folder / f"unclip_pipeline-{version}.dist-info"
            information.mkdir()
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: unclip-pipeline\nVersion: {version}\n")
        yield folder


def _beginning(what: str) -> str:
    return f"{_PREFIX}-{what}-" if what else f"{_PREFIX}-"


def _ours(jobs: Iterable[Any], what: str) -> Iterator[tuple[str, Any]]:
    for job in jobs:
        name = job.submission_id or ""
        if name.startswith(_beginning(what)):
            yield name, job


def _state_of(job: Any) -> JobState:
    return JobState(status=str(job.status), message=job.message or "", exit_code=job.driver_exit_code)


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])
