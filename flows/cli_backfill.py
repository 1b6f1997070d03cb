"""``unclip backfill``: past days of the lists, one after the other."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flows.backfill import Partition, find_partitions
from flows.backfill import backfill as backfill_partitions
from flows.console import PLAIN, open_console, print_json

if TYPE_CHECKING:
    from flows.project import Project
    from flows.selection import Selection


def backfill_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip backfill``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--from", dest="first", metavar="DATE", help="leave out lists of earlier days (YYYY-MM-DD)")
    parser.add_argument("--until", dest="last", metavar="DATE", help="leave out lists of later days")
    parser.add_argument("--dry-run", action="store_true", help="show the days, their lists and what would run")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def backfill(args: argparse.Namespace, bring_to_end: Callable[[argparse.Namespace, Project, Selection], int]) -> int:
    """Process what is not done of the days in question, in order; the same command goes on after a failure.

    Args:
        args: of the command line.
        bring_to_end: runs stages as ``unclip run`` does.
    """
    partitions = find_partitions(args.config, args.set, first=args.first, last=args.last)

    def run(partition: Partition) -> int:
        of_run = argparse.Namespace(**{**vars(args), "set": partition.overrides, "json": False, "detach": False})
        say(f"{partition.date}: {', '.join(partition.lists)}")
        with contextlib.redirect_stdout(sys.stderr):
            return bring_to_end(of_run, partition.project, partition.selection)

    status = {p.date: "pending" if p.pending else "done" for p in partitions}
    code = 0
    if not args.dry_run:
        for partition, code in backfill_partitions(partitions, run):
            status[partition.date] = "failed" if code else "processed"
    if args.json:
        print_json([_to_json(partition, status[partition.date]) for partition in partitions])
        return code
    for p in partitions:
        what = f"pending: {', '.join(p.pending)}" if status[p.date] == "pending" else status[p.date]
        print(f"{p.date}  {len(p.lists)} list{'' if len(p.lists) == 1 else 's'}  {what}")
    if not code and not args.dry_run:
        print(f"`unclip run {args.config}` takes these shards over")
    return code


def say(text: str) -> None:
    """Print a line to standard error, never wrapped."""
    open_console(sys.stderr).print(text, soft_wrap=True, **PLAIN)


def _to_json(partition: Partition, status: str) -> dict[str, Any]:
    stages = {name: partition.project.fingerprints[name] for name in partition.selection.stages}
    return {"date": partition.date.isoformat(), "lists": list(partition.lists), "status": status, "stages": stages}
