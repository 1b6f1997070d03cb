"""What a run tells in words beside its report: its cost as planned and as it came, and what the gate would say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flows.progress import format_duration
from flows.report_plan import planned_and_actual
from stages.config import Config
from stages.gate import Decision
from stages.manifest import Manifest
from stages.registry import ask_gate
from stages.version import metrics_of


def run_notes(manifests: Mapping[str, Manifest], config: Config) -> dict[str, str]:
    """Return the tables in markdown, by the keys of their artifacts.

    Args:
        manifests: the finished stages.
        config: what was run.
    """
    notes = {"cost": cost_table(manifests)}
    if "evaluate" in manifests:
        notes["gate"] = gate_table(manifests, config)
    return notes


def cost_table(manifests: Mapping[str, Manifest]) -> str:
    """Hold samples and work of every stage against the plan."""
    plan = planned_and_actual(manifests)
    rows = [
        [
            row.stage,
            "-" if row.planned_samples is None else f"{row.planned_samples:,.0f}",
            f"{row.kept_samples:,}",
            "-" if row.planned_s is None else format_duration(row.planned_s),
            format_duration(row.worked_s),
        ]
        for row in plan
    ]
    total = format_duration(sum(row.worked_s for row in plan))
    header = ["stage", "samples planned", "samples kept", "work planned", "work done"]
    return f"{_table(header, rows)}\n\nAll workers together: {total}. `unclip plan --cost` turns work into money."


def gate_table(manifests: Mapping[str, Manifest], config: Config) -> str:
    """Say what the gate would decide about an evaluated run; the decision itself is made by ``unclip promote``."""
    decision = ask_gate(config.root, config.gate, metrics_of(manifests))
    number = decision.compared_with
    beside = "nothing is in production" if number is None else f"in production is version {number}"
    if not decision.rules:
        return f"No rule is set (section `gate`); {beside}."
    verdict = "would be promoted" if decision.passed else "would be **refused**"
    return f"This run {verdict}; {beside}.\n\n{rules_table(decision)}"


def rules_table(decision: Decision) -> str:
    """Show every bound that the gate has held, and whether it was met."""
    rows = [["met" if rule.passed else "**not met**", rule.metric, rule.bound, rule.reason] for rule in decision.rules]
    return _table(["", "metric", "bound", "why"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
