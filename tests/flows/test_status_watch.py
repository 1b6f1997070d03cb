"""``unclip status --watch``: it sees a run of another process, outlives what passes, and ends when the run has."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flows.project import open_project
from flows.run_record import begin_run, end_run
from flows.watch import StageLook, Watch
from stages import storage
from stages.base import Shard
from stages.manifest import Manifest
from stages.runner import StageState
from tests.conftest import free_port
from tests.flows.prefect_setup import eventually
from tests.stages.toy_stages import Numbers, NumbersConfig

TOP = Path(__file__).parents[2]
TINY = str(TOP / "tests" / "tiny.yaml")
_NUM_COLUMNS = 60  # narrower than any line of JSON


def settings(root: Path, **more: object) -> list[str]:
    given = {"root": root, "cluster.executor": "local", "source.shapes.port": free_port(), **more}
    return [part for name, value in given.items() for part in ("-s", f"{name}={value}")]


def started(*words: str, **streams: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = os.environ | {"PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "", "LINES": ""}
    return subprocess.Popen([sys.executable, "-m", "flows.cli", *words], env=given, **streams)


class Terminal:
    """A real terminal, as wide as a phone, with a command on it; what it shows is in ``text``."""

    def __init__(self, *words: str, errors: int | None = None) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, _NUM_COLUMNS, 0, 0))
        self.process = started(*words, stdin=theirs, stdout=theirs, stderr=errors or theirs)
        os.close(theirs)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while data := os.read(self._ours, 65536):
                self.text += data.decode(errors="replace")

    @property
    def words(self) -> str:
        """What it shows, wherever the terminal breaks its lines."""
        return " ".join(self.text.split())

    def end(self, timeout_s: float = 60) -> int:
        """Wait for the command; return its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def close(self) -> None:
        """Give it back."""
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        os.close(self._ours)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def recorded(root: Path, *, exit_code: int, status: str) -> None:
    """Write the record of a run that has ended."""
    record = begin_run(str(root), config="c.yaml", config_digest="0" * 16, selected=["source"], estimates={})
    end_run(str(root), record, status=status, outcomes=[], errors=[], exit_code=exit_code)


# ---- what passes ----------------------------------------------------------------------------------------------------


class Listed(Numbers):
    """Reads from the store what it has to do."""

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        counts = storage.read_json(f"{self.root}/counts.json")
        return [self.shard(i, first=i, count=count) for i, count in enumerate(counts)]


def test_a_plan_that_cannot_be_made_is_made_at_a_later_look(tmp_path: Path) -> None:
    stage = Listed(NumbersConfig(), root=str(tmp_path))
    state = StageState(name=stage.name, fingerprint="0" * 16, status="pending", reason="")
    project = replace(open_project(TINY, []), stages={stage.name: stage}, states={stage.name: state})
    watch = Watch(project)
    (look,) = watch.look()
    assert look.status == "blocked" and "counts.json" in look.note
    storage.write_json(f"{tmp_path}/counts.json", [1, 2])
    assert watch.look() == [StageLook(stage="numbers", status="not started", num_done=0, num_total=2)]
    storage.delete(f"{tmp_path}/counts.json")
    assert [look.num_total for look in watch.look()] == [2], "a plan that was made is not made twice"


def test_a_store_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    obstacle = tmp_path / "source" / "shards"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    line = ["status", TINY, "--watch", "--every", "0.5", "--json", *settings(tmp_path)]
    with (tmp_path / "said").open("wb") as said, (tmp_path / "looks").open("wb") as looks:
        process = started(*line, stdout=looks.fileno(), stderr=said.fileno())
        try:
            eventually(lambda: "looking again in 0.5 s" in (tmp_path / "said").read_text(), 60, "a look that fails")
            assert (tmp_path / "looks").read_text() == ""
            obstacle.unlink()
            eventually(lambda: (tmp_path / "looks").read_text(), 60, "a look")
            recorded(tmp_path, exit_code=0, status="done")
            assert process.wait(60) == 0
        finally:
            process.kill()
    first, *_, last = [json.loads(text) for text in (tmp_path / "looks").read_text().splitlines()]
    assert first["run"] is None and last["run"]["status"] == "done"
    assert last["stages"][0]["status"] == "not started"


def test_a_store_that_never_answers_is_an_error(tmp_path: Path) -> None:
    obstacle = tmp_path / "source" / "shards"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    line = ["status", TINY, "--watch", "--every", "0.01", *settings(tmp_path)]
    process = started(*line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1 and said.count("looking again") == 11 and "unclip: " in said.splitlines()[-1]


# ---- its end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "expected"), [([], 1), ([("done", 0)], 0), ([("done", 0), ("failed", 1)], 1)])
def test_where_nothing_runs_it_waits_for_some_looks_and_ends(
    tmp_path: Path, terminals: list[Terminal], before: list[tuple[str, int]], expected: int
) -> None:
    for status, code in before:
        recorded(tmp_path, exit_code=code, status=status)
        time.sleep(1.1)  # ids sort by the second
    terminal = Terminal("status", TINY, "--watch", "--every", "0.02", "--json", *settings(tmp_path))
    terminals.append(terminal)
    assert terminal.end() == expected
    # Also on a terminal each look is one whole line of JSON, however narrow that is.
    looks = [json.loads(text) for text in terminal.text.splitlines()]
    assert len(looks) == 12 and all(len(text) > 2 * _NUM_COLUMNS for text in terminal.text.splitlines())


def test_it_ends_with_a_run_that_begins_and_fails_meanwhile(tmp_path: Path, terminals: list[Terminal]) -> None:
    recorded(tmp_path, exit_code=0, status="done")
    terminal = Terminal("status", TINY, "--watch", "--every", "2", *settings(tmp_path))
    terminals.append(terminal)
    eventually(lambda: ": done at" in terminal.words, 60, "a look")
    recorded(tmp_path, exit_code=7, status="failed")
    asked_at = time.monotonic()
    assert terminal.end() == 7 and time.monotonic() - asked_at < 12
    assert ": failed at" in terminal.words.rpartition("store: ")[2], "the last look stays"


# ---- a real run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_shards_are_seen_to_move_while_another_process_works(
    tmp_path: Path, prefect_state: Path, monkeypatch: pytest.MonkeyPatch, terminals: list[Terminal]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(prefect_state))
    given = settings(tmp_path / "store", **{"source.shapes.num_images": 120_000, "source.rows_per_shard": 10_000})
    with (tmp_path / "said").open("wb") as said:
        run = started("run", TINY, "--until", "source", *given, stdout=said.fileno(), stderr=said.fileno())
        try:
            eventually(lambda: list((tmp_path / "store" / "runs").glob("*.json")), 120, "a run on record")
            terminal = Terminal("status", TINY, "--watch", "--every", "0.1", *given)
            terminals.append(terminal)
            assert terminal.end(240) == 0, terminal.text[-2000:]
            assert run.wait(60) == 0, (tmp_path / "said").read_text()
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait(60)
    # The table is squeezed into sixty columns, but for its counts.
    seen = sorted({int(count) for count in re.findall(r"(\d+)/12", terminal.text)})
    assert len(seen) >= 4 and seen[-1] == 12, (seen, terminal.text[-2000:])


@pytest.mark.slow
def test_it_ends_with_a_run_that_fails(
    tmp_path: Path, prefect_state: Path, monkeypatch: pytest.MonkeyPatch, terminals: list[Terminal]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(prefect_state))
    with socket.socket() as taken, (tmp_path / "said").open("wb") as said:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = settings(tmp_path / "store", **{"source.shapes.port": taken.getsockname()[1]})
        run = started("run", TINY, "--until", "download", *given, stdout=said.fileno(), stderr=said.fileno())
        try:
            eventually(lambda: list((tmp_path / "store" / "runs").glob("*.json")), 120, "a run on record")
            terminal = Terminal("status", TINY, "--watch", "--every", "0.2", *given)
            terminals.append(terminal)
            assert terminal.end(240) == run.wait(60) == 1, (tmp_path / "said").read_text()
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait(60)
    assert ": failed at" in terminal.words
