"""Leases: one owner at a time, dead ones are replaced, woken ones write nothing; no two clocks are compared."""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stages import storage, swap
from stages.base import Stage
from stages.errors import StorageError
from stages.executor import ClusterConfig, LocalExecutor
from stages.lease import (
    Holding,
    LeaseLostError,
    Owner,
    claim,
    fenced,
    hold,
    lease_uri,
    read_lease,
    release_all,
    working,
)
from stages.manifest import Manifest, manifest_uri
from stages.runner import inspect_stage, run_stage
from tests.stages.toy_stages import Numbers, NumbersConfig

TTL_S = 0.6
HOUR_S = 3600.0
# An owner's time of day, beside that of those who wait for it.
SKEWS = pytest.mark.parametrize("ahead_s", [-6 * HOUR_S, 6 * HOUR_S], ids=["behind", "ahead"])


@contextmanager
def started(root: str, *machine: str, ttl_s: float = TTL_S, ahead_s: float = -3e8) -> Iterator[subprocess.Popen[str]]:
    """Run a process that wants the lease of the numbers, and holds it until it is told to publish."""
    command = [sys.executable, "-m", "tests.stages.lease_holder", root, str(ttl_s), str(ahead_s), *machine]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@contextmanager
def holder(root: str, *machine: str, ttl_s: float = TTL_S, ahead_s: float = -3e8) -> Iterator[subprocess.Popen[str]]:
    """The same, from when it has the lease."""
    with started(root, *machine, ttl_s=ttl_s, ahead_s=ahead_s) as child:
        assert child.stdout is not None and child.stdout.readline().startswith("held ")
        yield child


def stop_between_beats(child: subprocess.Popen[str], uri: str) -> None:
    """Stop an owner that is not just writing its lease: whoever stops then has it locked, and others say so."""
    while True:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        with Path(uri).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                os.kill(child.pid, signal.SIGCONT)
                time.sleep(0.02)


def _numbers(root: str) -> tuple[Stage[NumbersConfig], str]:
    stage = Numbers(NumbersConfig(), root=root)
    return stage, stage.fingerprint({})


def _uri(root: str) -> str:
    return lease_uri(root, "numbers", _numbers(root)[1])


def _do(root: str) -> Manifest:
    """Do the numbers as this process, waiting for whoever does them."""
    stage, fingerprint = _numbers(root)
    with hold(root, stage.name, fingerprint, ttl_s=TTL_S) as lease:
        found = inspect_stage(stage, fingerprint, {}).manifest
        return found or run_stage(stage, fingerprint, {}, LocalExecutor(), ClusterConfig(), lease=lease)


def test_a_process_that_ends_hard_gives_back_all_it_holds(tmp_path: Path) -> None:
    uris = [str(tmp_path / name / "lease.json") for name in ("a", "b")]
    leases = [claim(uri, ttl_s=60) for uri in uris]
    release_all(timeout_s=10)
    for uri, lease in zip(uris, leases, strict=True):
        found = read_lease(uri)
        assert found is not None and found.is_free and found.token == lease.token
        claim(uri, ttl_s=60).release()  # at once, though the owner is alive and its time not up


def test_one_owner_at_a_time_and_the_token_rises(atomic_root: str) -> None:
    uri = storage.join(atomic_root, "a/lease.json")
    inside, tokens = [0], []

    def work(number: int) -> None:
        lease = claim(uri, ttl_s=4.0, run=f"{number}")
        inside[0] += 1
        assert inside[0] == 1
        tokens.append(lease.token)
        lease.note(number, 4)
        time.sleep(0.02)
        inside[0] -= 1
        lease.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert tokens == [1, 2, 3, 4]
    found = read_lease(uri)
    assert found is not None and found.is_free and found.token == 4


@SKEWS
def test_who_waits_sees_progress_and_finds_the_result(tmp_path: Path, ahead_s: float) -> None:
    root = str(tmp_path)
    stage, fingerprint = _numbers(root)
    waits: list[Holding] = []
    with holder(root, ttl_s=1.0, ahead_s=ahead_s) as child, ThreadPoolExecutor(1) as pool:

        def wait() -> tuple[int, Manifest | None]:
            with hold(root, "numbers", fingerprint, ttl_s=1.0, on_wait=waits.append) as lease:
                return lease.token, inspect_stage(stage, fingerprint, {}).manifest

        waiting = pool.submit(wait)
        time.sleep(2.5)  # more than twice the time after which a silent owner would be replaced
        assert not waiting.done()
        child.communicate("go on\n")
        token, manifest = waiting.result()
    assert token == 2 and manifest is not None
    assert manifest.uri == manifest_uri(root, "numbers", fingerprint)
    assert (waits[-1].owner.pid, waits[-1].owner.run) == (child.pid, "child")
    assert (waits[-1].num_done, waits[-1].num_shards) == (3, 3)
    assert str(waits[-1]).startswith(f"process {child.pid} on ") and "3 of 3 shards done" in str(waits[-1])
    for noted in (waits[-1].since, manifest.created_at):  # its clock was wrong indeed
        told_s = datetime.datetime.fromisoformat(noted).timestamp() - time.time()
        assert told_s == pytest.approx(ahead_s, abs=HOUR_S)


@SKEWS
def test_who_waits_with_a_wrong_clock_waits_as_well(tmp_path: Path, ahead_s: float) -> None:
    root = str(tmp_path)
    stage, fingerprint = _numbers(root)
    lease = claim(_uri(root), ttl_s=1.0)
    with started(root, "another boot", ttl_s=1.0, ahead_s=ahead_s) as child:
        assert child.stdout is not None
        for _ in range(25):  # in ten of them a dead owner's time would be up
            assert child.stdout.readline() == "waits\n"
        run_stage(stage, fingerprint, {}, LocalExecutor(), ClusterConfig(), lease=lease)
        lease.release()
        later = (line for line in iter(child.stdout.readline, "") if line != "waits\n")
        assert next(later) == f"held {lease.token + 1}\n"


def test_a_killed_owner_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    with holder(str(tmp_path), ttl_s=1000.0) as child:
        child.kill()
        child.wait()
        started_at = time.monotonic()
        claim(_uri(str(tmp_path)), ttl_s=1000.0).release()
        assert time.monotonic() - started_at < 100


@SKEWS
def test_a_killed_owner_of_another_machine_is_replaced_after_the_time_to_live(tmp_path: Path, ahead_s: float) -> None:
    with holder(str(tmp_path), "another boot", ahead_s=ahead_s) as child:
        child.kill()
        child.wait()
        started_at = time.monotonic()
        lease = claim(_uri(str(tmp_path)), ttl_s=TTL_S)
        assert TTL_S < time.monotonic() - started_at < 100, "by the clock of who waits, and no other"
        assert lease.token == 2
        lease.release()
    assert _do(str(tmp_path)).num_kept == 12


@SKEWS
def test_an_owner_that_was_stopped_and_wakes_up_publishes_nothing(tmp_path: Path, ahead_s: float) -> None:
    root = str(tmp_path)
    with holder(root, "another boot", ahead_s=ahead_s) as child:
        stop_between_beats(child, _uri(root))
        manifest = _do(root)
        before = storage.list_entries(root)
        os.kill(child.pid, signal.SIGCONT)
        answer, _ = child.communicate("go on\n")
    assert answer.startswith("LeaseLostError numbers: taken over by process ")
    assert storage.list_entries(root) == before
    assert Manifest.read_uri(root, manifest.uri) == manifest


@pytest.mark.parametrize("stop_at", ["confirm", "table", "manifest"])
def test_a_stopped_owner_in_the_middle_of_publishing_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str
) -> None:
    """Before it confirms or writes, the owner sleeps; meanwhile a successor takes over and finishes."""
    uri = str(tmp_path / "lease.json")
    objects = [str(tmp_path / name) for name in ("table", "manifest")]
    old = claim(uri, ttl_s=30.0)
    create, confirm = swap.create, old.confirm

    def succeed() -> None:
        monkeypatch.undo()
        found = swap.read(uri)
        assert found is not None
        expired = dataclasses.replace(Holding.from_bytes(found.data, uri), is_free=True)
        assert swap.replace(uri, expired.to_bytes(), found.version)
        new = claim(uri, ttl_s=30.0)
        new.publish(dict.fromkeys(objects, b"new"))
        new.release()

    def create_late(uri: str, data: bytes, *, settle: bool) -> str | None:
        if uri.endswith(stop_at):
            succeed()
        return create(uri, data, settle=settle)

    def confirm_late() -> None:
        if stop_at == "confirm":
            succeed()
        confirm()

    monkeypatch.setattr(swap, "create", create_late)
    monkeypatch.setattr(old, "confirm", confirm_late)
    with pytest.raises(LeaseLostError):
        old.publish(dict.fromkeys(objects, b"old"))
    old.release()
    assert [storage.read_bytes(name) for name in objects] == [b"new", b"new"]
    found = read_lease(uri)
    assert found is not None and found.token == 2 and found.is_free


def test_a_beat_whose_answer_was_lost_is_our_own(atomic_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of a moment, in which what was written is not heard of, costs no run its stage."""
    whole = swap.replace

    def unheard(*given: Any, **options: Any) -> str | None:
        whole(*given, **options)
        raise StorageError("the answer was lost")

    with hold(atomic_root, "numbers", "0" * 16, ttl_s=60.0) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(swap, "replace", unheard)
            lease.note(1, 10)
            with pytest.raises(StorageError):
                lease.confirm()
        lease.note(2, 10)
        lease.confirm()
        found = read_lease(lease.uri)
        assert found is not None and (found.num_done, found.token, found.beat) == (2, lease.token, 2)
    found = read_lease(lease.uri)
    assert found is not None and found.is_free


def test_work_on_another_machine_asks_the_fence(tmp_path: Path) -> None:
    uri = str(tmp_path / "lease.json")
    lease = claim(uri, ttl_s=30.0)
    fence = pickle.loads(pickle.dumps(lease.fence))
    ask = fenced(lambda: False, fence.check, every_s=0.0)
    assert not ask()
    lease.release()
    other = claim(uri, ttl_s=30.0)
    with pytest.raises(LeaseLostError, match="taken over by process"):
        ask()
    other.release()
    Path(uri).unlink()
    fence.check()  # a store that does not answer proves nothing


def test_the_beat_finds_out_and_the_work_ends(tmp_path: Path) -> None:
    uri = str(tmp_path / "lease.json")
    lease = claim(uri, ttl_s=0.2)
    thief = Holding(token=9, owner=Owner.this(), since="").to_bytes()
    swap.update(uri, lambda old: thief)
    with pytest.raises(LeaseLostError):
        for number in range(100):
            lease.note(number, 100)
            time.sleep(0.05)
    lease.release()
    found = swap.read(uri)
    assert found is not None and Holding.from_bytes(found.data, uri).token == 9


@pytest.mark.parametrize("machine", [(), ("elsewhere",)])
def test_who_works_on_a_store_is_found(tmp_path: Path, machine: tuple[str, ...]) -> None:
    root = str(tmp_path)
    with holder(root, *machine) as child:
        (found,) = working(root, ttl_s=30.0).values()
        assert found.owner.pid == child.pid
        child.send_signal(signal.SIGSTOP)
        # On its own machine a process that is stopped may wake up at any time; elsewhere it counts as dead.
        assert len(working(root, ttl_s=TTL_S)) == (0 if machine else 1)
    assert working(root, ttl_s=TTL_S) == {}
    _do(root)
    assert working(root, ttl_s=TTL_S) == {}, "free"


def test_a_number_used_again_is_another_process() -> None:
    this = Owner.this()
    assert not this.is_gone()
    assert dataclasses.replace(this, started="1").is_gone()
    assert not dataclasses.replace(this, started="1", machine="elsewhere").is_gone()
    assert not dataclasses.replace(this, started="1", machine="").is_gone()
