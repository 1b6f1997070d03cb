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

from prefect import task
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
from stages.errors import StorageError, UnclipError
from stages.executor import ClusterConfig, Executor
from stages.lease import Lease
from stages.manifest import Manifest
from stages.runner import StageProgress, StageState, forget, inspect_stage, run_stage

logger = logging.getLogger(__name__)

NUM_RETRIES, RETRY_DELAY_S = 1, 5.0


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
        display: told about every stage.
        write_report: makes the report from the manifests there are; returns its URI.
        funnel: writes the table of samples in and out of every stage, in markdown.
        interrupt: knows whether the user has stopped the run.
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
    interrupt: Interrupt = field(default_factory=Interrupt)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    report_uri: str = ""
    _to_forget: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._to_forget = set(self.selection.forced)

    @property
    def cancelled(self) -> bool:
        """Whether the user has stopped the run."""
        return self.interrupt.cancelled.is_set()

    def do(self, name: str, inputs: Mapping[str, Manifest]) -> Outcome:
        """Bring one stage to its end, unless it is there already."""
        stage, fingerprint = self.stages[name], self.states[name].fingerprint
        if name not in self._to_forget:
            state = inspect_stage(stage, fingerprint, inputs)
            if state.manifest is not None:
                return Outcome(stage=name, status="cached", manifest=state.manifest)
        on_progress = self._watch(threading.get_ident())
        with held(stage, fingerprint, self.cluster.lease_ttl_s, on_progress) as lease:
            return self._do_alone(name, inputs, lease, on_progress)

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

    def _watch(self, thread: int) -> Callable[[StageProgress], None]:
        def on_progress(progress: StageProgress) -> None:
            # Only the stage's own thread may be broken out of: an executor's helper threads have work to undo.
            if self.cancelled and threading.get_ident() == thread:
                raise Cancelled
            self.display.update(progress)

        return on_progress


CURRENT_RUN: contextvars.ContextVar[Run] = contextvars.ContextVar("run")


def worth_retrying(error: BaseException) -> bool:
    """Tell whether running a whole stage again can help: lost storage or a lost cluster, not a wrong input.

    Shards have had their own retries by then (``cluster.max_attempts``), so a ``StageError`` is final.
    """
    return isinstance(error, StorageError) or (isinstance(error, Exception) and not isinstance(error, UnclipError))


def _retry_condition(this: Any, task_run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.data, BaseException) and _will_retry(CURRENT_RUN.get(), state.data, task_run)


def _will_retry(run: Run, error: BaseException, task_run: TaskRun) -> bool:
    return worth_retrying(error) and not run.cancelled and task_run.run_count <= NUM_RETRIES


@task(
    name="stage",
    task_run_name="{stage}",
    retries=NUM_RETRIES,
    retry_delay_seconds=RETRY_DELAY_S,
    retry_condition_fn=_retry_condition,
    cache_policy=NO_CACHE,
    persist_result=False,
)
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


def _note_failure(run: Run, stage: str, error: BaseException, *, wall_time_s: float) -> None:
    logger.debug("traceback", exc_info=error, extra={"stage": stage})
    context = TaskRunContext.get()
    if context is not None and _will_retry(run, error, context.task_run):
        logger.warning("%s; trying once more in %g s", error, RETRY_DELAY_S, extra={"stage": stage})
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
    found = run.manifests()
    run.report_uri = run.write_report(found)
    artifacts.publish(found, root=run.root, funnel=run.funnel(found), report_uri=run.report_uri)
    return run.report_uri
