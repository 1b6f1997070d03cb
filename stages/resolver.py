"""Name resolution for one unit of the download: every host once, never longer than a fetch may take, with a summary.

The system's resolver cannot be interrupted, so it runs in helper threads that a fetch waits for no longer than its
deadline; a late answer is still kept for the rows that follow. Negative answers are kept too: that a name does not
exist for the whole unit, a failure of the resolver itself for a moment.
"""

from __future__ import annotations

import ipaddress
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from stages.failure_codes import FetchError

# Lookups that hang keep their thread until the system gives up on them.
_MAX_LOOKUPS_AT_ONCE = 64
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class _Lookup:
    """One question to the resolver and its answer."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.started_at = time.monotonic()
        self.finished_at: float | None = None
        self.addresses: tuple[str, ...] = ()
        self.error: Exception | None = None
        self.done = threading.Event()

    @property
    def failed(self) -> bool:
        return not self.addresses

    @property
    def lasting(self) -> bool:
        """Whether the name does not exist, as opposed to a resolver that did not answer."""
        return isinstance(self.error, UnicodeError) or (
            isinstance(self.error, socket.gaierror) and self.error.errno in _NO_SUCH_NAME
        )

    @property
    def seconds(self) -> float:
        return (self.finished_at or time.monotonic()) - self.started_at


class Resolver:
    """Answers from any number of threads; see the module's docstring.

    Args:
        patience_s: longest wait for one lookup, seconds.
        forget_s: how long a failure of the resolver itself is kept, seconds.
        lookup: the system's ``getaddrinfo``.
    """

    def __init__(
        self, *, patience_s: float, forget_s: float = 0.0, lookup: Callable[..., Any] = socket.getaddrinfo
    ) -> None:
        self._patience_s = patience_s
        self._forget_s = forget_s
        self._lookup = lookup
        self._lock = threading.Lock()
        self._running = threading.BoundedSemaphore(_MAX_LOOKUPS_AT_ONCE)
        self._latest: dict[str, _Lookup] = {}
        self._all: list[_Lookup] = []

    def addresses(self, host: str, deadline: float) -> tuple[str, ...]:
        """Return the IP addresses of a host, at least one.

        Args:
            host: a name or an IP address in any notation.
            deadline: ``time.monotonic()`` at which to give up.

        Raises:
            FetchError: ``dns``.
        """
        literal = _literal(host)
        if literal:
            return literal
        lookup = self._find_or_start(host, deadline)
        patience = min(deadline, lookup.started_at + self._patience_s) - time.monotonic()
        if not lookup.done.wait(max(patience, 0.0)):
            raise FetchError("dns", f"{host}: no answer within {lookup.seconds:.1f} s")
        if lookup.failed:
            raise FetchError("dns", f"{host}: {lookup.error}", lasting=lookup.lasting)
        return lookup.addresses

    def summary(self) -> dict[str, float]:
        """Return the health of the resolver: lookups, failures, median and worst seconds."""
        with self._lock:
            lookups = list(self._all)
        seconds = [lookup.seconds for lookup in lookups] or [0.0]
        return {
            "dns_lookups": len(lookups),
            "dns_failures": sum(lookup.failed for lookup in lookups),
            "dns_median_s": round(statistics.median(seconds), 4),
            "dns_worst_s": round(max(seconds), 4),
        }

    def _find_or_start(self, host: str, deadline: float) -> _Lookup:
        with self._lock:
            found = self._latest.get(host)
            if found is not None and not self._is_stale(found):
                return found
            lookup = _Lookup(host)
            self._latest[host] = lookup
            self._all.append(lookup)
        if not self._running.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            self._finish(lookup, (), TimeoutError("too many lookups hang"))
        else:
            threading.Thread(target=self._run, args=(lookup,), name=f"dns-{host}", daemon=True).start()
        return lookup

    def _is_stale(self, lookup: _Lookup) -> bool:
        if not lookup.failed or lookup.finished_at is None or lookup.lasting:
            return False
        return time.monotonic() - lookup.finished_at >= self._forget_s

    def _run(self, lookup: _Lookup) -> None:
        try:
            answers = self._lookup(lookup.host, None, type=socket.SOCK_STREAM)
            addresses = tuple(dict.fromkeys(str(answer[4][0]) for answer in answers))
            self._finish(lookup, addresses, None if addresses else OSError("no addresses"))
        except Exception as error:  # whatever it is: somebody waits for an answer
            self._finish(lookup, (), error)
        finally:
            self._running.release()

    def _finish(self, lookup: _Lookup, addresses: tuple[str, ...], error: Exception | None) -> None:
        lookup.addresses, lookup.error, lookup.finished_at = addresses, error, time.monotonic()
        lookup.done.set()


def _literal(host: str) -> tuple[str, ...]:
    """Return the address that a host is by itself, also in the short notations of IPv4; nothing for a name."""
    try:
        return (str(ipaddress.ip_address(host)),)
    except ValueError:
        pass
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(answer[4][0]) for answer in answers))
