"""The whole pipeline on one screen, as a Prefect flow.

::

    source -> download -> filter -+-> embed -> curate -+-> pca --> prior ---------+
                          clip ---+                    +-> decoder ---------------+-> generate -> evaluate
                                                       +-> upsampler_256, _1024 --+
                                                       +-> ledger
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows.interrupt import Cancelled, Interrupt
from flows.prefect_server import PrivateServer, prefect_api
from flows.progress import Outcome
from flows.tasks import CURRENT_RUN, Run, do_stage, publish_report
from stages.errors import StageError
from stages.executor import ClusterConfig, Executor, LocalExecutor
from stages.manifest import manifest_uri
from stages.train import Training


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
    run = CURRENT_RUN.get()
    run.interrupt.listen()
    made: dict[str, PrefectFuture[Any] | str] = {}
    for stage in run.stages.values():
        if stage.name in stages:
            inputs = {upstream: made[upstream] for upstream in stage.upstream}
            made[stage.name] = do_stage.with_options(name=stage.name).submit(stage.name, inputs)  # type: ignore[arg-type]
        else:
            made[stage.name] = manifest_uri(root, stage.name, run.states[stage.name].fingerprint)
    wait([future for future in made.values() if isinstance(future, PrefectFuture)])
    note_stages_not_ready(run)
    report = publish_report({stage: manifest.uri for stage, manifest in run.manifests().items()})
    if run.failures():
        raise StageError("; ".join(outcome.message for outcome in run.failures()))
    return report


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
        server: a private server being started, or ``None`` where ``PREFECT_API_URL`` is set.

    Returns:
        What the flow raised, if it failed.

    Raises:
        ServerError: if there is no Prefect API to talk to.
        KeyboardInterrupt: if the user stopped it.
        UnclipError: if a training cannot start from the version it should start from.
    """
    for stage_name in run.selection.stages:
        if isinstance(stage := run.stages[stage_name], Training):
            stage.settle()
    # In this process alone, stages that run side by side would only fight for its cores.
    num_threads = 1 if isinstance(run.executor, LocalExecutor) else len(run.stages)
    chosen = pipeline.with_options(task_runner=ThreadPoolTaskRunner(max_workers=num_threads))  # type: ignore[arg-type]
    with prefect_api(server):
        token = CURRENT_RUN.set(run)
        try:
            state = chosen(name, run.root, list(run.selection.stages), return_state=True)
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
    from cluster.ray_executor import connect

    executor = connect(cluster)
    interrupt.closes(executor.close)
    return executor


def run_name(config_path: str, root: str) -> str:
    """Name a run after its config file and its store."""
    return f"{Path(config_path).stem} in {root}"
