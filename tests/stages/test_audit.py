"""Audit: every damage is named with its place, and a repair has exactly the damaged work done again."""

from __future__ import annotations

import dataclasses
import json

import pytest

from stages import storage
from stages.audit import Finding, Result, Verified, all_results, apply_repair, plan_repair, results_of, verify
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import Manifest
from stages.runner import StageProgress, run_stage
from tests.stages.toy_stages import Numbers, NumbersConfig, Squares, SquaresConfig


class CountingSquares(Squares):
    counts = "numbers"


KINDS = {"numbers": Numbers, "squares": CountingSquares}


def run(root: str, seen: list[StageProgress] | None = None) -> tuple[Manifest, Manifest]:
    numbers, squares = Numbers(NumbersConfig(), root=root), CountingSquares(SquaresConfig(), root=root)
    executor, cluster = LocalExecutor(), ClusterConfig(backoff_s=0.0)
    first = run_stage(numbers, numbers.fingerprint({}), {}, executor, cluster)
    names = {"numbers": first.fingerprint}
    watch = seen.append if seen is not None else lambda progress: None
    second = run_stage(squares, squares.fingerprint(names), {"numbers": first}, executor, cluster, on_progress=watch)
    return first, second


def results(root: str) -> list[Result]:
    return all_results({stage: storage.list_entries(f"{root}/{stage}") for stage in ("numbers", "squares")})


def check(root: str) -> Verified:
    return verify(root, results(root), KINDS)


def test_an_undisturbed_store_passes(root: str) -> None:
    seen: list[tuple[int, int]] = []
    numbers, squares = run(root)
    verified = verify(root, results(root), KINDS, on_progress=lambda done, total: seen.append((done, total)))
    assert verified.findings == []
    assert (verified.num_results, verified.num_files) == (2, 7)
    assert seen[-1] == (verified.num_bytes, verified.num_bytes) and verified.num_bytes > 0
    names = {"numbers": numbers.fingerprint, "squares": squares.fingerprint, "others": "0" * 16}
    assert results_of(names, root) == results(root)


@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_a_damaged_file_is_named_and_made_again(root: str, how: str) -> None:
    _, squares = run(root)
    file = squares.records[1].files["powers"]
    uri = storage.join(root, file.path)
    content = storage.read_bytes(uri)
    if how == "gone":
        storage.delete(uri)
    else:
        storage.write_bytes(uri, bytes([content[0] ^ 1, *content[1:]]) if how == "flipped" else content[:-1])
    (finding,) = check(root).findings
    assert finding.kind == ("missing" if how == "gone" else "damaged")
    assert (finding.stage, finding.shard, finding.path) == ("squares", squares.records[1].shard_id, file.path)
    assert file.sha256 in finding.expected and f"{file.num_bytes} bytes" in finding.expected
    repair = plan_repair([finding])
    assert repair.records == [f"squares/shards/{finding.shard}.json"]
    assert repair.manifests == [f"squares/{squares.fingerprint}/manifest.json"] and repair.stages == ["squares"]
    apply_repair(root, repair)
    seen: list[StageProgress] = []
    assert run(root, seen)[1].digest == squares.digest
    assert seen[0].num_done == 2 and check(root).findings == []


def test_a_file_of_the_whole_stage_keeps_the_shards(root: str) -> None:
    _, squares = run(root)
    storage.write_bytes(storage.join(root, squares.files["sum"].path), b"0")
    (finding,) = check(root).findings
    assert (finding.shard, finding.kind) == ("", "damaged")
    repair = plan_repair([finding])
    assert repair.records == [] and repair.manifests == [f"squares/{squares.fingerprint}/manifest.json"]
    apply_repair(root, repair)
    seen: list[StageProgress] = []
    assert run(root, seen)[1].digest == squares.digest and seen[0].num_done == 3
    assert check(root).findings == []


@pytest.mark.parametrize("how", ["gone", "no JSON", "other counts", "other file"])
def test_a_record_that_differs_is_named_and_made_again(root: str, how: str) -> None:
    _, squares = run(root)
    uri = f"{root}/squares/shards/{squares.records[0].shard_id}.json"
    value = storage.read_json(uri)
    if how == "gone":
        storage.delete(uri)
    elif how == "no JSON":
        storage.write_bytes(uri, b'{"shard_id": ')
    elif how == "other counts":
        storage.write_json(uri, value | {"num_in": 4, "num_kept": 4})
    else:
        value["files"]["powers"]["sha256"] = "0" * 64
        storage.write_json(uri, value)
    (finding,) = check(root).findings
    assert (finding.kind, finding.shard) == ("record", squares.records[0].shard_id)
    apply_repair(root, plan_repair([finding]))
    assert run(root)[1].digest == squares.digest and check(root).findings == []


@pytest.mark.parametrize("name", ["manifest.json", "shards.parquet"])
def test_a_damaged_manifest_is_named_and_made_again(root: str, name: str) -> None:
    _, squares = run(root)
    uri = f"{root}/squares/{squares.fingerprint}/{name}"
    storage.write_bytes(uri, storage.read_bytes(uri)[:-9])
    (finding,) = check(root).findings
    assert finding.kind == "manifest" and finding.path == f"squares/{squares.fingerprint}/manifest.json"
    apply_repair(root, plan_repair([finding]))
    assert run(root)[1].digest == squares.digest and check(root).findings == []


def test_lost_samples_are_found_and_not_hidden_by_a_repair(root: str) -> None:
    _, squares = run(root)
    lost = dataclasses.replace(squares.records[2], num_in=4, num_kept=4)
    dataclasses.replace(squares, records=(*squares.records[:2], lost)).write()
    storage.write_json(f"{root}/squares/shards/{lost.shard_id}.json", lost.to_json())
    (finding,) = check(root).findings
    assert finding.kind == "balance" and "12" in finding.expected and lost.shard_id in finding.found
    repair = plan_repair([finding])
    assert repair.unrepairable == [finding] and not repair.records and not repair.manifests


def test_findings_are_plain_and_readable() -> None:
    finding = Finding(
        kind="damaged",
        stage="embed",
        fingerprint="f",
        shard="a1",
        path="embed/shards/a1.parquet",
        expected="x",
        found="y",
    )
    assert str(finding) == "embed shard a1: embed/shards/a1.parquet: damaged: expected x, found y"
    assert json.loads(json.dumps(finding.to_json()))["path"] == finding.path
