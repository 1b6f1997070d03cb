"""Connections of one unit of the download: only to checked addresses, one deadline for all of an exchange, kept open.

The address that was checked is the address that is connected to, so a changing DNS answer leads nowhere. A connection
whose answer was read to its end is used again for the next row of the same host: that spares both sides the handshakes.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from stages.failure_codes import FetchError
from stages.resolver import Resolver

Origin = tuple[str, str, int]  # scheme, host, port

# A server, or what balances its load, has ended the connection without a word; nothing is wrong with its certificate.
HUNG_UP = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
_BUFFER_BYTES = 1 << 16
_MAX_IDLE = 64
_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)  # Linux


def remaining(deadline: float) -> float:
    """Return the seconds left until ``deadline`` of ``time.monotonic()``.

    Raises:
        FetchError: ``timeout`` when there are none.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise FetchError("timeout", "the deadline has passed")
    return left


class Connection:
    """The part of a socket that ``http.client`` uses, with one deadline for all of an exchange.

    A socket's own time-out starts anew with every read: a server that sends one byte a second would never meet it.

    Attributes:
        origin: whom it leads to.
        deadline: of the current exchange, ``time.monotonic()``.
        is_reused: whether an earlier exchange went over it.
        has_leftover: whether the server sent more than the answer: what follows cannot be trusted.
    """

    def __init__(self, raw: socket.socket, origin: Origin, deadline: float) -> None:
        self.origin = origin
        self.deadline = deadline
        self.is_reused = False
        self.has_leftover = False
        self._raw = raw

    def sendall(self, data: bytes) -> None:
        """Send a request."""
        self._raw.settimeout(remaining(self.deadline))
        self._raw.sendall(data)
        if _QUICK_ACK is not None:
            # A server that sends headers and body apart waits for our word in between: 40 ms of silence by default.
            self._raw.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Give the stream of one answer."""
        return _Answer(self)

    def receive_into(self, buffer: Any) -> int:
        """Read what has arrived, within the deadline."""
        self._raw.settimeout(remaining(self.deadline))
        return self._raw.recv_into(buffer)

    def close(self) -> None:
        """Do nothing: ``http.client`` calls this after every answer that ends the connection."""

    def shut(self) -> None:
        """Close the socket."""
        self._raw.close()

    @property
    def is_usable(self) -> bool:
        """Whether the other side still waits for a request: it has neither closed nor sent anything unasked."""
        if self.has_leftover or (isinstance(self._raw, ssl.SSLSocket) and self._raw.pending()):
            return False
        poll = select.poll()
        poll.register(self._raw, select.POLLIN)
        return not poll.poll(0)


class _Source(io.RawIOBase):
    """The bytes of a connection until ``is_over``."""

    def __init__(self, connection: Connection) -> None:
        self.is_over = False
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        return None if self.is_over else self._connection.receive_into(buffer)


class _Answer(io.BufferedReader):
    """The stream of one answer; when it is closed, it notes whether bytes are left over."""

    def __init__(self, connection: Connection) -> None:
        self._source = _Source(connection)
        self._connection = connection
        super().__init__(self._source, _BUFFER_BYTES)

    def close(self) -> None:
        if not self.closed:
            self._source.is_over = True
            self._connection.has_leftover |= bool(self.peek(1))
        super().close()


class Connections:
    """Opens and keeps connections, for any number of threads.

    Args:
        allows: whether ``(address, port)`` may be connected to.
        resolver: resolves the names.
    """

    def __init__(self, allows: Callable[[str, int], bool], resolver: Resolver) -> None:
        self._allows = allows
        self._resolver = resolver
        self._lock = threading.Lock()
        self._idle: collections.OrderedDict[Connection, Origin] = collections.OrderedDict()

    def open(self, origin: Origin, deadline: float, *, fresh: bool = False) -> Connection:
        """Return a connection to an allowed address of a host.

        Args:
            origin: scheme, host, port.
            deadline: of the exchange, ``time.monotonic()``.
            fresh: whether it must be a new one.

        Raises:
            FetchError: ``dns``, ``blocked_address``, ``connect``, ``timeout`` or ``tls``.
        """
        while not fresh and (kept := self._take(origin)):
            if kept.is_usable:
                kept.is_reused, kept.deadline = True, deadline
                return kept
            kept.shut()
        scheme, host, port = origin
        raw = self._connect(host, port, deadline)
        if scheme == "https":
            raw = _secured(raw, host, deadline)
        return Connection(raw, origin, deadline)

    def keep(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end."""
        with self._lock:
            self._idle[connection] = connection.origin
            oldest = self._idle.popitem(last=False)[0] if len(self._idle) > _MAX_IDLE else None
        if oldest is not None:
            oldest.shut()

    def close(self) -> None:
        """Close what is kept."""
        with self._lock:
            idle = list(self._idle)
            self._idle.clear()
        for connection in idle:
            connection.shut()

    def _take(self, origin: Origin) -> Connection | None:
        with self._lock:
            found = next((kept for kept, whose in reversed(self._idle.items()) if whose == origin), None)
            if found is not None:
                del self._idle[found]
            return found

    def _connect(self, host: str, port: int, deadline: float) -> socket.socket:
        addresses = self._resolver.addresses(host, deadline)
        allowed = [address for address in addresses if self._allows(address, port)]
        if not allowed:
            raise FetchError("blocked_address", f"{host} is {', '.join(addresses)}, not a public address")
        failure: OSError | None = None
        for position, address in enumerate(allowed):
            try:
                # An address that does not answer leaves time for the others.
                share = remaining(deadline) / (len(allowed) - position)
                return socket.create_connection((address, port), timeout=share)
            except OSError as error:
                failure = error
        reason = "timeout" if isinstance(failure, TimeoutError) else "connect"
        raise FetchError(reason, f"{host}:{port}: {failure}") from failure


def _secured(raw: socket.socket, host: str, deadline: float) -> socket.socket:
    with contextlib.ExitStack() as stack:
        stack.callback(raw.close)
        try:
            raw.settimeout(remaining(deadline))
            secured = _tls_context().wrap_socket(raw, server_hostname=host)
        except TimeoutError as error:
            raise FetchError("timeout", f"{host}: the TLS handshake did not end in time") from error
        except HUNG_UP as error:
            raise FetchError("connect", f"{host}: {error}") from error
        except ssl.SSLError as error:
            raise FetchError("tls", f"{host}: {error}") from error
        except (OSError, ValueError) as error:
            raise FetchError("connect", f"{host}: {error}") from error
        stack.pop_all()
        return secured


@functools.lru_cache(maxsize=1)
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()
