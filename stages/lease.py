"""Leases: of all runs that want to do a stage, one does it; the others wait, and take over if it dies.

A lease is an object in the store beside the stage's manifest, changed by compare and swap only (``stages/swap.py``)::

    <root>/<stage>/<fingerprint>/lease.json      owner, token, beat, progress; ``free`` once the work has ended

* The owner changes it every ``ttl_s / 4``. A waiting run takes over once it has not *changed* for ``ttl_s`` by its own
  monotonic clock: no two machines' clocks are ever compared.
* An owner on the same machine whose process is gone is replaced at once.
* The token rises with every owner and never falls: the object is not deleted. An owner that was only stopped and wakes
  up later finds another token at its next beat, and before it publishes anything that others rely on
  (``Lease.publish``). What shards write needs no fence where equal work has equal bytes (``Stage.repeatable``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages import storage, swap
from stages.clock import utc_now
from stages.errors import IntegrityError, StageError, StorageError

logger = logging.getLogger(__name__)

LEASE_NAME = "lease.json"
_BEATS_PER_TTL = 4
_MAX_POLL_S = 1.0
FENCE_EVERY_S = 15.0


class LeaseLostError(StageError):
    """Another run has taken the work over; this one publishes nothing more."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, so described that it can be told from every other one.

    Attributes:
        host: its machine's name, for people.
        pid: its number there.
        machine: one boot of one machine and its space of process numbers; empty where that is not known.
        started: when the process began, in the machine's ticks: numbers are used again.
        run: what the process calls its run, for people.
        nonce: random; two claims of one process differ.
    """

    host: str
    pid: int
    machine: str
    started: str
    run: str
    nonce: str

    @classmethod
    def this(cls, run: str = "") -> Owner:
        """Describe this process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_this_machine(),
            started=_start_of(os.getpid()) or "",
            run=run,
            nonce=secrets.token_hex(8),
        )

    def is_gone(self) -> bool:
        """Tell whether this process certainly exists no more; False where that cannot be seen from here."""
        return bool(self.machine) and self.machine == _this_machine() and _start_of(self.pid) != self.started

    def __str__(self) -> str:
        run = f", run {self.run}" if self.run else ""
        return f"process {self.pid} on {self.host}{run}"


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What a lease says.

    Attributes:
        token: rises with every owner.
        owner: who has it, or had it last.
        since: when the owner got it, for people.
        beat: rises as long as the owner lives.
        is_free: whether the work has ended.
        num_done: shards done.
        num_shards: shards in all; 0: not known yet.
    """

    token: int
    owner: Owner
    since: str
    beat: int = 0
    is_free: bool = False
    num_done: int = 0
    num_shards: int = 0

    @property
    def is_over(self) -> bool:
        """Whether certainly nobody works under it: it is free, or its process is gone, as far as that is seen here."""
        return self.is_free or self.owner.is_gone()

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, uri: str) -> Holding:
        """Read it back.

        Raises:
            IntegrityError: if it is no lease.
        """
        try:
            value = json.loads(data)
            return cls(**{**value, "owner": Owner(**value["owner"])})
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{uri}: not a lease ({error}); delete it and run again") from error

    def __str__(self) -> str:
        progress = f", {self.num_done} of {self.num_shards} shards done" if self.num_shards else ""
        return f"{self.owner} since {self.since}{progress}"


def lease_uri(root: str, stage: str, fingerprint: str) -> str:
    """Return where the lease of a stage's result is."""
    return storage.join(root, stage, fingerprint, LEASE_NAME)


def read_lease(uri: str) -> Holding | None:
    """Read a lease; None if nobody ever had it."""
    found = swap.read(uri)
    return Holding.from_bytes(found.data, uri) if found is not None else None


def working(root: str, *, ttl_s: float) -> dict[str, Holding]:
    """Find out who works on a store at present.

    An owner elsewhere lives if it changes its lease once more; that takes a fourth of ``ttl_s``, and ``ttl_s`` where it
    is dead.

    Args:
        root: the store.
        ttl_s: seconds without change after which an owner counts as dead.

    Returns:
        Path of the lease below the root -> what it says.
    """
    names = [name for name in storage.list_files(root) if name.count("/") == 2 and name.endswith("/" + LEASE_NAME)]
    alive: dict[str, Holding] = {}
    unsure: dict[str, str] = {}
    for name in names:
        found = swap.read(storage.join(root, name))
        holding = Holding.from_bytes(found.data, name) if found is not None else None
        if found is None or holding is None or holding.is_over:
            continue
        if holding.owner.machine == _this_machine() != "":
            alive[name] = holding
        else:
            unsure[name] = found.version
    deadline = time.monotonic() + ttl_s
    while unsure and time.monotonic() < deadline:
        time.sleep(min(_MAX_POLL_S, ttl_s / 10))
        for name, version in list(unsure.items()):
            found = swap.read(storage.join(root, name))
            if found is None or found.version != version:
                del unsure[name]
                if found is not None and not (holding := Holding.from_bytes(found.data, name)).is_free:
                    alive[name] = holding
    return alive


@dataclass(frozen=True, kw_only=True)
class Fence:
    """What a worker on another machine needs to ask whether its run still has the lease; crosses processes.

    Attributes:
        uri: the lease.
        token: that of the run.
    """

    uri: str
    token: int

    def check(self) -> None:
        """Refuse to go on for a run that has been replaced; a store that does not answer refuses nothing.

        Raises:
            LeaseLostError: if the token is another one by now.
        """
        with contextlib.suppress(StorageError):
            found = read_lease(self.uri)
            if found is not None and found.token != self.token:
                raise _lost(self.uri, found)


def fenced(
    should_stop: Callable[[], bool], fence: Callable[[], None], every_s: float = FENCE_EVERY_S
) -> Callable[[], bool]:
    """Return ``should_stop`` with a look at the fence now and then: long work ends when its run is replaced."""
    looked_at = time.monotonic()

    def ask() -> bool:
        nonlocal looked_at
        if time.monotonic() - looked_at >= every_s:
            fence()
            looked_at = time.monotonic()
        return should_stop()

    return ask


_HELD: set[Lease] = set()


def release_all(*, timeout_s: float) -> None:
    """Give back every lease of this process, which is about to end hard; what takes longer is left to its ``ttl_s``.

    Args:
        timeout_s: for all of them together.
    """
    threads = [threading.Thread(target=lease.release, daemon=True) for lease in tuple(_HELD)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class Lease:
    """A lease this process holds; made by ``hold``. Its beat is a thread of its own.

    Args:
        uri: of the lease.
        holding: what was written there.
        version: of that object.
        ttl_s: seconds without change after which others take over.
    """

    def __init__(self, uri: str, holding: Holding, version: str, ttl_s: float) -> None:
        self.uri = uri
        self._holding = holding
        self._version = version
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost: LeaseLostError | None = None
        self._progress = (0, 0)
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._thread.start()
        _HELD.add(self)

    @property
    def token(self) -> int:
        """Which owner of the lease this is, counted from 1."""
        return self._holding.token

    @property
    def fence(self) -> Fence:
        """What workers ask."""
        return Fence(uri=self.uri, token=self.token)

    def note(self, num_done: int, num_shards: int) -> None:
        """Say how far the work is; those who wait see it with the next beat.

        Raises:
            LeaseLostError: if a beat has found that another run has taken over.
        """
        self._progress = (num_done, num_shards)
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """Make sure that the lease is still held at this moment, by a beat.

        Raises:
            LeaseLostError: if another run has taken over.
            StorageError: if the store does not answer.
        """
        self._beat()
        if self._lost is not None:
            raise self._lost

    def publish(self, objects: Mapping[str, bytes]) -> None:
        """Write objects in their order, each atomically, as this owner or not at all.

        The versions are read before the lease is confirmed. A successor begins after that, so whatever it writes
        changes a version and is never overwritten from here.

        Args:
            objects: URI -> content; the last one is what makes the others count.

        Raises:
            LeaseLostError: if another run has taken over.
        """
        while True:
            versions = {uri: swap.read(uri) for uri in objects}
            self.confirm()
            if all(_swap_in(uri, data, versions[uri]) for uri, data in objects.items()):
                return

    def release(self) -> None:
        """End the beat and let others have the lease; a lease that was lost is left alone."""
        _HELD.discard(self)
        self._ended.set()
        self._thread.join()
        try:
            self._beat(is_free=True)
        except StorageError as error:
            logger.warning("%s: cannot be released (%s); others wait %g s for it", self.uri, error, self._ttl_s)

    def _beat_on(self) -> None:
        while not self._ended.wait(self._ttl_s / _BEATS_PER_TTL) and self._lost is None:
            try:
                self._beat()
            except StorageError as error:  # the next one may get through; whether it came too late, it will find out
                logger.warning("%s: no sign of life could be written: %s", self.uri, error)

    def _beat(self, *, is_free: bool = False) -> None:
        with self._lock:
            if self._lost is not None:
                return
            num_done, num_shards = self._progress
            following = dataclasses.replace(
                self._holding,
                beat=self._holding.beat + 1,
                is_free=is_free,
                num_done=num_done,
                num_shards=num_shards,
            )
            version = swap.replace(self.uri, following.to_bytes(), self._version, settle=False)
            if version is None and (found := swap.read(self.uri)) is not None:
                written = Holding.from_bytes(found.data, self.uri)
                if (written.token, written.owner) == (self._holding.token, self._holding.owner):
                    # A beat of ours that seemed to have failed: its answer was lost.
                    following = dataclasses.replace(following, beat=written.beat + 1)
                    version = swap.replace(self.uri, following.to_bytes(), found.version, settle=False)
            if version is None:
                self._lost = _lost(self.uri, read_lease(self.uri))
            else:
                self._holding, self._version = following, version


@contextlib.contextmanager
def hold(
    root: str,
    stage: str,
    fingerprint: str,
    *,
    ttl_s: float,
    run: str = "",
    on_wait: Callable[[Holding], None] = lambda holding: None,
) -> Iterator[Lease]:
    """Hold the lease of a stage's result for the length of a ``with`` block; wait for it if another run has it.

    Whoever had to wait must look again whether there is still anything to do.

    Args:
        root: the store.
        stage: the stage.
        fingerprint: of its result.
        ttl_s: seconds without change after which an owner counts as dead.
        run: name of this run, for people.
        on_wait: told about the owner, about once a second; may raise to give up.
    """
    lease = claim(lease_uri(root, stage, fingerprint), ttl_s=ttl_s, run=run, on_wait=on_wait)
    try:
        yield lease
    finally:
        lease.release()


def claim(uri: str, *, ttl_s: float, run: str = "", on_wait: Callable[[Holding], None] = lambda holding: None) -> Lease:
    """Get a lease, waiting for it if need be; see ``hold``."""
    owner = Owner.this(run)
    seen, seen_at = "", time.monotonic()
    while True:
        found = swap.read(uri)
        holding = Holding.from_bytes(found.data, uri) if found is not None else None
        if found is not None and found.version != seen:
            seen, seen_at = found.version, time.monotonic()
        if holding is None or holding.is_over or time.monotonic() - seen_at > ttl_s:
            if holding is not None and not holding.is_free:
                logger.warning("%s: taking over from %s", uri.rsplit("/", 3)[-3], holding)
            token = holding.token + 1 if holding is not None else 1
            mine = Holding(token=token, owner=owner, since=utc_now())
            version = (
                swap.create(uri, mine.to_bytes())
                if found is None
                else swap.replace(uri, mine.to_bytes(), found.version)
            )
            if version is not None:
                return Lease(uri, mine, version, ttl_s)
            continue
        on_wait(holding)
        time.sleep(min(_MAX_POLL_S, ttl_s / 10))


def _swap_in(uri: str, data: bytes, found: swap.Versioned | None) -> bool:
    if found is None:
        return swap.create(uri, data, settle=False) is not None
    return swap.replace(uri, data, found.version, settle=False) is not None


def _lost(uri: str, found: Holding | None) -> LeaseLostError:
    stage = uri.rsplit("/", 3)[-3]
    by = f"by {found}" if found is not None else "away: its lease is gone"
    return LeaseLostError(f"{stage}: taken over {by}; this run writes nothing more, run again to follow the other one")


def _this_machine() -> str:
    """Name this machine, this boot of it, and this container's space of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Return when a process began, in ticks since boot; None if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
