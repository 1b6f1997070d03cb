"""A reverse proxy that gives an S3 server the conditional writes it lacks: If-None-Match and If-Match of a PUT."""

from __future__ import annotations

import http.client
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@contextmanager
def conditional_proxy(endpoint: str) -> Iterator[str]:
    """Serve ``endpoint`` with conditional writes, decided one at a time; yield the proxy's own address."""
    target = urllib.parse.urlsplit(endpoint).netloc
    one_writer = threading.Lock()
    etags: dict[str, str] = {}  # of what was written through here; objects of a test are written nowhere else

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command not in ("PUT", "DELETE"):
                return self._forward(body)
            with one_writer:
                wanted, found = self.headers.get("If-Match"), etags.get(self.path)
                if wanted is not None and found is None:
                    return self._refuse(404, "NoSuchKey")
                if (wanted is not None and found != wanted) or (self.headers.get("If-None-Match") == "*" and found):
                    return self._refuse(412, "PreconditionFailed")
                self._forward(body)

        do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

        def _forward(self, body: bytes) -> None:
            connection = http.client.HTTPConnection(target, timeout=30)
            try:
                # The signature covers the Host header: it goes through as it is.
                connection.request(self.command, self.path, body=body or None, headers=dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
            finally:
                connection.close()
            if self.command == "PUT" and answer.status == 200:
                etags[self.path] = answer.headers["ETag"]
            elif self.command == "DELETE":
                etags.pop(self.path, None)
            length = int(answer.headers.get("Content-Length") or 0) if self.command == "HEAD" else len(content)
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            self._answer(answer.status, headers, content, length)

        def _refuse(self, status: int, code: str) -> None:
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>refused</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, text, len(text))

        def _answer(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

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
