"""Segments: resume from few reads, and never from a row whose record is not the one in the store."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stages import segments, storage
from stages.base import Shard
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import Manifest, ShardRecord
from stages.runner import committed_records, forget, output_uri, run_stage
from stages.segments import SEGMENTS_FOLDER
from tests.stages.toy_stages import Numbers, NumbersConfig, Squares, SquaresConfig

NUM_SHARDS = 9


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_FLUSH_ROWS", 4)
    monkeypatch.setattr(segments, "_MIN_ROWS", 1)


class Reads(list[str]):
    """The objects that were read."""

    @property
    def records(self) -> list[str]:
        return [uri for uri in self if uri.endswith(".json") and not uri.endswith(("numbers.json", "manifest.json"))]


@contextmanager
def watched_reads() -> Iterator[Reads]:
    reads = Reads()
    original = storage.read_bytes

    def read(uri: str, **options: Any) -> bytes:
        reads.append(uri)
        return original(uri, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read_bytes", read)
        yield reads


def numbers(root: str, num_shards: int = NUM_SHARDS) -> Numbers:
    return Numbers(NumbersConfig(counts=(2,) * num_shards), root=root)


def run(root: str, num_shards: int = NUM_SHARDS) -> Manifest:
    stage = numbers(root, num_shards)
    return run_stage(stage, stage.fingerprint({}), {}, LocalExecutor(), ClusterConfig(backoff_s=0.0))


def segments_of(root: str) -> list[str]:
    return [name for name in storage.list_files(f"{root}/numbers/shards") if name.startswith(SEGMENTS_FOLDER)]


def found(root: str, num_shards: int = NUM_SHARDS) -> tuple[dict[str, ShardRecord], Reads]:
    stage = numbers(root, num_shards)
    with watched_reads() as reads:
        return committed_records(stage, stage.plan({})), reads


def test_resume_reads_segments_and_no_record(root: str) -> None:
    manifest = run(root)
    assert [name.split("/")[1].split("-")[0] for name in segments_of(root)] == ["1", "4", "4"]
    records, reads = found(root)
    assert records == {record.shard_id: record for record in manifest.records}
    assert len(reads) == 3 and not reads.records


def test_only_uncovered_records_are_read(root: str) -> None:
    run(root, 4)
    storage.delete(storage.join(root, "numbers/shards", segments_of(root)[0]))
    run(root, 4)  # all were read one by one, and are noted now
    assert len(segments_of(root)) == 1
    manifest = run(root, 6)
    newest = next(name for name in segments_of(root) if "/2-" in name)
    storage.delete(storage.join(root, "numbers/shards", newest))
    records, reads = found(root, 6)
    assert records == {record.shard_id: record for record in manifest.records}
    assert len(reads.records) == 2 and len(reads) == 3


def test_a_record_written_anew_voids_its_row(root: str) -> None:
    manifest = run(root)
    changed = dataclasses.replace(manifest.records[3], num_in=3, num_kept=3)
    storage.write_json(f"{root}/numbers/shards/{changed.shard_id}.json", changed.to_json())
    records, reads = found(root)
    assert records[changed.shard_id].num_in == 3
    assert len(reads.records) == 1


def test_forgotten_and_deleted_records_are_gone(root: str) -> None:
    manifest = run(root)
    stage = numbers(root)
    storage.delete(f"{output_uri(stage)}/{manifest.records[2].shard_id}.json")
    assert found(root)[0].keys() == {record.shard_id for record in manifest.records} - {manifest.records[2].shard_id}
    forget(stage, manifest.fingerprint, {})
    assert found(root)[0] == {}
    assert run(root).digest == manifest.digest
    records, reads = found(root)
    assert len(records) == NUM_SHARDS and not reads.records


def test_damage_is_passed_over_and_made_good(root: str, caplog: pytest.LogCaptureFixture) -> None:
    manifest = run(root)
    damaged = storage.join(root, "numbers/shards", segments_of(root)[-1])
    content = bytearray(storage.read_bytes(damaged))
    content[len(content) // 2] ^= 1
    storage.write_bytes(damaged, bytes(content))
    with caplog.at_level(logging.WARNING):
        records, reads = found(root)
    assert "is damaged; the records it holds are read one by one" in caplog.text
    assert records == {record.shard_id: record for record in manifest.records}
    assert len(reads.records) == 4
    run(root)
    assert storage.read_bytes(damaged) != bytes(content)
    records, reads = found(root)
    assert len(records) == NUM_SHARDS and not reads.records


def test_a_damaged_record_is_done_again(root: str, caplog: pytest.LogCaptureFixture) -> None:
    manifest = run(root)
    uris = [f"{root}/numbers/shards/{record.shard_id}.json" for record in manifest.records[:2]]
    storage.write_bytes(uris[0], b'{"shard_id": "tr')
    storage.write_json(uris[1], {"shard_id": "x"})
    with caplog.at_level(logging.WARNING):
        assert len(found(root)[0]) == NUM_SHARDS - 2
    assert caplog.text.count("is damaged") == 2
    assert run(root).digest == manifest.digest
    assert json.loads(storage.read_bytes(uris[0]))["shard_id"] == manifest.records[0].shard_id


def test_many_segments_become_few(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_MAX_SMALL", 5)
    monkeypatch.setattr(segments, "_FULL_ROWS", 8)
    monkeypatch.setattr(segments, "_FLUSH_ROWS", 2)
    manifest = run(root, 13)
    assert len(segments_of(root)) == 7
    assert run(root, 13).digest == manifest.digest
    assert sorted(name.split("/")[1].split("-")[0] for name in segments_of(root)) == ["5", "8"]
    records, reads = found(root, 13)
    assert records == {record.shard_id: record for record in manifest.records}
    assert len(reads) == 2


def test_a_stopped_run_has_noted_what_it_did(tmp_path: Path) -> None:
    class Stopping(Numbers):
        def process(self, shard: Shard, output: str) -> ShardRecord:
            if shard.index == 6:
                raise KeyboardInterrupt
            return super().process(shard, output)

    root = str(tmp_path)
    stage = Stopping(NumbersConfig(counts=(2,) * NUM_SHARDS), root=root)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, stage.fingerprint({}), {}, LocalExecutor(), ClusterConfig())
    records, reads = found(root)
    assert len(records) == 6 and not reads.records


def test_two_drivers_are_harmless(root: str) -> None:
    manifest = run(root)
    stage = numbers(root)
    listing = storage.list_entries(output_uri(stage))
    wanted = {record.shard_id: record.inputs for record in manifest.records}
    first, second = (segments.Segments(output_uri(stage), listing) for _ in range(2))
    assert len(first.read(wanted)) == NUM_SHARDS
    first._merge(segments_of(root))
    # The second goes on from a listing that is out of date.
    assert second.read(wanted) == {}
    second._merge([name for name in listing if name.startswith(SEGMENTS_FOLDER)])
    assert found(root)[0] == {record.shard_id: record for record in manifest.records}


def test_a_resumed_driver_holds_each_input_once(root: str) -> None:
    numbers = {"numbers": run(root)}
    stage = Squares(SquaresConfig(), root=root)
    run_stage(stage, "f" * 16, numbers, LocalExecutor(), ClusterConfig())
    for through in ("segments", "records"):
        if through == "records":
            storage.delete_tree(f"{root}/squares/shards/{SEGMENTS_FOLDER}")
        shards = stage.plan(numbers)
        records = committed_records(stage, shards)
        assert len(records) == len(shards)
        assert all(records[shard.id].inputs is shard.inputs for shard in shards)


def test_few_records_are_not_worth_a_file(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_MIN_ROWS", NUM_SHARDS + 1)
    monkeypatch.setattr(segments, "_FLUSH_ROWS", NUM_SHARDS + 1)
    run(root)
    assert segments_of(root) == []
