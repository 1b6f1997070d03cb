"""What is kept of a run beside its results: record, log, metrics, traces, and the estimate it is held against."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flows import run_traces
from flows.progress import Display, Displays, Outcome
from flows.project import Project
from flows.run_log import RunLog
from flows.run_record import RunRecord, begin_run, end_run, prune_runs
from flows.selection import Selection
from stages.config import to_values
from stages.errors import StorageError, UnclipError
from stages.manifest import digest_of
from stages.runner import StageProgress

logger = logging.getLogger(__name__)


class Recording:
    """One run being recorded.

    Attributes:
        record: what has been written of it.
        display: to be told about every stage; passes it on to whoever wants to know.
    """

    def __init__(self, record: RunRecord, *displays: Display, traces: run_traces.RunTraces | None = None) -> None:
        self.record = record
        self._traces = traces
        self.display: Display = Displays(self, *displays)
        self._outcomes: dict[str, Outcome] = {}
        self._result: tuple[str, Sequence[str], int] | None = None

    def update(self, progress: StageProgress) -> None:
        """See ``Display``."""

    def end(self, outcome: Outcome) -> None:
        """See ``Display``."""
        self._outcomes[outcome.stage] = outcome

    def note_result(self, status: str, errors: Sequence[str], exit_code: int) -> None:
        """Say how the run ended; without it, what ends the ``with`` block tells."""
        self._result = (status, errors, exit_code)
        if self._traces is not None:
            self._traces.note_result(status, errors)

    def close_cancelled(self, root: str, exit_code: int) -> None:
        """Write the end of a run whose process ends hard: it was cancelled, unless another end is known already."""
        if self._result is None:
            self.note_result("cancelled", [], exit_code)
        self.close(root, None)

    def close(self, root: str, error: BaseException | None) -> None:
        """Write the end of the run."""
        status, errors, exit_code = self._result or _result_of(error)
        outcomes = list(self._outcomes.values())
        try:
            end_run(root, self.record, status=status, outcomes=outcomes, errors=errors, exit_code=exit_code)
            prune_runs(root, spare=self.record.id)
        except StorageError as failure:
            # What the run made is in the store, or is not, whatever is written about it.
            logger.warning("the end of run %s is not recorded: %s", self.record.id, failure)


@contextlib.contextmanager
def recorded(project: Project, selection: Selection, config_path: str, shown: Display) -> Iterator[Recording]:
    """Record a run for the length of a ``with`` block.

    Args:
        project: what runs.
        selection: the stages of it.
        config_path: the config file.
        shown: the display of the terminal.

    Raises:
        ConfigError: if the port of the metrics is taken, or traces cannot be made as the environment wants them.
        StorageError: if the store cannot be written.
    """
    config = project.config
    record = begin_run(
        config.root,
        config=config_path,
        config_digest=digest_of(to_values(config)),
        selected=selection.stages,
        estimates=_estimates(project, selection),
    )
    log = RunLog(config.root, record.id)
    displays: list[Display] = [shown, log]
    error: BaseException | None = None
    recording: Recording | None = None
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(log.kept())
            if config.cluster.metrics_port is not None:
                from flows.run_metrics import RunMetrics

                metrics = RunMetrics()
                port = stack.enter_context(metrics.served(config.cluster.metrics_host, config.cluster.metrics_port))
                logger.info("metrics: http://%s:%d/metrics", config.cluster.metrics_host, port)
                displays.append(metrics)
            traces: run_traces.RunTraces | None = None
            if run_traces.wanted():
                traces = stack.enter_context(run_traces.exported(record))
                displays.append(traces)
            recording = Recording(record, *displays, traces=traces)
            yield recording
    except BaseException as failure:
        error = failure
        raise
    finally:
        (recording or Recording(record)).close(config.root, error)


def _result_of(error: BaseException | None) -> tuple[str, Sequence[str], int]:
    if not isinstance(error, Exception):  # Ctrl-C, or what Prefect makes of a signal
        return "cancelled", [], 130
    text = str(error) if isinstance(error, UnclipError) else f"{type(error).__name__}: {error}"
    return "failed", [text], getattr(error, "exit_code", 1)


def _estimates(project: Project, selection: Selection) -> Mapping[str, Mapping[str, Any]]:
    """Estimate the stages that will run, from what this store has seen; a run never fails for want of an estimate."""
    from cluster.cost import estimate
    from cluster.throughput import measured

    try:
        found = measured(project.stages, [project.config.root])
        estimates = estimate(project.config, project.stages, project.states, found, machines=None)
    except UnclipError as error:
        logger.info("no estimate is recorded: %s", error)
        return {}
    keep = ("fingerprint", "num_in", "num_kept", "num_bytes", "worker_hours")
    return {
        item.stage: {name: getattr(item, name) for name in keep}
        for item in estimates
        if item.status == "pending" and item.stage in selection.stages
    }
