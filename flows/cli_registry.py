"""The commands of the model registry: promote, rollback, models list, diff."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flows.console import PLAIN, open_console, print_json
from flows.production_note import in_words, refusal, tell_server
from flows.project import open_project
from stages.errors import ConfigError, InputError
from stages.redaction import hide_secrets

if TYPE_CHECKING:
    from stages.gate import Decision
    from stages.manifest import Manifest
    from stages.version import VersionDiff

REFUSED = 3  # the exit code where the gate says no: nothing failed, and nothing was promoted
_SHOWN = ("frechet_distance", "clip_score", "caption_accuracy_all")


def promote_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip promote``."""
    _common_arguments(parser)
    parser.add_argument(
        "--version", type=int, metavar="N", help="a registered version; without, the finished run of this config"
    )
    parser.add_argument("--force-reason", metavar="TEXT", help="promote even if the gate fails; the reason is kept")


def rollback_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip rollback``."""
    _common_arguments(parser)
    parser.add_argument(
        "--to", type=int, metavar="N", help="a version that has been in production; without, the one before"
    )


def diff_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip diff``."""
    _common_arguments(parser)
    parser.add_argument("a", type=int, metavar="A", help="number of a version")
    parser.add_argument("b", type=int, metavar="B", help="number of another")


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def promote(args: argparse.Namespace) -> int:
    """Register the finished run if need be, ask the gate, and put the version into production."""
    from stages.config import load_config
    from stages.registry import card_uri, register
    from stages.registry import promote as promote_version

    reason = hide_secrets((args.force_reason or "").strip())
    if args.force_reason is not None and not reason:
        raise ConfigError("--force-reason: is empty; say why the gate is passed over")
    config = load_config(args.config, args.set)
    number = args.version
    if number is None:
        number = register(config.root, _finished_run(args), config.gate).number
    outcome = promote_version(config.root, number, config.gate, force_reason=reason)
    forced = f", forced past the gate: {reason}" if outcome.decision and not outcome.decision.passed and reason else ""
    said = {
        "refused": refusal(number, outcome.before),
        "unchanged": f"version {number} is in production already; nothing to do",
    }.get(outcome.status, f"version {number} is in production (before: {in_words(outcome.before)}){forced}")
    if outcome.decision is not None:
        tell_server(config.root, said, outcome.decision)
    if args.json:
        print_json(
            {
                "status": outcome.status,
                "version": number,
                "before": outcome.before,
                "production": outcome.before if outcome.status == "refused" else number,
                "decision": outcome.decision.to_json() if outcome.decision else None,
                "card": card_uri(config.root, number),
            }
        )
        return REFUSED if outcome.status == "refused" else 0
    if outcome.decision is not None:
        show_decision(outcome.decision)
    say(said)
    if outcome.status == "promoted":
        say(f"model card: {card_uri(config.root, number)}")
    return REFUSED if outcome.status == "refused" else 0


def _finished_run(args: argparse.Namespace) -> Mapping[str, Manifest]:
    project = open_project(args.config, args.set)
    if missing := [name for name in project.stages if name not in project.manifests]:
        raise InputError(
            f"promote: {', '.join(missing)} not finished; `unclip run {args.config}` brings them to an end"
        )
    return project.manifests


def rollback(args: argparse.Namespace) -> int:
    """Put an earlier version into production again."""
    from stages.registry import rollback as roll_back

    root = _root(args)
    change = roll_back(root, args.to)
    said = f"version {change.number} is in production again (before: version {change.before})"
    tell_server(root, said, None)
    if args.json:
        print_json({"status": "rolled back", "version": change.number, "before": change.before})
    else:
        say(said)
    return 0


def list_versions(args: argparse.Namespace) -> int:
    """List all versions; the one in production is marked."""
    from rich import box
    from rich.table import Table

    from stages.registry import read_production, read_versions
    from stages.withdrawn import read_withdrawn

    root = _root(args)
    known, production, withdrawn = read_versions(root), read_production(root), read_withdrawn(root)
    if args.json:
        print_json(
            {
                "root": root,
                "production": production.number,
                "versions": [version.to_json() for version in known.values()],
                "withdrawn": {number: asdict(withdrawal) for number, withdrawal in withdrawn.items()},
                "history": [asdict(change) for change in production.history],
            }
        )
        return 0
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("version", "registered", "rows", *_SHOWN, "gate then", "code", ""):
        table.add_column(name, justify="right" if name in ("rows", *_SHOWN) else "left")
    for number, version in known.items():
        rows = version.stages["curate"].num_kept if "curate" in version.stages else None
        table.add_row(
            str(number),
            version.created_at,
            _shown(rows),
            *(_shown(version.metrics.get(name)) for name in _SHOWN),
            "passed" if version.decision.passed else "failed",
            ", ".join(version.code_versions),
            ", ".join(_marks(number, production.number, withdrawn)),
        )
    console = open_console(sys.stdout)
    console.print(table if known else "no version yet; `unclip promote` registers the finished run")
    for number, withdrawal in withdrawn.items():
        say(f"version {number} {withdrawal}")
    for change in production.history:
        say(f"{change.at}  {change}")
    return 0


def _marks(number: int, production: int | None, withdrawn: Container[int]) -> Iterator[str]:
    if number == production:
        yield "in production"
    if number in withdrawn:
        yield "WITHDRAWN"


def diff(args: argparse.Namespace) -> int:
    """Show what distinguishes two versions."""
    from stages.registry import find_version
    from stages.version import compare

    root = _root(args)
    found = compare(find_version(root, args.a), find_version(root, args.b))
    if args.json:
        print_json(found.to_json())
    else:
        _show_diff(found)
    return 0


def _show_diff(found: VersionDiff) -> None:
    if not found.results:
        say(f"versions {found.a} and {found.b} are made of the same results")
    else:
        say(f"results that differ: {', '.join(found.results)}")
    for item in found.removed:
        say(f"- list {item.name}: {item.num_rows:,} rows")
    for item in found.added:
        say(f"+ list {item.name}: {item.num_rows:,} rows")
    for name, (a, b) in found.changed.items():
        say(f"  list {name}: {a.num_rows:,} -> {b.num_rows:,} rows, {a.sha256[:12]} -> {b.sha256[:12]}")
    for what, pairs in (
        ("setting", found.config),
        ("rows out of", found.rows),
        ("metric", found.metrics),
        ("code of", found.code),
    ):
        for name, (before, after) in pairs.items():
            say(f"  {what} {name}: {_shown(before)} -> {_shown(after)}")


def show_decision(decision: Decision) -> None:
    """Print every bound of the gate, and whether it is met."""
    if not decision.rules:
        say("the gate has no rule: everything passes; set `gate.rules`")
    for rule in decision.rules:
        say(f"{'met    ' if rule.passed else 'NOT met'}  {rule.reason}")


def _root(args: argparse.Namespace) -> str:
    from stages.config import load_config

    return load_config(args.config, args.set).root


def say(text: str) -> None:
    """Print a line to standard output, never wrapped."""
    open_console(sys.stdout).print(text, soft_wrap=True, **PLAIN)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value)
