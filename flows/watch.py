"""What runs right now, seen from the store alone: ``unclip status --watch`` works from any machine that reads it.

A look costs one listing per stage that is not done and one small read per training, whatever the number of shards.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.overview import new_table
from flows.progress import format_duration, format_number
from flows.project import Project
from flows.run_record import RunRecord
from stages import storage
from stages.base import Shard, Stage
from stages.errors import NotFoundError, UnclipError
from stages.manifest import Manifest
from stages.metrics import METRICS_NAME, read_metrics
from stages.redaction import hide_secrets
from stages.runner import StageState, inspect_stage, output_uri
from stages.storage import Entry

_WINDOW_S = 300.0  # over which the speed is taken
_STEP = re.compile(r"checkpoints/step-(\d+)/checkpoint\.json")


@dataclass(frozen=True, kw_only=True)
class StageLook:
    """One stage, as the store shows it at one moment.

    Attributes:
        stage: its name.
        status: ``done``, ``waiting`` (for a stage it needs), ``not started``, ``under way`` or ``blocked``.
        num_done: shards committed; of a training, steps.
        num_total: of how many; None while not known.
        unit: ``shards`` or ``steps``.
        samples_per_s: over the last minutes; None if nothing moved in them.
        eta_s: seconds left at that speed.
        num_quarantined: shards given up on, known once the stage has ended.
        note: why it is blocked.
    """

    stage: str
    status: str
    num_done: int | None = None
    num_total: int | None = None
    unit: str = "shards"
    samples_per_s: float | None = None
    eta_s: float | None = None
    num_quarantined: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class Watch:
    """Looks at a store again and again; what cannot change between two looks is not read twice."""

    def __init__(self, project: Project) -> None:
        self._stages = project.stages
        self._states = dict(project.states)
        self._plans: dict[str, Sequence[Shard]] = {}

    @property
    def is_over(self) -> bool:
        """Whether every stage is done."""
        return all(state.status == "done" for state in self._states.values())

    def look(self, now_s: float | None = None) -> list[StageLook]:
        """Return every stage as it is now.

        Raises:
            StorageError: if the store does not answer; the next look begins anew.
        """
        now_s = time.time() if now_s is None else now_s
        return [self._look(stage, now_s) for stage in self._stages.values()]

    def _look(self, stage: Stage[Any], now_s: float) -> StageLook:
        inputs: dict[str, Manifest] = {}
        for upstream in stage.upstream:
            manifest = self._states[upstream].manifest
            if manifest is not None:
                inputs[upstream] = manifest
        state = self._states[stage.name]
        if state.manifest is None and len(inputs) == len(stage.upstream):
            state = self._states[stage.name] = inspect_stage(stage, state.fingerprint, inputs)
        if state.manifest is not None:
            return _done(state)
        if len(inputs) < len(stage.upstream):
            return StageLook(stage=stage.name, status="waiting")
        try:
            plan = self._plan(stage, inputs)
        except UnclipError as error:  # it may pass: the next look tries again
            return StageLook(stage=stage.name, status="blocked", note=hide_secrets(str(error)))
        listing = storage.list_entries(output_uri(stage))
        if stage.gang and getattr(stage.config, "kind", "train") == "train":
            return _training(stage, plan, listing, now_s)
        return _shards(stage, plan, listing, _samples_per_shard(stage, inputs, plan), now_s)

    def _plan(self, stage: Stage[Any], inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        if stage.name not in self._plans:
            self._plans[stage.name] = stage.plan(inputs)
        return self._plans[stage.name]


def _done(state: StageState) -> StageLook:
    manifest = state.manifest
    assert manifest is not None
    num_done, num_quarantined = len(manifest.records), len(manifest.quarantined)
    return StageLook(
        stage=state.name,
        status="done",
        num_done=num_done,
        num_total=num_done + num_quarantined,
        num_quarantined=num_quarantined,
    )


def _shards(
    stage: Stage[Any],
    plan: Sequence[Shard],
    listing: Mapping[str, Entry],
    samples_per_shard: float | None,
    now_s: float,
) -> StageLook:
    times_s = [entry.modified_ns / 1e9 for shard in plan if (entry := listing.get(f"{shard.id}.json")) is not None]
    recent = [at for at in times_s if now_s - at < _WINDOW_S]
    # From the first recent shard on, which is itself work of before.
    elapsed_s = now_s - min(recent) if recent else 0.0
    per_s = (len(recent) - 1) / elapsed_s if len(recent) > 1 and elapsed_s > 0 else None
    return StageLook(
        stage=stage.name,
        status="under way" if times_s else "not started",
        num_done=len(times_s),
        num_total=len(plan),
        samples_per_s=per_s * samples_per_shard if per_s is not None and samples_per_shard is not None else None,
        eta_s=(len(plan) - len(times_s)) / per_s if per_s else None,
    )


def _training(stage: Stage[Any], plan: Sequence[Shard], listing: Mapping[str, Entry], now_s: float) -> StageLook:
    """Look at the newest checkpoint, and at the last line of metrics if it is fresh."""
    config = stage.config
    folder = plan[0].id
    own = {name.removeprefix(f"{folder}/"): entry for name, entry in listing.items() if name.startswith(f"{folder}/")}
    step = max((int(match[1]) for name in own if (match := _STEP.fullmatch(name))), default=0)
    speed = None
    log = own.get(METRICS_NAME)
    if log is not None and now_s - log.modified_ns / 1e9 < _WINDOW_S:
        try:
            lines = read_metrics(storage.read_bytes(storage.join(output_uri(stage), folder, METRICS_NAME)))
        except NotFoundError:
            lines = []
        if lines:
            step, speed = max(step, int(lines[-1]["step"])), lines[-1]["samples_per_s"]
    left = (config.num_steps - step) * config.global_batch_size
    return StageLook(
        stage=stage.name,
        status="under way" if own else "not started",
        num_done=step,
        num_total=config.num_steps,
        unit="steps",
        samples_per_s=speed,
        eta_s=left / speed if speed else None,
    )


def _samples_per_shard(stage: Stage[Any], inputs: Mapping[str, Manifest], plan: Sequence[Shard]) -> float | None:
    first = next(iter(inputs.values()), None)
    return first.num_kept / len(plan) if first is not None and plan else None


def watch_view(root: str, run: RunRecord | None, looks: Sequence[StageLook]) -> Group:
    """Draw one look."""
    table = new_table("stage", "status", "done", "samples/s", "left", "quarantined", "why")
    colours = {"done": "green", "under way": "yellow", "blocked": "red"}
    for look in looks:
        colour = colours.get(look.status, "dim")
        counts = "" if look.num_done is None else f"{look.num_done:,}/{look.num_total or 0:,} {look.unit}"
        table.add_row(
            look.stage,
            f"[{colour}]{look.status}[/]",
            counts,
            format_number(look.samples_per_s) if look.samples_per_s is not None else "",
            format_duration(look.eta_s) if look.eta_s is not None else "",
            str(look.num_quarantined) if look.num_quarantined else "",
            Text(look.note),
        )
    return Group(Text(f"store: {root}"), Text(describe_run(run)), table)


def describe_run(run: RunRecord | None) -> str:
    """Say in one line who runs it, or how the last run ended."""
    if run is None:
        return "no run is recorded"
    if run.status == "running":
        return f"run {run.id} by {run.user}, since {run.started_at} (or killed since: nobody wrote its end)"
    return f"run {run.id} by {run.user}: {run.status} at {run.ended_at}"


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """Draw the history of a store."""
    table = new_table("run", "status", "who", "config", "settings", "done", "cached", "failed", "seconds", "exit")
    colours = {"done": "green", "failed": "red", "running": "yellow"}
    for run in runs:
        status = f"[{colours.get(run.status, 'dim')}]{run.status}[/]"
        seconds = "" if run.status == "running" else f"{run.seconds:,.0f}"
        counts = [str(run.count(*names)) for names in (("done",), ("cached",), ("failed", "not ready"))]
        code = "" if run.exit_code is None else str(run.exit_code)
        table.add_row(run.id, status, run.user, run.config, run.config_digest[:8], *counts, seconds, code)
    return table
