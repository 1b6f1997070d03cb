"""Signs of life from the workers to the driver, and the wish to stop the other way.

The board is one small Ray actor; workers write the latest ``Progress`` of their stage on it and are told in the answer
whether to stop. Nothing here waits: a slow or dead board costs a worker nothing but its progress bar.
"""

from __future__ import annotations

import time
from typing import Any

from stages.base import Progress

_REPORT_EVERY_S = 0.25
_ASK_EVERY_S = 1.0


class Board:
    """What hangs on the board; becomes an actor in ``cluster/ray_executor.py``."""

    def __init__(self) -> None:
        self._progress: dict[str, Progress] = {}
        self._stopping = False
        self._stopped: set[str] = set()

    def report(self, key: str, progress: Progress | None) -> bool:
        """Put up the latest progress of one piece of work, if any; return whether to stop."""
        if progress is not None:
            self._progress[key] = progress
        return self._stopping or key in self._stopped

    def take(self, key: str) -> Progress | None:
        """Take down the progress put up since the last look."""
        return self._progress.pop(key, None)

    def stop(self, key: str | None = None) -> None:
        """Ask one piece of work to stop, or all."""
        if key is None:
            self._stopping = True
        else:
            self._stopped.add(key)


class BoardLink:
    """A worker's side of the board.

    Args:
        board: handle of the actor.
        key: names the piece of work.
    """

    def __init__(self, board: Any, key: str) -> None:
        self._board = board
        self._key = key
        self._reported_at = 0.0
        self._asked_at = 0.0
        self._answer: Any = None
        self._stop = False

    def report(self, progress: Progress) -> None:
        """Send progress, at most four times a second; the last unit of the work always."""
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_EVERY_S or progress.done >= progress.total:
            self._reported_at = now
            self._send(progress)

    def should_stop(self) -> bool:
        """Tell whether the driver wants this work to stop; it is known a second or two after the wish."""
        now = time.monotonic()
        if self._answer is None and now - self._asked_at >= _ASK_EVERY_S:
            self._send(None)
        if self._answer is not None and self._answer.done():
            # A board that is gone means that the driver is gone, and with it soon this worker.
            self._stop = self._stop or (self._answer.exception() is None and bool(self._answer.result()))
            self._answer = None
        return self._stop

    def _send(self, progress: Progress | None) -> None:
        answer = self._board.report.remote(self._key, progress)
        if self._answer is None:
            self._asked_at = time.monotonic()
            self._answer = answer.future()
