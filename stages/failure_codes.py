"""Why a row has no image: one table of all reason codes, read by the retries, the messages and ``docs/data.md``.

A status of a server is a reason of its own, ``http_<status>``; statuses without a line of their own share the line of
their hundred, such as ``http_5xx``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FailureCode:
    """One way in which a row can end without an image.

    Attributes:
        code: the stable name; ``http_Nxx`` stands for every status of that hundred without a line of its own.
        meaning: what happened.
        can_pass: whether a later run may find the image.
        retried: whether the row is tried again, ``download.retries`` times, within the same run.
        blames_host: whether it says that the host cannot be reached, and so counts for the circuit breaker.
        remedy: what to do when it is frequent.
    """

    code: str
    meaning: str
    can_pass: bool = False
    retried: bool = False
    blames_host: bool = False
    remedy: str


_BY_HAND = "open some of the URLs by hand"
_NONE = "nothing: the owner's wish is obeyed"

FAILURE_CODES: tuple[FailureCode, ...] = (
    # ---- the row ----
    FailureCode(
        code="invalid_url",
        meaning="there is no URL, or it cannot be parsed or names no host",
        remedy="the URLs are not http(s) URLs: check source.url_column",
    ),
    FailureCode(
        code="scheme",
        meaning="neither http nor https, also after a redirect",
        remedy="the URLs are not http(s) URLs: check source.url_column",
    ),
    FailureCode(
        code="blocked_address",
        meaning="the host, also after a redirect, is in a private network or on the worker itself",
        remedy="the hosts are in a private network: list it in download.allowed_networks if that is intended",
    ),
    # ---- the host ----
    FailureCode(
        code="dns",
        meaning="the name of the host cannot be resolved",
        can_pass=True,
        retried=True,
        blames_host=True,
        remedy="host names cannot be resolved: check the network and the resolver of the workers",
    ),
    FailureCode(
        code="connect",
        meaning="no connection, or it broke before the answer's headers were complete",
        can_pass=True,
        retried=True,
        blames_host=True,
        remedy="the servers cannot be reached: check the network and firewall of the workers",
    ),
    FailureCode(
        code="tls",
        meaning="the certificate or the handshake of an https server is wrong",
        remedy="check the certificates (the package ca-certificates) and the clock of the workers",
    ),
    FailureCode(
        code="timeout",
        meaning="no complete answer within download.timeout_s",
        can_pass=True,
        retried=True,
        blames_host=True,
        remedy="the servers cannot be reached, or not fast enough: check the network and firewall of the workers, or "
        "raise download.timeout_s",
    ),
    FailureCode(
        code="host_down",
        meaning="download.circuit_breaker_failures attempts in a row could not reach the host; the row was left out",
        can_pass=True,
        remedy="whole hosts cannot be reached: check the network and firewall of the workers; run again later",
    ),
    FailureCode(
        code="host_busy",
        meaning="the host asked for pauses (429, Retry-After) of more than download.max_host_pause_s in all; the row "
        "was left out",
        can_pass=True,
        remedy="the servers ask to be left alone: lower download.connections_per_host, or raise "
        "download.max_host_pause_s to wait longer",
    ),
    # ---- the owner's wish ----
    FailureCode(
        code="robots_txt", meaning="the host's robots.txt forbids the URL (download.obey_robots_txt)", remedy=_NONE
    ),
    FailureCode(
        code="robots_txt_unreachable",
        meaning="the host's robots.txt could not be read (5xx, 429, time-out), which counts as a refusal for now",
        can_pass=True,
        remedy="run again later",
    ),
    FailureCode(code="opt_out", meaning="the header X-Robots-Tag refuses (download.opt_out_directives)", remedy=_NONE),
    FailureCode(code="takedown", meaning="`unclip takedown` was asked to remove it", remedy=_NONE),
    # ---- the answer ----
    FailureCode(
        code="http_408",
        meaning="the server gave up waiting for the request",
        can_pass=True,
        retried=True,
        remedy="run again later",
    ),
    FailureCode(code="http_425", meaning="too early", can_pass=True, retried=True, remedy="run again later"),
    FailureCode(
        code="http_429",
        meaning="too many requests; the whole host pauses for as long as it asks",
        can_pass=True,
        retried=True,
        remedy="the servers ask for fewer requests: lower download.connections_per_host",
    ),
    FailureCode(
        code="http_5xx",
        meaning="the server failed; 503 with Retry-After pauses the whole host",
        can_pass=True,
        retried=True,
        remedy="the servers fail: run again later",
    ),
    FailureCode(code="http_404", meaning="the image is gone", remedy="the list is old: nothing to be done"),
    FailureCode(code="http_4xx", meaning="the server refuses, for example 401, 403, 410", remedy=_BY_HAND),
    FailureCode(
        code="http_3xx", meaning="a redirect to nowhere, or a status that makes no sense here", remedy=_BY_HAND
    ),
    FailureCode(code="http_2xx", meaning="a success without an image, for example 204", remedy=_BY_HAND),
    FailureCode(code="http_xxx", meaning="a status outside HTTP, for example 999", remedy=_BY_HAND),
    FailureCode(
        code="redirects",
        meaning="more than download.max_redirects redirects",
        remedy=f"raise download.max_redirects, or {_BY_HAND}",
    ),
    FailureCode(
        code="truncated",
        meaning="the connection ended before the announced end of the file",
        can_pass=True,
        retried=True,
        remedy="connections break: check the network of the workers",
    ),
    FailureCode(code="too_large", meaning="more than download.max_bytes", remedy="raise download.max_bytes"),
    FailureCode(code="empty", meaning="a file of no bytes", remedy=_BY_HAND),
    FailureCode(
        code="lost",
        meaning="an adopted data set counts the row as a success but holds no such image, or a damaged one",
        can_pass=True,
        remedy="download them anew: unclip run --retry-failed",
    ),
    # ---- the image ----
    FailureCode(
        code="hash_mismatch",
        meaning="the file is not the one that download.hash_column names",
        remedy="the files have changed since the list was made, or download.hash_algorithm is another one",
    ),
    FailureCode(
        code="too_many_pixels",
        meaning="more than download.max_pixels, as served or after resizing",
        remedy="raise download.max_pixels",
    ),
    FailureCode(
        code="decode",
        meaning="not a complete image of a known format: a page, an SVG, a damaged file",
        remedy=f"the files are no images: {_BY_HAND}",
    ),
    FailureCode(
        code="resize",
        meaning="the image could not be resized or stored in download.image_format",
        remedy="choose another download.resize_mode or download.image_format",
    ),
    # ---- this program ----
    FailureCode(
        code="unexpected",
        meaning="an error that the program does not know; the first of a shard stands in the log with its traceback",
        can_pass=True,
        remedy="report the traceback in the workers' log; run again with --retry-failed once it is mended",
    ),
)

_BY_CODE = {item.code: item for item in FAILURE_CODES}


class FetchError(Exception):
    """One URL that could not be fetched.

    Args:
        reason: one of ``FAILURE_CODES``.
        details: what exactly happened, for the debug log.
        retry_after_s: how long the server asked to wait, seconds.
        lasting: whether another attempt within the same run would meet the same, whatever the table says.
    """

    def __init__(self, reason: str, details: str = "", *, retry_after_s: float = 0.0, lasting: bool = False) -> None:
        super().__init__(f"{reason}: {details}" if details else reason)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.lasting = lasting

    @property
    def retried(self) -> bool:
        """Whether the same run tries again."""
        return failure_code(self.reason).retried and not self.lasting


def failure_code(reason: str) -> FailureCode:
    """Find the line of the table that a reason belongs to.

    Args:
        reason: a code, or ``http_<status>``.

    Raises:
        KeyError: if there is none.
    """
    if reason.startswith("http_") and reason not in _BY_CODE:
        return _BY_CODE.get(f"{reason[:6]}xx", _BY_CODE["http_xxx"])
    return _BY_CODE[reason]


def is_transient(reason: str) -> bool:
    """Tell whether a reason names a failure that can pass."""
    return failure_code(reason).can_pass


def remedy_of(reasons: Mapping[str, int]) -> str:
    """Say what to do about the most frequent reason.

    Args:
        reasons: reason -> rows.
    """
    if not reasons:
        return _BY_HAND
    return failure_code(max(reasons, key=lambda name: reasons[name])).remedy
