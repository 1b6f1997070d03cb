"""The final selection is exactly what the thresholds say, over the whole dataset, and explains itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import storage
from stages.curate import BELOW_FRACTION, BELOW_MIN, KEPT, Curate, CurateConfig, judge
from stages.errors import InputError
from stages.manifest import Manifest
from stages.samples import embedding_array, kept_keys, table_from_bytes, table_to_bytes
from tests.stages.small_store import Given, run


def publish_embed(root: str, shards: Sequence[Sequence[float]]) -> Manifest:
    """Publish shards of samples with given CLIP scores, as the embed stage does."""
    stage, download = Given("embed", root), Given("download", root)
    records = []
    for i, scores in enumerate(shards):
        unit = np.tile(np.eye(1, 4, dtype=np.float32), (len(scores), 1))
        table = pa.table(
            {
                "key": pa.array([f"{i:04x}{j:06d}" for j in range(len(scores))], pa.string()),
                "caption": pa.array(["a shape"] * len(scores), pa.string()),
                "image_embedding": embedding_array(unit),
                "text_embedding": embedding_array(unit),
                "clip_score": pa.array(scores, pa.float32()),
            }
        )
        images = download.record(i, {"images": ("tar", f"tar {i}".encode())}, {})
        files = {"embeddings": ("parquet", table_to_bytes(table))}
        records.append(stage.record(i, files, images.files, num_in=len(scores), num_kept=len(scores)))
    return stage.manifest(records)


def curate(root: str, embed: Manifest, **thresholds: float) -> Manifest:
    return run(Curate(CurateConfig(**thresholds), root=root), {"embed": embed})


def selections_of(manifest: Manifest) -> list[pa.Table]:
    return [table_from_bytes(record.files["selection"].read(manifest.root)) for record in manifest.records]


def random_shards(*sizes: int) -> list[list[float]]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.2, 0.6, size).tolist() for size in sizes]


def test_thresholds_mean_what_they_say(root: str) -> None:
    shards = random_shards(40, 0, 25, 60)
    manifest = curate(root, publish_embed(root, shards), clip_score_min=0.1, keep_fraction=0.5)
    scores = np.concatenate([np.asarray(shard, np.float32) for shard in shards])
    above = scores[scores >= np.float32(0.1)]
    cutoff = np.sort(above)[::-1][math.ceil(len(above) / 2) - 1]
    tables = selections_of(manifest)
    for shard, record, table in zip(shards, manifest.records, tables, strict=True):
        values = np.asarray(shard, np.float32)
        assert table["kept"].to_pylist() == (values >= cutoff).tolist()
        expected = [
            "clip_score_min" if v < np.float32(0.1) else None if v >= cutoff else "keep_fraction" for v in values
        ]
        assert table["reason"].to_pylist() == expected
        assert table["clip_score"].to_pylist() == values.tolist()
        assert record.num_kept == len(kept_keys(table)) and record.num_in == len(shard)
        assert record.dropped == {r: expected.count(r) for r in ("clip_score_min", "keep_fraction") if r in expected}
    assert manifest.num_kept == math.ceil(len(above) / 2)
    assert manifest.metrics["clip_score_min_kept"] == pytest.approx(cutoff)
    assert manifest.metrics["clip_score_p50"] == pytest.approx(np.median(scores), abs=1e-6)


def test_records_lead_to_images_and_embeddings(tmp_path: Path) -> None:
    embed = publish_embed(str(tmp_path), random_shards(3, 4))
    for record, upstream in zip(curate(str(tmp_path), embed).records, embed.records, strict=True):
        assert record.inputs == {"images": upstream.inputs["images"], "embeddings": upstream.files["embeddings"]}
        assert record.num_kept == record.num_in


def test_changed_thresholds_keep_the_shards(tmp_path: Path) -> None:
    root = str(tmp_path)
    embed = publish_embed(root, random_shards(20, 30))
    loose = curate(root, embed)
    names = storage.list_files(f"{root}/curate/shards")
    strict = curate(root, embed, keep_fraction=0.1)
    assert storage.list_files(f"{root}/curate/shards") == names
    assert loose.fingerprint != strict.fingerprint
    assert [r.shard_id for r in loose.records] == [r.shard_id for r in strict.records]
    assert (loose.num_kept, strict.num_kept) == (50, 5)
    assert sum(map(len, map(kept_keys, selections_of(loose)))) == 50  # the earlier selection still stands


def test_appended_shards_keep_old_ids_and_selections(tmp_path: Path) -> None:
    root, shards = str(tmp_path), random_shards(20, 30, 10)
    before = curate(root, publish_embed(root, shards[:2]), clip_score_min=0.2)
    after = curate(root, publish_embed(root, shards), clip_score_min=0.2)
    for old, new in zip(before.records, after.records, strict=False):
        assert old.shard_id == new.shard_id
        assert old.files["selection"].sha256 == new.files["selection"].sha256
    assert len(storage.list_files(f"{root}/curate/shards")) == 2 * 3


def test_nothing_left_says_why_and_what_to_do(tmp_path: Path) -> None:
    root = str(tmp_path)
    embed = publish_embed(root, [[0.1, 0.25], [0.2]])
    with pytest.raises(InputError, match=r"3 samples came in and curate\.clip_score_min: 0\.9 dropped all.*0\.2500"):
        curate(root, embed, clip_score_min=0.9)
    with pytest.raises(InputError, match="no embedded sample came in"):
        curate(root, dataclasses.replace(embed, records=()))


def test_equal_scores_fall_in_dataset_order() -> None:
    scores = np.asarray([0.5, 0.3, 0.3, 0.3, 0.9, 0.3], np.float32)
    verdicts = judge(scores, CurateConfig(keep_fraction=4 / 6))
    assert verdicts.tolist() == [KEPT, KEPT, KEPT, BELOW_FRACTION, KEPT, BELOW_FRACTION]


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-1, 1, width=32), max_size=60),
    clip_score_min=st.none() | st.floats(-1, 1, width=32),
    keep_fraction=st.integers(1, 100).map(lambda percent: percent / 100),
)
def test_judge_is_a_threshold(scores: list[float], clip_score_min: float | None, keep_fraction: float) -> None:
    values = np.asarray(scores, np.float32)
    config = CurateConfig(clip_score_min=clip_score_min, keep_fraction=keep_fraction)
    verdicts = judge(values, config)
    low = values < (-2 if clip_score_min is None else clip_score_min)
    assert ((verdicts == BELOW_MIN) == low).all()
    num_above = int((~low).sum())
    assert (verdicts == KEPT).sum() == -(-round(100 * keep_fraction) * num_above // 100)
    kept, cut = values[verdicts == KEPT], values[verdicts == BELOW_FRACTION]
    assert not len(cut) or kept.min() >= cut.max()


def test_settings_are_checked() -> None:
    for wrong in ({"clip_score_min": 1.5}, {"keep_fraction": 0.0}, {"keep_fraction": 1.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CurateConfig(**wrong)
