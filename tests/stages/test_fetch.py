"""The guarded fetch against a real loopback server that answers as badly as the web can."""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages.fetch import FetchError, FetchLimits, check_image, fetch, fetch_image, is_transient


def picture(image_format: str = "PNG", side: int = 20) -> bytes:
    sink = io.BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(sink, image_format)
    return sink.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return chunks


PNG = picture()


class Handler(BaseHTTPRequestHandler):
    """One path for each kind of answer."""

    requests: list[str]
    slow_s = 0.15

    def do_GET(self) -> None:
        type(self).requests.append(self.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, "answer_" + self.path.partition("?")[0].strip("/").replace("-", "_").split("/")[0])()

    def send(self, body: bytes = PNG, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            for one in value.split(";"):
                self.send_header(name.replace("_", "-"), one)
        if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_image(self) -> None:
        self.send()

    def answer_status(self) -> None:
        self.send(b"", status=int(self.path.rsplit("/", 1)[1]))

    def answer_opt_out(self) -> None:
        self.send(X_Robots_Tag=self.path.partition("?")[2].replace("+", " "))

    def answer_announced(self) -> None:
        self.send(Content_Length=str(10**9))

    def answer_endless(self) -> None:
        self.send(b"", Transfer_Encoding="chunked")
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        while True:
            self.wfile.write(chunk)

    def answer_truncated(self) -> None:
        self.send(PNG[:50], Content_Length=str(len(PNG)))

    def answer_empty(self) -> None:
        self.send(b"")

    def answer_text(self) -> None:
        self.send(b"<html>not an image</html>")

    def answer_dribbled_body(self) -> None:
        self.send(b"", Content_Length=str(len(PNG)))
        for byte in PNG:
            self.wfile.write(bytes([byte]))
            time.sleep(self.slow_s)

    def answer_dribbled_headers(self) -> None:
        for _ in range(100):
            self.wfile.write(b"H")
            time.sleep(self.slow_s)

    def answer_silent(self) -> None:
        time.sleep(2)

    def answer_garbage(self) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def answer_hang_up(self) -> None:
        self.close_connection = True

    def answer_redirect(self) -> None:
        self.send(b"", status=302, Location=self.path.partition("?")[2])

    def answer_loop(self) -> None:
        self.send(b"", status=301, Location="/loop")

    def answer_recovers(self) -> None:
        failed_before = type(self).requests.count(self.path) > 2
        self.send() if failed_before else self.send(b"", status=503)

    def answer_busy(self) -> None:
        self.send(b"", status=429, Retry_After="7")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    Handler.requests = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def limits_for(server: str, **changes: object) -> FetchLimits:
    endpoint = ("127.0.0.1", int(server.rsplit(":", 1)[1]))
    settings: dict[str, object] = {
        "timeout_s": 5.0,
        "retries": 0,
        "max_bytes": 100_000,
        "allowed_endpoints": frozenset({endpoint}),
    }
    return FetchLimits(**(settings | changes))  # type: ignore[arg-type]


def reason_of(url: str | None, limits: FetchLimits) -> str:
    with pytest.raises(FetchError) as caught:
        fetch_image(url, limits, sleep=lambda _: None)
    return caught.value.reason


def test_an_image_arrives_as_it_is(server: str) -> None:
    assert fetch_image(f"{server}/image", limits_for(server)) == PNG
    assert fetch_image(f"  {server}/image?a=b c&d=é#x ", limits_for(server)) == PNG


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/status/404", "http_404"),
        ("/status/500", "http_500"),
        ("/status/204", "http_204"),
        ("/announced", "too_large"),
        ("/endless", "too_large"),
        ("/truncated", "truncated"),
        ("/empty", "empty"),
        ("/text", "decode"),
        ("/garbage", "connect"),
        ("/hang-up", "connect"),
        ("/loop", "redirects"),
        ("/redirect?file:///etc/passwd", "scheme"),
        ("/redirect?http://[half", "invalid_url"),
        ("/redirect?http://127.0.0.1:1/", "blocked_address"),
        ("/redirect?http://169.254.169.254/latest/meta-data", "blocked_address"),
        ("/redirect?http://[::ffff:127.0.0.1]:80/", "blocked_address"),
    ],
)
def test_reason_codes(server: str, path: str, reason: str) -> None:
    assert reason_of(server + path, limits_for(server)) == reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (None, "invalid_url"),
        ("", "invalid_url"),
        ("example.org/a.jpg", "invalid_url"),
        ("http:///a.jpg", "invalid_url"),
        ("http://host:99999/", "invalid_url"),
        ("http://[::1/", "invalid_url"),
        ("file:///etc/passwd", "scheme"),
        ("ftp://example.org/a.jpg", "scheme"),
        ("http://127.0.0.1:1/a.jpg", "blocked_address"),
        ("http://localhost:1/a.jpg", "blocked_address"),
        ("http://[::1]:1/", "blocked_address"),
        ("http://0.0.0.0/", "blocked_address"),
        ("http://10.0.0.1/", "blocked_address"),
        ("http://169.254.169.254/", "blocked_address"),
        ("http://2130706433/", "blocked_address"),
        ("http://name.invalid/", "dns"),
        ("http://" + "a" * 70 + ".org/", "dns"),
    ],
)
def test_wrong_urls(url: str | None, reason: str) -> None:
    assert reason_of(url, FetchLimits(retries=0)) == reason


def test_redirects_are_followed_within_the_allowed(server: str) -> None:
    assert fetch_image(f"{server}/redirect?/image", limits_for(server)) == PNG
    assert fetch_image(f"{server}/redirect?{server}/image", limits_for(server)) == PNG
    assert reason_of(f"{server}/redirect?/image", limits_for(server, max_redirects=0)) == "redirects"


@pytest.mark.parametrize("path", ["/dribbled-body", "/dribbled-headers", "/silent"])
def test_one_deadline_for_the_whole_attempt(server: str, path: str) -> None:
    started_at = time.monotonic()
    assert reason_of(server + path, limits_for(server, timeout_s=0.5)) == "timeout"
    assert time.monotonic() - started_at < 1.5


@pytest.mark.parametrize(
    ("tag", "refused"),
    [
        ("noai", True),
        ("NoAI,+nofollow", True),
        ("nofollow;noimageindex", True),
        ("tester:+noai", True),
        ("otherbot:+noai", False),
        ("nofollow", False),
        ("unavailable_after:+25+Jun+2050+15:00:00+PST", False),
        ("noai,+unavailable_after:+25+Jun+2050+15:00:00+PST", True),
    ],
)
def test_opt_outs(server: str, tag: str, refused: bool) -> None:
    limits = limits_for(server, user_agent="Tester/1.0")
    if refused:
        assert reason_of(f"{server}/opt-out?{tag}", limits) == "opt_out"
    else:
        assert fetch_image(f"{server}/opt-out?{tag}", limits) == PNG
    assert fetch_image(f"{server}/opt-out?{tag}", limits_for(server, opt_out_directives=())) == PNG


def test_failures_that_pass_are_retried_with_growing_pauses(server: str) -> None:
    pauses: list[float] = []
    limits = limits_for(server, retries=3, backoff_s=1.0)
    assert fetch_image(f"{server}/recovers", limits, sleep=pauses.append) == PNG
    assert len(pauses) == 2
    assert 0.5 <= pauses[0] <= 1.0 <= pauses[1] <= 2.0


def test_the_server_may_ask_for_a_longer_pause(server: str) -> None:
    pauses: list[float] = []
    with pytest.raises(FetchError, match="http_429"):
        fetch_image(f"{server}/busy", limits_for(server, retries=2, backoff_s=0.1), sleep=pauses.append)
    assert pauses == [7.0, 7.0]


@pytest.mark.parametrize("path", ["/status/404", "/text", "/opt-out?noai", "/announced"])
def test_final_failures_are_not_retried(server: str, path: str) -> None:
    before = len(Handler.requests)
    reason_of(server + path, limits_for(server, retries=5))
    assert len(Handler.requests) == before + 1


def test_refused_connections_can_pass() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = FetchLimits(retries=0, allowed_networks=("127.0.0.0/8",))
    assert reason_of(f"http://127.0.0.1:{port}/", limits) == "connect"
    assert is_transient("connect") and is_transient("http_503") and not is_transient("http_404")


def test_https_to_a_plain_server_is_a_tls_failure(server: str) -> None:
    assert reason_of(server.replace("http:", "https:") + "/image", limits_for(server)) == "tls"


@pytest.mark.parametrize("side", [7_100, 10_000, 20_000])
def test_pixels_are_counted_before_decoding(side: int) -> None:
    with pytest.raises(FetchError, match="too_many_pixels"):
        check_image(png_header(side, side), 50_000_000)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_complete_images_pass_and_cut_ones_do_not(image_format: str) -> None:
    data = picture(image_format, side=60)
    assert check_image(data, 10_000) == (60, 60)
    with pytest.raises(FetchError, match="decode"):
        check_image(data[: len(data) // 2], 10_000)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
        "2002:7f00:1::", "64:ff9b::7f00:1",
    ],
)  # fmt: skip
def test_special_addresses_are_refused(address: str) -> None:
    assert not FetchLimits().allows(address, 80)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert FetchLimits().allows(address, 80)


@given(st.ip_addresses(v=4, network="10.0.0.0/8"))
def test_allowed_networks(address: object) -> None:
    assert not FetchLimits().allows(str(address), 80)
    assert FetchLimits(allowed_networks=("10.0.0.0/8",)).allows(str(address), 80)
    assert not FetchLimits(allowed_networks=("192.168.0.0/16", "fc00::/7")).allows(str(address), 80)


def test_an_allowed_endpoint_is_one_port_only() -> None:
    limits = FetchLimits(allowed_endpoints=frozenset({("127.0.0.1", 8000)}))
    assert limits.allows("127.0.0.1", 8000)
    assert not limits.allows("127.0.0.1", 8001)
    assert not limits.allows("127.0.0.2", 8000)


def test_fetch_returns_any_bytes(server: str) -> None:
    assert fetch(f"{server}/text", limits_for(server)).startswith(b"<html>")
