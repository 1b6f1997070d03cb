"""The whole pipeline on one screen, as a Prefect flow.

::

    source -> download -> filter -+-> embed -> curate -+-> pca --> prior ---------+
                          clip ---+                    +-> decoder ---------------+-> generate -> evaluate
                                                       +-> upsampler_256, _1024 --+
                                                       +-> ledger
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, wait

from flows.interrupt import Cancelled, Interrupt
from flows.logs import hide_secrets_from_prefect
from flows.prefect_server import PrivateServer, prefect_api
from flows.progress import Displays, Outcome
from flows.progress_artifacts import progress_shown
from flows.tasks import CURRENT_RUN, Run, publish_report, stage_task
from stages.errors import StageError
from stages.executor import ClusterConfig, Executor, LocalExecutor
from stages.manifest import manifest_uri
from stages.redaction import errors_without_secrets, hide_secrets


@flow(name="unclip", flow_run_name="{name}", persist_result=False)
def pipeline(name: str, root: str, stages: list[str]) -> str:
    """Bring stages to their end, each as soon as the ones it reads are done, and write the report.

    Args:
        name: of this run, for people.
        root: the store.
        stages: what to run; stages that are done already show as cached.

    Returns:
        The URI of the report.

    Raises:
        StageError: if a stage failed. Stages that do not need it have run to their end by then.
    """
    return run_stages(CURRENT_RUN.get())


def run_stages(run: Run) -> str:
    """Do the flow's work; called in the flow, with ``CURRENT_RUN`` set.

    Returns:
        The URI of the report.

    Raises:
        StageError: if a stage failed.
    """
    hide_secrets_from_prefect()
    with errors_without_secrets(), contextlib.ExitStack() as stack:
        if run.shows_progress:
            progress = stack.enter_context(progress_shown())
            run.display = Displays(run.display, progress)
        return _run_stages(run)


def _run_stages(run: Run) -> str:
    run.interrupt.listen()
    made: dict[str, PrefectFuture[Any] | str] = {}
    try:
        for stage in run.stages.values():
            if stage.name not in run.selection.stages:
                made[stage.name] = manifest_uri(run.root, stage.name, run.states[stage.name].fingerprint)
                continue
            inputs = {upstream: made[upstream] for upstream in stage.upstream}
            future = stage_task(stage.name, run.prefect).submit(stage.name, inputs)
            made[stage.name] = future
            if isinstance(run.executor, LocalExecutor):
                future.wait()  # in this process alone, stages side by side would only fight for its cores
        wait(_futures(made))
    except Exception:
        raise
    except BaseException:  # a signal, as whoever handles it says so
        run.interrupt.stop(128 + signal.SIGTERM)
        # The stages end by themselves now and give their leases back; what hangs meets the clock of the interrupt.
        for future in _futures(made):
            with contextlib.suppress(Exception, Cancelled):
                future.wait()
        raise
    note_stages_not_ready(run)
    report = publish_report({stage: manifest.uri for stage, manifest in run.manifests().items()})
    if run.failures():
        raise StageError("; ".join(outcome.message for outcome in run.failures()))
    return report


def _futures(made: Mapping[str, PrefectFuture[Any] | str]) -> list[PrefectFuture[Any]]:
    return [future for future in made.values() if isinstance(future, PrefectFuture)]


def note_stages_not_ready(run: Run) -> None:
    """Note the stages that never began, because a stage they need has failed."""
    for name in run.selection.stages:
        if name not in run.outcomes:
            run.end(Outcome(stage=name, status="cancelled" if run.cancelled else "not ready"))


def run_pipeline(run: Run, *, name: str, server: PrivateServer | None) -> BaseException | None:
    """Run the flow against a Prefect API; how the stages ended is in ``run.outcomes``.

    Args:
        run: the live things of the run.
        name: of this run, shown in Prefect.
        server: a private server being started, or ``None`` where the user has a server.

    Returns:
        What the flow raised, if it failed.

    Raises:
        ServerError: if there is no Prefect API to talk to.
        KeyboardInterrupt: if the user stopped it.
    """
    with prefect_api(server):
        run.shows_progress = server is None  # a private server has no pages
        token = CURRENT_RUN.set(run)
        try:
            state = pipeline(name, run.root, list(run.selection.stages), return_state=True)
        except Cancelled:
            raise KeyboardInterrupt from None
        finally:
            CURRENT_RUN.reset(token)
    if run.cancelled:
        raise KeyboardInterrupt
    error = state.result(raise_on_failure=False)
    return error if isinstance(error, BaseException) else None


def open_executor(cluster: ClusterConfig, interrupt: Interrupt) -> Executor:
    """Start or join what processes shards; must be called in the main thread, with whose life Ray's processes end.

    Raises:
        UnclipError: if Ray does not start, or its cluster does not answer.
    """
    if cluster.executor == "local":
        return LocalExecutor()
    from cluster.connection import connect

    executor = connect(cluster)
    interrupt.closes(executor.close)
    return executor


def run_name(config_path: str, root: str) -> str:
    """Name a run after its config file and its store."""
    return hide_secrets(f"{Path(config_path).stem} in {root}")
