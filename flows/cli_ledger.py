"""The commands that answer for every row: explain, funnel, what-if."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from flows.console import PLAIN, open_console, print_json
from flows.project import open_project
from stages.errors import ConfigError, InputError
from stages.ledger import DATA_STAGES

if TYPE_CHECKING:
    from stages.life import Life
    from stages.manifest import Manifest


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def what_if_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip what-if``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "-s", "--set", action="append", default=[], metavar="K=V", help="the change, e.g. curate.clip_score_min=0.28"
    )
    parser.add_argument(
        "-b", "--base", action="append", default=[], metavar="K=V", help="a setting of the run as it is, not a change"
    )
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip explain``."""
    _common_arguments(parser)
    parser.add_argument("sample", metavar="SAMPLE", help="its key, its URL, or LIST:ROW")


def funnel_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip funnel``."""
    _common_arguments(parser)


def explain(args: argparse.Namespace) -> int:
    """Tell the life of a sample."""
    from stages.life import find_lives

    lives = find_lives(open_project(args.config, args.set).manifests, args.sample)
    if args.json:
        print_json([life.to_json() for life in lives])
        return 0
    console = open_console(sys.stdout)
    for life in lives:
        _show(console, life)
    return 0


def _show(console: Console, life: Life) -> None:
    for name in ("key", "url", "caption", "list", "row", "shard"):
        console.print(f"{name:8} {getattr(life, name)}", soft_wrap=True, **PLAIN)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("stage", "verdict", "rules", "what it looked at"):
        table.add_column(name)
    for verdict in life.verdicts:
        scores = ", ".join(f"{name} {_short(value)}" for name, value in verdict.scores.items())
        fate = "[green]kept[/]" if verdict.reason is None else f"[yellow]dropped: {verdict.reason}[/]"
        table.add_row(verdict.stage, fate, "" if verdict.rule_version is None else f"v{verdict.rule_version}", scores)
    console.print(table)
    trained = f"; trained on by {', '.join(life.trained)}" if life.trained else ""
    console.print(f"state    {life.state}{trained}\n", soft_wrap=True, **PLAIN)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def funnel(args: argparse.Namespace) -> int:
    """Show what every stage dropped, and why."""
    manifests = open_project(args.config, args.set).manifests
    if "source" not in manifests:
        raise InputError("funnel: no data stage has finished; run it first (unclip run --until curate)")
    rows = funnel_rows(manifests)
    if args.json:
        print_json(rows)
        return 0
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("stage", "reason", "samples", "of the stage", "of all rows"):
        table.add_column(name, justify="left" if name in ("stage", "reason") else "right")
    for row in rows:
        lines = [("in", row["in"]), *row["dropped"].items(), ("kept", row["kept"])]
        for number, (reason, count) in enumerate(lines):
            shares = [f"{100 * count / whole:.2f} %" if whole else "" for whole in (row["in"], rows[0]["in"])]
            table.add_row(row["stage"] if number == 0 else "", reason, f"{count:,}", *shares)
        table.add_section()
    open_console(sys.stdout).print(table)
    return 0


def funnel_rows(manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """Return samples in, dropped by reason, and kept, of every finished data stage."""
    found: Sequence[Manifest] = [manifests[name] for name in DATA_STAGES if name in manifests]
    return [{"stage": m.stage, "in": m.num_in, "dropped": m.dropped, "kept": m.num_kept} for m in found]


def what_if_(args: argparse.Namespace) -> int:
    """Show what other thresholds would keep."""
    from stages.config import load_config
    from stages.graph import build_stages
    from stages.what_if import what_if

    if not args.set:
        raise ConfigError("what-if: no change given; add for example -s curate.clip_score_min=0.28")
    project = open_project(args.config, args.base)
    changed = build_stages(load_config(args.config, [*args.base, *args.set]))
    found = what_if(project.stages, changed, project.manifests)
    if args.json:
        print_json(asdict(found))
        return 0
    console = open_console(sys.stdout)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("stage", "reason", "now", "then", "difference"):
        table.add_column(name, justify="left" if name in ("stage", "reason") else "right")
    lines = [(stage, reason, *counts) for stage, reasons in found.dropped.items() for reason, counts in reasons.items()]
    for stage, reason, now, then in [*lines, ("", "kept", *found.kept)]:
        table.add_row(stage, reason, f"{now:,}", f"{then:,}", f"{then - now:+,}")
    console.print(table)
    waiting = f"; {found.not_embedded:,} more would have to be embedded first" if found.not_embedded else ""
    console.print(f"{found.gained:,} samples gained, {found.lost:,} lost{waiting}", **PLAIN)
    return 0
