"""The watchdog of a training: notices that a rank no longer gets on, says where it stands, and ends its process.

A process that waits for ever in a collective, for a mount that is gone or for a lock cannot help itself. A thread of
its own sees that the training entered no new phase for too long. It writes the stacks of all threads to the log and to
the training's folder, compares notes with the other ranks to name the one that the others wait for, and ends the
process; on Ray the group is then started again from its newest checkpoint, elsewhere the same command resumes::

    <folder>/hangs/<start of the group>/rank-0000.txt      one line of JSON, then the stacks

The other ranks stand still within the same step, so their own watchdogs bark too. Should Python itself stand still, a
timer in C does what is left to do: the stacks to stderr, and the end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Literal

from stages import storage
from stages.errors import StorageError

logger = logging.getLogger(__name__)

HANGS_NAME = "hangs"
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
_FIRST_STEP_FACTOR = 3.0  # compilation, first shards, memory pools
_STDERR = 2
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")

Phase = Literal["start", "data", "step", "insight", "log", "checkpoint"]


@dataclass(frozen=True, kw_only=True)
class HangReport:
    """Where one rank stood when it stopped getting on.

    Attributes:
        rank: which one.
        host: where it ran.
        pid: its process.
        step: optimizer step it was in, from 0.
        phase: what it was doing.
        num_phases: phases entered since the start, by which ranks are compared: all enter the same ones.
        in_collective: whether it was waiting for the others, as far as its Python frames tell.
        where: the innermost frame.
        silent_s: for how long it had not got on, seconds.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    num_phases: int
    in_collective: bool
    where: str
    silent_s: float


class Watchdog:
    """Watches the thread that made it.

    Args:
        folder: URI of the training's folder.
        place: the stage, for messages.
        rank: of this process.
        world_size: ranks that train together.
        session: the same on every rank of a group, and different for each start.
        timeout_s: longest time for one phase of a step; three times that for the first step. 0: nothing is watched.
    """

    def __init__(self, folder: str, place: str, *, rank: int, world_size: int, session: str, timeout_s: float) -> None:
        self._uri = storage.join(folder, HANGS_NAME, session)
        self._place = place
        self._rank, self._world_size = rank, world_size
        self._timeout_s = timeout_s
        self._poll_s = min(5.0, timeout_s / 20)
        self._grace_s = min(30.0, max(3.0, timeout_s / 4))
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self._is_first = True
        self._stand: tuple[int, Phase, int, float] = (0, "start", 0, time.monotonic())
        self._thread = threading.Thread(target=self._watch, name="unclip-watchdog", daemon=True)

    def enter(self, phase: Phase, step: int) -> None:
        """Say what comes next; costs well under a microsecond."""
        self._stand = step, phase, self._stand[2] + 1, time.monotonic()

    def step_done(self) -> None:
        """Say that a step was done; from then on there is no more patience than the timeout."""
        self._is_first = False

    def __enter__(self) -> Watchdog:
        if self._timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._timeout_s > 0:
            self._thread.join()

    def _watch(self) -> None:
        backstop_s = _FIRST_STEP_FACTOR * self._timeout_s + 2 * self._grace_s
        seen_at = time.monotonic()
        try:
            while not self._closed.wait(self._poll_s):
                if self._world_size > 1:  # alone, a process may be suspended at a terminal for as long as one likes
                    faulthandler.dump_traceback_later(backstop_s, exit=True, file=_STDERR)
                now = time.monotonic()
                if now - seen_at > 5 * self._poll_s + 1:  # this process itself did not run: stopped, and continued
                    self._stand = (*self._stand[:3], now)
                seen_at = now
                if now - self._stand[3] > self._timeout_s * (_FIRST_STEP_FACTOR if self._is_first else 1):
                    self._bark()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _bark(self) -> None:
        """Report, and end the process; reporting must not keep it from that, whatever else is stuck."""
        report, stacks = self._report(), _stacks()
        if self._closed.is_set():
            return
        reporter = threading.Thread(target=self._publish, args=(report, stacks), daemon=True)
        reporter.start()
        reporter.join(2 * self._grace_s)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(EXIT_CODE)

    def _report(self) -> HangReport:
        step, phase, num_phases, since = self._stand
        frame = sys._current_frames().get(self._watched)
        return HangReport(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=step,
            phase=phase,
            num_phases=num_phases,
            in_collective=_in_collective(frame),
            where=f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})" if frame else "ended",
            silent_s=round(time.monotonic() - since, 1),
        )

    def _publish(self, report: HangReport, stacks: str) -> None:
        logger.critical(
            "%s: rank %d on %s has not got on for %.0f s; it is in phase %r of step %d, %s\n%s",
            *(self._place, report.rank, report.host, report.silent_s, report.phase, report.step, report.where, stacks),
        )
        reports = {report.rank: report}
        try:
            content = json.dumps(asdict(report)) + "\n\n" + stacks
            storage.write_bytes(storage.join(self._uri, _file_of(report.rank)), content.encode())
            reports |= self._others()
        except StorageError as error:
            logger.critical("%s: the report of the hang is in this log alone: %s", self._place, error)
        logger.critical(
            "%s: %s; stacks in %s; this process ends with code %d, and the training resumes from its newest checkpoint "
            "when it is started again (%s.hang_timeout_s: %g)",
            *(self._place, verdict(reports, self._world_size), self._uri, EXIT_CODE, self._place, self._timeout_s),
        )

    def _others(self) -> dict[int, HangReport]:
        """Wait a moment for the reports of the other ranks."""
        found: dict[int, HangReport] = {}
        until = time.monotonic() + self._grace_s
        while len(found) < self._world_size:
            found = read_reports(self._uri)
            if time.monotonic() > until:
                break
            time.sleep(self._poll_s)
        return found


def read_reports(uri: str) -> dict[int, HangReport]:
    """Read the reports of one hang, by rank.

    Args:
        uri: of its folder.
    """
    lines = [storage.read_bytes(storage.join(uri, name)).partition(b"\n")[0] for name in storage.list_files(uri)]
    reports = [HangReport(**json.loads(line)) for line in lines]
    return {report.rank: report for report in reports}


def suspects(reports: Mapping[int, HangReport], world_size: int) -> Sequence[int]:
    """Name the ranks that the others wait for.

    Those are the ranks that did not report, for they are stopped or gone; else those that got less far than others;
    else those that do not wait in a collective while others do. None, if the ranks do not differ.
    """
    if silent := [rank for rank in range(world_size) if rank not in reports]:
        return silent
    for stand in (lambda report: report.num_phases, lambda report: report.in_collective):
        values = {rank: stand(report) for rank, report in reports.items()}
        if len(set(values.values())) > 1:
            return sorted(rank for rank, value in values.items() if value == min(values.values()))
    return []


def verdict(reports: Mapping[int, HangReport], world_size: int) -> str:
    """Say in words which ranks to look at."""
    if world_size == 1:
        return "there are no other ranks"
    found = suspects(reports, world_size)
    if not found:
        return f"all {world_size} ranks stand at the same place"
    words = []
    for rank in found[:8]:
        if report := reports.get(rank):
            words.append(f"rank {rank} on {report.host} (phase {report.phase!r} of step {report.step}, {report.where})")
        else:
            words.append(f"rank {rank}, which gives no sign of life")
    return f"the others wait for {', '.join(words)}"


def _in_collective(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def _stacks() -> str:
    """Return the stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _file_of(rank: int) -> str:
    return f"rank-{rank:04d}.txt"
