"""State files as the tests find them: on disk, without the record of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from stages import storage
from stages.state_file import StateFile


def state_file(path: Path) -> StateFile:
    """Take a file for what it was when it was written."""
    return StateFile(str(path), storage.checksum(str(path)))


def parameters_of(path: Path) -> set[str]:
    """Return the names of the parameters that a state file holds something of."""
    return {stretch.name for stretch in state_file(path).stretches()}
