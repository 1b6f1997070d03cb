"""The model card of a version, in markdown: what its record says, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.version import Version


def model_card(version: Version) -> str:
    """Write the card of a version; the same version gives the same text."""
    code = ", ".join(version.code_versions) or "unknown"
    parts = [
        f"# Models, version {version.number}",
        f"Registered {version.created_at}; made by unclip-pipeline {code}; digest `{version.digest}`.",
        "## Weights",
        _table(
            ("stage", "file", "bytes", "sha256", "started from"),
            (
                (name, f"`{file.path}`", f"{file.num_bytes:,}", f"`{file.sha256}`", _start(stage.config))
                for name, stage in version.stages.items()
                for file in stage.weights
            ),
        ),
        "## Data",
        _data(version),
        _table(
            ("stage", "samples in", "samples out", "manifest"),
            (
                (name, f"{stage.num_in:,}", f"{stage.num_kept:,}", f"`{stage.manifest}`")
                for name, stage in version.stages.items()
            ),
        ),
        "## Metrics",
        "Of generated images, and of real ones that were left out of the comparison (`real`): the floor or ceiling of "
        "each metric. The losses are of real samples that were not trained on.",
        _metrics(version),
        "## Gate",
        _gate(version),
    ]
    return "\n\n".join(parts) + "\n"


def _start(config: Mapping[str, Any]) -> str:
    """Say where a training started, as its settings name it."""
    init = config.get("init_from") or {}
    names = ("version", "fingerprint", "file", "root")
    return ", ".join(f"{name} {init[name]}" for name in names if init.get(name) is not None)


def _data(version: Version) -> str:
    if not version.lists:
        return "No URL lists: the source stage made the pictures itself."
    rows = ((f"`{item.name}`", f"{item.num_rows:,}", f"`{item.sha256}`") for item in version.lists)
    return _table(("URL list", "rows", "sha256"), rows)


def _metrics(version: Version) -> str:
    names = [name for name in version.metrics if name != "gate" and not name.startswith("real_")]
    rows = ((name, _shown(version.metrics[name]), _shown(version.metrics.get(f"real_{name}"))) for name in names)
    return _table(("metric", "generated", "real"), rows)


def _gate(version: Version) -> str:
    decision = version.decision
    beside = f"version {decision.compared_with} in production" if decision.compared_with else "nothing in production"
    if not decision.rules:
        return f"No rule was set at registration, with {beside}."
    head = f"At registration, with {beside}: {'passed' if decision.passed else 'failed'}."
    lines = [f"- {'met' if rule.passed else 'NOT met'}: {rule.reason}" for rule in decision.rules]
    return "\n".join([head, "", *lines])


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
