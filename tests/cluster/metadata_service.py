"""An instance metadata service on loopback, as strict as EC2's where version 1 of its protocol is switched off."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_TOKEN = "X-aws-ec2-metadata-token"
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


class MetadataService:
    """What it answers, and what it was asked.

    Attributes:
        url: where it is.
        notices: path -> text; all other paths are 404.
        tokens: those that are taken at present.
        status: what it answers to everything, if not 200: it is unwell.
        asked: method and path of every request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.notices: dict[str, str] = {}
        self.tokens: set[str] = set()
        self.status = 200
        self.asked: list[tuple[str, str]] = []


@contextlib.contextmanager
def metadata_service() -> Iterator[MetadataService]:
    """Serve one during a ``with`` block."""
    service = MetadataService()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            service.asked.append(("PUT", self.path))
            if service.status != 200 or self.path != "/latest/api/token":
                return self._answer(service.status if service.status != 200 else 404)
            lifetime = self.headers.get(f"{_TOKEN}-ttl-seconds", "")
            if not (lifetime.isdigit() and 1 <= int(lifetime) <= 21600) or "X-Forwarded-For" in self.headers:
                return self._answer(400)
            token = secrets.token_hex(8)
            service.tokens.add(token)
            return self._answer(200, token)

        def do_GET(self) -> None:
            service.asked.append(("GET", self.path))
            if service.status != 200:
                return self._answer(service.status)
            if self.headers.get(_TOKEN) not in service.tokens:
                return self._answer(401)
            text = service.notices.get(self.path)
            return self._answer(404) if text is None else self._answer(200, text)

        def _answer(self, status: int, text: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
