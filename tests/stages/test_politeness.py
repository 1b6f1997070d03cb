"""Which row may be fetched next: laws of the queues, on a clock of the test's own."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.failure_codes import FetchError
from stages.politeness import Courtesy, Ended, HostQueues, Request
from stages.robots import RobotsRules


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def queues_of(urls: list[str], clock: Clock, **courtesy: object) -> HostQueues:
    queues = HostQueues(
        Courtesy(**courtesy),  # type: ignore[arg-type]
        timeout_s=10.0,
        clock=clock,
    )
    for row, url in enumerate(urls):
        queues.add(row, url)
    return queues


def take_all(queues: HostQueues) -> list[Request | Ended]:
    items = []
    while (item := queues.take()) is not None:
        items.append(item)
    return items


def rows_of(items: list[Request | Ended]) -> list[int | None]:
    return [item.row for item in items]


def urls_on(*hosts: str, each: int) -> list[str]:
    """Rows of one host after those of another."""
    return [f"http://{host}/{index}" for host in hosts for index in range(each)]


def test_hosts_take_turns_and_none_has_too_many_connections() -> None:
    clock = Clock()
    queues = queues_of(urls_on("a", "b", each=5), clock, connections_per_host=2)
    active = take_all(queues)
    assert rows_of(active) == [0, 5, 1, 6], "interleaved, two of each"
    assert queues.seconds_to_wait() is None, "nothing happens until one is answered"
    assert isinstance(active[1], Request)
    queues.succeeded(active[1])
    assert rows_of(take_all(queues)) == [7], "its place goes to the same host"


def test_a_port_is_a_host_of_its_own_and_the_scheme_is_not() -> None:
    urls = ["http://a/0", "http://A:80/1", "http://a:8080/2", "https://a:80/3", "https://a/4"]
    assert rows_of(take_all(queues_of(urls, Clock(), connections_per_host=1))) == [0, 2, 4]


def test_a_row_that_is_tried_again_waits_and_holds_nothing() -> None:
    clock = Clock()
    queues = queues_of(urls_on("a", each=2), clock, connections_per_host=1, retries=3, backoff_s=1.0)
    first = queues.take()
    assert isinstance(first, Request)
    pauses = []
    for failure in range(3):
        queues.failed(first, FetchError("truncated"))
        if failure == 0:
            other = queues.take()
            assert isinstance(other, Request) and other.row == 1, "another row takes the place meanwhile"
            queues.succeeded(other)
        assert queues.take() is None
        pause = queues.seconds_to_wait()
        assert pause is not None
        pauses.append(pause)
        clock.now += pause
        assert queues.take() is first
    queues.failed(first, FetchError("truncated"))
    assert queues.take() == Ended(0, "truncated")
    assert 0.5 <= pauses[0] <= 1.0 <= pauses[1] <= 2.0 <= pauses[2] <= 4.0
    assert queues.summary()["attempts"] == 5 and queues.summary()["retries"] == 3


@pytest.mark.parametrize("reason", ["http_404", "opt_out", "decode", "too_large", "hash_mismatch", "tls"])
def test_final_failures_end_at_once(reason: str) -> None:
    queues = queues_of(["http://a/0"], Clock(), retries=5)
    request = queues.take()
    assert isinstance(request, Request)
    queues.failed(request, FetchError(reason))
    assert queues.take() == Ended(0, reason)


def test_a_name_that_does_not_exist_is_not_asked_for_again() -> None:
    queues = queues_of(["http://a/0"], Clock(), retries=5)
    request = queues.take()
    assert isinstance(request, Request)
    queues.failed(request, FetchError("dns", lasting=True))
    assert queues.take() == Ended(0, "dns")


@pytest.mark.parametrize("reason", ["http_429", "http_503"])
def test_retry_after_pauses_the_whole_host_and_no_other(reason: str) -> None:
    clock = Clock()
    queues = queues_of(urls_on("a", each=5), clock, connections_per_host=2, backoff_s=0.1)
    queues.add(9, "http://b/9")
    first, other_host, second = take_all(queues)
    assert isinstance(first, Request) and isinstance(second, Request) and other_host.row == 9
    queues.failed(first, FetchError(reason, retry_after_s=7.0))
    queues.succeeded(second)
    assert queues.take() is None
    queues.add(10, "http://b/10")
    assert rows_of(take_all(queues)) == [10]
    assert queues.seconds_to_wait() == 7.0
    clock.now += 6.9
    assert queues.take() is None
    clock.now += 0.1
    assert set(rows_of(take_all(queues))) <= {0, 2, 3, 4}
    assert queues.summary()["host_pauses_s"] == 7.0


def test_503_alone_pauses_its_row_only_and_429_the_host() -> None:
    for reason, expected in (("http_503", [1]), ("http_429", [])):
        queues = queues_of(urls_on("a", each=2), Clock(), connections_per_host=1)
        request = queues.take()
        assert isinstance(request, Request)
        queues.failed(request, FetchError(reason))
        assert rows_of(take_all(queues)) == expected


def test_a_host_that_asks_for_too_long_a_pause_is_left_alone() -> None:
    clock = Clock()
    queues = queues_of(urls_on("a", "b", each=3), clock, connections_per_host=1, max_host_pause_s=20.0)
    for _ in range(2):
        request = next(item for item in take_all(queues) if item.row is not None and item.row < 3)
        assert isinstance(request, Request)
        queues.failed(request, FetchError("http_429", retry_after_s=15.0))
        clock.now += 15.0
    ended = [item for item in take_all(queues) if isinstance(item, Ended)]
    assert sorted((item.row, item.reason) for item in ended) == [
        (row, "http_429" if row == request.row else "host_busy") for row in range(3)
    ]
    assert queues.summary()["hosts_busy"] == 1


@pytest.mark.parametrize("reason", ["http_500", "http_502", "http_504", "http_408", "http_425"])
def test_a_row_waits_as_long_as_its_server_asks_up_to_a_limit(reason: str) -> None:
    clock = Clock()
    queues = queues_of(urls_on("a", each=2), clock, retries=5, backoff_s=0.1, max_host_pause_s=20.0)
    first, second = take_all(queues)
    assert isinstance(first, Request) and isinstance(second, Request)
    queues.failed(first, FetchError(reason, retry_after_s=20.0))
    queues.failed(second, FetchError(reason, retry_after_s=20.5))
    assert take_all(queues) == [Ended(1, reason)]
    assert queues.seconds_to_wait() == 20.0
    clock.now += 20.0
    assert queues.take() is first
    assert queues.summary()["host_pauses_s"] == 0, "a row's wait is not the host's"


def test_any_number_of_retries_has_a_pause() -> None:
    clock = Clock()
    queues = queues_of(["http://a/0"], clock, retries=1200, backoff_s=0.5)
    for _ in range(1200):
        request = queues.take()
        assert isinstance(request, Request)
        queues.failed(request, FetchError("truncated"))
        pause = queues.seconds_to_wait()
        assert pause is not None and pause < 30.1
        clock.now += pause


def test_simultaneous_wishes_count_once() -> None:
    clock = Clock()
    queues = queues_of(urls_on("a", each=4), clock, connections_per_host=4, max_host_pause_s=20.0)
    for request in take_all(queues):
        assert isinstance(request, Request)
        queues.failed(request, FetchError("http_429", retry_after_s=15.0))
    assert queues.summary()["host_pauses_s"] == 15.0
    clock.now += 15.0
    assert len(take_all(queues)) == 4


@pytest.mark.parametrize("reason", ["connect", "timeout", "dns"])
def test_a_host_that_cannot_be_reached_is_given_up(reason: str) -> None:
    clock = Clock()
    queues = queues_of(urls_on("a", "b", each=8), clock, connections_per_host=1, retries=0, circuit_breaker_failures=3)
    ended: list[Ended] = []
    while (item := queues.take()) is not None:
        if isinstance(item, Ended):
            ended.append(item)
        elif item.host == ("a", 80):
            queues.failed(item, FetchError(reason))
        else:
            queues.succeeded(item)
    assert Counter(item.reason for item in ended) == {reason: 3, "host_down": 5}
    assert sorted(item.row for item in ended) == list(range(8))
    assert queues.summary()["hosts_down"] == 1
    queues.add(99, "http://a/99")
    assert queues.take() == Ended(99, "host_down")


def test_rows_that_wait_for_another_attempt_are_given_up_too() -> None:
    queues = queues_of(urls_on("a", each=2), Clock(), connections_per_host=2, retries=9, circuit_breaker_failures=2)
    for request in take_all(queues):
        assert isinstance(request, Request)
        queues.failed(request, FetchError("connect"))
    assert take_all(queues) == [Ended(0, "host_down"), Ended(1, "connect")]


@pytest.mark.parametrize("answer", ["file", "http_404", "http_500", "truncated", "redirect"])
def test_any_answer_closes_the_circuit_again(answer: str) -> None:
    queues = queues_of(urls_on("a", each=30), Clock(), connections_per_host=1, retries=0, circuit_breaker_failures=3)
    reasons: Counter[str] = Counter()
    asked = 0
    while (item := queues.take()) is not None:
        if isinstance(item, Ended):
            reasons[item.reason] += 1
            continue
        if item.host == ("b", 80):
            queues.succeeded(item)
            continue
        asked += 1
        if asked % 3:
            queues.failed(item, FetchError("connect"))
        elif answer == "file":
            queues.succeeded(item)
        elif answer == "redirect":
            queues.redirected(item, "http://b/")
        else:
            queues.failed(item, FetchError(answer))
    assert "host_down" not in reasons


@pytest.mark.parametrize(("reason", "falls"), [("timeout", False), ("connect", True)])
def test_time_that_another_host_has_used_up_is_not_held_against_a_host(reason: str, falls: bool) -> None:
    queues = queues_of([], Clock(), connections_per_host=1, retries=0, circuit_breaker_failures=3)
    for row in range(5):
        queues.add(row, f"http://shortener/{row}")
        while isinstance(request := queues.take(), Request):
            if request.host == ("shortener", 80):
                queues.redirected(request, f"http://b/{row}")
            else:
                queues.failed(request, FetchError(reason))
    queues.add(99, "http://b/fine")
    assert (queues.take() == Ended(99, "host_down")) == falls


def test_the_breaker_can_be_switched_off() -> None:
    queues = queues_of(urls_on("a", each=50), Clock(), connections_per_host=1, retries=0, circuit_breaker_failures=0)
    ended = []
    while (item := queues.take()) is not None:
        if isinstance(item, Ended):
            ended.append(item.reason)
        else:
            queues.failed(item, FetchError("connect"))
    assert ended == ["connect"] * 50


def test_a_redirect_counts_for_the_host_it_leads_to() -> None:
    queues = queues_of(urls_on("a", "b", each=2), Clock(), connections_per_host=1)
    of_a, of_b = take_all(queues)
    assert isinstance(of_a, Request) and isinstance(of_b, Request)
    queues.redirected(of_a, "http://b/elsewhere")
    assert rows_of(take_all(queues)) == [1], "b is busy"
    queues.succeeded(of_b)
    item = queues.take()
    assert item is of_a and item.url == "http://b/elsewhere", "what has begun comes first"


def test_a_retry_starts_from_the_first_url() -> None:
    clock = Clock()
    queues = queues_of(["http://a/0"], clock)
    request = queues.take()
    assert isinstance(request, Request)
    queues.redirected(request, "http://b/elsewhere")
    assert queues.take() is request
    request.seconds_left = 1.0
    queues.failed(request, FetchError("timeout"))
    clock.now += 60.0
    assert queues.take() is request
    assert (request.url, request.seconds_left, request.num_redirects) == ("http://a/0", 10.0, 0)


def test_redirects_to_nowhere_and_for_ever_end() -> None:
    queues = queues_of(["http://a/0", "http://a/1"], Clock())
    first, second = take_all(queues)
    assert isinstance(first, Request) and isinstance(second, Request)
    queues.redirected(first, "ftp://a/0")
    assert queues.take() == Ended(0, "scheme")
    for _ in range(5):
        queues.redirected(second, "http://a/1")
        assert queues.take() is second
    queues.redirected(second, "http://a/1")
    assert queues.take() == Ended(1, "redirects")


RULES = b"User-agent: *\nDisallow: /private/\n\nUser-agent: tester\nDisallow: /secret/\n"


def test_robots_txt_comes_first_and_is_obeyed() -> None:
    urls = ["http://a/secret/0", "http://a/private/1", "http://a/2"]
    queues = queues_of(urls, Clock(), obey_robots_txt=True)
    rules = queues.take()
    assert isinstance(rules, Request) and (rules.row, rules.url) == (None, "http://a/robots.txt")
    assert queues.take() is None, "nothing else meanwhile"
    queues.succeeded(rules, RobotsRules(RULES, "tester"))
    items = take_all(queues)
    assert items[0] == Ended(0, "robots_txt")
    assert rows_of(items[1:]) == [1, 2]
    queues.add(3, "http://a/secret/3")
    assert queues.take() == Ended(3, "robots_txt"), "asked for once"


def test_robots_txt_of_the_host_a_redirect_leads_to_is_obeyed() -> None:
    queues = queues_of(["http://a/0"], Clock(), obey_robots_txt=True)
    rules = queues.take()
    assert isinstance(rules, Request)
    queues.succeeded(rules)
    row = queues.take()
    assert isinstance(row, Request)
    queues.redirected(row, "http://b/secret/0")
    rules = queues.take()
    assert isinstance(rules, Request) and rules.url == "http://b/robots.txt"
    queues.redirected(rules, "http://c/robots.txt")
    elsewhere = queues.take()
    assert elsewhere is rules and rules.host == ("c", 80), "the rules may lie elsewhere; no rules are asked for those"
    queues.succeeded(rules, RobotsRules(RULES, "tester"))
    assert queues.take() == Ended(0, "robots_txt")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("http_404", None),
        ("http_401", None),
        ("http_204", None),
        ("empty", None),
        ("http_500", "robots_txt_unreachable"),
        ("http_429", "robots_txt_unreachable"),
        ("timeout", "robots_txt_unreachable"),
        ("too_large", "robots_txt_unreachable"),
        ("dns", "dns"),
        ("blocked_address", "blocked_address"),
    ],
)
def test_without_robots_txt(reason: str, expected: str | None) -> None:
    clock = Clock()
    queues = queues_of(urls_on("a", each=3), clock, obey_robots_txt=True, retries=1)
    num_asked = 0
    while isinstance(item := queues.take(), Request) and item.row is None:
        num_asked += 1
        queues.failed(item, FetchError(reason))
        clock.now += 40.0
    assert num_asked == (2 if FetchError(reason).retried else 1)
    items = [item, *take_all(queues)]
    if expected is None:
        assert all(isinstance(item, Request) for item in items) and len(items) == 3
    else:
        assert items == [Ended(row, expected) for row in range(3)]


REASONS = [
    "connect",
    "timeout",
    "dns",
    "http_408",
    "http_429",
    "http_500",
    "http_503",
    "http_404",
    "truncated",
    "decode",
]
WISHES_S = [0.0, 5.0, 40.0, 86_400.0, math.inf]


@given(
    hosts=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    connections=st.integers(1, 4),
    robots=st.booleans(),
    data=st.data(),
)
def test_every_row_comes_out_exactly_once(
    hosts: list[int], connections: int, robots: bool, data: st.DataObject
) -> None:
    """Whatever the servers answer, in whatever order: no row is lost, none is stuck, no host is crowded."""
    clock = Clock()
    courtesy = {"connections_per_host": connections, "obey_robots_txt": robots, "circuit_breaker_failures": 4}
    queues = queues_of([f"http://h{host}/{row}" for row, host in enumerate(hosts)], clock, **courtesy)
    active: list[Request] = []
    finished: list[int] = []
    while len(finished) < len(hosts):
        item = queues.take()
        if isinstance(item, Ended):
            finished.append(item.row)
            continue
        if item is not None:
            active.append(item)
            assert max(Counter(request.host for request in active).values()) <= connections
            if len(active) < 8:
                continue
        if not active:
            pause = queues.seconds_to_wait()
            assert pause is not None, "rows are left, nothing is under way and nothing will happen"
            assert pause < Courtesy().max_host_pause_s + 0.1
            clock.now += pause + 1e-6
            continue
        request = active.pop(data.draw(st.integers(0, len(active) - 1)))
        answer = data.draw(st.sampled_from(["file", "redirect", *REASONS]))
        if answer == "file":
            queues.succeeded(request)
            finished += [request.row] if request.row is not None else []
        elif answer == "redirect":
            queues.redirected(request, f"http://h{data.draw(st.integers(0, 4))}/elsewhere")
        else:
            queues.failed(request, FetchError(answer, retry_after_s=data.draw(st.sampled_from(WISHES_S))))
    assert sorted(finished) == list(range(len(hosts)))
    # A host's rules may still be asked for, on behalf of rows that have ended for another reason meanwhile.
    assert queues.take() is None and all(request.row is None for request in active)
