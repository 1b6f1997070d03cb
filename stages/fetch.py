"""Guarded HTTP fetch of one image: a hostile or broken server can cost a bounded amount of time, memory and trust.

* http and https only; private, loopback, link-local and other special addresses are refused unless the config allows
  them. The address that was checked is the address that is connected to, again after every redirect, so neither a
  redirect nor a changing DNS answer leads inside (``stages/connections.py``).
* One deadline covers an exchange as a whole (name, connection, headers, body), not each read.
* The body is counted while it streams; the number of pixels is read from the header before anything is decoded.
* ``X-Robots-Tag`` opt-outs are honoured.

This file asks once and reports a redirect or a failure; what is asked when, and how often, is decided in
``stages/politeness.py``.
"""

from __future__ import annotations

import contextlib
import datetime
import email.message
import email.utils
import http.client
import io
import ipaddress
import ssl
import string
import time
import urllib.parse
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image

from stages.connections import HUNG_UP, Connection, Connections, Origin, remaining
from stages.failure_codes import FetchError
from stages.pixel_budget import PixelBudget

_CHUNK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_DIRECTIVES_WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_URL_CHARACTERS = 16_000
# The page of a redirect or a refusal is read, for the connection's sake, only if it is short and there at once.
_DRAIN_BYTES, _DRAIN_S = 1 << 16, 0.2
_MAX_WAIT_S = 366 * 86_400.0  # finite, so that it can be added up and written down

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that is assigned to hosts of the public IPv6 internet
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # how workers without IPv4 reach hosts without IPv6 (RFC 6052)
# Not public either, although `ipaddress` says so of some, depending on the version of Python.
_SPECIAL = (
    ipaddress.ip_network("100.64.0.0/10"),  # shared with the provider (RFC 6598)
    ipaddress.ip_network("168.63.129.16/32"),  # Azure's host, which hands out a machine's settings
    ipaddress.ip_network("192.0.0.0/24"),  # protocol assignments, one of them Oracle's metadata server
    ipaddress.ip_network("192.88.99.0/24"),  # relays to 6to4
    ipaddress.ip_network("2001::/23"),  # protocol assignments: Teredo, benchmarks, ORCHID
    ipaddress.ip_network("2001:db8::/32"),  # documentation
    ipaddress.ip_network("3fff::/20"),  # documentation
)


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """What a fetch may cost and where it may go.

    Attributes:
        timeout_s: seconds for one attempt as a whole, redirects included.
        max_bytes: largest body.
        cuts: whether of a larger body the beginning is taken; else it is refused.
        max_pixels: largest width x height.
        max_redirects: redirects followed.
        user_agent: sent as ``User-Agent``; its part before ``/`` is the name that opt-outs may address.
        opt_out_directives: ``X-Robots-Tag`` directives that refuse the image.
        allowed_networks: CIDR networks that may be fetched from although they are not public.
        allowed_endpoints: ``(address, port)`` that may be fetched from although they are not public.
    """

    timeout_s: float = 10.0
    max_bytes: int = 20 << 20
    cuts: bool = False
    max_pixels: int = 50_000_000
    max_redirects: int = 5
    user_agent: str = "unclip-pipeline"
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    allowed_networks: tuple[str, ...] = ()
    allowed_endpoints: frozenset[tuple[str, int]] = frozenset()

    def allows(self, address: str, port: int) -> bool:
        """Tell whether an IP address may be connected to."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        if _is_public(ip) or (address, port) in self.allowed_endpoints:
            return True
        return any(ip in ipaddress.ip_network(network) for network in self.allowed_networks)


def _is_public(ip: _Address) -> bool:
    """Tell whether an address is one of the public internet, in whatever way it is written.

    Of IPv6, only what is global unicast; addresses that a translator takes for IPv4 (mapped ``::ffff:0:0/96``, NAT64
    ``64:ff9b::/96``, 6to4 ``2002::/16``) are as public as the address that they hold. Other ways to hold one
    (IPv4-compatible ``::/96``, IPv4-translated ``::ffff:0:0:0/96``, NAT64 of a site ``64:ff9b:1::/48``) are no global
    unicast; Teredo is refused as a whole.
    """
    if isinstance(ip, ipaddress.IPv6Address):
        held = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            held = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if held is not None:
            return _is_public(held)
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _SPECIAL)


def _decode(data: bytes) -> None:
    with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
        # Of a JPEG, the scaled decode reads the whole file at a fraction of the cost.
        image.draft("RGB", (1, 1))
        image.load()


def _ends_as_it_should(data: bytes) -> bool:
    """Tell whether the last scan of a JPEG file is followed by the end-of-image marker; False: it has to be decoded.

    Within a scan neither marker can occur, so that a file that was cut anywhere in its picture has none behind its last
    start-of-scan. Pictures after the main one (previews, gain maps) may be cut: only a decoder can tell.
    """
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") > 0


@dataclass(frozen=True)
class Redirect:
    """Where a server sends the fetch instead of answering."""

    url: str


@dataclass(frozen=True)
class Target:
    """A URL that may be asked for.

    Attributes:
        origin: scheme, host, port.
        path: path and query, quoted.
    """

    origin: Origin
    path: str


def parse_url(url: str | None) -> Target:
    """Take a URL apart.

    Raises:
        FetchError: ``invalid_url`` or ``scheme``.
    """
    try:
        parts = urllib.parse.urlsplit((url or "").strip())
        port = parts.port
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?[]") if parts.query else ""
    except ValueError as error:  # also half a surrogate pair, which cannot be quoted
        raise FetchError("invalid_url", str(error)) from error
    scheme = parts.scheme.lower()
    if not scheme:
        raise FetchError("invalid_url", f"{url!r} has no scheme")
    if scheme not in ("http", "https"):
        raise FetchError("scheme", f"{scheme} is not http or https")
    if not parts.hostname or port == 0 or "\\" in parts.netloc:  # which others read as the end of the host
        raise FetchError("invalid_url", f"{url!r} names no host")
    if len(url or "") > _MAX_URL_CHARACTERS:
        raise FetchError("invalid_url", f"{len(url or '')} characters")
    return Target((scheme, parts.hostname, port or (443 if scheme == "https" else 80)), path + query)


def fetch(url: str | None, limits: FetchLimits, connections: Connections, deadline: float) -> bytes | Redirect:
    """Ask for one URL once, without following redirects; see the module's docstring for the limits.

    Args:
        url: http or https URL.
        limits: see ``FetchLimits``.
        connections: of the unit.
        deadline: ``time.monotonic()`` at which to give up.

    Returns:
        the body as it was served, or where to ask instead.

    Raises:
        FetchError: with the reason.
    """
    target = parse_url(url)
    remaining(deadline)
    for fresh in (False, True):
        connection = connections.open(target.origin, deadline, fresh=fresh)
        try:
            answer = _exchange(connection, target, limits, connections)
        except _StaleError:
            continue
        return Redirect(_joined(url or "", answer.url)) if isinstance(answer, Redirect) else answer
    raise AssertionError("a fresh connection is never stale")


def check_image(data: bytes, max_pixels: int, budget: PixelBudget | None = None) -> tuple[int, int]:
    """Check the size in the header of an image file, then that the file is complete.

    Args:
        data: the file.
        max_pixels: largest width x height.
        budget: of all threads that decode.

    Returns:
        width, height in pixels.

    Raises:
        FetchError: ``too_many_pixels`` before decoding, or ``decode``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            width, height = image.size
            is_jpeg = image.format == "JPEG"
        if width * height > max_pixels:
            raise FetchError("too_many_pixels", f"{width}x{height}")
        if not (is_jpeg and _ends_as_it_should(data)):
            with budget.spend(width * height) if budget else contextlib.nullcontext():
                _decode(data)
        return width, height
    except (FetchError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FetchError("too_many_pixels", str(error)) from error
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file provokes: OSError, SyntaxError, struct.error, ValueError, ...
        raise FetchError("decode", f"{type(error).__name__}: {error}") from error


class _StaleError(Exception):
    """The server closed a kept connection before it saw the request."""


def _joined(base: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(base.strip(), location)
    except ValueError as error:
        raise FetchError("invalid_url", f"redirect to {location!r}: {error}") from error


def _exchange(
    connection: Connection, target: Target, limits: FetchLimits, connections: Connections
) -> bytes | Redirect:
    """Send a request and read the answer; keep the connection if the answer was read to its end, else close it."""
    keeps = False
    try:
        response = _response(connection, target, limits)
        with response:
            try:
                return _content(response, limits)
            finally:
                _drain(response, connection)
                keeps = response.isclosed() and not response.will_close and not connection.has_leftover
    except TimeoutError as error:
        raise FetchError("timeout", f"no complete answer within {limits.timeout_s:g} s") from error
    finally:
        if keeps:
            connections.keep(connection)
        else:
            connection.shut()


def _response(connection: Connection, target: Target, limits: FetchLimits) -> http.client.HTTPResponse:
    """Send the request and read the headers of the answer."""
    scheme, host, port = target.origin
    client = http.client.HTTPConnection(host, port)
    if scheme == "https":
        client.default_port = http.client.HTTPS_PORT
    client.sock = cast(Any, connection)
    headers = {"User-Agent": limits.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    try:
        client.request("GET", target.path, headers=headers)
        return client.getresponse()
    except TimeoutError:
        raise
    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, *HUNG_UP) as error:
        if connection.is_reused:
            raise _StaleError from error
        raise FetchError("connect", f"{type(error).__name__}: {error}") from error
    except ssl.SSLError as error:
        raise FetchError("tls", str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise FetchError("connect", f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        # http.client refuses control characters in the URL and absurd numbers in headers.
        raise FetchError("invalid_url", str(error)) from error


def _content(response: http.client.HTTPResponse, limits: FetchLimits) -> bytes | Redirect:
    _refuse_opt_out(response.headers, limits)
    if response.status in _REDIRECTS and response.headers.get("Location"):
        # Headers are decoded as Latin-1; what the server sent are these bytes, as a rule UTF-8.
        location = response.headers["Location"].strip(" \t")
        location = urllib.parse.quote(location, safe=string.punctuation, encoding="iso-8859-1")
        return Redirect(location)
    if response.status != 200:
        wait = seconds_to_wait(response.headers.get("Retry-After"))
        raise FetchError(f"http_{response.status}", response.reason, retry_after_s=wait)
    return _body(response, limits.max_bytes, cuts=limits.cuts)


def _body(response: http.client.HTTPResponse, max_bytes: int, *, cuts: bool) -> bytes:
    if (response.length or 0) > max_bytes and not cuts:
        raise FetchError("too_large", f"{response.length} bytes announced")
    body = bytearray()
    # `read` takes a chunk of -1 bytes for all that the server ever sends; `read1` never returns more than a buffer.
    read = response.read1 if response.chunked else response.read
    try:
        while chunk := read(_CHUNK_BYTES):
            body += chunk
            if len(body) > max_bytes:
                if cuts:
                    return bytes(body[:max_bytes])
                raise FetchError("too_large", f"more than {max_bytes} bytes")
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError("truncated", f"after {len(body)} bytes: {type(error).__name__}: {error}") from error
    if response.length:
        raise FetchError("truncated", f"{response.length} bytes are missing")
    if not body:
        raise FetchError("empty", "no bytes")
    return bytes(body)


def _drain(response: http.client.HTTPResponse, connection: Connection) -> None:
    """Read the page that comes with a redirect or a refusal, so that the connection can be used again."""
    if response.isclosed() or response.will_close or response.length is None or response.length > _DRAIN_BYTES:
        return
    connection.deadline = min(connection.deadline, time.monotonic() + _DRAIN_S)
    with contextlib.suppress(FetchError, OSError, http.client.HTTPException):
        response.read()


def _refuse_opt_out(headers: email.message.Message[Any, Any], limits: FetchLimits) -> None:
    """Honour ``X-Robots-Tag: [user agent:] directive, directive``."""
    own_name = limits.user_agent.partition("/")[0].strip().lower()
    refusing = {directive.lower() for directive in limits.opt_out_directives}
    for value in headers.get_all("X-Robots-Tag", []):
        text = str(value).lower()
        name, separator, rest = text.partition(":")
        # A colon also stands in some directives; only a name is free of commas.
        if separator and "," not in name and name.strip() not in _DIRECTIVES_WITH_VALUES:
            if name.strip() != own_name:
                continue
            text = rest
        found = {directive.strip() for directive in text.split(",")}
        if "none" in found:
            found |= {"noindex", "nofollow"}
        if refusing & found:
            raise FetchError("opt_out", f"X-Robots-Tag: {value}")


def seconds_to_wait(value: str | None) -> float:
    """Read a ``Retry-After`` header, seconds or an HTTP date; what cannot be read is no wish, for ever is a year."""
    text = (value or "").strip()
    if text.isdecimal():
        return min(float(text), _MAX_WAIT_S)  # 400 digits are infinity
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, IndexError, OverflowError):
        # OverflowError: a year or a time zone of twenty digits.
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return min(max((date - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0), _MAX_WAIT_S)
