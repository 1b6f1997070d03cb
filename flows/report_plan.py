"""The report's section that holds every finished stage against what was estimated before it ran."""

from __future__ import annotations

from collections.abc import Mapping
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
    rows = []
    estimates = _estimates(manifests)
    for name in STAGE_NAMES:
        if name not in manifests or name not in estimates:
            continue
        manifest, estimated = manifests[name], estimates[name]
        work_s = _work_s(manifest)
        hours = estimated.get("worker_hours")
        planned_s = None if hours is None else hours * 3600
        rows.append(
            [
                escape(name),
                _number(estimated.get("num_kept")),
                number(manifest.num_kept),
                _duration(planned_s),
                _duration(work_s),
                f"{work_s / planned_s:.2f}" if planned_s else "-",
            ]
        )
    if not rows:
        return ""
    header = ["stage", "#samples planned", "#samples kept", "#work planned", "#work done", "#ratio"]
    return soft(_TEXT) + table(header, rows)


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
