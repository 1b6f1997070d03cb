"""Which row may be fetched next: the order of a unit's rows by what its hosts can bear.

No thread ever waits for one host while rows of another could be fetched: rows wait in a queue per host, the hosts take
turns, and whoever is free takes a row of a host that may be asked now.

* A host has at most so many connections at once, also as the target of redirects: a redirect sends the row to the queue
  of the other host.
* A row that failed for a reason that passes waits in its queue, with growing pauses, and as long as its server asks
  (``Retry-After``). A row that is asked to wait for longer than a host may ask ends with its reason.
* 429, and 503 with ``Retry-After``, pause the whole host. A host that asks for more than the unit has time for is left
  alone: its remaining rows end as ``host_busy``.
* A host that could not be reached several times in a row is left alone: its remaining rows end as ``host_down``.
* Where ``robots.txt`` is obeyed, a host is asked for it before anything else.

Nothing here knows of threads or sockets, and the clock is an argument: ``stages/row_fetcher.py`` does the work.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
import random
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field

from stages.failure_codes import FetchError, failure_code
from stages.fetch import parse_url
from stages.robots import ROBOTS_TXT, RobotsRules, refusal_without_rules

_BACKOFF_MAX_S = 30.0
_MAX_DOUBLINGS = 64  # more of them say nothing and overflow in the end

HostKey = tuple[str, int]  # name and port


@dataclass(frozen=True, kw_only=True)
class Courtesy:
    """What the hosts are spared.

    Attributes:
        connections_per_host: at once.
        retries: further attempts at a row after a failure that can pass.
        backoff_s: pause before the second attempt, seconds; doubles each time, with jitter.
        max_host_pause_s: seconds that a host may ask to be left alone, in all, before its remaining rows are given up;
            also the longest ``Retry-After`` that a row waits for, whatever the status.
        circuit_breaker_failures: failures to reach a host in a row after which its remaining rows are given up; 0: off.
        obey_robots_txt: whether ``robots.txt`` is asked for and obeyed.
    """

    connections_per_host: int = 4
    retries: int = 2
    backoff_s: float = 0.5
    max_host_pause_s: float = 60.0
    circuit_breaker_failures: int = 10
    obey_robots_txt: bool = False


@dataclass(eq=False, slots=True)
class Request:
    """One row on its way, or one ``robots.txt``.

    Attributes:
        row: its position; None: the ``robots.txt`` of ``rules_of``.
        first_url: where the row starts.
        url: what to ask for next: the first URL, or where a redirect led.
        seconds_left: of the attempt.
    """

    row: int | None
    first_url: str
    url: str
    seconds_left: float
    rules_of: HostKey | None = None
    host: HostKey = ("", 0)
    num_failures: int = 0
    num_redirects: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """A row that ends without an image."""

    row: int
    reason: str


@dataclass(eq=False, slots=True)
class _Host:
    """What is known of one host."""

    waiting: collections.deque[Request] = field(default_factory=collections.deque)
    later: list[tuple[float, int, Request]] = field(default_factory=list)  # a heap by time
    held: list[Request] = field(default_factory=list)  # until the rules are known
    rules: RobotsRules | None = None
    verdict: str | None = None  # the reason with which all its rows end
    num_active: int = 0
    num_failures_in_a_row: int = 0
    paused_until: float = 0.0
    paused_s: float = 0.0
    has_turn: bool = False
    wakes_at: float = math.inf


class HostQueues:
    """The rows of one unit; see the module's docstring. Not thread-safe.

    Args:
        courtesy: what the hosts are spared.
        timeout_s: of one attempt at a row, seconds.
        max_redirects: followed in one attempt.
        clock: seconds, as ``time.monotonic``.
    """

    def __init__(
        self,
        courtesy: Courtesy,
        *,
        timeout_s: float,
        max_redirects: int = 5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._courtesy = courtesy
        self._timeout_s = timeout_s
        self._max_redirects = max_redirects
        self._clock = clock
        self._hosts: dict[HostKey, _Host] = {}
        self._turns: collections.deque[_Host] = collections.deque()
        self._wakes: list[tuple[float, int, _Host]] = []  # a heap: when a host has to be looked at again
        self._ended: collections.deque[Ended] = collections.deque()
        self._order = itertools.count()
        self._num_attempts = 0
        self._num_retries = 0

    # ---- rows in, rows out ------------------------------------------------------------------------------------------

    def add(self, row: int, url: str | None) -> None:
        """Add a row."""
        self._send(Request(row, url or "", url or "", self._timeout_s))

    def take(self) -> Request | Ended | None:
        """Return a request that may be sent now, or a row that has ended; None if all must wait.

        Every request is answered by one call of ``succeeded``, ``redirected`` or ``failed``.
        """
        now = self._clock()
        while self._wakes and self._wakes[0][0] <= now:
            host = heapq.heappop(self._wakes)[2]
            host.wakes_at = math.inf
            self._look_at(host)
        if self._ended:
            return self._ended.popleft()
        while self._turns:
            host = self._turns.popleft()
            host.has_turn = False
            request = host.waiting.popleft() if host.waiting and host.paused_until <= now else None
            host.num_active += request is not None
            self._look_at(host)
            if request is not None:
                self._num_attempts += request.row is not None and not request.num_redirects
                return request
        return None

    def seconds_to_wait(self) -> float | None:
        """Return the seconds after which ``take`` may find something by itself; None: not without an answer."""
        if self._ended or self._turns:
            return 0.0
        return max(self._wakes[0][0] - self._clock(), 0.0) if self._wakes else None

    def summary(self) -> dict[str, float]:
        """Return what the hosts were asked and spared."""
        hosts = self._hosts.values()
        return {
            "hosts": len(hosts),
            "hosts_down": sum(host.verdict == "host_down" for host in hosts),
            "hosts_busy": sum(host.verdict == "host_busy" for host in hosts),
            "host_pauses_s": round(sum(host.paused_s for host in hosts), 3),
            "attempts": self._num_attempts,
            "retries": self._num_retries,
        }

    # ---- answers ----------------------------------------------------------------------------------------------------

    def succeeded(self, request: Request, rules: RobotsRules | None = None) -> None:
        """Note that a request was answered by a file.

        Args:
            request: that was taken.
            rules: the file, if it is a ``robots.txt``.
        """
        host = self._release(request)
        host.num_failures_in_a_row = 0
        if request.rules_of is not None:
            self._open(self._hosts[request.rules_of], rules or RobotsRules())
        self._look_at(host)

    def redirected(self, request: Request, url: str) -> None:
        """Note that a request was answered by a redirect: the row goes on at the head of the other host's queue."""
        host = self._release(request)
        host.num_failures_in_a_row = 0
        request.num_redirects += 1
        request.url = url
        if request.num_redirects > self._max_redirects:
            self._end(request, "redirects")
        else:
            self._send(request, first=True)
        self._look_at(host)

    def failed(self, request: Request, error: FetchError) -> None:
        """Note that a request failed: the row is tried again later, or ends."""
        host = self._release(request)
        # Of a row that came from elsewhere, another host may have used the time.
        blames = failure_code(error.reason).blames_host and (error.reason != "timeout" or not request.num_redirects)
        host.num_failures_in_a_row = host.num_failures_in_a_row + 1 if blames else 0
        pause = max(self._backoff(request), error.retry_after_s)
        # Whatever the status: otherwise one header decides how long the whole unit takes.
        can_wait = error.retry_after_s <= self._courtesy.max_host_pause_s
        if error.reason == "http_429" or (error.reason == "http_503" and error.retry_after_s):
            self._pause(host, pause)
        elif 0 < self._courtesy.circuit_breaker_failures <= host.num_failures_in_a_row:
            self._give_up(host, "host_down")
        has_attempts_left = error.retried and request.num_failures < self._courtesy.retries
        if has_attempts_left and can_wait and host.verdict is None:
            self._retry(request, self._clock() + pause)
        else:
            self._end(request, error.reason)
        self._look_at(host)

    # ---- hosts ------------------------------------------------------------------------------------------------------

    def _send(self, request: Request, *, first: bool = False) -> None:
        """Put a request into the queue of the host that its URL names."""
        try:
            host = self._host_of(request)
        except FetchError as error:
            self._end(request, error.reason)
            return
        if host.verdict is not None:
            self._end(request, host.verdict)
            return
        if request.row is not None and self._courtesy.obey_robots_txt:
            if host.rules is None:
                self._hold(request, host)
                return
            if not host.rules.allow(request.url):
                self._end(request, "robots_txt")
                return
        (host.waiting.appendleft if first else host.waiting.append)(request)
        self._look_at(host)

    def _hold(self, request: Request, host: _Host) -> None:
        """Let a row wait for the rules of its host, and ask for them."""
        host.held.append(request)
        if len(host.held) == 1:
            url = urllib.parse.urljoin(request.url, ROBOTS_TXT)
            self._send(Request(None, url, url, self._timeout_s, rules_of=request.host))

    def _host_of(self, request: Request) -> _Host:
        _, name, port = parse_url(request.url).origin
        request.host = (name, port)
        return self._hosts.setdefault(request.host, _Host())

    def _look_at(self, host: _Host) -> None:
        """Give a host a turn if it may be asked now; otherwise note when to look again."""
        now = self._clock()
        while host.later and host.later[0][0] <= now:
            host.waiting.append(heapq.heappop(host.later)[2])
        if host.later:
            self._wake(host, host.later[0][0])
        if host.has_turn or not host.waiting or host.num_active >= self._courtesy.connections_per_host:
            return
        if host.paused_until > now:
            self._wake(host, host.paused_until)
            return
        host.has_turn = True
        self._turns.append(host)

    def _wake(self, host: _Host, at: float) -> None:
        if at < host.wakes_at:
            host.wakes_at = at
            heapq.heappush(self._wakes, (at, next(self._order), host))

    def _release(self, request: Request) -> _Host:
        host = self._hosts[request.host]
        host.num_active -= 1
        return host

    def _pause(self, host: _Host, seconds: float) -> None:
        now = self._clock()
        until = max(host.paused_until, now + seconds)
        host.paused_s += until - max(host.paused_until, now)
        host.paused_until = until
        if host.paused_s > self._courtesy.max_host_pause_s:
            self._give_up(host, "host_busy")

    def _give_up(self, host: _Host, reason: str) -> None:
        """End all rows of a host, those that redirects will bring included."""
        host.verdict = reason
        requests = [*host.waiting, *(item[2] for item in sorted(host.later)), *host.held]
        host.waiting.clear()
        host.later.clear()
        host.held.clear()
        for request in requests:
            self._end(request, reason)

    def _open(self, host: _Host, rules: RobotsRules) -> None:
        """Let the rows go that waited for the rules of their host."""
        host.rules = rules
        held, host.held = host.held, []
        for request in held:
            self._send(request)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _end(self, request: Request, reason: str) -> None:
        if request.row is not None:
            self._ended.append(Ended(request.row, reason))
            return
        assert request.rules_of is not None
        host = self._hosts[request.rules_of]
        refusal = refusal_without_rules(reason)
        if refusal is None:
            self._open(host, RobotsRules())
        else:
            self._give_up(host, refusal)

    def _retry(self, request: Request, at: float) -> None:
        """Start a row again, from its first URL."""
        self._num_retries += 1
        request.num_failures += 1
        request.num_redirects = 0
        request.url, request.seconds_left = request.first_url, self._timeout_s
        host = self._host_of(request)
        heapq.heappush(host.later, (at, next(self._order), request))
        self._look_at(host)

    def _backoff(self, request: Request) -> float:
        doubled = 2.0 ** min(request.num_failures, _MAX_DOUBLINGS)
        pause = self._courtesy.backoff_s * doubled * random.uniform(0.5, 1.0)
        return min(pause, _BACKOFF_MAX_S)
