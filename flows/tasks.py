"""One Prefect task is one stage. Prefect orders, retries and shows; the store alone says what is done.

What Prefect sees are plain values: a stage's name and the URIs of manifests. The live things of a run (executor,
display) travel beside them in ``Run``, found through a context variable, because Prefect walks through every argument.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.states import Completed

from flows import artifacts
from flows.interrupt import Cancelled, Interrupt
from flows.lease_wait import held
from flows.logs import CURRENT_STAGE
from flows.progress import Display, Outcome
from flows.selection import Selection
from stages.base import Stage
from stages.errors import StageTimeoutError, StorageError, UnclipError
from stages.executor import ClusterConfig, Executor
from stages.lease import Lease
from stages.manifest import Manifest
from stages.orchestration import PrefectConfig
from stages.redaction import errors_without_secrets
from stages.runner import StageProgress, StageState, forget, inspect_stage, run_stage

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """Everything alive in one run of the pipeline.

    Attributes:
        root: the store.
        stages: all stages, in order.
        states: what was found of each before the run began.
        selection: what to run.
        executor: where shards are processed; shared by all stages.
        cluster: retry policy of shards.
        prefect: retry policy and time limits of stages.
        display: told about every stage.
        write_report: makes the report from the manifests there are; returns its URI.
        funnel: writes the table of samples in and out of every stage, in markdown.
        notes: further tables in markdown for Prefect, by their keys.
        interrupt: knows whether the user has stopped the run.
        shows_progress: whether people can look at Prefect while it runs.
        outcomes: how each stage ended, filled by the run.
        report_uri: where the report is, once it has been written.
    """

    root: str
    stages: Mapping[str, Stage[Any]]
    states: Mapping[str, StageState]
    selection: Selection
    executor: Executor
    cluster: ClusterConfig
    display: Display
    write_report: Callable[[Mapping[str, Manifest]], str]
    funnel: Callable[[Mapping[str, Manifest]], str]
    prefect: PrefectConfig = field(default_factory=PrefectConfig)
    notes: Callable[[Mapping[str, Manifest]], Mapping[str, str]] = lambda manifests: {}
    interrupt: Interrupt = field(default_factory=Interrupt)
    shows_progress: bool = False
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    report_uri: str = ""
    _to_forget: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._to_forget = set(self.selection.forced)

    @property
    def cancelled(self) -> bool:
        """Whether the user has stopped the run."""
        return self.interrupt.cancelled.is_set()

    def lacks(self, name: str) -> bool:
        """Tell whether there is no result of a stage for its settings, so that it must be done; or it is forced."""
        state = self.states[name]
        if name in self.selection.forced:
            return True
        return state.manifest is None and Manifest.read(self.root, name, state.fingerprint) is None

    def do(self, name: str, inputs: Mapping[str, Manifest]) -> Outcome:
        """Bring one stage to its end, unless it is there already."""
        stage, fingerprint = self.stages[name], self.states[name].fingerprint
        if name not in self._to_forget:
            state = inspect_stage(stage, fingerprint, inputs)
            if state.manifest is not None:
                return Outcome(stage=name, status="cached", manifest=state.manifest)
        on_progress = self._watch(threading.get_ident())
        with held(stage, fingerprint, self.cluster.lease_ttl_s, on_progress) as lease:
            # Only now: another run's work, which this one may have waited for, is not on this one's time.
            return self._do_alone(name, inputs, lease, self._timed(name, on_progress))

    def _do_alone(
        self,
        name: str,
        inputs: Mapping[str, Manifest],
        lease: Lease | None,
        on_progress: Callable[[StageProgress], None],
    ) -> Outcome:
        """Do it as the only run that does; another one may have finished it while this one waited."""
        stage, fingerprint = self.stages[name], self.states[name].fingerprint
        if name in self._to_forget:
            forget(stage, fingerprint, inputs)
            self._to_forget.discard(name)  # a retry of the task must not lose what the first attempt committed
        state = inspect_stage(stage, fingerprint, inputs)
        if state.manifest is not None:
            return Outcome(stage=name, status="cached", manifest=state.manifest)
        started_at = time.monotonic()
        manifest = run_stage(
            stage, fingerprint, inputs, self.executor, self.cluster, on_progress=on_progress, lease=lease
        )
        return Outcome(stage=name, status="done", manifest=manifest, wall_time_s=time.monotonic() - started_at)

    def end(self, outcome: Outcome) -> None:
        """Note how a stage ended and show it."""
        self.outcomes[outcome.stage] = outcome
        self.display.end(outcome)

    def manifests(self) -> dict[str, Manifest]:
        """Return every finished stage whose inputs are still the ones it was made from."""
        found: dict[str, Manifest] = {}
        for name, stage in self.stages.items():
            outcome = self.outcomes.get(name)
            manifest = outcome.manifest if outcome else self.states[name].manifest
            if manifest is None or (outcome is None and name in self.selection.forced):
                continue
            if all(up in found and manifest.inputs[up]["digest"] == found[up].digest for up in stage.upstream):
                found[name] = manifest
        return found

    def failures(self) -> list[Outcome]:
        """Return the stages that failed, in order."""
        return [o for name in self.stages if (o := self.outcomes.get(name)) and o.status == "failed"]

    def _timed(self, name: str, on_progress: Callable[[StageProgress], None]) -> Callable[[StageProgress], None]:
        limit_s = self.prefect.stage_timeouts_s.get(name)  # type: ignore[call-overload]
        if limit_s is None:
            return on_progress
        thread, started_at = threading.get_ident(), time.monotonic()

        def on_timed_progress(progress: StageProgress) -> None:
            late = time.monotonic() - started_at > limit_s
            if late and not progress.finished and threading.get_ident() == thread:
                raise StageTimeoutError(
                    f"{name}: not done after {limit_s:g} s, with {progress.num_done} of {progress.num_shards} shards; "
                    f"what is committed is kept; raise prefect.stage_timeouts_s.{name} and run again"
                )
            on_progress(progress)

        return on_timed_progress

    def _watch(self, thread: int) -> Callable[[StageProgress], None]:
        def on_progress(progress: StageProgress) -> None:
            # Only the stage's own thread may be broken out of: an executor's helper threads have work to undo.
            if self.cancelled and threading.get_ident() == thread:
                raise Cancelled
            self.display.update(progress)

        return on_progress


CURRENT_RUN: contextvars.ContextVar[Run] = contextvars.ContextVar("run")


def worth_retrying(error: BaseException) -> bool:
    """Tell whether running a whole stage again can help: lost storage or a lost cluster, a hang, not a wrong input.

    Shards have had their own retries by then (``cluster.max_attempts``), so any other ``StageError`` is final.
    """
    if isinstance(error, UnclipError):
        return isinstance(error, StorageError | StageTimeoutError)
    return isinstance(error, Exception)


def _retry_condition(this: Any, task_run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, BaseException) and _will_retry(CURRENT_RUN.get(), state.data, task_run)


def _will_retry(run: Run, error: BaseException, task_run: TaskRun) -> bool:
    return worth_retrying(error) and not run.cancelled and task_run.run_count <= run.prefect.stage_retries


@task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def do_stage(stage: str, inputs: dict[str, str]) -> Any:
    """Bring one stage to its end.

    Args:
        stage: its name.
        inputs: upstream stage -> URI of its manifest.

    Returns:
        The URI of the stage's manifest, as a state named ``Cached`` if the stage was done before.
    """
    run = CURRENT_RUN.get()
    token = CURRENT_STAGE.set(stage)
    started_at = time.monotonic()
    try:
        with errors_without_secrets():  # Prefect keeps the text of what a task raises
            outcome = run.do(stage, {name: Manifest.read_uri(run.root, uri) for name, uri in inputs.items()})
    except BaseException as error:
        _note_failure(run, stage, error, wall_time_s=time.monotonic() - started_at)
        raise
    finally:
        CURRENT_STAGE.reset(token)
    run.end(outcome)
    assert outcome.manifest is not None, stage
    uri = outcome.manifest.uri
    return Completed(name="Cached", message="done before", data=uri) if outcome.status == "cached" else uri


def stage_task(name: str, config: PrefectConfig) -> Task[..., Any]:
    """Return the task of a stage, with the tries that the config gives it."""
    return do_stage.with_options(
        name=name,
        retries=config.stage_retries,
        retry_delay_seconds=config.retry_delays_s,
        retry_jitter_factor=config.retry_jitter,
        retry_condition_fn=_retry_condition,
    )


def _note_failure(run: Run, stage: str, error: BaseException, *, wall_time_s: float) -> None:
    logger.debug("traceback", exc_info=error, extra={"stage": stage})
    context = TaskRunContext.get()
    if context is not None and _will_retry(run, error, context.task_run):
        delay_s = run.prefect.retry_delays_s[context.task_run.run_count - 1]
        logger.warning("%s; trying again in about %.3g s", error, delay_s, extra={"stage": stage})
        return
    status: Literal["cancelled", "failed"] = "cancelled" if run.cancelled else "failed"
    run.end(Outcome(stage=stage, status=status, error=error, wall_time_s=wall_time_s))


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def publish_report(manifests: dict[str, str]) -> str:
    """Write the report from whatever is finished, and show funnel, link and sample images in Prefect.

    Args:
        manifests: stage -> URI of its manifest, for people who look at the task in Prefect.

    Returns:
        The URI of the report.
    """
    run = CURRENT_RUN.get()
    with errors_without_secrets():
        found = run.manifests()
        run.report_uri = run.write_report(found)
        funnel, notes = run.funnel(found), run.notes(found)
        artifacts.publish(found, root=run.root, funnel=funnel, report_uri=run.report_uri, notes=notes)
    return run.report_uri
