"""What the user sees while stages run: live bars on a terminal; elsewhere log lines, fewer the longer a stage takes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from stages.errors import UnclipError
from stages.manifest import Manifest
from stages.runner import StageProgress

logger = logging.getLogger(__name__)

_REFRESH_HZ = 5
_FIRST_LINE_AFTER_S = 60.0  # of a stage that runs; the next one comes after twice as long
_LINE_EVERY_S = 900.0  # at most


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage ended in this run.

    Attributes:
        stage: its name.
        status: ``done`` by this run; ``cached``: was done before; ``failed``; ``not ready``: a stage it needs failed;
            ``cancelled`` by the user.
        manifest: its result, when there is one.
        error: what went wrong, when it failed.
        wall_time_s: seconds spent by this run.
    """

    stage: str
    status: Literal["done", "cached", "failed", "not ready", "cancelled"]
    manifest: Manifest | None = None
    error: BaseException | None = None
    wall_time_s: float = 0.0

    @property
    def message(self) -> str:
        """What went wrong in one line, naming the stage once."""
        text = str(self.error) if isinstance(self.error, UnclipError) else f"{type(self.error).__name__}: {self.error}"
        return text if text.startswith(self.stage) else f"{self.stage}: {text}"


class Display(Protocol):
    """Shows a run. Every method may be called from any thread."""

    def update(self, progress: StageProgress) -> None:
        """Show where a running stage is."""
        ...

    def end(self, outcome: Outcome) -> None:
        """Show how a stage ended."""
        ...


class Displays:
    """Several displays in the place of one.

    Args:
        displays: each is told everything.
    """

    def __init__(self, *displays: Display) -> None:
        self._displays = displays

    def update(self, progress: StageProgress) -> None:
        """See ``Display``."""
        for display in self._displays:
            display.update(progress)

    def end(self, outcome: Outcome) -> None:
        """See ``Display``."""
        for display in self._displays:
            display.end(outcome)


class Meter:
    """Turns the snapshots of one running stage into a fraction, a rate and an estimate.

    Work that was done before this run (earlier shards, a training's earlier steps) counts as done, not as fast.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.started_at = clock()
        self.latest: StageProgress | None = None
        self._first_done = 0
        self._first_inner: tuple[float, int] | None = None

    def update(self, progress: StageProgress) -> None:
        """Take the next snapshot."""
        before = self.latest
        if before is None:
            self._first_done = progress.num_done
        if progress.inner is not None:
            restarted = before is not None and before.inner is not None and progress.inner.done < before.inner.done
            if self._first_inner is None or restarted:
                self._first_inner = (self._clock(), progress.inner.done)
        self.latest = progress

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage began."""
        return self._clock() - self.started_at

    @property
    def follows_inner(self) -> bool:
        """Whether there is a single shard, so that its inside tells more than the count of shards."""
        progress = self.latest
        return bool(progress and progress.num_shards == 1 and progress.inner and progress.inner.total)

    @property
    def fraction(self) -> float:
        """Done share of the stage, 0 to 1."""
        progress = self.latest
        if progress is None or progress.num_shards == 0:
            return 0.0
        done = float(progress.num_done)
        if self.follows_inner and progress.inner and progress.num_done == 0:
            done = progress.inner.done / progress.inner.total
        return min(1.0, done / progress.num_shards)

    @property
    def rate(self) -> tuple[float, str] | None:
        """Units per second in this run, and the unit; ``None`` while nothing can be said."""
        progress = self.latest
        if progress is None:
            return None
        if self.follows_inner and progress.inner and self._first_inner:
            since, first = self._first_inner
            elapsed_s, done, unit = self._clock() - since, progress.inner.done - first, progress.inner.unit
        else:
            unit = progress.inner.unit if progress.inner and progress.inner.unit != "steps" else "samples"
            elapsed_s, done = self.elapsed_s, progress.num_samples
        return (done / elapsed_s, unit) if done > 0 and elapsed_s > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the speed so far; ``None`` while unknown."""
        progress = self.latest
        if progress is None:
            return None
        if self.follows_inner and progress.inner:
            rate = self.rate
            return (progress.inner.total - progress.inner.done) / rate[0] if rate else None
        fresh = progress.num_done - self._first_done
        return (progress.num_shards - progress.num_done) * self.elapsed_s / fresh if fresh > 0 else None

    @property
    def counts(self) -> str:
        """What is done of what, in words."""
        progress = self.latest
        if progress is None:
            return ""
        if self.follows_inner and progress.inner:
            return f"{progress.inner.done:,}/{progress.inner.total:,} {progress.inner.unit}"
        return f"{progress.num_done:,}/{progress.num_shards:,} shard{'s' if progress.num_shards != 1 else ''}"

    @property
    def details(self) -> str:
        """Speed and live numbers such as the loss, in words."""
        parts = []
        if (rate := self.rate) is not None:
            parts.append(f"{format_number(rate[0])} {rate[1]}/s")
        if self.latest is not None and self.latest.inner is not None:
            parts += [f"{name} {format_number(value)}" for name, value in self.latest.inner.numbers.items()]
        return "  ".join(parts)

    @property
    def summary(self) -> str:
        """Counts, details and the time left, on one line."""
        left = f", left {format_duration(self.eta_s)}" if self.eta_s is not None else ""
        return f"{self.counts}  {self.details}".rstrip() + left


def format_number(value: float) -> str:
    """Write a number in about three digits."""
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_duration(seconds: float | None) -> str:
    """Write seconds as ``7.2 s``, ``3:05`` or ``2:03:05``."""
    if seconds is None:
        return "--:--"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(outcome: Outcome) -> str:
    """Say in a few words what a stage made, or why it did not."""
    manifest = outcome.manifest
    if outcome.status == "failed":
        return outcome.message
    if outcome.status == "not ready":
        return "a stage it needs has failed"
    if manifest is None:
        return ""
    parts = [f"{len(manifest.records):,} shard{'s' if len(manifest.records) != 1 else ''}"]
    if manifest.num_in:
        parts.append(f"{manifest.num_in:,} -> {manifest.num_kept:,} samples")
    if manifest.quarantined:
        parts.append(f"{len(manifest.quarantined)} quarantined")
    return ", ".join(parts)


@dataclass
class _Running:
    """A stage that runs: its meter, when the next line of it is due, and how long after the last one that is."""

    meter: Meter
    due_at: float
    wait_s: float = _FIRST_LINE_AFTER_S


class LogDisplay:
    """For logs and pipes: one line when a stage starts, one when it ends, and on the way one now and then.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()

    def update(self, progress: StageProgress) -> None:
        """See ``Display``."""
        with self._lock:
            line = self._line_of(progress)
        if line:
            logger.info("%s", line, extra={"stage": progress.stage})

    def _line_of(self, progress: StageProgress) -> str:
        """Say what is due of a stage; nothing, most of the time."""
        now = self._clock()
        running = self._running.get(progress.stage)
        if running is None:
            self._running[progress.stage] = running = _Running(Meter(self._clock), now + _FIRST_LINE_AFTER_S)
            running.meter.update(progress)
            before = f", {progress.num_done:,} of them done before" if progress.num_done else ""
            return f"started: {progress.num_shards:,} shard{'s' if progress.num_shards != 1 else ''}{before}"
        running.meter.update(progress)
        if now < running.due_at:
            return ""
        running.wait_s = min(2 * running.wait_s, _LINE_EVERY_S)
        running.due_at = now + running.wait_s
        return f"running for {format_duration(running.meter.elapsed_s)}: {running.meter.summary}"

    def end(self, outcome: Outcome) -> None:
        """See ``Display``."""
        level = logging.ERROR if outcome.status == "failed" else logging.INFO
        spent = f" in {format_duration(outcome.wall_time_s)}" if outcome.status == "done" else ""
        what = describe(outcome)
        logger.log(level, "%s%s%s", outcome.status, spent, f": {what}" if what else "", extra={"stage": outcome.stage})


_MARKS = {
    "done": ("✓", "green"),
    "cached": ("=", "cyan"),
    "failed": ("✗", "red"),
    "not ready": ("-", "yellow"),
    "cancelled": ("-", "yellow"),
}


class LiveDisplay:
    """For terminals: a bar for every running stage, a line for every stage that has ended.

    Args:
        console: where to draw.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._meters: dict[str, Meter] = {}
        self._spinner = Spinner("dots")
        self._lock = threading.Lock()
        self._live = Live(console=console, get_renderable=self.bars, refresh_per_second=_REFRESH_HZ, transient=True)

    def update(self, progress: StageProgress) -> None:
        """See ``Display``."""
        with self._lock:
            if progress.stage not in self._meters:
                self._meters[progress.stage] = Meter(self._clock)
            self._meters[progress.stage].update(progress)

    def end(self, outcome: Outcome) -> None:
        """See ``Display``."""
        with self._lock:
            self._meters.pop(outcome.stage, None)
        mark, colour = _MARKS[outcome.status]
        spent = format_duration(outcome.wall_time_s) if outcome.status == "done" else outcome.status
        line = Text.assemble((f"{mark} ", colour), f"{outcome.stage:<15} ", (f"{spent:>9}  ", "dim"), describe(outcome))
        self.console.print(line, highlight=False)

    def bars(self) -> Table:
        """Draw the running stages."""
        table = Table.grid(padding=(0, 1))
        with self._lock:
            for name, meter in self._meters.items():
                table.add_row(
                    self._spinner,
                    f"{name:<15}",
                    ProgressBar(total=1.0, completed=meter.fraction, width=24),
                    Text(meter.counts, style="bold"),
                    Text(meter.details, style="cyan"),
                    Text(f"{format_duration(meter.elapsed_s)}, left {format_duration(meter.eta_s)}", style="dim"),
                )
        return table

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the bars on the screen for the length of a ``with`` block."""
        with self._live:
            yield


@contextlib.contextmanager
def open_display(console: Console) -> Iterator[Display]:
    """Give the display that suits the console: live bars on a terminal, log lines elsewhere."""
    if not console.is_terminal:
        yield LogDisplay()
        return
    display = LiveDisplay(console)
    with display.shown():
        yield display
