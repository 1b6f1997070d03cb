"""The report's section that holds every finished stage against what was estimated before it ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from flows.report_html import duration, number, soft, table
from flows.run_record import read_runs
from stages.graph import STAGE_NAMES
from stages.manifest import Manifest

_NEWEST_RUNS = 50
_TEXT = (
    "Estimates were written down when the run that finished the stage began (unclip plan --cost), from what this store "
    "had measured by then. Work adds up all workers; the ratio is actual over estimated work."
)


def plan_section(manifests: Mapping[str, Manifest]) -> str:
    """Show samples and work, estimated and actual; empty if no finished stage had been estimated."""
    rows = [
        [
            escape(row.stage),
            _number(row.planned_samples),
            number(row.kept_samples),
            _duration(row.planned_s),
            _duration(row.worked_s),
            f"{row.worked_s / row.planned_s:.2f}" if row.planned_s else "-",
        ]
        for row in planned_and_actual(manifests)
        if row.is_planned
    ]
    if not rows:
        return ""
    header = ["stage", "#samples planned", "#samples kept", "#work planned", "#work done", "#ratio"]
    return soft(_TEXT) + table(header, rows)


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One finished stage beside what was estimated of it.

    Attributes:
        stage: its name.
        is_planned: whether an estimate was written down before it ran.
        planned_samples: samples it was to keep; None if unknown.
        kept_samples: those it kept.
        planned_s: seconds of work, all workers together; None if unknown.
        worked_s: likewise, as it came.
    """

    stage: str
    is_planned: bool
    planned_samples: float | None
    kept_samples: int
    planned_s: float | None
    worked_s: float


def planned_and_actual(manifests: Mapping[str, Manifest]) -> list[PlanRow]:
    """Hold every finished stage against its estimate, in the pipeline's order."""
    estimates = _estimates(manifests)
    rows = []
    for name in STAGE_NAMES:
        if name not in manifests:
            continue
        estimated = estimates.get(name, {})
        hours = estimated.get("worker_hours")
        rows.append(
            PlanRow(
                stage=name,
                is_planned=name in estimates,
                planned_samples=estimated.get("num_kept"),
                kept_samples=manifests[name].num_kept,
                planned_s=None if hours is None else hours * 3600,
                worked_s=_work_s(manifests[name]),
            )
        )
    return rows


def _estimates(manifests: Mapping[str, Manifest]) -> dict[str, Mapping[str, Any]]:
    """Find for every stage what the newest run that was to make exactly this result had estimated."""
    if not manifests:
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for run in read_runs(next(iter(manifests.values())).root, newest=_NEWEST_RUNS):
        for name, estimated in run.estimates.items():
            manifest = manifests.get(name)
            if manifest is None or name in found or estimated.get("num_in") is None:
                continue
            if estimated["fingerprint"] == manifest.fingerprint and run.started_at <= manifest.created_at:
                found[name] = estimated
    return found


def _work_s(manifest: Manifest) -> float:
    """Return seconds of work as estimates count them; a training's are those of all its ranks."""
    is_training = "num_ranks" in manifest.config and any("metrics" in record.files for record in manifest.records)
    if is_training:
        return manifest.wall_time_s * float(manifest.config["num_ranks"])
    return sum(record.wall_time_s for record in manifest.records)


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else f'<span class="num">{duration(seconds)}</span>'
