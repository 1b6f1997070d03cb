"""The report of a run: one HTML file that needs nothing else, from whatever stages have finished.

It holds no script and asks for nothing over the network (its content security policy forbids it). Everything that comes
from data or settings is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from html import escape
from typing import Any

from flows import report_plan, report_quality, report_samples, report_training
from flows.report_html import bar, duration, link_list, note, number, soft, table, tile, tiles
from flows.report_style import STYLE
from stages import storage
from stages.config import Config, to_values
from stages.errors import UnclipError
from stages.graph import STAGE_NAMES
from stages.ledger import DATA_STAGES
from stages.manifest import Manifest

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, title, and what makes its body (an empty body leaves the section out)."""

    anchor: str
    title: str
    build: Callable[[Mapping[str, Manifest]], str]


def write_report(manifests: Mapping[str, Manifest], config: Config, uri: str) -> str:
    """Write the report of a run.

    Args:
        manifests: the finished stages; those missing are named as unfinished.
        config: what was run.
        uri: where to write the HTML file, a path or a URI.

    Returns:
        ``uri``.

    Raises:
        StorageError: if the file cannot be written.
    """
    storage.write_bytes(uri, render(manifests, config).encode())
    return uri


def render(manifests: Mapping[str, Manifest], config: Config) -> str:
    """Return the report as HTML; see ``write_report``."""
    built = [(section, _built(section, manifests)) for section in SECTIONS]
    shown = [(section, body) for section, body in built if body]
    shown.append((Section("configuration", "Configuration", lambda _: ""), config_section(config)))
    body = "".join(f'<h2 id="{s.anchor}">{escape(s.title)}</h2>{content}' for s, content in shown)
    links = link_list([(s.anchor, s.anchor[0].upper() + s.anchor[1:]) for s, _ in shown])
    title = _title(config)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} - unCLIP report</title><style>{STYLE}</style></head><body><main>"
        f"{_header(title, manifests, config)}{links}{body}"
        f"{_footer(manifests)}</main></body></html>\n"
    )


def funnel_markdown(manifests: Mapping[str, Manifest]) -> str:
    """Return the samples in and out of every finished data stage as a markdown table."""
    lines = ["| stage | in | kept | dropped | reasons |", "| --- | ---: | ---: | ---: | --- |"]
    for name in DATA_STAGES:
        if name in manifests:
            m = manifests[name]
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in m.dropped.items())
            lines.append(f"| {name} | {m.num_in:,} | {m.num_kept:,} | {m.num_in - m.num_kept:,} | {reasons or '-'} |")
    return "\n".join(lines) + "\n"


def _built(section: Section, manifests: Mapping[str, Manifest]) -> str:
    """Build a section; what cannot be read is said in its place, the rest of the page stands."""
    try:
        return section.build(manifests)
    except UnclipError as error:
        return note(f"This part could not be made: {error}")


# ---- head and foot ------------------------------------------------------------------------------------------------


def _title(config: Config) -> str:
    return config.root.rstrip("/").rsplit("/", 1)[-1] or config.root


def _header(title: str, manifests: Mapping[str, Manifest], config: Config) -> str:
    missing = [name for name in STAGE_NAMES if name not in manifests]
    done = len(STAGE_NAMES) - len(missing)
    facts = [f"{done} of {len(STAGE_NAMES)} stages finished"]
    if manifests:
        facts.append(f"last result {max(m.created_at for m in manifests.values()).replace('T', ' ')[:16]} UTC")
    facts.append(f"seed {config.seed}")
    waiting = note(f"Not finished yet: {', '.join(missing)}. This page shows what there is.") if missing else ""
    return (
        f'<header><div class="eyebrow">unCLIP pipeline report</div><h1>{escape(title)}</h1>'
        f'<div class="soft">{escape(" · ".join(facts))} &nbsp;{report_quality.verdict_badge(manifests)}</div>{waiting}'
        f"{tiles(_headline(manifests))}</header>"
    )


def _headline(manifests: Mapping[str, Manifest]) -> list[str]:
    found = report_quality.headline(manifests)
    if "curate" in manifests:
        first = next(manifests[name] for name in DATA_STAGES if name in manifests)
        kept = manifests["curate"].num_kept
        found.append(tile("training samples", f"{kept:,}", f"of {first.num_in:,} rows"))
    if manifests:
        found.append(tile("time", duration(busy_s(manifests.values())), "in which any stage ran"))
    return found


def busy_s(manifests: Iterable[Manifest]) -> float:
    """Return the seconds in which at least one of the runs that finished these stages was at work."""
    ends = [(datetime.fromisoformat(m.created_at).timestamp(), m.wall_time_s) for m in manifests]
    total, reached = 0.0, -math.inf
    for start, end in sorted((end - wall, end) for end, wall in ends):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _footer(manifests: Mapping[str, Manifest]) -> str:
    versions = sorted({m.code_version for m in manifests.values() if m.code_version})
    made_by = f"unclip-pipeline {', '.join(versions)}" if versions else "unclip-pipeline"
    return f"<footer>Made by {escape(made_by)} from the manifests of the store.</footer>"


# ---- lineage and settings -----------------------------------------------------------------------------------------


def lineage_section(manifests: Mapping[str, Manifest]) -> str:
    """Show what every result was made from, and how long it took."""
    names = [name for name in STAGE_NAMES if name in manifests]
    if not names:
        return ""
    longest = max(max(m.wall_time_s for m in manifests.values()), 1e-9)
    rows = []
    for name in names:
        m = manifests[name]
        work = sum(record.wall_time_s for record in m.records)
        made_from = ", ".join(f"{up} {entry['fingerprint'][:8]}" for up, entry in m.inputs.items())
        rows.append(
            [
                escape(name),
                f"<code>{escape(m.fingerprint)}</code>"
                + (f"<small>made from {escape(made_from)}</small>" if made_from else ""),
                f"<code>{m.digest[:12]}</code>",
                number(len(m.records)),
                f'<span class="num">{duration(m.wall_time_s)}</span>{bar(m.wall_time_s / longest)}',
                f'<span class="num">{duration(work)}</span>',
            ]
        )
    text = soft(
        "The fingerprint names the question (settings and inputs), the digest the answer (checksums of all files). "
        "Time is of the run that finished the stage; work adds up its shards, whenever they were done."
    )
    return text + table(["stage", "fingerprint", "digest", "#shards", "time", "work"], rows)


def config_section(config: Config) -> str:
    """Show every setting, a fold per section."""
    values = to_values(config)
    plain = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    folds = {"general": plain, **{name: value for name, value in values.items() if isinstance(value, Mapping)}}
    return "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(_settings_text(value))}</pre></details>"
        for name, value in folds.items()
    )


def _settings_text(value: Mapping[str, Any]) -> str:
    return "\n".join(f"{path}: {json.dumps(setting)}" for path, setting in _flat(value))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


SECTIONS = (
    Section("images", "Generated images", report_quality.images_section),
    Section("quality", "Quality", report_quality.quality_section),
    Section("training", "Training", report_training.training_section),
    Section("funnel", "From URLs to training samples", report_samples.funnel_section),
    Section("data", "The data", report_samples.data_section),
    Section("CLIP", "CLIP and its embeddings", report_samples.clip_section),
    Section("lineage", "Lineage and time", lineage_section),
    Section("plan", "Planned and actual", report_plan.plan_section),
)
