"""The final selection is exactly what the thresholds say, over the whole dataset, and explains itself."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from stages import storage
from stages.concepts import Concept
from stages.config import check_config, load_config, to_values
from stages.curate import KEPT, RULE_VERSION, Curate, CurateConfig, decide
from stages.errors import ConfigError, InputError, IntegrityError
from stages.golden import golden_metadata
from stages.keepers import NONE
from stages.manifest import Manifest
from stages.samples import embedding_array, kept_keys, table_from_bytes, table_to_bytes
from tests.stages.small_store import Given, run, sample_of, small_clip
from tests.stages.small_store import embed as embed_samples


def publish_embed(
    root: str,
    shards: Sequence[Sequence[float]],
    images: Sequence[npt.NDArray[np.float32]] | None = None,
    rows: Sequence[Sequence[int]] | None = None,
) -> Manifest:
    """Publish shards of samples with given CLIP scores, as the embed stage does.

    Args:
        root: the store.
        shards: CLIP scores.
        images: image embeddings of each shard; by default all the same.
        rows: rank of every sample; by default in order.
    """
    stage, download, chosen = Given("embed", root), Given("download", root), Given("filter", root)
    records, start = [], 0
    for i, scores in enumerate(shards):
        unit = np.tile(np.eye(1, 4, dtype=np.float32), (len(scores), 1)) if images is None else images[i]
        ranks = list(range(start, start + len(scores))) if rows is None else list(rows[i])
        start += len(scores)
        keys = pa.array([f"{i:04x}{j:06d}" for j in range(len(scores))], pa.string())
        table = pa.table(
            {
                "key": keys,
                "caption": pa.array(["a shape"] * len(scores), pa.string()),
                "image_embedding": embedding_array(unit),
                "text_embedding": embedding_array(unit),
                "clip_score": pa.array(scores, pa.float32()),
            }
        )
        # The filter knows samples that were not embedded, in any order.
        known = pa.table(
            {
                "key": pa.array([*reversed(keys.to_pylist()), "dropped"], pa.string()),
                "list": pa.array(["a.parquet"] * (len(keys) + 1), pa.string()),
                "row": pa.array([*reversed(ranks), 10**6 + i], pa.int64()),
            }
        )
        tar = download.record(i, {"images": ("tar", f"tar {i}".encode())}, {})
        selection = chosen.record(i, {"selection": ("parquet", table_to_bytes(known))}, tar.files)
        inputs = {"images": tar.files["images"], "selection": selection.files["selection"]}
        files = {"embeddings": ("parquet", table_to_bytes(table))}
        records.append(stage.record(i, files, inputs, num_in=len(scores), num_kept=len(scores)))
    return stage.manifest(records)


def curate(root: str, embed: Manifest, **thresholds: Any) -> Manifest:
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
    for shard, record, table in zip(filter(len, shards), manifest.records, tables, strict=True):  # no empty one
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
        assert record.inputs == {**upstream.inputs, "embeddings": upstream.files["embeddings"]}
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


def verdicts_of(scores: npt.NDArray[np.float32], config: CurateConfig) -> list[str]:
    verdicts = decide({"clip_score": scores}, config, lambda rows: np.full(len(rows), NONE, np.int64))
    return ["kept" if code == KEPT else config.reasons[code] for code in verdicts.codes]


def test_equal_scores_fall_in_dataset_order() -> None:
    scores = np.asarray([0.5, 0.3, 0.3, 0.3, 0.9, 0.3], np.float32)
    verdicts = verdicts_of(scores, CurateConfig(keep_fraction=4 / 6))
    assert verdicts == ["kept", "kept", "kept", "keep_fraction", "kept", "keep_fraction"]


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-1, 1, width=32), max_size=60),
    clip_score_min=st.none() | st.floats(-1, 1, width=32),
    keep_fraction=st.integers(1, 100).map(lambda percent: percent / 100),
)
def test_a_decision_is_a_threshold(scores: list[float], clip_score_min: float | None, keep_fraction: float) -> None:
    values = np.asarray(scores, np.float32)
    config = CurateConfig(clip_score_min=clip_score_min, keep_fraction=keep_fraction)
    verdicts = np.asarray(verdicts_of(values, config), object)
    low = values < (-2 if clip_score_min is None else clip_score_min)
    assert ((verdicts == "clip_score_min") == low).all()
    num_above = int((~low).sum())
    assert (verdicts == "kept").sum() == -(-round(100 * keep_fraction) * num_above // 100)
    kept, cut = values[verdicts == "kept"], values[verdicts == "keep_fraction"]
    assert not len(cut) or kept.min() >= cut.max()


RULES: dict[str, Any] = {"clip_score_min": 0.0, "semantic_duplicate_cosine": 0.95, "keep_fraction": 0.8}
SAMPLES = st.lists(st.tuples(st.floats(-0.25, 1, width=16), st.integers(0, 30)), min_size=1, max_size=30)


def decided(samples: Sequence[tuple[float, int]], shard_size: int, order: Sequence[int] = ()) -> list[str | None]:
    """Decide on samples (CLIP score, direction) cut into shards that come in any order; return reasons by rank."""
    shards = [range(i, min(i + shard_size, len(samples))) for i in range(0, len(samples), shard_size)]
    shards = [shards[i] for i in (order or range(len(shards)))]
    scores = [[samples[rank][0] for rank in shard] for shard in shards]
    angles = [np.asarray([samples[rank][1] / 10 for rank in shard], np.float32) for shard in shards]
    images = [np.stack([np.cos(a), np.sin(a)], axis=1) for a in angles]
    with tempfile.TemporaryDirectory() as root:
        stage = Curate(CurateConfig(**RULES), root=root)
        embed = publish_embed(root, scores, images, shards)
        records = [stage.process(shard, f"{root}/curate/shards") for shard in stage.plan({"embed": embed})]
        before = storage.list_files(root)
        reasons = stage.decide(records)
        assert storage.list_files(root) == before
        if any(reason is None for shard in reasons for reason in shard):
            for own, record in zip(reasons, stage.finish(records, f"{root}/out", {}).records, strict=True):
                assert (record.num_in, record.num_kept) == (len(own), own.count(None))
                assert record.dropped == {r: own.count(r) for r in sorted(stage.config.reasons) if r in own}
                table = table_from_bytes(record.files["selection"].read(root))
                assert table["reason"].to_pylist() == own
    by_rank = dict(zip(chain(*shards), chain(*reasons), strict=True))
    return [by_rank[rank] for rank in range(len(samples))]


@settings(max_examples=10, deadline=None)
@given(SAMPLES, st.integers(1, 30), st.randoms(use_true_random=False))
def test_shards_and_their_order_change_nothing(
    samples: list[tuple[float, int]], shard_size: int, random: Random
) -> None:
    order = list(range(-(-len(samples) // shard_size)))
    random.shuffle(order)
    assert decided(samples, shard_size, order) == decided(samples, len(samples))


def test_semantic_duplicates_name_their_keeper_and_rank_by_row(root: str) -> None:
    # The second shard holds the earlier rows; its first sample is below clip_score_min and keeps nobody out.
    near = [np.eye(2, dtype=np.float32), np.asarray([[1, 0.01], [0, 1], [0.7, 0.7]], np.float32)]
    near[1] /= np.linalg.norm(near[1], axis=1, keepdims=True)
    embed = publish_embed(root, [[0.5, 0.5], [-0.5, 0.5, 0.5]], near, [[3, 4], [0, 1, 2]])
    manifest = curate(root, embed, semantic_duplicate_cosine=0.95, clip_score_min=0.0)
    tables = selections_of(manifest)
    assert [table["reason"].to_pylist() for table in tables] == [
        [None, "semantic_duplicate"],
        ["clip_score_min", None, None],
    ]
    assert tables[0]["duplicate_of"].to_pylist() == [None, "0001000001"]
    assert tables[1]["row"].to_pylist() == [0, 1, 2]
    assert {version for table in tables for version in table["rule_version"].to_pylist()} == {RULE_VERSION}


def test_heads_score_and_drop(root: str, tmp_path: Path) -> None:
    weight, bias = np.asarray([4, 0, 0, -4], np.float32), np.asarray(-1, np.float32)
    path = tmp_path / "head.safetensors"
    path.write_bytes(save({"weight": weight, "bias": bias}))
    images = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    embed = publish_embed(root, [[0.5] * 20], [images])
    manifest = curate(root, embed, concepts={"watermark": Concept(head=str(path), max=0.4)})
    (table,) = selections_of(manifest)
    expected = 1 / (1 + np.exp(1 - images.astype(np.float16).astype(np.float64) @ weight))
    assert np.allclose(table["concept_watermark"].to_numpy(), expected, atol=1e-6)
    assert table["reason"].to_pylist() == ["concept_watermark" if score > 0.4 else None for score in expected]
    assert 0 < manifest.dropped["concept_watermark"] < 20

    loose = Curate(CurateConfig(concepts={"watermark": Concept(head=str(path), max=0.9)}), root=root)
    assert [shard.id for shard in loose.plan({"embed": embed})] == [r.shard_id for r in manifest.records]
    assert loose.fingerprint({"embed": embed.fingerprint}) != manifest.fingerprint
    (planned,) = loose.plan({"embed": embed})
    path.write_bytes(save({"weight": weight, "bias": np.asarray(bias + 1)}))
    assert loose.plan({"embed": embed})[0].id != planned.id
    with pytest.raises(InputError, match=r"curate\.concepts\.watermark\.head: .* has changed since"):
        loose.process(planned, f"{root}/curate/shards")
    path.write_bytes(save({"weight": weight[:3], "bias": bias}))
    with pytest.raises(InputError, match=r"needs weight \(4,\) and bias \(\)"):
        loose.process(loose.plan({"embed": embed})[0], f"{root}/curate/shards")
    path.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        loose.process(loose.plan({"embed": embed})[0], f"{root}/curate/shards")
    path.unlink()
    with pytest.raises(InputError, match=r"curate\.concepts\.watermark\.head"):
        loose.external()


def publish_clip(root: str, folder: Path, metadata: dict[str, str]) -> Manifest:
    path, stage = folder / "weights.safetensors", Given("clip", root)
    small_clip().save(path, metadata=metadata)
    return stage.manifest([stage.record(0, {"weights": ("safetensors", path)}, {})])


def test_prompts_are_scored_by_the_clip_that_made_the_embeddings(root: str, tmp_path: Path) -> None:
    samples, clip = [sample_of(i) for i in range(12)], small_clip()
    images, _ = embed_samples(clip, samples)
    prompts, against = ("a red circle", "a red square"), ("a blue circle", "a green ring", "a shape")
    texts = clip.encode_text(clip.tokenize([*prompts, *against])).double().numpy()
    half = images.astype(np.float16).astype(np.float64)
    cosines = (half / np.linalg.norm(half, axis=1, keepdims=True)) @ texts.T
    shares = np.exp(float(clip.model.logit_scale.exp().max()) * cosines)  # type: ignore[operator, union-attr]
    expected = shares[:, :2].sum(axis=1) / shares.sum(axis=1)
    limit = float(np.median(expected))
    stage = Curate(CurateConfig(concepts={"red": Concept(prompts=prompts, against=against, max=limit)}), root=root)
    assert stage.upstream == ("embed", "clip")
    embed = publish_embed(root, [[0.5] * 12], [images])
    manifest = run(stage, {"embed": embed, "clip": publish_clip(root, tmp_path, golden_metadata(clip))})
    (table,) = selections_of(manifest)
    assert np.allclose(table["concept_red"].to_numpy(), expected, atol=1e-5)
    assert table["reason"].to_pylist() == ["concept_red" if score > limit else None for score in expected]
    assert manifest.dropped == {"concept_red": 6}
    unknown = {"embed": embed, "clip": publish_clip(root, tmp_path, {})}
    with pytest.raises(IntegrityError, match="no golden embeddings"):
        stage.process(stage.plan(unknown)[0], f"{root}/curate/shards")


def test_concepts_are_checked() -> None:
    wrong_ways: tuple[dict[str, Any], ...] = (
        {},
        {"prompts": ("a",)},
        {"head": "x", "prompts": ("a",), "against": ("b",)},
    )
    for wrong in wrong_ways:
        with pytest.raises(ValueError, match="prompts: give prompts and against, or head alone"):
            Concept(max=0.5, **wrong)
    with pytest.raises(ValueError, match="max: 2"):
        Concept(head="x", max=2)
    with pytest.raises(ValueError, match="concepts: 'Red one'"):
        CurateConfig(concepts={"Red one": Concept(head="x", max=0.5)})


def test_concepts_are_read_from_a_config() -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    concept = "{prompts: [a watermark], against: [a photo], max: 0.3}"
    config = load_config(quickstart, [f"curate.concepts.watermark={concept}"])
    assert config.curate.concepts == {"watermark": Concept(prompts=("a watermark",), against=("a photo",), max=0.3)}
    assert config.curate.reasons[1] == "concept_watermark"
    assert check_config(to_values(config)) == config
    for wrong, message in (
        ("curate.concepts.watermark.maximum=1", r"curate\.concepts\.watermark\.maximum: unknown key"),
        ("curate.concepts.watermark.max=3", r"curate\.concepts\.watermark\.max: 3"),
        ("curate.concepts.nsfw={head: a}", r"curate\.concepts\.nsfw\.max: required"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(quickstart, [f"curate.concepts.watermark={concept}", wrong])


def test_settings_are_checked() -> None:
    for wrong in (
        {"clip_score_min": 1.5},
        {"keep_fraction": 0.0},
        {"keep_fraction": 1.1},
        {"semantic_duplicate_cosine": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CurateConfig(**wrong)
