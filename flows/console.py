"""The console of the commands: as wide as the terminal, or wide enough not to wrap where there is none."""

from __future__ import annotations

import json
from typing import Any, TextIO

from rich.console import Console

_WIDE = 240
# Text that is not ours to format: URLs, captions, error messages.
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}


def open_console(stream: TextIO) -> Console:
    """Return a console on a stream."""
    console = Console(file=stream)
    return console if console.is_terminal else Console(file=stream, width=_WIDE)


def print_json(value: Any) -> None:
    """Print the answer of a command to standard output."""
    print(json.dumps(value, indent=1, default=str))
