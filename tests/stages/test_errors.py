"""Errors of other software in one line."""

from __future__ import annotations

import pytest

from stages.errors import first_line


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("no such bucket\nrequest id 7", "no such bucket"),
        ("", "OSError"),
        (
            "Initialization failure from server:\nTraceback:\n  File x\nTimeoutError: port 7 \n",
            "Initialization failure from server: TimeoutError: port 7",
        ),
        ("nothing behind:", "nothing behind:"),
    ],
)
def test_the_line_that_tells_most(message: str, said: str) -> None:
    assert first_line(OSError(message)) == said
