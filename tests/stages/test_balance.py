"""Balance between stages: what one kept is what the next takes in, as a whole and shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.balance import check_balance
from stages.base import Shard
from stages.errors import IntegrityError
from stages.executor import ClusterConfig, LocalExecutor
from stages.graph import STAGES
from stages.manifest import File, Manifest, ShardRecord
from stages.runner import run_stage
from tests.stages.toy_stages import Numbers, NumbersConfig, Squares, SquaresConfig


def record(name: str, num_in: int, **dropped: int) -> ShardRecord:
    files = {"table": File(path=f"up/shards/{name}.parquet", sha256=name * 8, num_bytes=1)}
    kept = num_in - sum(dropped.values())
    return ShardRecord(shard_id=name, files=files, num_in=num_in, num_kept=kept, dropped=dropped)


def manifest(*records: ShardRecord) -> Manifest:
    fields: dict[str, Any] = {"root": "", "version": 1, "fingerprint": "f" * 16, "config": {}, "inputs": {}}
    return Manifest(stage="up", records=records, **fields)


UP = manifest(record("a", 12, timeout=2), record("b", 20))
PLANNED = {"a2": ["up/shards/a.parquet"], "b2": ["up/shards/b.parquet", "elsewhere"]}


def check(*records: ShardRecord, planned: dict[str, list[str]] = PLANNED, quarantined: Sequence[str] = ()) -> None:
    check_balance("down", records, UP, planned=planned, quarantined=quarantined)


def test_balance_holds() -> None:
    check(record("a2", 10, small=3), record("b2", 20))


def test_a_lost_sample_is_named_with_its_shard() -> None:
    expected = r"down: 29 samples in, but up kept 30; first shard: b2 with 19 in, made from up shard b with 20"
    with pytest.raises(IntegrityError, match=expected):
        check(record("a2", 10), record("b2", 19))


def test_errors_that_cancel_out_are_seen() -> None:
    with pytest.raises(IntegrityError, match="down: 30 samples in, but up kept 30; first shard: a2 with 11 in"):
        check(record("a2", 11), record("b2", 19))


def test_a_forgotten_shard_is_seen() -> None:
    with pytest.raises(IntegrityError, match="down: 10 samples in, but up kept 30; run again with --force down"):
        check(record("a2", 10), planned={"a2": PLANNED["a2"]})


def test_a_second_try_that_is_given_up_on_changes_no_count() -> None:
    """Its shard counts all rows, those of the second try too."""
    again = {**PLANNED, "a2r": ["up/shards/a.parquet"]}
    check(record("a2", 10), record("b2", 20), planned=again, quarantined=["a2r"])
    with pytest.raises(IntegrityError, match="29 samples in, but up kept 30"):
        check(record("a2", 10), record("b2", 19), planned=again, quarantined=["a2r"])


def test_quarantined_shards_are_not_expected() -> None:
    check(record("a2", 10), quarantined=["b2"])
    with pytest.raises(IntegrityError, match="9 samples in, but up kept 10"):
        check(record("a2", 9), quarantined=["b2"])


def test_shards_of_several_upstream_shards_count_as_a_whole() -> None:
    planned = {"x": ["up/shards/a.parquet", "up/shards/b.parquet"]}
    check(record("x", 30), planned=planned)
    with pytest.raises(IntegrityError, match="31 samples in, but up kept 30; run"):
        check(record("x", 31), planned=planned)


def test_the_data_stages_are_held_to_it() -> None:
    found = {stage.name: stage.counts for stage in STAGES if stage.counts}
    expected = {"download": "source", "filter": "download", "embed": "filter", "curate": "embed", "pca": "curate"}
    assert found == expected


def test_the_runner_refuses_a_stage_that_lost_samples(tmp_path: Path) -> None:
    class Losing(Squares):
        counts = "numbers"

        def process(self, shard: Shard, output: str) -> ShardRecord:
            made = super().process(shard, output)
            return replace(made, num_in=3, num_kept=3) if shard.index == 1 else made

    root = str(tmp_path)
    numbers = run(Numbers(NumbersConfig(), root=root), {})
    with pytest.raises(
        IntegrityError, match=r"squares: 11 samples in, but numbers kept 12; first shard: \w{16} with 3"
    ):
        run(Losing(SquaresConfig(), root=root), {"numbers": numbers})
    assert Manifest.read(root, "squares", "0" * 16) is None


def run(stage: Any, inputs: dict[str, Manifest]) -> Manifest:
    return run_stage(stage, "0" * 16, inputs, LocalExecutor(), ClusterConfig(backoff_s=0.0))
