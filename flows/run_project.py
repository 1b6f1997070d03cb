"""One run of a project from its record to its end; what the command line and a deployment have in common."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from flows.interrupt import Interrupt
from flows.progress import Display, Outcome
from flows.project import Project
from flows.recording import recorded
from flows.run_notes import run_notes
from flows.selection import Selection
from flows.summary import write_summary

if TYPE_CHECKING:
    from flows.tasks import Run


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended.

    Attributes:
        status: ``done``, ``failed`` or ``cancelled``.
        exit_code: of a command that ran it.
        report_uri: where the report is; empty if it was not written.
        outcomes: how each stage ended.
        errors: one line each.
    """

    status: Literal["done", "failed", "cancelled"]
    exit_code: int
    report_uri: str = ""
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    errors: Sequence[str] = ()


def run_project(
    project: Project,
    selection: Selection,
    config_name: str,
    execute: Callable[[Run], BaseException | None],
    *,
    interrupt: Interrupt,
    shown: Display,
) -> Ended:
    """Run the selected stages; call it in the main thread, with whose life Ray's processes end.

    Args:
        project: what to run.
        selection: the stages of it.
        config_name: names the config in the record of the run.
        execute: runs the stages with Prefect; returns what failed. ``KeyboardInterrupt`` means a stop by the user.
        interrupt: listening.
        shown: told about every stage.

    Raises:
        UnclipError: if the run cannot begin, or a training cannot start from the version it should start from.
        BaseException: what else than ``KeyboardInterrupt`` breaks ``execute`` off; the end is recorded all the same.
    """
    config = project.config
    with recorded(project, selection, config_name, shown) as recording:
        from flows.pipeline import open_executor
        from flows.report import funnel_markdown
        from flows.tasks import Run
        from stages.generator_training import Training

        interrupt.notes(partial(recording.close_cancelled, config.root))
        executor = open_executor(config.cluster, interrupt)
        run = Run(
            root=config.root,
            stages=project.stages,
            states=project.states,
            selection=selection,
            executor=executor,
            cluster=config.cluster,
            prefect=config.prefect,
            display=recording.display,
            write_report=lambda manifests: write_summary(manifests, config),
            funnel=funnel_markdown,
            notes=lambda manifests: run_notes(manifests, config),
            interrupt=interrupt,
        )
        error: BaseException | None = None
        try:
            executor.refuse_impossible(project.stages[name] for name in selection.stages if run.lacks(name))
            for name in selection.stages:
                if isinstance(stage := project.stages[name], Training):
                    stage.settle()
            error = execute(run)
        except KeyboardInterrupt:
            interrupt.stop(128 + signal.SIGINT)  # where it takes no signals, nobody has told it before the stages ran
        finally:
            executor.close()
            ended = _ended(run, error)
            if interrupt.cancelled.is_set():
                recording.note_result(ended.status, ended.errors, ended.exit_code)
        recording.note_result(ended.status, ended.errors, ended.exit_code)
    return ended


def _ended(run: Run, error: BaseException | None) -> Ended:
    errors = [outcome.message for outcome in run.failures()]
    if error is not None and not errors:
        errors = [str(error)]
    status: Literal["done", "failed", "cancelled"] = "failed" if errors else "done"
    exit_code = 1 if errors else 0
    if run.cancelled:
        status, exit_code = "cancelled", run.interrupt.exit_code
    return Ended(
        status=status, exit_code=exit_code, report_uri=run.report_uri, outcomes=run.outcomes, errors=tuple(errors)
    )
