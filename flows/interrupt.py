"""Ctrl-C, SIGTERM and a closed terminal: stop the work in seconds, keep what is committed, leave nothing running.

Stages run in threads, which cannot be interrupted from outside; the first signal therefore closes the executor (Ray
cancels its tasks, and the threads that wait for them fail), and a clock ends the process where that takes too long.
Ending it hard is safe: everything in the store is published atomically, leases are given back, and Ray's processes end
with their driver.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from stages.errors import first_line
from stages.lease import release_all

logger = logging.getLogger(__name__)

DEADLINE_S = 8.5
_LAST_ACTS_S = 1.0  # longer than that nobody waits for a store
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Cancelled(BaseException):
    """Raised inside a stage's own thread once the run is cancelled; no stage may swallow it as a failure."""


class Interrupt:
    """Turns the first signal into a quick, orderly end and a second one into an immediate end.

    Args:
        deadline_s: seconds between the first signal and the hard end.
        on_stop: called at the first signal, before anything else.
        outlived: whether the work goes on elsewhere without this process, so that a closed terminal does not stop it.
        takes_signals: whether to handle signals; if not, the handlers that are found are kept in place, also against
            libraries, and whoever catches what they raise calls ``stop``. Prefect's engine tells its server that it
            can be cancelled only as long as its own handler stands.
    """

    def __init__(
        self,
        deadline_s: float = DEADLINE_S,
        on_stop: Callable[[], None] = lambda: None,
        *,
        outlived: bool = False,
        takes_signals: bool = True,
    ) -> None:
        self.cancelled = threading.Event()
        self.exit_code = 0
        self._deadline_s = deadline_s
        self._on_stop = on_stop
        self._takes_signals = takes_signals
        self._signals = tuple(
            number
            for number in _SIGNALS
            if not (number == signal.SIGHUP and (outlived or signal.getsignal(number) == signal.SIG_IGN))  # nohup
        )
        self._close: Callable[[], object] | None = None
        self._note: Callable[[int], object] | None = None
        self._old_handlers: dict[int, Any] = {}
        self._is_active = False
        self._releasing: threading.Thread | None = None

    def closes(self, close: Callable[[], object]) -> None:
        """Name what releases the workers, once they are up; called at the first signal, in a thread of its own."""
        self._close = close
        self.listen()

    def notes(self, note: Callable[[int], object]) -> None:
        """Name what writes down, with the exit code, that the run was cancelled; called before a hard end only."""
        self._note = note

    def __enter__(self) -> Interrupt:
        self._old_handlers = {number: signal.getsignal(number) for number in self._signals}
        self._is_active = True
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_active = False
        if self._releasing is not None:
            # Leaving earlier would kill Ray's main process in the middle of ending the others.
            self._releasing.join()
            return  # a second Ctrl-C still ends it at once
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals; called again where a library has put its own handlers in place (Ray, a Prefect flow)."""
        if not self._is_active or threading.current_thread() is not threading.main_thread():
            return
        for number in self._signals:
            if self._takes_signals:
                signal.signal(number, self._handle)
            elif self._old_handlers[number] is not None:  # None: it is not one of Python's
                signal.signal(number, self._old_handlers[number])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.cancelled.is_set():
            os._exit(self.exit_code)
        self.stop(128 + number)
        raise KeyboardInterrupt

    def stop(self, exit_code: int) -> None:
        """Begin the end, as the first signal does; for those whose signals arrive as exceptions.

        Args:
            exit_code: of the process if it must be ended hard.
        """
        if self.cancelled.is_set():
            return
        self.exit_code = exit_code
        self.cancelled.set()
        with contextlib.suppress(OSError):  # of a terminal that is no more
            self._on_stop()
        threading.Thread(target=self._end_hard, daemon=True).start()
        self._releasing = threading.Thread(target=self._release, daemon=True)
        self._releasing.start()

    def _release(self) -> None:
        if self._close is not None:
            try:
                self._close()
            except Exception as error:  # this thread has nobody to raise it to
                logger.warning("stopping: %s; something may go on", first_line(error))

    def _write_down(self) -> None:
        if self._note is not None:
            self._note(self.exit_code)

    def _end_hard(self) -> None:
        threading.Event().wait(self._deadline_s)
        ends_at = time.monotonic() + _LAST_ACTS_S
        writing = threading.Thread(target=self._write_down, daemon=True)
        writing.start()
        release_all(timeout_s=_LAST_ACTS_S)
        writing.join(max(0.0, ends_at - time.monotonic()))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(self.exit_code)
