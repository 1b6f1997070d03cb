"""The log of a run in the store: JSON lines with run, stage and shard, readable from any machine while it runs.

::

    <root>/logs/<run>/00000.jsonl, 00001.jsonl, ...

Objects of a store cannot be appended to, so lines are collected and published as a new segment every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flows.logs import CURRENT_STAGE, PACKAGES
from flows.progress import Outcome, describe, format_duration
from flows.run_record import LOGS_FOLDER
from stages import storage
from stages.errors import StorageError
from stages.redaction import hide_secrets
from stages.runner import StageProgress

_FLUSH_EVERY_S = 5.0
_MAX_BYTES = 32 << 20  # of one run; a loop that logs without end must not fill the store
_OWN_LOGGERS = ("flows.progress",)  # the terminal's own account of what `update` and `end` tell


class RunLog(logging.Handler):
    """Collects log records and the beginnings and ends of stages; also a ``Display``.

    Args:
        root: the store.
        run: id of the run.
        max_bytes: what the log may take; what comes after is counted, and the count is its last line.
    """

    def __init__(self, root: str, run: str, *, max_bytes: int = _MAX_BYTES) -> None:
        super().__init__(logging.INFO)
        self._folder = storage.join(root, LOGS_FOLDER, run)
        self._run = run
        self._left = max_bytes
        self._num_dropped = 0
        self._num_segments = 0
        self._lines: list[bytes] = []
        self._started: set[str] = set()
        self._guard = threading.Lock()
        self._flushing = threading.Lock()
        self._ended = threading.Event()

    # ---- what comes in --------------------------------------------------------------------------------------------

    def emit(self, record: logging.LogRecord) -> None:
        """Take one log record."""
        if record.name in _OWN_LOGGERS or not record.name.startswith(PACKAGES):
            return
        try:
            stage = getattr(record, "stage", "") or CURRENT_STAGE.get()
            shard = str(getattr(record, "shard", ""))
            self.add(record.levelname, record.getMessage(), stage=stage, shard=shard, time_s=record.created)
        except Exception:
            self.handleError(record)

    def update(self, progress: StageProgress) -> None:
        """Note the beginning of a stage; see ``Display``."""
        with self._guard:
            if progress.is_waiting or progress.stage in self._started:
                return
            self._started.add(progress.stage)
        self.add("INFO", f"started: {progress.num_done} of {progress.num_shards} shards are done", stage=progress.stage)

    def end(self, outcome: Outcome) -> None:
        """Note how a stage ended; see ``Display``."""
        spent = f" in {format_duration(outcome.wall_time_s)}" if outcome.status == "done" else ""
        what = describe(outcome)
        level = "ERROR" if outcome.status == "failed" else "INFO"
        self.add(level, f"{outcome.status}{spent}{f': {what}' if what else ''}", stage=outcome.stage)

    def add(self, level: str, message: str, *, stage: str = "", shard: str = "", time_s: float | None = None) -> None:
        """Take one line."""
        seconds = time.time() if time_s is None else time_s
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
        value = {"time": at, "level": level, "run": self._run, "stage": stage, "shard": shard}
        value["message"] = hide_secrets(message)  # before it is JSON, in which a secret may look otherwise
        line = json.dumps({name: item for name, item in value.items() if item != ""}).encode() + b"\n"
        with self._guard:
            if len(line) > self._left:
                self._num_dropped += 1
                return
            self._left -= len(line)
            self._lines.append(line)

    # ---- what goes out --------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Write the lines since the last time as a segment; lines that cannot be written are tried again later."""
        with self._flushing:
            with self._guard:
                lines, self._lines = self._lines, []
            if not lines:
                return
            try:
                storage.write_bytes(storage.join(self._folder, f"{self._num_segments:05d}.jsonl"), b"".join(lines))
                self._num_segments += 1
            except StorageError:
                with self._guard:
                    self._lines = lines + self._lines

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Collect and publish for the length of a ``with`` block."""
        root = logging.getLogger()
        root.addHandler(self)
        thread = threading.Thread(target=self._publish_now_and_then, daemon=True, name="run-log")
        thread.start()
        try:
            yield
        finally:
            root.removeHandler(self)
            self._ended.set()
            thread.join()
            if self._num_dropped:
                self._left = 1 << 20
                self.add("WARNING", f"{self._num_dropped} further lines are left out: the log had grown too long")
            self.publish()

    def _publish_now_and_then(self) -> None:
        while not self._ended.wait(_FLUSH_EVERY_S):
            self.publish()


def read_log(root: str, run: str, *, stage: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's log, of one stage or of all."""
    folder = storage.join(root, LOGS_FOLDER, run)
    return _lines(folder, _segments(folder), stage)


def follow_log(
    root: str, run: str, *, stage: str | None, is_over: Callable[[], bool], every_s: float = 2.0
) -> Iterator[dict[str, Any]]:
    """Yield the lines there are, and then new ones as they are published, until the run is over."""
    folder = storage.join(root, LOGS_FOLDER, run)
    num_read = 0
    while True:
        over = is_over()  # asked before the look: all lines are published before the end is
        segments = _segments(folder)
        yield from _lines(folder, segments[num_read:], stage)
        num_read = len(segments)
        if over:
            return
        time.sleep(every_s)


def _segments(folder: str) -> list[str]:
    return sorted(storage.list_files(folder))


def _lines(folder: str, segments: Sequence[str], stage: str | None) -> Iterator[dict[str, Any]]:
    for name in segments:
        for line in storage.read_bytes(storage.join(folder, name)).splitlines():
            value: dict[str, Any] = json.loads(line)
            if stage is None or value.get("stage") == stage:
                yield value
