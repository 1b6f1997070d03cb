"""Rows fetched by many threads from real servers: limits per host, names, robots.txt, hashes, kept connections."""

from __future__ import annotations

import contextlib
import hashlib
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stages import robots
from stages.failure_codes import FetchError
from stages.fetch import FetchLimits
from stages.politeness import Courtesy
from stages.resolver import Resolver
from stages.row_fetcher import ExpectedHashes, FetchedRow, RowFetcher
from tests.conftest import free_port
from tests.stages.hostile_server import PNG, HostileServer, serve

LIMITS = FetchLimits(timeout_s=5.0, allowed_networks=("127.0.0.0/8", "::1/128"))


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with serve() as running:
        yield running


def fetch_all(
    urls: list[str],
    *,
    num_threads: int = 16,
    limits: FetchLimits = LIMITS,
    hashes: ExpectedHashes | None = None,
    resolver: Resolver | None = None,
    **courtesy: Any,
) -> tuple[list[FetchedRow], dict[str, float]]:
    """Fetch rows as the download does; return them in row order, and the summary."""
    settings = {"backoff_s": 0.01} | courtesy
    fetcher = RowFetcher(urls, limits, Courtesy(**settings), hashes=hashes, resolver=resolver)
    with contextlib.closing(fetcher), ThreadPoolExecutor(num_threads) as pool:
        rows = list(pool.map(lambda _: fetcher.next_row(), urls))
    assert sorted(row.row for row in rows) == list(range(len(urls))), "every row once"
    return sorted(rows, key=lambda row: row.row), fetcher.summary()


def outcomes(rows: list[FetchedRow]) -> list[str | None]:
    assert all(row.data == PNG for row in rows if row.reason is None)
    return [row.reason for row in rows]


# ---- hosts ----------------------------------------------------------------------------------------------------------


def test_no_host_is_crowded_and_none_waits_for_another(server: HostileServer) -> None:
    with serve() as other:
        urls = [f"{server.url}/late/{row}?0.1" for row in range(12)]
        urls += [f"{other.url}/redirect?{server.url}/late/{row}?0.1" for row in range(4)]
        urls += [f"{other.url}/image/{row}" for row in range(20)]
        rows, summary = fetch_all(urls, connections_per_host=2)
        assert outcomes(rows) == [None] * 36
        assert server.busiest == 2, "redirects included"
        assert other.busiest <= 2
        assert max(other.seen_at) < sorted(server.seen_at)[8], "the fast host is done long before the slow one"
        assert summary["hosts"] == 2 and summary["attempts"] == 36 and summary["retries"] == 0


def test_retry_after_keeps_everybody_away_from_the_host(server: HostileServer) -> None:
    urls = [f"{server.url}/busy-once?1", *(f"{server.url}/image/{row}" for row in range(10))]
    rows, summary = fetch_all(urls, connections_per_host=1)
    assert outcomes(rows) == [None] * 11
    assert server.seen_at[1] - server.seen_at[0] >= 1.0, "the second request of any row comes after the pause"
    assert summary["host_pauses_s"] == pytest.approx(1.0)


def test_a_host_that_is_never_ready_costs_bounded_time(server: HostileServer) -> None:
    urls = [f"{server.url}/busy/{row}?30" for row in range(20)]
    started_at = time.monotonic()
    rows, summary = fetch_all(urls, connections_per_host=1, max_host_pause_s=20.0)
    assert time.monotonic() - started_at < 5
    assert outcomes(rows) == ["http_429"] + ["host_busy"] * 19
    assert len(server.paths) == 1 and summary["hosts_busy"] == 1


@pytest.mark.parametrize("wish", ["86400", "9" * 400, "Fri,%2031%20Dec%209999%2023:59:59%20GMT"])
def test_no_status_makes_a_row_wait_for_longer_than_a_host_may_ask(server: HostileServer, wish: str) -> None:
    statuses = [500, 502, 504, 507, 408, 425]
    urls = [f"{server.url}/status/{status}?{wish}" for status in statuses] + [f"{server.url}/image"]
    started_at = time.monotonic()
    rows, summary = fetch_all(urls, max_host_pause_s=20.0)
    assert time.monotonic() - started_at < 5
    assert outcomes(rows) == [*(f"http_{status}" for status in statuses), None], "and the host is not left alone"
    assert len(server.paths) == len(urls), "nor asked again before it wants to be"
    assert summary["host_pauses_s"] == 0


@pytest.mark.parametrize("status", [429, 503])
def test_a_host_that_asks_for_all_eternity_is_left_alone(server: HostileServer, status: int) -> None:
    wish = "9" * 400
    rows, summary = fetch_all([f"{server.url}/status/{status}/{status}?{wish}"] * 3, connections_per_host=1)
    assert outcomes(rows) == [f"http_{status}", "host_busy", "host_busy"]
    assert math.isfinite(summary["host_pauses_s"]), "metrics are written as JSON"


def test_a_dead_host_is_given_up_and_the_others_go_on(server: HostileServer) -> None:
    dead = free_port()
    urls = [f"http://127.0.0.1:{dead}/{row}" for row in range(40)] + [f"{server.url}/image/{row}" for row in range(40)]
    rows, summary = fetch_all(urls, connections_per_host=1, circuit_breaker_failures=5, retries=0)
    assert Counter(outcomes(rows)) == {None: 40, "connect": 5, "host_down": 35}
    assert summary["hosts_down"] == 1


def test_silent_hosts_hold_no_more_than_their_share(server: HostileServer) -> None:
    """Twenty hosts that accept and say nothing, and one that works: four threads are busy with the silent ones for ever
    without a breaker; here all is over after a few deadlines."""
    with contextlib.ExitStack() as stack:
        mute = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64)) for _ in range(5)]
        urls = [f"http://127.0.0.1:{one.getsockname()[1]}/{row}" for one in mute for row in range(30)]
        urls += [f"{server.url}/image/{row}" for row in range(30)]
        started_at = time.monotonic()
        rows, _ = fetch_all(
            urls,
            limits=FetchLimits(timeout_s=0.3, allowed_networks=("127.0.0.0/8",)),
            circuit_breaker_failures=4,
            retries=0,
        )
        assert time.monotonic() - started_at < 3
    found = Counter(outcomes(rows))
    assert found[None] == 30 and found["timeout"] + found["host_down"] == 150
    assert 20 <= found["timeout"] <= 20 + 5 * 3, "those under way when the breaker opened"


# ---- names ----------------------------------------------------------------------------------------------------------


class Names:
    """The system's resolver, under the test's control: it counts, hangs and fails as told."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.release = threading.Event()

    def __call__(self, host: str, port: Any, **_: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        answer = self.answers[host.partition(".")[0]]
        if answer == "hangs":
            self.release.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if isinstance(answer, Exception):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in answer]


NO_SUCH_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
FOR_NOW = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def test_every_name_is_resolved_once_also_if_it_does_not_exist(server: HostileServer) -> None:
    names = Names(good=["127.0.0.1"], bad=NO_SUCH_NAME)
    port = server.server_port
    urls = [f"http://{name}.example:{port}/image/{row}" for row in range(8) for name in ("good", "bad")]
    rows, summary = fetch_all(urls, resolver=Resolver(patience_s=5, lookup=names), retries=3)
    assert outcomes(rows) == [None, "dns"] * 8
    assert sorted(names.asked) == ["bad.example", "good.example"]
    assert (summary["dns_lookups"], summary["dns_failures"]) == (2, 1)
    assert summary["retries"] == 0


def test_a_failing_resolver_is_asked_again() -> None:
    names = Names(shy=FOR_NOW)
    resolver = Resolver(patience_s=5, forget_s=0.0, lookup=names)
    fetch_all(["http://shy.example/0"], resolver=resolver, retries=2)
    assert len(names.asked) == 3
    names.answers["shy"] = ["127.0.0.9"]
    assert resolver.addresses("shy.example", time.monotonic() + 5) == ("127.0.0.9",)
    assert resolver.addresses("shy.example", time.monotonic() + 5) == ("127.0.0.9",)
    assert len(names.asked) == 4 and resolver.summary()["dns_failures"] == 3


def test_a_hanging_resolver_holds_no_slot_past_the_deadline(server: HostileServer) -> None:
    names = Names(good=["127.0.0.1"], stuck="hangs")
    limits = FetchLimits(timeout_s=0.4, allowed_networks=("127.0.0.0/8",))
    urls = [f"http://stuck.example/{row}" for row in range(10)]
    urls += [f"http://good.example:{server.server_port}/image/{row}" for row in range(10)]
    started_at = time.monotonic()
    rows, summary = fetch_all(urls, limits=limits, resolver=Resolver(patience_s=0.4, lookup=names), retries=0)
    assert time.monotonic() - started_at < 2
    assert outcomes(rows) == ["dns"] * 10 + [None] * 10
    assert names.asked.count("stuck.example") == 1
    assert summary["dns_failures"] == 1 and summary["dns_worst_s"] >= 0.4
    names.release.set()


def test_a_late_answer_is_still_of_use() -> None:
    names = Names(slow=["127.0.0.3"])
    gate = threading.Event()

    def lookup(host: str, port: Any, **options: Any) -> Any:
        gate.wait(30)
        return names(host, port, **options)

    resolver = Resolver(patience_s=0.1, lookup=lookup)
    with pytest.raises(FetchError, match="dns"):
        resolver.addresses("slow.example", time.monotonic() + 5)
    gate.set()
    for _ in range(100):
        with contextlib.suppress(FetchError):
            assert resolver.addresses("slow.example", time.monotonic() + 5) == ("127.0.0.3",)
            break
        time.sleep(0.02)
    assert names.asked == ["slow.example"] and resolver.summary()["dns_failures"] == 0


def test_a_name_with_one_dead_address_still_works(server: HostileServer) -> None:
    names = Names(two=["127.0.0.9", "127.0.0.1"], half=["10.0.0.1", "127.0.0.1"])
    urls = [f"http://{name}.example:{server.server_port}/image" for name in ("two", "half")]
    rows, _ = fetch_all(urls, resolver=Resolver(patience_s=5, lookup=names))
    assert outcomes(rows) == [None, None], "a private address beside it is not tried"


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "2130706433", "127.1", "0x7f.1"])
def test_addresses_in_any_notation_are_not_looked_up_but_checked(host: str) -> None:
    names = Names()
    rows, summary = fetch_all(
        [f"http://{host}:1/"], limits=FetchLimits(), resolver=Resolver(patience_s=5, lookup=names), retries=0
    )
    assert outcomes(rows) == ["blocked_address"] and not names.asked and summary["dns_lookups"] == 0


# ---- robots.txt -----------------------------------------------------------------------------------------------------


def test_robots_txt_is_asked_for_once_and_obeyed(server: HostileServer) -> None:
    server.robots_txt = b"User-agent: *\nDisallow: /image/secret\n"
    urls = [f"{server.url}/image/{kind}/{row}" for row in range(10) for kind in ("open", "secret")]
    rows, _ = fetch_all(urls, obey_robots_txt=True)
    assert outcomes(rows) == [None, "robots_txt"] * 10
    assert server.paths[0] == "/robots.txt" and server.num_asked("/robots.txt") == 1
    assert not any("secret" in path for path in server.paths)


@pytest.mark.parametrize(
    ("answer", "reason", "num_asked"),
    [
        (404, None, 1),
        (403, None, 1),
        (b"", None, 1),
        (500, "robots_txt_unreachable", 3),
        (None, "robots_txt_unreachable", 3),
    ],
)
def test_without_robots_txt(server: HostileServer, answer: Any, reason: str | None, num_asked: int) -> None:
    server.robots_txt = answer
    limits = FetchLimits(timeout_s=0.3, allowed_networks=("127.0.0.0/8",))
    rows, _ = fetch_all([f"{server.url}/image/{row}" for row in range(5)], limits=limits, obey_robots_txt=True)
    assert outcomes(rows) == [reason] * 5
    assert server.num_asked("/robots.txt") == num_asked


@pytest.mark.parametrize("line", [b"Crawl-delay: \xc2\xb2", b"Crawl-delay: " + b"9" * 5000, b"Disallow: //[half"])
def test_a_strange_robots_txt_is_obeyed_as_far_as_it_goes(server: HostileServer, line: bytes) -> None:
    server.robots_txt = b"User-agent: *\n" + line + b"\nAllow: /\nDisallow: /*.png$\n"
    rows, _ = fetch_all(
        [f"{server.url}/image/{row}.{kind}" for row in range(3) for kind in ("jpg", "png")], obey_robots_txt=True
    )
    assert outcomes(rows) == [None, "robots_txt"] * 3


def test_rules_for_our_name_come_before_those_for_all(server: HostileServer) -> None:
    server.robots_txt = b"User-agent: *\nDisallow: /\n\nUser-agent: Tester\nDisallow: /image/secret\n"
    limits = FetchLimits(user_agent="tester/1.0 (+http://a/)", allowed_networks=("127.0.0.0/8",))
    urls = [f"{server.url}/image/{kind}" for kind in ("open", "secret")]
    assert outcomes(fetch_all(urls, limits=limits, obey_robots_txt=True)[0]) == [None, "robots_txt"]


@pytest.mark.parametrize("size", [robots.MAX_BYTES - 50, robots.MAX_BYTES + 10_000, 3 * robots.MAX_BYTES])
def test_of_a_long_robots_txt_the_beginning_counts(server: HostileServer, size: int) -> None:
    """RFC 9309, section 2.5: at least 500 KiB are read."""
    rules = b"User-agent: *\nDisallow: /image/secret\n"
    server.robots_txt = rules + b"# more\n" * (size // 7) + b"Disallow: /\n" * (size > robots.MAX_BYTES)
    urls = [f"{server.url}/image/0", f"{server.url}/image/secret/0"]
    assert outcomes(fetch_all(urls, obey_robots_txt=True)[0]) == [None, "robots_txt"]


def test_robots_txt_is_not_asked_for_by_default(server: HostileServer) -> None:
    server.robots_txt = b"User-agent: *\nDisallow: /\n"
    assert outcomes(fetch_all([f"{server.url}/image"])[0]) == [None]
    assert server.num_asked("/robots.txt") == 0


# ---- hashes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_hashes_are_checked_before_decoding(server: HostileServer, algorithm: str) -> None:
    right = hashlib.new(algorithm, PNG).hexdigest()
    page = "/special/html.jpg"
    digests = [right, right.upper(), f" {right} ", None, "", right[:-1], "0" * len(right), right]
    urls = [f"{server.url}/image/{row}" for row in range(len(digests) - 1)] + [server.url + page]
    rows, _ = fetch_all(urls, hashes=ExpectedHashes(algorithm, digests), retries=3)
    assert outcomes(rows) == [None] * 5 + ["hash_mismatch"] * 3
    assert server.num_asked(page) == 1, "not tried again"


# ---- what nobody foresaw ---------------------------------------------------------------------------------------------


class Digests(list[str | None]):
    """Hashes of a list that breaks where it is read."""

    def __init__(self, size: int, broken: dict[int, BaseException]) -> None:
        super().__init__([None] * size)
        self.broken = broken

    def __getitem__(self, row: Any) -> Any:
        if row in self.broken:
            raise self.broken[row]
        return super().__getitem__(row)


def test_an_unexpected_exception_costs_its_own_row_and_is_told_once(
    server: HostileServer, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [f"{server.url}/image/{row}" for row in range(10)]
    broken: dict[int, BaseException] = {2: RuntimeError("two"), 5: RecursionError("five")}
    rows, _ = fetch_all(urls, num_threads=1, hashes=ExpectedHashes("md5", Digests(10, broken)))
    assert outcomes(rows) == ["unexpected" if row in broken else None for row in range(10)]
    told = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1 and told[0].exc_info and "/image/2" in told[0].getMessage()


def test_an_unexpected_exception_of_a_request_costs_its_own_row(server: HostileServer) -> None:
    """A network that is none breaks the check of every address that is not public."""
    limits = FetchLimits(
        allowed_networks=("nowhere",), allowed_endpoints=frozenset({("127.0.0.1", server.server_port)})
    )
    urls = [f"{server.url}/image/0", "http://127.0.0.2/", f"{server.url}/image/1", "http://127.0.0.3/"]
    rows, summary = fetch_all(urls, limits=limits, retries=2)
    assert outcomes(rows) == [None, "unexpected", None, "unexpected"]
    assert summary["retries"] == 0, "it would meet the same"
    server.robots_txt = b""
    rows, _ = fetch_all(urls, limits=limits, obey_robots_txt=True)
    assert outcomes(rows) == [None, "robots_txt_unreachable"] * 2


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_not_the_rows_fault_is_raised(server: HostileServer, error: BaseException) -> None:
    names = Names(good=["127.0.0.1"])
    hashes = ExpectedHashes("md5", Digests(2, {0: error}))
    urls = [f"http://good.example:{server.server_port}/image/{row}" for row in range(2)]
    fetcher = RowFetcher(urls, LIMITS, Courtesy(), hashes=hashes, resolver=Resolver(patience_s=5, lookup=names))
    with contextlib.closing(fetcher):
        with pytest.raises(type(error)):
            fetcher.next_row()
        assert fetcher.next_row().data == PNG


class NoMemory(Resolver):
    """A resolver that has none left for one of the names."""

    def addresses(self, host: str, deadline: float) -> tuple[str, ...]:
        if host == "large.example":
            raise MemoryError
        return super().addresses(host, deadline)


def test_a_row_that_raises_leaves_no_thread_waiting(server: HostileServer) -> None:
    resolver = NoMemory(patience_s=5, lookup=Names(good=["127.0.0.1"]))
    urls = ["http://large.example/", f"http://good.example:{server.server_port}/late?0.2"]
    with contextlib.closing(RowFetcher(urls, LIMITS, Courtesy(), resolver=resolver)) as fetcher:
        with pytest.raises(MemoryError):
            fetcher.next_row()
        with ThreadPoolExecutor(2) as pool:
            ended = [pool.submit(fetcher.next_row) for _ in urls]
            assert {one.result(timeout=5).reason for one in ended} == {"unexpected", None}


def test_a_lookup_that_breaks_is_a_lookup_that_failed() -> None:
    resolver = Resolver(patience_s=60, lookup=Names(odd=RuntimeError("not a name")))
    started_at = time.monotonic()
    assert outcomes(fetch_all(["http://odd.example/"], resolver=resolver, retries=0)[0]) == ["dns"]
    assert time.monotonic() - started_at < 5


# ---- kept connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["image", "chunked", "status/404", "status/500", "redirect?/image"])
def test_a_connection_serves_many_rows(server: HostileServer, path: str) -> None:
    fetch_all([f"{server.url}/{path}" for _ in range(20)], num_threads=1, retries=0)
    assert server.num_connections == 1
    assert len(server.paths) >= 20


@pytest.mark.parametrize("path", ["closes-quietly", "hang-up-later"])
def test_a_connection_that_the_server_closed_costs_no_row(server: HostileServer, path: str) -> None:
    rows, summary = fetch_all([f"{server.url}/{path}/{row}" for row in range(20)], num_threads=1, retries=0)
    assert outcomes(rows) == [None] * 20
    assert summary["attempts"] == 20 and server.num_connections >= 10


def test_what_was_not_asked_for_is_not_taken_for_an_answer(server: HostileServer) -> None:
    """A body longer than announced must not become the image of the next row."""
    urls = [f"{server.url}/understated/{row}" for row in range(10)]
    rows, _ = fetch_all(urls, num_threads=1, retries=0)
    assert outcomes(rows) == [None] * 10
    assert server.num_connections == 10


@pytest.mark.parametrize("path", ["truncated", "announced", "endless", "slow-drip"])
def test_a_connection_with_an_unfinished_answer_is_closed(server: HostileServer, path: str) -> None:
    limits = FetchLimits(timeout_s=0.3, max_bytes=100_000, allowed_networks=("127.0.0.0/8",))
    urls = [f"{server.url}/{path}", f"{server.url}/image"]
    rows, _ = fetch_all(urls, num_threads=1, limits=limits, retries=0)
    assert outcomes(rows)[1] is None
    assert server.num_connections == 2
