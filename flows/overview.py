"""What is done, what will run and why: the tables of ``unclip plan`` and ``unclip status``, and their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from stages.base import Stage
from stages.errors import UnclipError
from stages.manifest import Manifest
from stages.runner import StageState, committed_records

_NUMBERS = frozenset(
    {
        *("shards", "samples in", "samples kept", "quarantined", "seconds", "done", "cached", "failed", "exit"),
        *("samples/s", "left", "store", "workers", "time", "price", "ZeRO"),
    }
)
_WRAPPED = ("why", "when", "known from")


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One stage, as shown.

    Attributes:
        stage: its name.
        status: ``done``, ``will run``, ``skipped`` (not part of the run) or ``blocked`` (its plan is refused).
        reason: why.
        num_done: shards committed; ``None`` while the stage's inputs are not there.
        num_shards: shards in all, likewise.
        fingerprint: 16 hex digits.
        num_in: samples in, of a finished stage.
        num_kept: samples out.
        num_quarantined: shards given up on.
        wall_time_s: seconds the stage took.
        metrics: its plain numbers.
    """

    stage: str
    status: str
    reason: str
    num_done: int | None
    num_shards: int | None
    fingerprint: str
    num_in: int | None = None
    num_kept: int | None = None
    num_quarantined: int = 0
    wall_time_s: float | None = None
    metrics: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def overview(
    stages: Mapping[str, Stage[Any]],
    states: Mapping[str, StageState],
    *,
    selected: Sequence[str] | None = None,
    forced: frozenset[str] = frozenset(),
) -> list[StageRow]:
    """Describe every stage.

    Args:
        stages: all stages, in order.
        states: what was found of each.
        selected: the stages a run would touch; all if not given.
        forced: those of them that would run anew.
    """
    return [_row(stage, states, name in forced, selected is None or name in selected) for name, stage in stages.items()]


def plan_table(rows: Sequence[StageRow]) -> Table:
    """Draw what will run and why."""
    table = new_table("stage", "status", "why", "shards", "fingerprint")
    colours = {"done": "green", "will run": "yellow", "blocked": "red", "skipped": "dim"}
    for row in rows:
        status = f"[{colours[row.status]}]{row.status}[/]"
        table.add_row(row.stage, status, row.reason, _shards(row), row.fingerprint)
    return table


def status_table(rows: Sequence[StageRow]) -> Table:
    """Draw what the store holds."""
    table = new_table("stage", "status", "shards", "samples in", "samples kept", "quarantined", "seconds", "when")
    for row in rows:
        done = row.status == "done"
        counts = [f"{row.num_in:,}", f"{row.num_kept:,}", str(row.num_quarantined)] if done else ["", "", ""]
        seconds = f"{row.wall_time_s:,.1f}" if row.wall_time_s is not None else ""
        status = "[green]done[/]" if done else "[yellow]not done[/]"
        table.add_row(row.stage, status, _shards(row), *counts, seconds, row.reason.removeprefix("done "))
    return table


def new_table(*columns: str) -> Table:
    """Return an empty table; columns of numbers are set to the right."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=name not in _WRAPPED)
    return table


def _shards(row: StageRow) -> str:
    return "?" if row.num_shards is None else f"{row.num_done:,}/{row.num_shards:,}"


def _row(stage: Stage[Any], states: Mapping[str, StageState], forced: bool, selected: bool) -> StageRow:
    state = states[stage.name]
    if state.manifest is not None and not forced:
        manifest = state.manifest
        return StageRow(
            stage=stage.name,
            status="done",
            reason=state.reason,
            num_done=len(manifest.records),
            num_shards=len(manifest.records) + len(manifest.quarantined),
            fingerprint=state.fingerprint,
            num_in=manifest.num_in,
            num_kept=manifest.num_kept,
            num_quarantined=len(manifest.quarantined),
            wall_time_s=manifest.wall_time_s,
            metrics=dict(manifest.metrics),
        )
    status, reason = "will run" if selected else "skipped", "--force" if forced else state.reason
    num_done, num_shards = None, None
    inputs = {name: states[name].manifest for name in stage.upstream}
    found = {name: manifest for name, manifest in inputs.items() if manifest is not None}
    if len(found) == len(inputs):
        try:
            num_done, num_shards = _count(stage, found)
        except UnclipError as error:
            status, reason = "blocked", str(error)
    if forced and num_shards is not None:
        num_done = 0
    return StageRow(
        stage=stage.name,
        status=status,
        reason=reason,
        num_done=num_done,
        num_shards=num_shards,
        fingerprint=state.fingerprint,
    )


def _count(stage: Stage[Any], inputs: Mapping[str, Manifest]) -> tuple[int, int]:
    shards = stage.plan(inputs)
    return len(committed_records(stage, shards)), len(shards)
