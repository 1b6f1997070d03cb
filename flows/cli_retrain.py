"""``unclip retrain``: the loop of ``flows/retrain.py`` on the command line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from flows.cli_registry import REFUSED, say, show_decision
from flows.console import print_json
from flows.production_note import tell_server
from flows.project import open_project
from flows.retrain import Retrained
from flows.retrain import retrain as retrain_models

if TYPE_CHECKING:
    from flows.project import Project
    from flows.selection import Selection

BringToEnd = Callable[[argparse.Namespace, "Project", "Selection"], int]


def retrain_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip retrain``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")
    parser.add_argument("--no-promote", action="store_true", help="register the version and ask the gate, no more")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train from random weights, not from those in production"
    )
    parser.epilog = (
        f"exit code: 0 promoted, or nothing to promote; {REFUSED} refused by the gate, production is what it was; "
        "1 failed, 2 bad usage or config, 130 stopped: the same command goes on"
    )


def retrain(args: argparse.Namespace, bring_to_end: BringToEnd) -> int:
    """Retrain and say how it ended.

    Args:
        args: of the command line.
        bring_to_end: runs stages as ``unclip run`` does.
    """
    of_run = argparse.Namespace(**{**vars(args), "json": False, "detach": False})

    def run(project: Project, selection: Selection) -> int:
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            return bring_to_end(of_run, project, selection)

    def look() -> Project:
        return open_project(args.config, args.set)

    found = retrain_models(look, run, promote=not args.no_promote, from_scratch=args.from_scratch)
    if found.decision is not None:
        tell_server(found.root, found.said, found.decision)
    code = REFUSED if found.status == "refused" else found.run_code
    if args.json:
        print_json(
            {
                "status": found.status,
                "trained": found.has_run,
                "version": found.version.number if found.version else None,
                "production": found.production,
                "decision": found.decision.to_json() if found.decision else None,
            }
        )
    else:
        _show(found)
    return code


def _show(found: Retrained) -> None:
    if found.version is not None and not found.has_run:
        say(
            f"nothing has changed since version {found.version.number}: the same lists, settings and starts; nothing "
            "was trained"
        )
    if found.decision is not None:
        show_decision(found.decision)
    say(found.said)
