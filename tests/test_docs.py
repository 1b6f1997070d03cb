"""Commands in the documents: each one parses, those marked ``sh`` run, those marked ``console`` say they need more.

A command is a line of a fenced block that begins with ``unclip`` or ``make``. In ``docs/operations.md`` and
``docs/kubernetes.md`` every block with commands bears one of the two marks.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.cli import build_parser, main

TOP = Path(__file__).parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
MARKED = ("operations.md", "kubernetes.md")
TARGETS = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))


@dataclass(frozen=True)
class Command:
    """One command of a page: its page, the mark of its block, its line as written."""

    page: str
    mark: str
    line: str


def commands() -> Iterator[Command]:
    for page in PAGES:
        for mark, body in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in body.splitlines():
                if line.startswith(("unclip ", "make ", "docker ", "kubectl ", "ray ")):
                    yield Command(page.name, mark, line)


COMMANDS = list(commands())


def variants(line: str) -> list[str]:
    """Drop what follows two spaces or a ``#``, and write out ``unclip a | b | c REST``."""
    text = re.split(r" {2,}| #", line)[0].rstrip()
    match = re.match(r"unclip (\S+(?: \| \S+)+)(.*)", text)
    return [f"unclip {name}{match[2]}" for name in match[1].split(" | ")] if match else [text]


def test_there_are_commands_of_both_marks() -> None:
    assert {command.mark for command in COMMANDS if command.page in MARKED} == {"sh", "console"}
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.line.startswith("unclip ")], ids=lambda c: c.line[:50])
def test_every_command_is_one_that_the_program_takes(command: Command) -> None:
    parsed = variants(command.line)
    # A list of commands that differ in what they take names them alone, and says where they are described.
    name_only = len(parsed) > 1
    for text in parsed:
        words = shlex.split(text)[1:]
        build_parser().parse_args(_with_least(words[0]) if name_only else words)


def _with_least(name: str) -> list[str]:
    """Give a command its required arguments."""
    least = {
        "vary": ["CONFIG", "a.png", "-o", "b.png"],
        "interpolate": ["CONFIG", "a.png", "b.png", "-o", "c.png"],
        "edit": ["CONFIG", "a.png", "-o", "b.png"],
        "invert": ["CONFIG", "a.png", "-o", "b.png"],
        "probe": ["CONFIG", "a.png", "-o", "b.png"],
    }
    return [name, *least.get(name, ["CONFIG"])]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.line.startswith("make ")], ids=lambda c: c.line[:50])
def test_every_make_target_exists(command: Command) -> None:
    assert variants(command.line)[0].split()[1] in TARGETS


def test_commands_of_other_programs_are_marked_as_needing_them() -> None:
    for command in COMMANDS:
        if command.line.startswith(("docker ", "kubectl ", "ray ")):
            assert command.mark == "console", command


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.page in MARKED and c.mark == "sh"], ids=lambda c: c.line[:60]
)
def test_commands_marked_sh_run_as_they_stand(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(TOP / "configs")
    monkeypatch.chdir(tmp_path)
    assert command.line.startswith("unclip ")
    code = main(shlex.split(command.line)[1:])
    captured = capsys.readouterr()
    assert code == 0 and captured.out, captured.err


def test_the_runbook_quotes_messages_that_the_program_has() -> None:
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for package in ("stages", "cluster", "flows")
        for path in sorted((TOP / package).glob("*.py"))
    )
    table = (TOP / "docs" / "operations.md").read_text().partition("## When it stops")[2]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    quoted = [part.strip() for row in rows for text in re.findall(r"`([^`]+)`", row) for part in text.split("...")]
    missing = [part for part in quoted if part.strip(" ;:") and part.strip(" ;:") not in sources]
    assert len(rows) >= 12 and not missing, missing
