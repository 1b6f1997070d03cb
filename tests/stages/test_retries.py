"""Rows that failed for passing reasons, tried again by a real download: only they, and every row counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages import storage
from stages.failure_codes import is_transient
from stages.garbage import find_garbage
from stages.life import find_lives
from stages.manifest import Manifest
from stages.retries import request_retries
from stages.runner import forget
from stages.samples import table_from_bytes
from tests.stages.data_run import Pictures, run_data, serving, stages_of, write_list

NUM_ROWS = 20
FAILING = (1, 2, 12)


@pytest.fixture
def server() -> Any:
    with serving() as found:
        found.failing = {f"/{i}.png" for i in FAILING}
        yield found


@pytest.fixture
def lists(tmp_path: Path, server: Pictures) -> Path:
    rows: list[tuple[str, str | None]] = [(server.url(i), f"picture {i}") for i in range(NUM_ROWS)]
    rows[7] = (server.url("missing"), "gone for good")
    write_list(tmp_path / "lists" / "pairs.jsonl", rows)
    return tmp_path / "lists"


def asked(server: Pictures) -> set[str]:
    """Return the paths that were asked for since the last time."""
    found = set(server.num_requests)
    server.num_requests.clear()
    return found


def selection_of(manifest: Manifest, number: int) -> list[dict[str, Any]]:
    data = manifest.records[number].files["selection"].read(manifest.root)
    return list(table_from_bytes(data).to_pylist())


def test_only_what_may_pass_is_fetched_again_and_counts_once(tmp_path: Path, server: Pictures, lists: Path) -> None:
    root = str(tmp_path / "store")
    before = run_data(root, lists)
    assert before["download"].dropped == {"http_503": 3, "http_404": 1}
    asked(server)
    server.failing = {"/12.png"}
    assert request_retries(before["download"], is_transient) == {"http_503": 3}
    after = run_data(root, lists)
    assert asked(server) == {"/1.png", "/2.png", "/12.png"}
    download = after["download"]
    assert download.dropped == {"http_503": 1, "http_404": 1} and download.num_in == NUM_ROWS
    assert [record.num_in for record in download.records] == [6, 7, 4, 2, 1]
    assert after["ledger"].metrics == {"num_rows": NUM_ROWS, "num_kept": NUM_ROWS - 2}
    (found,) = find_lives(after, server.url(1))
    assert found.state == "kept" and found.row == 1
    # Old shards are as they were; the rows that arrived late come last.
    old = [record.files["images"] for record in before["download"].records]
    assert [record.files["images"] for record in download.records[:3]] == old
    assert selection_of(before["filter"], 0) == selection_of(after["filter"], 0)
    # A retry can be retried.
    server.failing = set()
    assert request_retries(download, is_transient) == {"http_503": 1}
    last = run_data(root, lists)
    assert asked(server) == {"/12.png"}
    assert last["download"].dropped == {"http_404": 1} and last["download"].num_in == NUM_ROWS
    assert last["ledger"].metrics == {"num_rows": NUM_ROWS, "num_kept": NUM_ROWS - 1}
    assert request_retries(last["download"], is_transient) == {}
    # All that was asked for, and the lists as they were read, is there for good.
    stages = stages_of(root, lists)
    names = {name: last[name].fingerprint for name in stages}
    assert [
        g.reason for g in find_garbage(root, [stages], [names], older_than_days=0) if "/shards/" not in g.path
    ] == []
    assert storage.exists(last["download"].uri), "nothing to retry leaves a download done"


def test_an_earlier_kept_sample_is_not_displaced_by_one_that_arrives_late(
    tmp_path: Path, server: Pictures, lists: Path
) -> None:
    write_list(lists / "pairs.jsonl", [(server.url(1) + "?first", "one"), (server.url(2), "two"), (server.url(3), "3")])
    write_list(lists / "pairs2.jsonl", [(server.url(3) + "?copy", "the same as the third")])
    server.failing = {"/3.png"}
    root = str(tmp_path / "store")
    before = run_data(root, lists)
    kept = before["filter"].num_kept
    request_retries(before["download"], is_transient)
    server.failing = set()
    after = run_data(root, lists)
    assert after["filter"].num_kept == kept and after["filter"].dropped == {"duplicate": 1}


def test_all_may_fail_again(tmp_path: Path, server: Pictures, lists: Path) -> None:
    root = str(tmp_path / "store")
    settings = {"max_transient_fraction": 0.3}
    before = run_data(root, lists, download=settings)
    request_retries(before["download"], is_transient)
    after = run_data(root, lists, download=settings)
    assert after["download"].dropped == before["download"].dropped
    assert len(after["download"].records) == 5


def test_a_shard_that_is_done_anew_takes_its_rows_back(tmp_path: Path, server: Pictures, lists: Path) -> None:
    root = str(tmp_path / "store")
    before = run_data(root, lists)
    request_retries(before["download"], is_transient)
    run_data(root, lists)
    stage = stages_of(root, lists)["download"]
    forget(stage, before["download"].fingerprint, {"source": before["source"]})
    server.failing = {"/12.png"}
    after = run_data(root, lists)
    assert after["download"].dropped == {"http_503": 1, "http_404": 1} and len(after["download"].records) == 3
    assert after["ledger"].metrics == {"num_rows": NUM_ROWS, "num_kept": NUM_ROWS - 2}
    assert request_retries(after["download"], is_transient) == {"http_503": 1}
    server.failing = set()
    assert run_data(root, lists)["ledger"].metrics == {"num_rows": NUM_ROWS, "num_kept": NUM_ROWS - 1}
