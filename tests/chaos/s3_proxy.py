"""A reverse proxy before an S3 server that spoils answers by a seeded schedule."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "503", "truncated", "reset_before", "reset_after")
_CODES = {"500": "InternalError", "503": "SlowDown"}
_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class Schedule:
    """Decides which request is spoiled, and how: a function of the seed and the request's number.

    Attributes:
        fraction: share of spoiled requests.
        seed: of the schedule.
        faults: the kinds to choose from.
        counts: what has been done so far.
    """

    fraction: float
    seed: int = 0
    faults: tuple[str, ...] = FAULTS
    counts: Counter[str] = field(default_factory=Counter)
    _number: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> str:
        """Return the fault of the next request, or ``ok``."""
        with self._lock:
            self._number += 1
            draw = random.Random(f"{self.seed}:{self._number}")
            fault = draw.choice(self.faults) if draw.random() < self.fraction else "ok"
            self.counts[fault] += 1
        return fault


@contextmanager
def faulty_proxy(endpoint: str, schedule: Schedule) -> Iterator[str]:
    """Serve a spoiled view of ``endpoint``; yield its own address."""
    target = urllib.parse.urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fault = schedule.next()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault == "reset_before":
                return self._reset()
            if fault in _CODES:
                code = _CODES[fault]
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>spoiled</Message></Error>".encode()
                return self._answer(int(fault), {"Content-Type": "application/xml"}, text, len(text))
            connection = http.client.HTTPConnection(target, timeout=30)
            try:
                # The signature covers the Host header: it goes through as it is.
                connection.request(self.command, self.path, body=body or None, headers=dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
            finally:
                connection.close()
            if fault == "reset_after":
                return self._reset()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            if self.command == "HEAD":
                return self._answer(answer.status, headers, b"", int(answer.headers.get("Content-Length") or 0))
            sent = content[: len(content) // 2] if fault == "truncated" else content
            self._answer(answer.status, headers, sent, len(content))
            if len(sent) < len(content):
                self.close_connection = True

        do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

        def _answer(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        def _reset(self) -> None:
            # Lingering for no time makes the kernel answer with a reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):
                self.close_connection = True  # we closed it, or the client did

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
