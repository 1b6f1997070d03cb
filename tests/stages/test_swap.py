"""Compare and swap: of all who try, one succeeds; on a disk, on S3, and on an S3 server that ignores conditions."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages import storage, swap
from stages.errors import StorageError
from tests.chaos.s3_proxy import Schedule, faulty_proxy
from tests.s3_forwarding import ForwardingHandler, serving


def test_create_then_replace(atomic_root: str) -> None:
    uri = storage.join(atomic_root, "a/b.json")
    assert swap.is_atomic(uri)
    assert swap.read(uri) is None
    assert swap.replace(uri, b"early", "no version") is None
    first = swap.create(uri, b"one")
    assert first is not None
    assert swap.read(uri) == swap.Versioned(b"one", first)
    assert swap.create(uri, b"two") is None
    second = swap.replace(uri, b"two", first)
    assert second is not None and second != first
    assert swap.replace(uri, b"three", first) is None
    assert swap.read(uri) == swap.Versioned(b"two", second)
    assert list(storage.list_entries(atomic_root, temporary=True)) == ["a/b.json"]


def test_of_many_creators_one_succeeds(atomic_root: str) -> None:
    uri = storage.join(atomic_root, "x")
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda i: swap.create(uri, b"%d" % i), range(16)))
    winners = [i for i, version in enumerate(versions) if version is not None]
    found = swap.read(uri)
    assert len(winners) == 1
    assert found == swap.Versioned(b"%d" % winners[0], versions[winners[0]] or "")


def test_no_update_is_lost(atomic_root: str) -> None:
    uri = storage.join(atomic_root, "list")

    def add(number: int) -> None:
        swap.update(uri, lambda old: json.dumps([*(json.loads(old) if old else []), number]).encode())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(20)))
    assert sorted(json.loads(storage.read_bytes(uri))) == list(range(20))


def _count(uri: str, times: int) -> None:
    """Add to a counter; two may well want to write the same number at the same moment."""
    for _ in range(times):
        swap.update(uri, lambda old: b"%d" % (int(old or b"0") + 1))


def test_processes_exclude_each_other(tmp_path: Path) -> None:
    uri = str(tmp_path / "counter")
    processes = [multiprocessing.get_context("fork").Process(target=_count, args=(uri, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert storage.read_bytes(uri) == b"200"


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    uri = tmp_path / "x"
    version = swap.create(str(uri), b"one")
    assert version is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        file = uri.open("rb+")
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(writing, b"!")
        signal.pause()
    os.read(reading, 1)
    answers: list[str | None] = []
    waiting = threading.Thread(target=lambda: answers.append(swap.replace(str(uri), b"two", version)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    waiting.join(10)
    assert answers == [swap.Versioned(b"two", answers[0] or "").version] and uri.read_bytes() == b"two"
    os.close(reading)
    os.close(writing)


def test_a_file_system_without_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="knows no hard links or locks"):
        swap.create(str(tmp_path / "x"), b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_answer_is_no_refusal(s3_root: str, conditional_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server writes, the answer is lost, and the repeated request is refused because of our own write."""
    monkeypatch.setattr(storage, "_RETRY_WAITS_S", (0.0,) * 8)
    uri = storage.join(s3_root, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", conditional_server)
    version = swap.create(uri, b"0")
    schedule = Schedule(0.5, faults=("reset_after",))
    with faulty_proxy(conditional_server, schedule) as endpoint:
        monkeypatch.setitem(swap._REFUSES, (endpoint, "bucket"), True)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for number in range(1, 7):
            assert version is not None
            version = swap.replace(uri, b"%d" % number, version)
    assert version is not None and schedule.counts["reset_after"] > 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", conditional_server)
    assert swap.read(uri) == swap.Versioned(b"6", version)


def test_a_server_that_ignores_conditions_is_found_out(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(swap, "_REFUSES", {})
    uri = storage.join(s3_root, "x")
    assert not swap.is_atomic(uri)
    assert "ignores conditional writes" in caplog.text
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda i: swap.create(uri, b"%d" % i), range(4)))
    assert sum(version is not None for version in versions) == 1
    found = swap.read(uri)
    assert found is not None
    assert found == swap.Versioned(b"%d" % versions.index(found.version), found.version)
    assert swap.create(uri, b"late") is None
    assert swap.replace(uri, b"new", "other") is None
    assert swap.replace(uri, b"new", found.version, settle=False) is not None
    assert list(storage.list_entries(s3_root, temporary=True)) == ["x"]


def test_a_name_that_is_not_seen_at_once_is_no_failure(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ignores conditions may lose a name for a moment, while several write it: only the end counts."""

    class Handler(ForwardingHandler):
        target = urllib.parse.urlsplit(s3_server).netloc

        def do_GET(self) -> None:
            body = self.body()
            if self.command == "HEAD":
                return self.refuse(404, "NoSuchKey", "not seen")
            self.answer(self.forward(body))

    uri = storage.join(s3_root, "x")
    with serving(Handler) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setitem(swap._REFUSES, (endpoint, "bucket"), False)
        version = swap.create(uri, b"1")
        assert version is not None and swap.read(uri) == swap.Versioned(b"1", version)
