"""The commands that look after the store: verify, repair, gc."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flows.console import open_console, print_json
from stages.errors import ConfigError
from stages.units import GIB

if TYPE_CHECKING:
    from stages.audit import Verified
    from stages.base import Stage
    from stages.garbage import Garbage, Held

_MAX_SHOWN = 50


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip verify``."""
    _common_arguments(parser)
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("--all", action="store_true", help="every result in the store, not only this config's")


def repair_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip repair``."""
    _common_arguments(parser)
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="show what would be deleted")


def gc_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip gc``."""
    _common_arguments(parser)
    parser.add_argument("configs", metavar="CONFIG", nargs="+", help="YAML files of all pipelines to keep, one store")
    parser.add_argument("--apply", action="store_true", help="delete; without it, only show")
    parser.add_argument(
        "--older-than", type=float, default=7.0, metavar="DAYS", help="nothing younger is deleted (default 7)"
    )
    parser.add_argument("--stale", action="store_true", help="also results that none of the configs leads to any more")


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def verify(args: argparse.Namespace) -> int:
    """Hold the store to its manifests, and the weights of all versions to the registry.

    Returns:
        1 if anything is wrong, or nothing is there.
    """
    root, verified = _verified(args, every=args.all, with_versions=True)
    if args.json:
        print_json({"root": root, **_counts(verified), "findings": [f.to_json() for f in verified.findings]})
    else:
        _show_findings(root, verified)
    return 1 if verified.findings or not verified.num_results else 0


def repair(args: argparse.Namespace) -> int:
    """Delete the records of damaged work, so that the next run does it again."""
    from stages.audit import apply_repair, plan_repair

    root, verified = _verified(args)
    plan = plan_repair(verified.findings)
    if not args.dry_run:
        apply_repair(root, plan)
    if args.json:
        print_json(
            {
                "root": root,
                "applied": not args.dry_run,
                "deleted": [*plan.records, *plan.manifests],
                "stages": list(plan.stages),
                "unrepairable": [finding.to_json() for finding in plan.unrepairable],
            }
        )
        return 1 if plan.unrepairable else 0
    for path in (*plan.records, *plan.manifests):
        print(f"{'would delete' if args.dry_run else 'deleted'} {path}")
    for finding in plan.unrepairable:
        print(f"cannot be repaired by deleting a record: {finding}")
    command = " ".join(["unclip run", args.config, *(f"-s {value}" for value in args.set)])
    if plan.manifests:
        shards = f"{len(plan.records)} shard{'' if len(plan.records) == 1 else 's'}"
        verb = "would do" if args.dry_run else "does"
        print(f"`{command}` then {verb} again: {', '.join(plan.stages)} ({shards})")
    elif not plan.unrepairable:
        print(f"nothing to repair: {verified.num_files} files are what their manifests say")
    return 1 if plan.unrepairable else 0


def gc(args: argparse.Namespace) -> int:
    """Show, or delete, what nothing names any more."""
    from stages.garbage import delete_garbage, find_garbage

    if not args.older_than >= 0:  # nor is it no number at all
        raise ConfigError(f"--older-than {args.older_than:g}: write a number of days, 0 or more")
    opened = [_open(path, args.set) for path in args.configs]
    roots = {root: path for path, (root, _, _) in zip(args.configs, opened, strict=True)}
    if len(roots) > 1:
        (first, path), (second, other) = list(roots.items())[:2]
        raise ConfigError(f"{path} and {other}: their stores differ ({first}, {second}); collect one store at a time")
    root = opened[0][0]
    pipelines, fingerprints = [stages for _, stages, _ in opened], [names for _, _, names in opened]
    held: list[Held] = []
    garbage = find_garbage(
        root, pipelines, fingerprints, older_than_days=args.older_than, stale=args.stale, on_held=held.append
    )
    if args.apply:
        delete_garbage(root, garbage)
    if args.json:
        found = {"garbage": [item.to_json() for item in garbage], "held": [item.to_json() for item in held]}
        print_json({"root": root, "applied": args.apply, **found})
        return 0
    _show_garbage(garbage)
    for item in held:
        print(f"{item.result.stage} is being made by {item.holding}: all its shards and checkpoints are kept")
    if garbage:
        print("deleted" if args.apply else "nothing is deleted without --apply")
    return 0


def _open(path: str, overrides: Sequence[str]) -> tuple[str, dict[str, Stage[Any]], dict[str, str]]:
    """Read a config without looking at its results, which may be damaged."""
    from stages.config import load_config
    from stages.graph import build_stages, fingerprints

    config = load_config(path, overrides)
    stages = build_stages(config)
    return config.root, stages, fingerprints(stages)


def _verified(args: argparse.Namespace, *, every: bool = False, with_versions: bool = False) -> tuple[str, Verified]:
    from stages import storage
    from stages.audit import all_results, results_of
    from stages.audit import verify as verify_store
    from stages.graph import STAGES
    from stages.registry import read_versions

    root, stages, names = _open(args.config, args.set)
    versions = list(read_versions(root).values()) if with_versions else []
    kinds = {kind.name: kind for kind in STAGES}
    listings = {name: storage.list_entries(storage.join(root, name)) for name in stages} if every else {}
    results = all_results(listings) if every else results_of(names, root)
    with _progress() as on_progress:
        return root, verify_store(root, results, kinds, versions=versions, on_progress=on_progress)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show bytes checked on standard error, where that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = open_console(sys.stderr)
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _counts(verified: Verified) -> dict[str, int]:
    return {
        "num_results": verified.num_results,
        "num_files": verified.num_files,
        "num_bytes": verified.num_bytes,
    }


def _show_findings(root: str, verified: Verified) -> None:
    if not verified.num_results:
        print(f"nothing to verify: {root} holds no result of this config; is root right?")
        return
    for finding in verified.findings[:_MAX_SHOWN]:
        print(finding)
    if len(verified.findings) > _MAX_SHOWN:
        print(f"... and {len(verified.findings) - _MAX_SHOWN} more; --json lists all")
    what = f"{verified.num_results} results, {verified.num_files} files, {verified.num_bytes / GIB:.3g} GiB"
    wrong = len(verified.findings)
    print(f"{what}: {f'{wrong} wrong; `unclip repair` says what to do' if wrong else 'all as their manifests say'}")


def _show_garbage(garbage: Sequence[Garbage]) -> None:
    from rich import box
    from rich.table import Table

    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for item in sorted(garbage, key=lambda item: (item.stage, item.reason)):
        count, num_bytes = totals.get((item.stage, item.reason), (0, 0))
        totals[item.stage, item.reason] = count + 1, num_bytes + item.num_bytes
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("stage", "files", "GiB", "why"):
        table.add_column(name, justify="right" if name in ("files", "GiB") else "left")
    for (stage, reason), (count, num_bytes) in totals.items():
        table.add_row(stage, f"{count:,}", f"{num_bytes / GIB:,.3f}", reason)
    total_bytes = sum(item.num_bytes for item in garbage)
    table.add_row("all", f"{len(garbage):,}", f"{total_bytes / GIB:,.3f}", "" if garbage else "nothing to collect")
    open_console(sys.stdout).print(table)
