"""EC2's notices, from a metadata service that takes tokens only; what becomes of a drained node is in test_drain."""

from __future__ import annotations

import datetime
import fcntl
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.draining import this_node
from cluster.ray_executor import RayExecutor
from cluster.spot_notice import InstanceMetadata, MetadataError, Notice, main, wait_for_notice
from tests.cluster.metadata_service import ACTION, REBALANCE, MetadataService, metadata_service
from tests.conftest import free_port

LONG_AGO = '{"noticeTime": "2020-11-05T08:22:00Z"}'


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataService]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there, and nobody is to be asked
    with metadata_service() as service:
        yield service


def action(left_s: float) -> str:
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=left_s)
    return f'{{"action": "terminate", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}'


def test_nothing_is_said_until_there_is_a_notice(service: MetadataService) -> None:
    metadata = InstanceMetadata(service.url)
    assert [metadata.notice(heed_rebalance=True) for _ in range(3)] == [None] * 3
    assert service.asked.count(("PUT", "/latest/api/token")) == 1, "one token is enough for hours"
    service.notices[ACTION] = text = action(100)
    found = metadata.notice(heed_rebalance=True)
    assert found is not None and (found.kind, found.text) == ("instance-action", text)
    assert found.left_s is not None and 90 < found.left_s <= 100


def test_a_token_that_is_taken_no_more_is_renewed(service: MetadataService) -> None:
    metadata = InstanceMetadata(service.url)
    assert metadata.notice(heed_rebalance=False) is None
    service.tokens.clear()
    service.notices[ACTION] = action(100)
    assert metadata.notice(heed_rebalance=False) is not None
    assert service.asked.count(("PUT", "/latest/api/token")) == 2


def test_a_recommendation_counts_where_it_is_heeded(service: MetadataService) -> None:
    metadata = InstanceMetadata(service.url)
    service.notices[REBALANCE] = LONG_AGO
    assert metadata.notice(heed_rebalance=False) is None
    assert ("GET", REBALANCE) not in service.asked
    assert metadata.notice(heed_rebalance=True) == Notice(kind="rebalance", text=LONG_AGO, left_s=None)
    service.notices[ACTION] = action(50)  # what is certain goes first
    found = metadata.notice(heed_rebalance=True)
    assert found is not None and found.kind == "instance-action"


@pytest.mark.parametrize(
    ("text", "left_s"),
    [
        (action(-60), 0.0),
        (action(86400), 120.0),
        ("soon", 120.0),
        ('{"action": "stop"}', 120.0),
        ('{"time": 5}', 120.0),
    ],
    ids=["past", "far", "no JSON", "no time", "no text"],  # the time of day is no name of a test
)
def test_a_notice_with_any_time_or_none_is_one(service: MetadataService, text: str, left_s: float) -> None:
    service.notices[ACTION] = text
    found = InstanceMetadata(service.url).notice(heed_rebalance=False)
    assert found is not None and found.left_s == left_s


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_service_that_is_unwell_is_asked_on_and_told_of_once(
    service: MetadataService, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    rounds = itertools.count()

    def until(end: int, then: Callable[[], None]) -> Callable[[], bool]:
        return lambda: next(rounds) == end and (then(), False)[1]

    def mend() -> None:
        service.status = 200
        service.notices[ACTION] = action(60)

    service.status = status
    metadata = InstanceMetadata(service.url)
    with pytest.raises(MetadataError, match=f"{service.url}/latest/api/token: .*{status}.*; is version 2"):
        metadata.notice(heed_rebalance=False)
    with caplog.at_level(logging.WARNING):
        found = wait_for_notice(metadata, heed_rebalance=False, poll_s=0.01, until=until(5, mend))
    assert found is not None and found.kind == "instance-action"
    assert [record.message.count("asking on") for record in caplog.records] == [1]


def test_no_service_is_no_notice() -> None:
    metadata = InstanceMetadata(f"http://127.0.0.1:{free_port()}")
    rounds = itertools.count()
    assert wait_for_notice(metadata, heed_rebalance=True, poll_s=0.01, until=lambda: next(rounds) == 3) is None


def test_one_program_watches_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (tmp_path / f"unclip-spot-notice-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["--address", "127.0.0.1:9", "--metadata-url", "http://127.0.0.1:9"]) == 0


@pytest.mark.slow
def test_ray_is_asked_which_node_this_is(ray_executor: RayExecutor) -> None:
    import ray

    address, here = ray.get_runtime_context().gcs_address, ray.get_runtime_context().get_node_id()
    assert this_node(address) == here
