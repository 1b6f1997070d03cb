"""A progress bar per running stage on the pages of Prefect.

One thread sends what is new every few seconds, and when a stage ends: the stages never wait for the server, and a
server that does not answer costs a bar and nothing else.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext, TaskRunContext

from flows.progress import Meter, Outcome, describe
from stages.redaction import hide_secrets
from stages.runner import StageProgress

logger = logging.getLogger(__name__)

EVERY_S = 3.0
_LAST_S = 5.0


@dataclass
class _Bar:
    """What is to be shown of a stage, and what is."""

    task_run: UUID | None
    meter: Meter
    text: str = ""
    percent: float = 0.0
    is_new: bool = True
    artifact: UUID | None = None


class ProgressArtifacts:
    """A display that keeps one progress artifact per stage; made by ``progress_shown``.

    Args:
        flow_run: the run it belongs to.
        every_s: seconds between two updates at least.
    """

    def __init__(self, flow_run: UUID | None, every_s: float = EVERY_S) -> None:
        self._flow_run = flow_run
        self._every_s = every_s
        self._bars: dict[str, _Bar] = {}
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._ended = False

    def update(self, progress: StageProgress) -> None:
        """See ``Display``."""
        with self._lock:
            bar = self._bar(progress.stage)
            bar.meter.update(progress)
            self._show(bar, 100 * bar.meter.fraction, bar.meter.summary)

    def end(self, outcome: Outcome) -> None:
        """See ``Display``."""
        if outcome.status in ("cached", "not ready"):
            return
        with self._lock:
            bar = self._bar(outcome.stage)
            percent = 100.0 if outcome.status == "done" else bar.percent
            self._show(bar, percent, hide_secrets(f"{outcome.status}: {describe(outcome)}"))
        self._due.set()

    def send_until_ended(self) -> None:
        """Send what is new, now and then, and once more at the end; the body of the sending thread."""
        with get_client(sync_client=True) as client:
            while not self._ended:
                self._due.wait(self._every_s)
                self._due.clear()
                self._send(client)
            self._send(client)

    def stop(self) -> None:
        """Let the sending thread end."""
        self._ended = True
        self._due.set()

    def _bar(self, stage: str) -> _Bar:
        if stage not in self._bars:
            context = TaskRunContext.get()
            self._bars[stage] = _Bar(context.task_run.id if context is not None else None, Meter())
        return self._bars[stage]

    def _show(self, bar: _Bar, percent: float, text: str) -> None:
        bar.is_new = bar.is_new or (percent, text) != (bar.percent, bar.text)
        bar.percent, bar.text = percent, text

    def _send(self, client: SyncPrefectClient) -> None:
        with self._lock:
            fresh = [(stage, bar, bar.percent, bar.text) for stage, bar in self._bars.items() if bar.is_new]
            for _, bar, _, _ in fresh:
                bar.is_new = False
        for stage, bar, percent, text in fresh:
            try:
                self._send_bar(client, stage, bar, percent, text)
            except Exception as error:  # whatever the server or the way to it has; the next round tries again
                logger.debug("no progress is shown of %s: %s", stage, error)

    def _send_bar(self, client: SyncPrefectClient, stage: str, bar: _Bar, percent: float, text: str) -> None:
        if bar.artifact is not None:
            client.update_artifact(bar.artifact, ArtifactUpdate(data=percent, description=text))
            return
        created = client.create_artifact(
            ArtifactCreate(
                key=f"progress-{stage.replace('_', '-')}",
                type="progress",
                data=percent,
                description=text,
                task_run_id=bar.task_run,
                flow_run_id=self._flow_run,
            )
        )
        bar.artifact = created.id


@contextlib.contextmanager
def progress_shown(every_s: float = EVERY_S) -> Iterator[ProgressArtifacts]:
    """Give a display that shows running stages on Prefect's pages; call it inside a flow."""
    context = FlowRunContext.get()
    flow_run = context.flow_run.id if context is not None and context.flow_run is not None else None
    artifacts = ProgressArtifacts(flow_run, every_s)
    # The settings of Prefect, such as the address, are a context variable: a thread begins without them.
    surroundings = contextvars.copy_context()
    thread = threading.Thread(
        target=surroundings.run, args=(artifacts.send_until_ended,), name="progress artifacts", daemon=True
    )
    thread.start()
    try:
        yield artifacts
    finally:
        artifacts.stop()
        thread.join(_LAST_S)
