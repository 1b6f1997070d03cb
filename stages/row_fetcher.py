"""Fetching the rows of one unit: any number of threads take turns, every row comes out exactly once.

A thread asks for the next finished row, not for a row of its own: it works on whatever may be fetched now
(``stages/politeness.py``) until some row is finished. As many calls as there are rows return all of them.

An exception that nobody foresaw costs the row that met it, as ``unexpected``, not the others of the unit. What is not
the row's fault (no memory, an interrupt) is raised.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stages import robots
from stages.connections import Connections
from stages.failure_codes import FetchError
from stages.fetch import FetchLimits, Redirect, check_image, fetch
from stages.pixel_budget import PixelBudget
from stages.politeness import Courtesy, Ended, HostQueues, Request
from stages.resolver import Resolver

logger = logging.getLogger(__name__)

_PIXELS_AT_ONCE = 16_000_000

_Answer = bytes | Redirect | robots.RobotsRules | FetchError


@dataclass(frozen=True)
class ExpectedHashes:
    """What the files of the rows must hash to.

    Attributes:
        algorithm: of ``hashlib``.
        digests: hexadecimal, one per row; None or empty: unknown, any file will do.
    """

    algorithm: str
    digests: Sequence[str | None]

    def check(self, row: int, data: bytes) -> None:
        """Check a file.

        Raises:
            FetchError: ``hash_mismatch``.
        """
        expected = (self.digests[row] or "").strip().lower()
        found = hashlib.new(self.algorithm, data, usedforsecurity=False).hexdigest() if expected else ""
        if found != expected:
            raise FetchError("hash_mismatch", f"{self.algorithm} is {found}, not {expected}")


@dataclass(frozen=True)
class FetchedRow:
    """A row that is finished.

    Attributes:
        row: its position.
        data: the file as it was served, or None.
        reason: why there is none, or None.
        num_pixels: width x height of the image.
    """

    row: int
    data: bytes | None = None
    reason: str | None = None
    num_pixels: int = 0


class RowFetcher:
    """Fetches all rows of a unit; see the module's docstring.

    Args:
        urls: of the rows.
        limits: of every fetch.
        courtesy: what the hosts are spared.
        hashes: of the files, if they are known.
        resolver: resolves the names; by default the system's.

    Attributes:
        budget: of all threads that decode images of the unit.
    """

    def __init__(
        self,
        urls: Sequence[str | None],
        limits: FetchLimits,
        courtesy: Courtesy,
        *,
        hashes: ExpectedHashes | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        self.budget = PixelBudget(_PIXELS_AT_ONCE)
        self._limits = limits
        # Of more rules than that the first ones count (RFC 9309, section 2.5).
        self._rules_limits = dataclasses.replace(limits, max_bytes=robots.MAX_BYTES, cuts=True, opt_out_directives=())
        self._hashes = hashes
        # Half the shortest pause: a row that is tried again is looked up again.
        forget_s = courtesy.backoff_s / 2
        self._resolver = resolver or Resolver(patience_s=limits.timeout_s, forget_s=forget_s)
        self._connections = Connections(limits.allows, self._resolver)
        self._changed = threading.Condition()
        self._has_told = False
        self._queues = HostQueues(courtesy, timeout_s=limits.timeout_s, max_redirects=limits.max_redirects)
        for row, url in enumerate(urls):
            self._queues.add(row, url)

    def next_row(self) -> FetchedRow:
        """Work until some row is finished, and return it; to be called once per row, by any number of threads.

        Raises:
            MemoryError: if there is none left; the row counts as finished.
        """
        while True:
            item = self._take()
            if isinstance(item, Ended):
                return FetchedRow(item.row, reason=item.reason)
            data = self._ask(item)
            if data is not None and item.row is not None:
                return self._checked(item, data)

    def summary(self) -> dict[str, float]:
        """Return the health of the name resolution and what the hosts were asked and spared."""
        with self._changed:
            return self._queues.summary() | self._resolver.summary()

    def close(self) -> None:
        """Close the connections that were kept."""
        self._connections.close()

    def _take(self) -> Request | Ended:
        with self._changed:
            while (item := self._queues.take()) is None:
                self._changed.wait(self._queues.seconds_to_wait())
            # Another thread has to watch the clock, or take what else may be taken, in this one's place.
            if self._queues.seconds_to_wait() is not None:
                self._changed.notify()
            return item

    def _ask(self, request: Request) -> bytes | None:
        """Send one request and note the answer; return the file if it is one."""
        limits = self._limits if request.row is not None else self._rules_limits
        started_at = time.monotonic()
        answer: _Answer
        fatal: BaseException | None = None
        try:
            answer = fetch(request.url, limits, self._connections, started_at + request.seconds_left)
            if request.row is None and isinstance(answer, bytes):
                answer = robots.RobotsRules(answer, limits.user_agent)
        except FetchError as error:
            logger.debug("%s: %s", request.url, error)
            answer = error
        except BaseException as error:
            fatal = None if _is_of_the_row(error) else error
            answer = self._unexpected(request, error)
        request.seconds_left -= time.monotonic() - started_at
        # Also what is raised has to be noted: the other threads would wait for ever for a row that nobody works on.
        with self._changed:
            self._note(request, answer)
            self._changed.notify()
        if fatal is not None:
            raise fatal
        return answer if isinstance(answer, bytes) else None

    def _note(self, request: Request, answer: _Answer) -> None:
        if isinstance(answer, bytes):
            self._queues.succeeded(request)
        elif isinstance(answer, robots.RobotsRules):
            self._queues.succeeded(request, answer)
        elif isinstance(answer, Redirect):
            self._queues.redirected(request, answer.url)
        else:
            self._queues.failed(request, answer)

    def _checked(self, request: Request, data: bytes) -> FetchedRow:
        assert request.row is not None
        try:
            if self._hashes is not None:
                self._hashes.check(request.row, data)
            width, height = check_image(data, self._limits.max_pixels, self.budget)
        except FetchError as error:
            logger.debug("%s: %s", request.url, error)
            return FetchedRow(request.row, reason=error.reason)
        except Exception as error:
            if not _is_of_the_row(error):
                raise
            return FetchedRow(request.row, reason=self._unexpected(request, error).reason)
        return FetchedRow(request.row, data, num_pixels=width * height)

    def _unexpected(self, request: Request, error: BaseException) -> FetchError:
        """Tell what nobody foresaw, in full once per unit: a mistake that all rows meet must not flood the log."""
        with self._changed:
            level = logging.DEBUG if self._has_told else logging.ERROR
            self._has_told = True
        logger.log(level, "%s: unexpected; further ones are only counted", request.url, exc_info=error)
        return FetchError("unexpected", f"{type(error).__name__}: {error}")


def _is_of_the_row(error: BaseException) -> bool:
    """Tell whether another row may well fare better."""
    return isinstance(error, Exception) and not isinstance(error, MemoryError)
