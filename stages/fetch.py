"""Guarded HTTP fetch of one image: a hostile or broken server can cost a bounded amount of time, memory and trust.

* http and https only; private, loopback, link-local and other special addresses are refused unless the config allows
  them. The address that was checked is the address that is connected to, again after every redirect, so neither a
  redirect nor a changing DNS answer leads inside.
* One deadline covers the whole attempt (connection, headers, body, redirects), not each read.
* The body is counted while it streams; the number of pixels is read from the header before anything is decoded.
* ``X-Robots-Tag`` opt-outs are honoured.
* Failures that pass (name resolution, time-outs, 429, 5xx, broken connections) are retried with growing pauses; the
  others are final at once. Every failure has a stable reason code.
"""

from __future__ import annotations

import contextlib
import email.message
import functools
import http.client
import io
import ipaddress
import random
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image

_CHUNK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_TRANSIENT_REASONS = ("dns", "connect", "timeout", "truncated")
_BACKOFF_MAX_S = 30.0
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class FetchError(Exception):
    """One URL that could not be fetched.

    Args:
        reason: stable code: ``invalid_url``, ``scheme``, ``blocked_address``, ``dns``, ``connect``, ``tls``,
            ``timeout``, ``truncated``, ``http_<status>``, ``redirects``, ``opt_out``, ``too_large``, ``empty``,
            ``too_many_pixels``, ``decode``.
        details: what exactly happened, for the debug log.
        retry_after_s: how long the server asked to wait.
    """

    def __init__(self, reason: str, details: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def transient(self) -> bool:
        """Whether another attempt can succeed."""
        return is_transient(self.reason)


def is_transient(reason: str) -> bool:
    """Tell whether a reason code names a failure that can pass."""
    return reason in _TRANSIENT_REASONS or reason in {f"http_{status}" for status in _TRANSIENT_STATUS}


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """What a fetch may cost and where it may go.

    Attributes:
        timeout_s: seconds for one attempt as a whole.
        retries: further attempts after a failure that can pass.
        backoff_s: pause before the second attempt, seconds; doubles each time, with jitter.
        max_bytes: largest body.
        max_pixels: largest width x height.
        max_redirects: redirects followed.
        user_agent: sent as ``User-Agent``; its part before ``/`` is the name that opt-outs may address.
        opt_out_directives: ``X-Robots-Tag`` directives that refuse the image.
        allowed_networks: CIDR networks that may be fetched from although they are not public.
        allowed_endpoints: ``(address, port)`` that may be fetched from although they are not public.
    """

    timeout_s: float = 10.0
    retries: int = 2
    backoff_s: float = 0.5
    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000
    max_redirects: int = 5
    user_agent: str = "unclip-pipeline"
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    allowed_networks: tuple[str, ...] = ()
    allowed_endpoints: frozenset[tuple[str, int]] = frozenset()

    def allows(self, address: str, port: int) -> bool:
        """Tell whether an IP address may be connected to."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        if all(candidate.is_global and not candidate.is_multicast for candidate in [ip, *_embedded_in(ip)]):
            return True
        if (address, port) in self.allowed_endpoints:
            return True
        return any(ip in ipaddress.ip_network(network) for network in self.allowed_networks)


def _embedded_in(ip: _Address) -> list[ipaddress.IPv4Address]:
    """List the IPv4 addresses that an IPv6 address is another way to write of."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    found = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64:
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [inner for inner in found if inner is not None]


def fetch_image(url: str | None, limits: FetchLimits, *, sleep: Callable[[float], object] = time.sleep) -> bytes:
    """Fetch one image file, with retries, and check that it decodes within the limits.

    Args:
        url: http or https URL.
        limits: see ``FetchLimits``.
        sleep: waits between attempts, seconds.

    Returns:
        the file as it was served.

    Raises:
        FetchError: the last failure.
    """
    attempt = 0
    while True:
        try:
            data = fetch(url, limits)
            check_image(data, limits.max_pixels)
            return data
        except FetchError as error:
            if attempt >= limits.retries or not error.transient:
                raise
            pause = limits.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
            sleep(min(max(pause, error.retry_after_s), _BACKOFF_MAX_S))
            attempt += 1


def fetch(url: str | None, limits: FetchLimits) -> bytes:
    """Fetch one URL once; see the module's docstring for the limits.

    Raises:
        FetchError: with the reason.
    """
    deadline = time.monotonic() + limits.timeout_s
    for _ in range(limits.max_redirects + 1):
        target = _parse(url)
        answer = _exchange(target, limits, deadline)
        if isinstance(answer, bytes):
            return answer
        url = _joined(target.geturl(), answer.location)
    raise FetchError("redirects", f"more than {limits.max_redirects}")


def check_image(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Check the size in the header of an image file, then that the file is complete.

    Returns:
        width, height in pixels.

    Raises:
        FetchError: ``too_many_pixels`` before decoding, or ``decode``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise FetchError("too_many_pixels", f"{width}x{height}")
            if image.format == "JPEG":
                # The scaled decode reads the whole file at a fraction of the cost.
                image.draft("RGB", (1, 1))
            image.load()
            return width, height
    except FetchError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FetchError("too_many_pixels", str(error)) from error
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file provokes: OSError, SyntaxError, struct.error, ValueError, ...
        raise FetchError("decode", f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Redirect:
    location: str


def _parse(url: str | None) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit((url or "").strip())
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError as error:
        raise FetchError("invalid_url", str(error)) from error
    if not parts.scheme:
        raise FetchError("invalid_url", f"{url!r} has no scheme")
    if parts.scheme.lower() not in ("http", "https"):
        raise FetchError("scheme", f"{parts.scheme} is not http or https")
    if not parts.hostname or not port_is_valid:
        raise FetchError("invalid_url", f"{url!r} names no host")
    return parts


def _joined(base: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(base, location)
    except ValueError as error:
        raise FetchError("invalid_url", f"redirect to {location!r}: {error}") from error


def _exchange(target: urllib.parse.SplitResult, limits: FetchLimits, deadline: float) -> bytes | _Redirect:
    """Send one request to a checked address and read the answer."""
    secure = target.scheme.lower() == "https"
    host = target.hostname or ""
    port = target.port or (443 if secure else 80)
    raw = _connect(host, port, limits, deadline)
    try:
        with contextlib.closing(_secured(raw, host, deadline) if secure else raw) as connected:
            return _request(_DeadlineSocket(connected, deadline), target, host, port, limits)
    except TimeoutError as error:
        raise FetchError("timeout", f"no complete answer within {limits.timeout_s:g} s") from error
    except ssl.SSLError as error:
        raise FetchError("tls", str(error)) from error
    except http.client.IncompleteRead as error:
        raise FetchError("truncated", str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise FetchError("connect", f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        # http.client refuses control characters in the URL and absurd numbers in headers.
        raise FetchError("invalid_url", str(error)) from error
    finally:
        raw.close()


def _connect(host: str, port: int, limits: FetchLimits, deadline: float) -> socket.socket:
    """Open a connection to an allowed address of ``host``."""
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise FetchError("dns", f"{host}: {error}") from error
    addresses = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
    allowed = [address for address in addresses if limits.allows(address, port)]
    if not allowed:
        raise FetchError("blocked_address", f"{host} is {', '.join(addresses)}, not a public address")
    failure: OSError | None = None
    for address in allowed:
        try:
            return socket.create_connection((address, port), timeout=_remaining(deadline))
        except OSError as error:
            failure = error
    reason = "timeout" if isinstance(failure, TimeoutError) else "connect"
    raise FetchError(reason, f"{host}:{port}: {failure}") from failure


def _secured(raw: socket.socket, host: str, deadline: float) -> socket.socket:
    raw.settimeout(_remaining(deadline))
    return _tls_context().wrap_socket(raw, server_hostname=host)


@functools.lru_cache(maxsize=1)
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _request(
    stream: _DeadlineSocket, target: urllib.parse.SplitResult, host: str, port: int, limits: FetchLimits
) -> bytes | _Redirect:
    connection = http.client.HTTPConnection(host, port)
    if target.scheme.lower() == "https":
        connection.default_port = http.client.HTTPS_PORT
    connection.sock = cast(Any, stream)
    path = urllib.parse.quote(target.path or "/", safe="/%:@!$&'()*+,;=~")
    query = "?" + urllib.parse.quote(target.query, safe="/%:@!$&'()*+,;=~?[]") if target.query else ""
    headers = {"User-Agent": limits.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    connection.request("GET", path + query, headers=headers | {"Connection": "close"})
    with connection.getresponse() as response:
        _refuse_opt_out(response.headers, limits)
        if response.status in _REDIRECTS and response.headers.get("Location"):
            return _Redirect(response.headers["Location"])
        if response.status != 200:
            wait = _seconds(response.headers.get("Retry-After"))
            raise FetchError(f"http_{response.status}", response.reason, retry_after_s=wait)
        return _body(response, limits.max_bytes)


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if (response.length or 0) > max_bytes:
        raise FetchError("too_large", f"{response.length} bytes announced")
    body = bytearray()
    while chunk := response.read(_CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise FetchError("too_large", f"more than {max_bytes} bytes")
    if response.length:
        raise FetchError("truncated", f"{response.length} bytes are missing")
    if not body:
        raise FetchError("empty", "no bytes")
    return bytes(body)


def _refuse_opt_out(headers: email.message.Message[Any, Any], limits: FetchLimits) -> None:
    """Honour ``X-Robots-Tag: [user agent:] directive, directive``."""
    own_name = limits.user_agent.partition("/")[0].strip().lower()
    refusing = {directive.lower() for directive in limits.opt_out_directives}
    for value in headers.get_all("X-Robots-Tag", []):
        text = str(value).lower()
        name, separator, rest = text.partition(":")
        # A colon also stands in directives such as `unavailable_after: <date>`; only a name is free of commas.
        if separator and "," not in name and name.strip() != "unavailable_after":
            if name.strip() != own_name:
                continue
            text = rest
        found = refusing & {directive.strip() for directive in text.split(",")}
        if found:
            raise FetchError("opt_out", f"X-Robots-Tag: {value}")


def _seconds(value: str | None) -> float:
    """Read a ``Retry-After`` header; dates count as no wish."""
    return float(value) if value and value.isdecimal() else 0.0


def _remaining(deadline: float) -> float:
    """Return the seconds left.

    Raises:
        FetchError: ``timeout`` when there are none.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise FetchError("timeout", "the deadline has passed")
    return left


class _DeadlineSocket:
    """The part of a socket that ``http.client`` uses, with one deadline for all of it.

    A socket's own time-out starts anew with every read: a server that sends one byte a second would never meet it.
    """

    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw = raw
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(_remaining(self._deadline))
        self._raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_DeadlineReader(self._raw, self._deadline), _CHUNK_BYTES)

    def close(self) -> None:
        """Do nothing: the fetch closes the socket when the body is read."""


class _DeadlineReader(io.RawIOBase):
    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw = raw
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._raw.settimeout(_remaining(self._deadline))
        return self._raw.recv_into(buffer)
