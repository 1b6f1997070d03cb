"""``unclip status --watch``: look at a store again and again until the run that works on it has ended."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live

from flows.console import PLAIN, open_console
from flows.project import Project
from flows.run_record import RunRecord, read_runs
from flows.watch import StageLook, Watch, watch_view
from stages.errors import ConfigError, StorageError
from stages.redaction import hide_secrets

logger = logging.getLogger(__name__)

# So many looks in a row at which nothing runs, or the store does not answer, are the end: by default a minute.
_PATIENCE = 12


class _Screen(Protocol):
    def show(self, run: RunRecord | None, looks: Sequence[StageLook]) -> None: ...

    def say(self, line: str) -> None: ...


def watch(args: argparse.Namespace, project: Project) -> int:
    """Look until every stage is done, or the newest run has ended; one that had ended before is waited for a while.

    Returns:
        0 if the stages are done or that run did what it was asked for, else the exit code of that run.

    Raises:
        ConfigError: if the time between two looks is not positive.
        StorageError: if the store does not answer at ``_PATIENCE`` looks in a row.
    """
    if args.every <= 0:
        raise ConfigError(f"--every {args.every:g}: is not positive; write seconds, for example 5")
    with _screen(args, project.config.root) as screen:
        return _look_until_over(project, screen, args.every)


def _look_until_over(project: Project, screen: _Screen, every_s: float) -> int:
    stages, known = Watch(project), None
    num_failed, num_idle = 0, 0
    while True:
        try:
            # The run first: what is seen of the stages is then at least as new as its end.
            run = next(iter(read_runs(project.config.root, newest=1)), None)
            looks = stages.look()
        except StorageError as error:
            num_failed += 1
            if num_failed == _PATIENCE:
                raise
            screen.say(hide_secrets(f"{error}; looking again in {every_s:g} s"))
            time.sleep(every_s)
            continue
        num_failed = 0
        screen.show(run, looks)
        if stages.is_over:
            return 0
        runs = run is not None and run.status == "running"
        num_idle = 0 if runs else num_idle + 1
        ended = run.id if run is not None and not runs else ""
        # What had ended before the first look is not what is watched for: another run may be about to begin.
        known = ended if known is None else known
        if (ended and ended != known) or num_idle == _PATIENCE:
            return 1 if run is None else run.exit_code or 0
        time.sleep(every_s)


@contextlib.contextmanager
def _screen(args: argparse.Namespace, root: str) -> Iterator[_Screen]:
    console = open_console(sys.stdout)
    if args.json:
        yield _Lines(root)
    elif console.is_terminal:
        # Nobody else prints meanwhile, and a line that is caught and drawn again would be cut to the terminal's width.
        with Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as live:
            terminal = _Terminal(root, console, live)
            yield terminal
        terminal.leave()
    else:
        yield _Tables(root, console)


class _Lines:
    """One JSON object a look."""

    def __init__(self, root: str) -> None:
        self._root = root

    def show(self, run: RunRecord | None, looks: Sequence[StageLook]) -> None:
        """Print a look."""
        value = {"root": self._root, "run": run and run.to_json(), "stages": [look.to_json() for look in looks]}
        print(json.dumps(value), flush=True)

    def say(self, line: str) -> None:
        """Tell what went wrong beside the objects."""
        logger.warning("%s", line)


class _Tables:
    """One table a look, for logs and pipes."""

    def __init__(self, root: str, console: Console) -> None:
        self._root, self._console = root, console

    def show(self, run: RunRecord | None, looks: Sequence[StageLook]) -> None:
        """Print a look."""
        self._console.print(watch_view(self._root, run, looks))
        self._console.file.flush()

    def say(self, line: str) -> None:
        """Tell what went wrong beside the tables."""
        logger.warning("%s", line)


class _Terminal:
    """One table that changes; the last one stays."""

    def __init__(self, root: str, console: Console, live: Live) -> None:
        self._root, self._console, self._live = root, console, live
        self._last: tuple[RunRecord | None, Sequence[StageLook]] | None = None

    def show(self, run: RunRecord | None, looks: Sequence[StageLook]) -> None:
        """Draw a look over the one before."""
        self._last = run, looks
        self._live.update(watch_view(self._root, run, looks), refresh=True)

    def say(self, line: str) -> None:
        """Tell what went wrong above the table."""
        self._console.print(line, style="yellow", soft_wrap=True, **PLAIN)

    def leave(self) -> None:
        """Print the last look where it stays."""
        if self._last is not None:
            self._console.print(watch_view(self._root, *self._last))
