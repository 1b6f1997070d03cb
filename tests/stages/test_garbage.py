"""Garbage: what nothing names goes, and what anything names stays."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stages import storage
from stages.audit import all_results, verify
from stages.base import Stage
from stages.errors import IntegrityError
from stages.executor import ClusterConfig, LocalExecutor
from stages.garbage import (
    CHECKPOINT,
    NO_MANIFEST,
    NO_RESULT,
    NOT_NAMED,
    STALE,
    TEMPORARY,
    Garbage,
    Held,
    delete_garbage,
    find_garbage,
)
from stages.gate import PromotionGateConfig
from stages.lease import LEASE_NAME, hold
from stages.manifest import Manifest
from stages.registry import register, version_uri
from stages.runner import run_stage
from tests.stages.finished_run import publish_stage
from tests.stages.test_lease import holder
from tests.stages.toy_stages import Numbers, NumbersConfig, Squares, SquaresConfig

DAY_S = 86_400


class Pipeline:
    """The two toy stages with one set of settings."""

    def __init__(self, root: str, *counts: int, power: int = 2) -> None:
        self.root = root
        numbers = Numbers(NumbersConfig(counts=counts or (3, 4, 5)), root=root)
        self.stages: dict[str, Stage[Any]] = {
            "numbers": numbers,
            "squares": Squares(SquaresConfig(power=power), root=root),
        }
        self.names: dict[str, str] = {}
        for name, stage in self.stages.items():
            self.names[name] = stage.fingerprint(self.names)

    def run(self) -> dict[str, Manifest]:
        found: dict[str, Manifest] = {}
        for name, stage in self.stages.items():
            inputs = {up: found[up] for up in stage.upstream}
            found[name] = run_stage(stage, self.names[name], inputs, LocalExecutor(), ClusterConfig())
        return found


def collect(
    *pipelines: Pipeline, older_than_days: float = 0.0, stale: bool = False, held: list[Held] | None = None
) -> list[Garbage]:
    stages, names = [p.stages for p in pipelines], [p.names for p in pipelines]
    on_held = (held if held is not None else []).append
    return find_garbage(pipelines[0].root, stages, names, older_than_days=older_than_days, stale=stale, on_held=on_held)


def reasons(garbage: list[Garbage]) -> dict[str, str]:
    return {item.path: item.reason for item in garbage}


def test_a_finished_store_holds_no_garbage(root: str) -> None:
    pipeline = Pipeline(root)
    pipeline.run()
    assert collect(pipeline) == []
    assert collect(pipeline, stale=True) == []


def test_other_results_stay_unless_stale(root: str) -> None:
    old, new = Pipeline(root), Pipeline(root, power=3)
    old.run()
    new.run()
    assert collect(new) == [] and collect(old, new, stale=True) == []
    found = collect(new, stale=True)
    assert found[0].path == f"squares/{old.names['squares']}/manifest.json" and found[0].reason == STALE
    assert {item.stage for item in found} == {"squares"} and len(found) == 3 + 3 * 2  # the numbers are shared
    assert collect(new, stale=True, older_than_days=1) == []
    delete_garbage(root, found)
    assert collect(new, stale=True) == []
    listings = {stage: storage.list_entries(f"{root}/{stage}") for stage in new.stages}
    kinds = {name: type(stage) for name, stage in new.stages.items()}
    assert verify(root, all_results(listings), kinds).findings == []


class Borrowing(Squares):
    """Squares that name another result of the store."""

    borrowed: tuple[tuple[str, str], ...] = ()

    def named_results(self) -> Sequence[tuple[str, str]]:
        return self.borrowed


def test_what_a_config_names_of_other_runs_is_not_stale(root: str) -> None:
    other, own = Pipeline(root, 6, 7, power=3), Pipeline(root)
    other.run()
    own.run()
    assert {item.stage for item in collect(own, stale=True)} == {"numbers", "squares"}
    borrowing = Borrowing(SquaresConfig(), root=root)
    borrowing.borrowed = (("squares", other.names["squares"]),)
    own.stages["squares"] = borrowing
    assert collect(own, stale=True) == []  # nor the numbers that it was made from


def test_shards_whose_stage_cannot_be_planned_yet_stay(root: str) -> None:
    """Such as a takedown leaves them: without the manifests, and to be used again."""
    pipeline = Pipeline(root)
    before = pipeline.run()
    for manifest in before.values():
        storage.delete(manifest.uri)
    assert [item for item in collect(pipeline) if "/shards/" in item.path] == []
    assert pipeline.run()["squares"].digest == before["squares"].digest


def test_unnamed_files_go_when_they_are_old(root: str) -> None:
    pipeline = Pipeline(root)
    squares = pipeline.run()["squares"]
    unnamed = {
        "squares/shards/0123456789abcdef.powers.json": NO_MANIFEST,
        "squares/shards/0123456789abcdef.json": NO_MANIFEST,
        "squares/shards/fedcba9876543210/checkpoints/step-000002/rank-0000.safetensors": CHECKPOINT,
        f"squares/shards/{squares.records[0].shard_id}.other": NOT_NAMED,
        f"squares/shards/{squares.records[0].shard_id}/checkpoints/step-000002/checkpoint.json": CHECKPOINT,
        f"squares/{squares.fingerprint}/other.parquet": NOT_NAMED,
        "squares/0000000000000000/sum.json": NO_RESULT,
    }
    kept = [f"squares/shards/{squares.records[0].shard_id}/tensorboard/events", "report.html", "else/where.bin"]
    for path in (*unnamed, *kept):
        storage.write_bytes(f"{root}/{path}", b"{}")
    assert reasons(collect(pipeline)) == unnamed
    assert collect(pipeline, older_than_days=1) == []
    delete_garbage(root, collect(pipeline))
    assert collect(pipeline) == []
    assert all(storage.exists(f"{root}/{path}") for path in kept)
    assert Pipeline(root).run()["squares"].digest == squares.digest


def test_a_run_in_progress_of_a_given_config_keeps_its_shards(root: str) -> None:
    pipeline = Pipeline(root)
    squares = pipeline.run()["squares"]
    storage.delete(squares.uri)  # as if it were still running
    result = {f"squares/{squares.fingerprint}/{name}" for name in ("sum.json", "shards.parquet")}
    assert reasons(collect(pipeline)).keys() == result  # what `finish` will write anew
    checkpoint = f"squares/shards/{squares.records[0].shard_id}/checkpoints/step-000002/checkpoint.json"
    storage.write_bytes(f"{root}/{checkpoint}", b"{}")
    assert collect(pipeline, older_than_days=7) == []
    other = Pipeline(root, power=5)
    assert {path.split("/")[1] for path in reasons(collect(other))} == {"shards", squares.fingerprint}


def test_age_is_that_of_the_newest_file_of_a_shard(tmp_path: Path) -> None:
    root = str(tmp_path)
    pipeline = Pipeline(root)
    pipeline.run()
    folder = tmp_path / "squares" / "shards"
    now_s = time.time()
    for name, days in (
        ("aa.json", 9),
        ("aa.powers.json", 3),
        ("bb.powers.json", 8),
        (".bb.json.0f.tmp", 2),
        (".cc.tmp", 0.5),
    ):
        (folder / name).write_bytes(b"{}")
        os.utime(folder / name, (now_s - days * DAY_S,) * 2)
    assert reasons(collect(pipeline, older_than_days=7)) == {
        "squares/shards/bb.powers.json": NO_MANIFEST,
        "squares/shards/.bb.json.0f.tmp": TEMPORARY,
    }


def make_old(folder: Path, days: float = 30) -> None:
    """Date every file below a folder back."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != LEASE_NAME:
            os.utime(path, (time.time() - days * DAY_S,) * 2)


@pytest.mark.parametrize("machine", [(), ("another boot",)])
def test_a_held_lease_keeps_the_work_of_a_config_that_is_not_given(tmp_path: Path, machine: tuple[str, ...]) -> None:
    """A training of a month must find its checkpoints, whoever collects meanwhile."""
    root, shards = str(tmp_path), tmp_path / "numbers" / "shards"
    given = Pipeline(root, 7, 8)
    given.run()
    with holder(root, *machine) as child:
        checkpoint = shards / "fedcba9876543210" / "checkpoints" / "step-000002" / "checkpoint.json"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_bytes(b"{}")
        (shards / ".dd.tmp").write_bytes(b"{}")
        (tmp_path / "squares" / "shards" / "aa.json").write_bytes(b"{}")
        make_old(tmp_path)
        held: list[Held] = []
        found = collect(given, older_than_days=7, held=held)
        assert reasons(found) == {"numbers/shards/.dd.tmp": TEMPORARY, "squares/shards/aa.json": NO_MANIFEST}
        (item,) = held
        assert (item.result.stage, item.holding.owner.pid) == ("numbers", child.pid)
        delete_garbage(root, found)
        assert checkpoint.exists() and len(list(shards.glob("*.json"))) == 2 * (2 + 3)
        child.kill()
        child.wait()
    lease = tmp_path / "numbers" / item.result.fingerprint / LEASE_NAME
    if machine:
        # Whether a process of another machine lives can only be told by its silence.
        assert collect(given, older_than_days=7) == []
        os.utime(lease, (time.time() - 2 * DAY_S,) * 2)
    gone = reasons(collect(given, older_than_days=7))
    assert sorted(gone.values()) == sorted([CHECKPOINT] + [NO_MANIFEST] * 3 * 2)


def test_a_free_lease_keeps_nothing(tmp_path: Path) -> None:
    given, other = Pipeline(str(tmp_path)), Pipeline(str(tmp_path), power=5)
    given.run()
    with hold(str(tmp_path), "squares", other.names["squares"], ttl_s=30.0):
        (tmp_path / "squares" / "shards" / "aa.json").write_bytes(b"{}")
        assert collect(given) == []
    assert set(reasons(collect(given))) == {"squares/shards/aa.json", f"squares/{other.names['squares']}/{LEASE_NAME}"}


def test_what_a_held_stage_may_read_is_not_stale(tmp_path: Path) -> None:
    """Nobody knows which of the old results the other run reads."""
    old, new = Pipeline(str(tmp_path), power=2), Pipeline(str(tmp_path), 7, power=3)
    old.run()
    new.run()
    with hold(str(tmp_path), "squares", "0" * 16, ttl_s=30.0):
        assert collect(new, stale=True) == []
    with hold(str(tmp_path), "numbers", "0" * 16, ttl_s=30.0):
        assert {item.stage for item in collect(new, stale=True)} == {"squares"}
    assert {item.stage for item in collect(new, stale=True)} == {"numbers", "squares"}


def test_an_unreadable_manifest_stops_the_collection(root: str) -> None:
    pipeline = Pipeline(root)
    squares = pipeline.run()["squares"]
    storage.write_bytes(squares.uri, b"{}")
    with pytest.raises(IntegrityError, match="repair"):
        collect(pipeline)


def test_what_registered_versions_name_stays(root: str) -> None:
    old, new = Pipeline(root), Pipeline(root, power=3)
    run = {**old.run(), "evaluate": publish_stage(root, "evaluate", "0" * 16, metrics={"clip_score": 0.3})}
    run["squares"] = publish_stage(root, "squares", "1" * 16, run["squares"].records, weights=b"weights")
    new.run()
    assert {item.reason for item in collect(new, stale=True)} >= {STALE}
    version = register(root, run, PromotionGateConfig())
    kept = {stage.manifest for stage in version.stages.values()} | {version.stages["squares"].weights[0].path}
    assert not kept & reasons(collect(new, stale=True)).keys()
    storage.delete(f"{root}/{version.stages['squares'].manifest}")
    assert not kept & reasons(collect(new, stale=True)).keys()  # the weights stay without it
    storage.write_bytes(version_uri(root, 1), b"{}")
    with pytest.raises(IntegrityError, match="0001"):
        collect(new, stale=True)
