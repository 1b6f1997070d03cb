"""What the user sees: rates and estimates with a clock of the test's own, lines with and without a terminal."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from flows.progress import (
    LiveDisplay,
    LogDisplay,
    Meter,
    Outcome,
    describe,
    format_duration,
    format_number,
    open_display,
)
from stages.base import Progress
from stages.errors import StageError
from stages.manifest import Manifest, ShardRecord
from stages.runner import StageProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def manifest(num_shards: int = 2) -> Manifest:
    records = tuple(
        ShardRecord(shard_id=str(i), files={}, num_in=10, num_kept=7, dropped={"small": 3}) for i in range(num_shards)
    )
    return Manifest(root="", stage="filter", version=1, fingerprint="0" * 16, config={}, inputs={}, records=records)


def test_meter_of_many_shards() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.update(StageProgress(stage="filter", num_done=2, num_shards=10))
    assert (meter.fraction, meter.rate, meter.eta_s) == (0.2, None, None)
    clock.now += 8
    meter.update(StageProgress(stage="filter", num_done=6, num_shards=10, num_samples=400))
    # Four shards in eight seconds; the two of an earlier run do not count as speed.
    assert meter.fraction == 0.6 and meter.eta_s == 8.0 and meter.rate == (50.0, "samples")
    assert meter.counts == "6/10 shards" and meter.details == "50 samples/s"


def training(done: int, loss: float = 0.25) -> StageProgress:
    inner = Progress(done=done, total=1000, unit="steps", numbers={"loss": loss})
    return StageProgress(stage="prior", num_done=0, num_shards=1, inner=inner)


def test_meter_of_a_resumed_training() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.update(StageProgress(stage="prior", num_done=0, num_shards=1))
    clock.now += 30  # loading
    meter.update(training(400))
    clock.now += 10
    meter.update(training(500))
    assert meter.fraction == 0.5 and meter.rate == (10.0, "steps") and meter.eta_s == 50.0
    assert meter.counts == "500/1,000 steps" and meter.details == "10 steps/s  loss 0.25"
    # The group has lost a rank and goes back to its last checkpoint.
    meter.update(training(450))
    clock.now += 5
    meter.update(training(460))
    assert meter.rate == (2.0, "steps")


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "--:--"), (7.24, "7.2 s"), (65, "1:05"), (3600, "1:00:00"), (7384.4, "2:03:04")]
)
def test_format_duration(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.00012, "1.2e-04"), (0.12345, "0.123"), (12.5, "12.5"), (12345.6, "12,346")]
)
def test_format_number(value: float, text: str) -> None:
    assert format_number(value) == text


def test_outcomes_name_the_stage_once() -> None:
    plain = Outcome(stage="filter", status="failed", error=StageError("filter: nothing is left"))
    assert plain.message == describe(plain) == "filter: nothing is left"
    assert Outcome(stage="filter", status="failed", error=KeyError("x")).message == "filter: KeyError: 'x'"
    assert describe(Outcome(stage="filter", status="done", manifest=manifest())) == "2 shards, 20 -> 14 samples"


def test_log_display_says_two_things_per_stage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flows")
    display = LogDisplay()
    for done in range(1, 3):
        display.update(StageProgress(stage="filter", num_done=done, num_shards=2))
    display.end(Outcome(stage="filter", status="done", manifest=manifest(), wall_time_s=2.04))
    assert [(record.stage, record.getMessage()) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("filter", "started: 2 shards, 1 of them done before"),
        ("filter", "done in 2.0 s: 2 shards, 20 -> 14 samples"),
    ]


def test_log_display_tells_of_a_long_stage_ever_less_often(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flows")
    clock = Clock()
    display = LogDisplay(clock)
    display.update(StageProgress(stage="prior", num_done=0, num_shards=1))
    told_at = []
    for second in range(1, 4001):
        clock.now += 1
        display.update(training(second // 8))
        if len(caplog.records) > 1 + len(told_at):
            told_at.append(second)
    assert told_at == [60, 180, 420, 900, 1800, 2700, 3600]
    assert caplog.records[2].getMessage() == "running for 3:00: 22/1,000 steps  0.123 steps/s  loss 0.25, left 2:12:37"


def test_live_display_shows_running_stages_and_what_became_of_them() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    clock = Clock()
    display = LiveDisplay(console, clock)
    display.update(training(400))
    clock.now += 10
    display.update(training(500))
    console.print(display.bars())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("prior", "500/1,000 steps", "10 steps/s", "loss 0.25", "left 50.0 s"):
        assert text in shown
    display.end(Outcome(stage="prior", status="done", manifest=manifest(1), wall_time_s=83))
    assert display.bars().row_count == 0
    assert "prior" in console.file.getvalue() and "1:23" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_display_suits_the_console() -> None:
    with open_display(Console(file=io.StringIO())) as display:
        assert isinstance(display, LogDisplay)
    with open_display(Console(file=io.StringIO(), force_terminal=True)) as display:
        assert isinstance(display, LiveDisplay)
