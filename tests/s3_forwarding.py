"""What the reverse proxies of the tests share: requests go on to a real server, answers come back."""

from __future__ import annotations

import http.client
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class Answer(NamedTuple):
    """An answer of the server; ``num_bytes`` is the length it tells, also where it sends no body (HEAD)."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    num_bytes: int


class ForwardingHandler(BaseHTTPRequestHandler):
    """Knows how to ask the server and how to answer; all methods come to ``do_GET`` of the proxy."""

    protocol_version = "HTTP/1.1"
    target: str  # host:port of the server

    def body(self) -> bytes:
        """Read the request's body."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def forward(self, body: bytes) -> Answer:
        """Ask the server the same."""
        connection = http.client.HTTPConnection(self.target, timeout=30)
        try:
            # The signature covers the Host header: it goes through as it is.
            connection.request(self.command, self.path, body=body or None, headers=dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        length = int(answer.headers.get("Content-Length") or 0) if self.command == "HEAD" else len(content)
        return Answer(answer.status, headers, content, length)

    def answer(self, answer: Answer) -> None:
        """Send an answer to the client."""
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(answer.num_bytes))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else answer.content)

    def refuse(self, status: int, code: str, message: str) -> None:
        """Answer with an error of S3."""
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.answer(Answer(status, {"Content-Type": "application/xml"}, text, len(text)))

    def do_PUT(self) -> None:
        """Treat like any other request."""
        self.do_GET()  # type: ignore[attr-defined]

    do_POST = do_DELETE = do_HEAD = do_PUT

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(handler: type[ForwardingHandler]) -> Iterator[str]:
    """Run a proxy on loopback; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def counting_proxy(endpoint: str) -> Iterator[tuple[str, Counter[str]]]:
    """Serve a view of ``endpoint``; yield its own address, and how many requests of each kind have come."""
    counts: Counter[str] = Counter()

    class Handler(ForwardingHandler):
        target = urllib.parse.urlsplit(endpoint).netloc

        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query, keep_blank_values=True)
            kind = "LIST" if self.command == "GET" and "list-type" in query else self.command
            # Several objects are deleted with one POST.
            counts["DELETE" if kind == "POST" and "delete" in query else kind] += 1
            self.answer(self.forward(self.body()))

    with serving(Handler) as address:
        yield address, counts
