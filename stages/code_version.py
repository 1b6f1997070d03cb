"""Which code is running: the release, and in a checkout the commit too.

A release says little of a pipeline that people change: what made a result is told by the commit, and by whether tracked
files differed from it. Written as a local version (PEP 440), such as ``0.1.0+g007d770a1b2c.dirty``.
"""

from __future__ import annotations

import functools
import subprocess
from importlib.metadata import version
from pathlib import Path

_TOP = Path(__file__).parents[1]
_COMMIT_DIGITS = 12


@functools.cache
def code_version() -> str:
    """Name the code of this process; it is looked at once, as it was imported once."""
    return described(version("unclip-pipeline"), _TOP)


def described(release: str, top: Path) -> str:
    """Add commit and state of a checkout to a release.

    Args:
        release: of the installed distribution.
        top: folder that holds the packages. Only if it is itself the top of a checkout does its commit count: an
            environment inside somebody's repository is not that repository's code.
    """
    if not (top / ".git").exists():
        return release
    commit = _git(top, "rev-parse", f"--short={_COMMIT_DIGITS}", "HEAD")
    if not commit:
        return release  # no git here, or nothing committed yet
    changed = _git(top, "status", "--porcelain", "--untracked-files=no")
    return f"{release}+g{commit}{'' if changed == '' else '.dirty'}"


def _git(top: Path, *arguments: str) -> str | None:
    """Return what git says; None if it cannot say."""
    command = ["git", "-C", str(top), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
