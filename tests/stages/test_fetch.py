"""The guarded fetch against a real loopback server that answers as badly as the web can."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import io
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages import fetch
from stages.failure_codes import FetchError, is_transient
from stages.fetch import FetchLimits, check_image, parse_url, seconds_to_wait
from stages.politeness import Courtesy
from stages.row_fetcher import RowFetcher
from tests.stages.hostile_server import PNG, HostileServer, encoded, noise, png, serve


@pytest.fixture(scope="module")
def hostile() -> Iterator[HostileServer]:
    with serve() as running:
        yield running


@pytest.fixture
def server(hostile: HostileServer) -> str:
    return hostile.url


def limits_for(server: str, **changes: object) -> FetchLimits:
    endpoint = ("127.0.0.1", int(server.rsplit(":", 1)[1]))
    settings: dict[str, object] = {
        "timeout_s": 5.0,
        "max_bytes": 100_000,
        "allowed_endpoints": frozenset({endpoint}),
    }
    return FetchLimits(**(settings | changes))  # type: ignore[arg-type]


def fetched(url: str | None, limits: FetchLimits, **courtesy: object) -> bytes | str | None:
    """Fetch one row; return the file, or the reason why there is none."""
    settings: dict[str, object] = {"retries": 0, "backoff_s": 0.01}
    fetcher = RowFetcher([url], limits, Courtesy(**(settings | courtesy)))  # type: ignore[arg-type]
    with contextlib.closing(fetcher):
        row = fetcher.next_row()
    assert row.row == 0 and (row.data is None) == (row.reason is not None)
    return row.data or row.reason


def test_an_image_arrives_as_it_is(server: str) -> None:
    assert fetched(f"{server}/image", limits_for(server)) == PNG
    assert fetched(f"  {server}/image?a=b c&d=é#x ", limits_for(server)) == PNG


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/status/404", "http_404"),
        ("/status/500", "http_500"),
        ("/status/204", "http_204"),
        ("/announced", "too_large"),
        ("/endless", "too_large"),
        ("/negative-chunk", "too_large"),
        ("/status/500?Fri,%2031%20Dec%2099999999999999999999%2023:59:59%20GMT", "http_500"),
        ("/truncated", "truncated"),
        ("/empty", "empty"),
        ("/special/html.jpg", "decode"),
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
    assert fetched(server + path, limits_for(server)) == reason


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (None, "invalid_url"),
        ("", "invalid_url"),
        ("example.org/a.jpg", "invalid_url"),
        ("http:///a.jpg", "invalid_url"),
        ("http://host:99999/", "invalid_url"),
        ("http://[::1/", "invalid_url"),
        ("http://a/\ud800.jpg", "invalid_url"),
        ("file:///etc/passwd", "scheme"),
        ("ftp://example.org/a.jpg", "scheme"),
        ("http://127.0.0.1:1/a.jpg", "blocked_address"),
        ("http://localhost:1/a.jpg", "blocked_address"),
        ("http://[::1]:1/", "blocked_address"),
        ("http://0.0.0.0/", "blocked_address"),
        ("http://10.0.0.1/", "blocked_address"),
        ("http://169.254.169.254/", "blocked_address"),
        ("http://2130706433/", "blocked_address"),
        ("http://[::127.0.0.1]/", "blocked_address"),
        ("http://[::ffff:0:7f00:1]/", "blocked_address"),
        ("http://168.63.129.16/metadata", "blocked_address"),
        ("http://name.invalid/", "dns"),
        ("http://" + "a" * 70 + ".org/", "dns"),
    ],
)
def test_wrong_urls(url: str | None, reason: str) -> None:
    assert fetched(url, FetchLimits()) == reason


def test_redirects_are_followed_within_the_allowed(server: str) -> None:
    assert fetched(f"{server}/redirect?/image", limits_for(server)) == PNG
    assert fetched(f"{server}/redirect?{server}/image", limits_for(server)) == PNG
    assert fetched(f"{server}/redirect?/image", limits_for(server, max_redirects=0)) == "redirects"
    assert fetched(f"{server}/redirect_unescaped", limits_for(server)) == PNG


@pytest.mark.parametrize("path", ["/slow-drip", "/dribbled-headers", "/silent"])
def test_one_deadline_for_the_whole_attempt(server: str, path: str) -> None:
    started_at = time.monotonic()
    assert fetched(server + path, limits_for(server, timeout_s=0.5)) == "timeout"
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
        ("max-image-preview:large,+noai", True),
        ("max-snippet:-1,+max-image-preview:large,+max-video-preview:-1,+noindex", True),
        ("max-image-preview:large", False),
        ("none", True),
    ],
)
def test_opt_outs(server: str, tag: str, refused: bool) -> None:
    limits = limits_for(server, user_agent="Tester/1.0")
    if refused:
        assert fetched(f"{server}/opt-out?{tag}", limits) == "opt_out"
    else:
        assert fetched(f"{server}/opt-out?{tag}", limits) == PNG
    assert fetched(f"{server}/opt-out?{tag}", limits_for(server, opt_out_directives=())) == PNG


def test_failures_that_pass_are_retried(hostile: HostileServer) -> None:
    limits = limits_for(hostile.url)
    assert fetched(f"{hostile.url}/recovers/a?2", limits, retries=3) == PNG
    assert hostile.num_asked("/recovers/a?2") == 3
    assert fetched(f"{hostile.url}/recovers/b?2", limits, retries=1) == "http_503"
    assert hostile.num_asked("/recovers/b?2") == 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_server_may_ask_for_a_longer_pause(hostile: HostileServer, form: str) -> None:
    started_at = time.monotonic()
    # A date is given in whole seconds.
    assert fetched(f"{hostile.url}/busy-once/{form}?2,{form}", limits_for(hostile.url), retries=1) == PNG
    assert time.monotonic() - started_at > 0.9


def test_retry_after_is_read_in_both_forms() -> None:
    now = datetime.datetime.now(datetime.UTC)
    later = email.utils.format_datetime(now + datetime.timedelta(seconds=90), usegmt=True)
    assert seconds_to_wait("7") == 7.0
    year_s = 366 * 86_400
    assert seconds_to_wait("9" * 400) == seconds_to_wait("Fri, 31 Dec 9999 23:59:59 GMT") == year_s
    assert 88 < seconds_to_wait(later) <= 90
    assert seconds_to_wait("Fri, 31 Dec 1999 23:59:59 GMT") == 0.0
    assert [seconds_to_wait(value) for value in (None, "", "soon", "-5", "1.5", "²")] == [0.0] * 6


DATE_PARTS = [
    "Fri,",
    "31",
    "Dec",
    "9" * 20,
    "²",
    "2030",
    "23:59:59",
    "0:0",
    "GMT",
    "+" + "9" * 20,
    "-2400",
    "+2300",
    "0001",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(DATE_PARTS), max_size=7).map(" ".join)))
def test_whatever_retry_after_says_is_a_number_of_seconds(value: str) -> None:
    assert 0 <= seconds_to_wait(value) <= 366 * 86_400


@given(
    st.text(st.characters(), max_size=30), st.sampled_from(["", "http://", "http://a/", "http://[", "//", "http://a:"])
)
def test_whatever_a_url_is_it_is_taken_apart_or_refused(text: str, start: str) -> None:
    try:
        target = parse_url(start + text)
    except FetchError as error:
        assert error.reason in ("invalid_url", "scheme")
    else:
        assert target.path.isascii() and target.path.startswith("/")


@pytest.mark.parametrize("path", ["/status/404", "/special/html.jpg", "/opt-out?noai", "/announced"])
def test_final_failures_are_not_retried(hostile: HostileServer, path: str) -> None:
    before = len(hostile.paths)
    fetched(hostile.url + path, limits_for(hostile.url), retries=5)
    assert len(hostile.paths) == before + 1


def test_refused_connections_can_pass() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = FetchLimits(allowed_networks=("127.0.0.0/8",))
    assert fetched(f"http://127.0.0.1:{port}/", limits) == "connect"
    assert is_transient("connect") and is_transient("http_503") and not is_transient("http_404")


def test_a_server_that_hangs_up_in_the_handshake_may_be_asked_again() -> None:
    """It is overloaded, or what balances its load is; nothing is wrong with its certificate."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)  # closed with unread bytes it would be a reset

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        limits = FetchLimits(allowed_networks=("127.0.0.0/8",))
        assert fetched(f"https://127.0.0.1:{listening.getsockname()[1]}/", limits) == "connect"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_no_memory_to_decode_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(fetch, "_decode", decode)
    with pytest.raises(MemoryError):
        check_image(PNG, 10**6)


def test_https_to_a_plain_server_is_a_tls_failure(server: str) -> None:
    assert fetched(server.replace("http:", "https:") + "/image", limits_for(server)) == "tls"


@pytest.mark.parametrize("side", [7_100, 10_000, 20_000])
def test_pixels_are_counted_before_decoding(side: int) -> None:
    with pytest.raises(FetchError, match="too_many_pixels"):
        check_image(png(side, side, b"\0"), 50_000_000)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_complete_images_pass_and_cut_ones_do_not(image_format: str) -> None:
    data = encoded(noise(60), image_format)
    assert check_image(data, 10_000) == (60, 60)
    with pytest.raises(FetchError, match="decode"):
        check_image(data[: len(data) // 2], 10_000)


def jpeg_with_preview() -> bytes:
    """A camera's file: its preview has markers of its own."""
    preview = encoded(noise(16), "JPEG")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x927C] = preview
    data = encoded(noise(60), "JPEG", exif=exif, progressive=True)
    assert data.count(b"\xff\xda") > 2 and data.find(preview) > 0
    return data


@pytest.mark.parametrize("kind", ["baseline", "progressive", "preview"])
def test_a_cut_jpeg_is_told_as_the_decoder_tells_it(kind: str) -> None:
    """Most files are told whole by their markers; the decoder of the whole file has to agree, wherever the cut is."""
    data = jpeg_with_preview() if kind == "preview" else encoded(noise(60), "JPEG", progressive=kind == "progressive")
    assert check_image(data, 10_000) == check_image(data + b"\0" * 7, 10_000) == (60, 60)
    for end in (*range(0, len(data), 37), len(data) - 3):
        cut = data[:end]
        with pytest.raises(FetchError, match="decode"):
            check_image(cut, 10_000)
        with pytest.raises((OSError, SyntaxError)), Image.open(io.BytesIO(cut)) as image:
            image.load()


# Networks that are not the public internet, by what they are for (RFC 6890 and others); both ends of each are tried.
SPECIAL_NETWORKS = {
    "this host": "0.0.0.0/8",
    "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16",
    "loopback": "127.0.0.0/8 ::1/128",
    "unspecified": "::/128",
    "link-local, with most clouds' metadata servers": "169.254.0.0/16 169.254.169.254/32 fe80::/10",
    "shared with the provider": "100.64.0.0/10",
    "another cloud's metadata server": "100.100.100.200/32",
    "protocol assignments": "192.0.0.0/24 192.0.0.192/32 192.0.0.9/32 2001::/23 2001:20::/28",
    "a cloud's wire server": "168.63.129.16/32",
    "documentation": "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 2001:db8::/32 3fff::/20",
    "benchmarks": "198.18.0.0/15",
    "relays to 6to4": "192.88.99.0/24",
    "multicast": "224.0.0.0/4 ff00::/8 ff0e::/16",
    "reserved": "240.0.0.0/4 255.255.255.255/32 100::/64 4000::/3 8000::/3 5f00::/16",
    "unique local": "fc00::/7 fd00:ec2::254/128",
    "site-local": "fec0::/10",
    "IPv4-compatible": "::127.0.0.1/128 ::8.8.8.8/128 ::10.0.0.0/104",
    "IPv4-translated": "::ffff:0:7f00:1/128 ::ffff:0:0:0/96 ::ffff:0:808:808/128",
    "IPv4-mapped, not public": "::ffff:7f00:1/128 ::ffff:10.0.0.0/104 ::ffff:a9fe:a9fe/128 ::ffff:168.63.129.16/128",
    "NAT64, not public": "64:ff9b::7f00:1/128 64:ff9b::a9fe:a9fe/128 64:ff9b::10.0.0.0/104 64:ff9b::168.63.129.16/128",
    "NAT64 of a site": "64:ff9b:1::/48 64:ff9b:1::808:808/128",
    "6to4, not public": "2002:7f00:1::/48 2002:a00::/24 2002:a9fe:a9fe::/48 2002:a83f:8110::/48",
    "Teredo": "2001::/32 2001:0:a00:1::f5ff:fffe/128 2001:0:808:808:0:0:80ff:fffe/128",
}


@pytest.mark.parametrize("purpose", SPECIAL_NETWORKS)
def test_special_addresses_are_refused_unless_they_are_allowed(purpose: str) -> None:
    for text in SPECIAL_NETWORKS[purpose].split():
        network = ipaddress.ip_network(text)
        for address in (str(network[0]), str(network[-1])):
            assert not FetchLimits().allows(address, 80), address
            assert FetchLimits(allowed_networks=(text,)).allows(address, 80), address
            assert FetchLimits(allowed_endpoints=frozenset({(address, 80)})).allows(address, 80), address


def test_a_zone_does_not_hide_an_address() -> None:
    assert not FetchLimits().allows("fe80::1%eth0", 80)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8", "93.184.216.34", "168.63.129.15", "192.0.1.1", "100.63.255.255", "100.128.0.0",
        "2606:4700:4700::1111", "2001:200::", "2001:4860:4860::8888", "2a00:1450:4001::1", "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8", "2002:808:808::1",
    ],
)  # fmt: skip
def test_public_addresses_are_allowed(address: str) -> None:
    assert FetchLimits().allows(address, 80)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_in_ipv6_clothes_is_as_public_as_itself(address: ipaddress.IPv4Address) -> None:
    expected = FetchLimits().allows(str(address), 80)
    for base, shift in (("::ffff:0:0", 0), ("64:ff9b::", 0), ("2002::", 80)):
        dressed = ipaddress.IPv6Address(int(ipaddress.IPv6Address(base)) | int(address) << shift)
        assert FetchLimits().allows(str(dressed), 80) is expected
    for base in ("::", "::ffff:0:0:0", "64:ff9b:1::"):
        assert not FetchLimits().allows(str(ipaddress.IPv6Address(base) + int(address)), 80)


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
