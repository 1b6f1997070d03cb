"""The commands for whoever keeps it running: status --watch, runs, logs, retry."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flows.console import PLAIN, open_console, print_json
from flows.overview import overview, status_table
from flows.project import Project, open_project
from stages import storage
from stages.errors import ConfigError
from stages.manifest import manifest_uri


def status_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip status``."""
    _common_arguments(parser)
    parser.add_argument("--watch", action="store_true", help="look again and again until the run has ended")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks (default 5)")


def runs_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip runs``."""
    _common_arguments(parser)
    parser.add_argument("-n", "--newest", type=int, default=20, metavar="N", help="how many (default 20)")


def logs_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip logs``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("stage", metavar="STAGE", nargs="?", help="its lines alone")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--run", metavar="ID", help="of this run (the beginning of its id); the newest if not given")
    parser.add_argument("--follow", action="store_true", help="go on with new lines until the run ends")
    parser.add_argument("--json", action="store_true", help="print the lines as they are stored")


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


# ---- status ---------------------------------------------------------------------------------------------------------


def status(args: argparse.Namespace) -> int:
    """Show what the store holds, once or again and again."""
    project = open_project(args.config, args.set)
    if args.watch:
        from flows.cli_watch import watch

        return watch(args, project)
    rows = overview(project.stages, project.states)
    if args.json:
        print_json({"root": project.config.root, "stages": [row.to_json() for row in rows]})
    else:
        console = open_console(sys.stdout)
        console.print(f"store: {project.config.root}", **PLAIN)
        console.print(status_table(rows))
    return 0


# ---- history --------------------------------------------------------------------------------------------------------


def runs(args: argparse.Namespace) -> int:
    """Show who ran what when, and how it ended."""
    from flows.run_record import read_runs
    from flows.watch import runs_table

    if args.newest < 1:
        raise ConfigError(f"--newest {args.newest}: is below 1")
    found = read_runs(_root(args), newest=args.newest)
    if args.json:
        print_json([run.to_json() for run in found])
    else:
        open_console(sys.stdout).print(runs_table(found) if found else "no run is recorded")
    return 0


def logs(args: argparse.Namespace) -> int:
    """Print the log of a run."""
    from flows.run_log import follow_log, read_log
    from flows.run_record import find_run, is_running
    from stages.graph import STAGE_NAMES

    if args.stage is not None and args.stage not in STAGE_NAMES:
        raise ConfigError(f"STAGE: '{args.stage}' is none; the stages are: {', '.join(STAGE_NAMES)}")
    root = _root(args)
    run = find_run(root, args.run)

    lines: Iterable[Mapping[str, Any]] = read_log(root, run, stage=args.stage)
    if args.follow:
        lines = follow_log(root, run, stage=args.stage, is_over=lambda: not is_running(root, run))
    for line in lines:
        print(json.dumps(line) if args.json else _readable(line), flush=args.follow)
    return 0


def _readable(line: Mapping[str, Any]) -> str:
    places = [f"{name}={line[name]}" for name in ("stage", "shard") if name in line]
    return " ".join([line["time"], line["level"], *places, line["message"]])


def _root(args: argparse.Namespace) -> str:
    from stages.config import load_config

    return load_config(args.config, args.set).root


# ---- retry ----------------------------------------------------------------------------------------------------------


def reopen_quarantined(project: Project, stages: Sequence[str]) -> dict[str, int]:
    """Take back the manifests of stages that gave shards up, so that the next run does those shards, and no other.

    Returns:
        Stage -> shards that will be tried again.
    """
    given_up = {name: len(m.quarantined) for name, m in project.manifests.items() if m.quarantined and name in stages}
    for name in given_up:
        storage.delete(manifest_uri(project.config.root, name, project.states[name].fingerprint))
    return given_up
