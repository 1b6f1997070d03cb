"""A real HTTP server on loopback that answers as badly as the web can: one path for each kind of answer."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import io
import socket
import struct
import threading
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, image_format, **options)
    return sink.getvalue()


def noise(side: int = 20, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(width: int, height: int, rows: bytes, *, bit_depth: int = 8, colour_type: int = 2) -> bytes:
    """Write a PNG that claims a size and holds these rows, if any."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 1)),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return chunks


PNG = encoded(noise(), "PNG")


@functools.cache
def special_file(name: str) -> bytes:
    """Return a file that is hard on decoders."""
    if name == "gif":
        frames = [Image.new("P", (30, 20), index) for index in range(5)]
        return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    if name == "cmyk":
        return encoded(noise(40).convert("CMYK"), "JPEG")
    if name == "deep":
        ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (40, 1))
        return encoded(Image.fromarray(ramp), "PNG")
    if name == "bomb":
        side = 20_000  # complete and valid: 220 kB that decode to 400 MB or more
        return png(side, side, (b"\0" + bytes(side // 8)) * side, bit_depth=1, colour_type=0)
    if name == "glass":
        side = 6_000  # transparent, 36 million pixels: allowed, and large in memory
        return png(side, side, (b"\0" + bytes(4 * side)) * side, colour_type=6)
    if name == "strip":
        return encoded(Image.new("RGB", (20_000, 1)), "PNG")
    if name == "svg":
        return b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
    if name == "html":
        return b"<!DOCTYPE html><html><body>not an image</body></html>"
    if name == "cut":
        return encoded(noise(200), "JPEG")[:3000]
    raise KeyError(name)


class HostileServer(ThreadingHTTPServer):
    """The server and what it saw.

    Attributes:
        paths: of all requests, in order.
        seen_at: when each of them came, ``time.monotonic()``.
        robots_txt: what ``/robots.txt`` answers: a file, a status, or None for silence.
        busiest: most requests that were answered at the same time.
        num_connections: connections accepted.
        slow_s: pause between two bytes of an answer that drips.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((address, port), _Handler)
        self.lock = threading.Lock()
        self.paths: list[str] = []
        self.seen_at: list[float] = []
        self.robots_txt: bytes | int | None = 404
        self.slow_s = 0.15
        self.num_active = 0
        self.busiest = 0
        self.num_connections = 0
        self.is_closing = threading.Event()

    @property
    def url(self) -> str:
        """Its root, without a slash at the end."""
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    def num_asked(self, path: str) -> int:
        """Return how often a path was asked for."""
        with self.lock:
            return self.paths.count(path)

    def get_request(self) -> tuple[socket.socket, Any]:
        self.num_connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up: that is the point."""


@contextlib.contextmanager
def serve(address: str = "127.0.0.1") -> Iterator[HostileServer]:
    """Run a server in a thread."""
    server = HostileServer(address)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.is_closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: HostileServer

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.paths.append(self.path)
            server.seen_at.append(time.monotonic())
            server.num_active += 1
            server.busiest = max(server.busiest, server.num_active)
        try:
            name = self.path.partition("?")[0].strip("/").split("/")[0]
            getattr(self, "answer_" + name.replace("-", "_").replace(".", "_"), self.answer_unknown)()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.num_active -= 1

    @property
    def query(self) -> str:
        return self.path.partition("?")[2]

    def send(self, body: bytes = PNG, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            for one in value.split(";"):
                self.send_header(name.replace("_", "-"), one)
        if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def drip(self, content: bytes) -> None:
        for byte in content:
            if self.server.is_closing.wait(self.server.slow_s):
                break
            self.wfile.write(bytes([byte]))
        self.close_connection = True

    def answer_unknown(self) -> None:
        self.send(b"<html>no such page</html>", status=404)

    # ---- images, good and strange ----

    def answer_image(self) -> None:
        self.send()

    def answer_late(self) -> None:
        self.server.is_closing.wait(float(self.query))
        self.send()

    def answer_special(self) -> None:
        self.send(special_file(self.path.split("/")[2].partition(".")[0]), Content_Type="image/jpeg")

    def answer_chunked(self) -> None:
        self.send(b"", Transfer_Encoding="chunked")
        for start in range(0, len(PNG), 100):
            part = PNG[start : start + 100]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def answer_empty(self) -> None:
        self.send(b"")

    # ---- statuses ----

    def answer_status(self) -> None:
        """Answer with a status, and with a ``Retry-After`` if the query holds one."""
        status = int(self.path.partition("?")[0].rsplit("/", 1)[1])
        wish = {"Retry_After": urllib.parse.unquote(self.query)} if self.query else {}
        self.send(b"", status=status, **wish)

    def answer_recovers(self) -> None:
        """Fail as often as the query says, then answer."""
        times, _, status = self.query.partition(",")
        if self.server.num_asked(self.path) <= int(times):
            self.send(b"later", status=int(status or 503))
        else:
            self.send()

    def answer_busy(self) -> None:
        """Ask for a pause, at every request."""
        self.send(b"", status=429, Retry_After=urllib.parse.unquote(self.query))

    def answer_busy_once(self) -> None:
        """Ask for a pause of so many seconds at the first request, by a date if the query says so."""
        if self.server.num_asked(self.path) > 1:
            self.send()
            return
        seconds, _, form = self.query.partition(",")
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=float(seconds))
        date = email.utils.format_datetime(until, usegmt=True)
        self.send(b"", status=503 if form == "date" else 429, Retry_After=date if form == "date" else seconds)

    # ---- slow, endless, cut ----

    def answer_slow_drip(self) -> None:
        self.send(b"", Content_Length=str(len(PNG)))
        self.drip(PNG)

    def answer_dribbled_headers(self) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\nX-Name: " + b"a" * 1000)

    def answer_silent(self) -> None:
        self.server.is_closing.wait(30)
        self.close_connection = True

    def answer_announced(self) -> None:
        self.send(Content_Length=str(10**9))
        self.close_connection = True

    def answer_endless(self) -> None:
        self.send(b"", Transfer_Encoding="chunked")
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        while not self.server.is_closing.is_set():
            self.wfile.write(chunk)

    def answer_truncated(self) -> None:
        self.send(PNG[:50], Content_Length=str(len(PNG)))
        self.close_connection = True

    def answer_truncated_chunk(self) -> None:
        self.send(b"%x\r\n%s" % (len(PNG), PNG[:50]), Transfer_Encoding="chunked")
        self.close_connection = True

    def answer_negative_chunk(self) -> None:
        """Announce a chunk of -1 bytes, which may be read as all that ever comes."""
        self.send(b"-1\r\n", Transfer_Encoding="chunked")
        while not self.server.is_closing.is_set():
            self.wfile.write(b"x" * 0x10000)

    def answer_reset(self) -> None:
        """Break the connection in the middle of the body."""
        self.send(PNG[:50], Content_Length=str(len(PNG)))
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def answer_understated(self) -> None:
        """Send more than ``Content-Length`` says: here a whole second answer that nobody asked for."""
        forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
        self.send(PNG + forged, Content_Length=str(len(PNG)))

    def answer_short_length(self) -> None:
        self.send(PNG, Content_Length=str(len(PNG) // 2))

    def answer_closes_quietly(self) -> None:
        """Answer as if the connection stayed open, then close it."""
        self.send()
        self.close_connection = True

    def answer_hang_up_later(self) -> None:
        """Answer the first request of a connection and hang up, without a word, at the second."""
        self.num_answered = getattr(self, "num_answered", 0) + 1
        if self.num_answered == 1:
            self.send()
        else:
            self.close_connection = True

    def answer_garbage(self) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")
        self.close_connection = True

    def answer_hang_up(self) -> None:
        self.close_connection = True

    # ---- redirects, refusals ----

    def answer_redirect(self) -> None:
        self.send(b"", status=302, Location=self.query)

    def answer_redirect_unescaped(self) -> None:
        self.send(b"", status=302, Location="/quoted?é".encode().decode("latin-1"))  # headers are sent as Latin-1

    def answer_quoted(self) -> None:
        if self.query == "%C3%A9":
            self.send()
        else:
            self.send(b"", status=404)

    def answer_loop(self) -> None:
        self.send(b"", status=301, Location="/loop")

    def answer_opt_out(self) -> None:
        self.send(X_Robots_Tag=self.query.replace("+", " "))

    def answer_robots_txt(self) -> None:
        if self.server.robots_txt is None:
            self.answer_silent()
        elif isinstance(self.server.robots_txt, int):
            self.send(b"", status=self.server.robots_txt)
        else:
            self.send(self.server.robots_txt, Content_Type="text/plain")

    def log_message(self, format: str, *args: object) -> None:
        pass
