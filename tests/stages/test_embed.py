"""Embeddings: row i is sample i's, every sample is accounted for, and a CLIP that drifted is refused."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from stages import storage
from stages.clip import Clip, ClipConfig
from stages.embed import Embed, EmbedConfig, Rows, embeddings_table
from stages.errors import ConfigError, InputError, IntegrityError, ShardError
from stages.golden import METADATA_KEY, golden_metadata
from stages.manifest import Manifest
from stages.runner import output_uri
from stages.samples import (
    Sample,
    embeddings_of,
    kept_keys,
    selection_table,
    table_from_bytes,
    table_to_bytes,
    write_tar,
)
from tests.stages.small_store import CLIP, EMBEDDING_DIM, Given, embed, run, sample_of, small_clip
from unclip_models.clip import ClipModel

torch.set_num_threads(1)


def publish_filter(root: str, shards: Sequence[Sequence[Sample]], drop_every: int = 4) -> Manifest:
    """Publish samples as the filter stage leaves them; every ``drop_every``-th is dropped."""
    download, stage = Given("download", root), Given("filter", root)
    records = []
    for i, samples in enumerate(shards):
        images = download.record(i, {"images": ("tar", write_tar(samples))}, {})
        reasons = ["too_small" if j % drop_every == drop_every - 1 else None for j in range(len(samples))]
        selection = table_to_bytes(selection_table([sample.key for sample in samples], reasons))
        kept = reasons.count(None)
        dropped = {"too_small": len(samples) - kept} if kept < len(samples) else {}
        files = {"selection": ("selection.parquet", selection)}
        counts = {"num_in": len(samples), "num_kept": kept, "dropped": dropped}
        records.append(stage.record(i, files, images.files, **counts))
    return stage.manifest(records)


def publish_clip(root: str, folder: Path, clip: ClipModel | None = None) -> Manifest:
    path = folder / "own.safetensors"
    (clip or small_clip()).save(path)
    return run(Clip(ClipConfig(kind="pretrained", name=str(path)), root=root), {})


def shards_of(*sizes: int) -> list[list[Sample]]:
    ends = np.cumsum([0, *sizes])
    return [[sample_of(j) for j in range(ends[i], ends[i + 1])] for i in range(len(sizes))]


def tables_of(manifest: Manifest) -> list[pa.Table]:
    return [table_from_bytes(record.files["embeddings"].read(manifest.root)) for record in manifest.records]


def test_every_row_is_its_samples(root: str, tmp_path: Path) -> None:
    shards = shards_of(11, 6)
    inputs = {"filter": publish_filter(root, shards), "clip": publish_clip(root, tmp_path)}
    manifest = run(Embed(EmbedConfig(batch_size=4, num_decode_threads=2), root=root), inputs)
    clip = small_clip()
    for samples, table in zip(shards, tables_of(manifest), strict=True):
        kept = [sample for j, sample in enumerate(samples) if j % 4 != 3]
        assert table["key"].to_pylist() == [sample.key for sample in kept]
        assert table["caption"].to_pylist() == [sample.caption for sample in kept]
        assert table.schema.field("image_embedding").type == pa.list_(pa.float16(), EMBEDDING_DIM)
        images, texts = embed(clip, kept)
        np.testing.assert_allclose(embeddings_of(table, "image_embedding"), images, atol=1e-3)
        np.testing.assert_allclose(embeddings_of(table, "text_embedding"), texts, atol=1e-3)
        np.testing.assert_allclose(table["clip_score"].to_numpy(), (images * texts).sum(1), atol=1e-5)
    assert (manifest.num_in, manifest.num_kept) == (14, 14)
    assert manifest.metrics["embedding_dim"] == EMBEDDING_DIM and manifest.metrics["num_embeddings"] == 14
    scores = np.concatenate([table["clip_score"].to_numpy() for table in tables_of(manifest)])
    assert manifest.metrics["clip_score_mean"] == pytest.approx(scores.mean(), abs=1e-6)
    assert [record.inputs["images"] for record in manifest.records] == [
        record.inputs["images"] for record in inputs["filter"].records
    ]


def test_batches_and_threads_do_not_matter(tmp_path: Path) -> None:
    inputs_of = {}
    for name, config in {
        "one": EmbedConfig(batch_size=1, num_decode_threads=3),
        "all": EmbedConfig(batch_size=64, num_decode_threads=1),
    }.items():
        root = str(tmp_path / name)
        inputs = {"filter": publish_filter(root, shards_of(9)), "clip": publish_clip(root, tmp_path)}
        inputs_of[name] = run(Embed(config, root=root), inputs)
    one, every = inputs_of["one"], inputs_of["all"]
    assert (one.fingerprint, one.records[0].shard_id) == (every.fingerprint, every.records[0].shard_id)
    (a,), (b,) = tables_of(one), tables_of(every)
    assert a["key"] == b["key"]
    np.testing.assert_allclose(embeddings_of(a, "image_embedding"), embeddings_of(b, "image_embedding"), atol=1e-3)


def test_undecodable_images_are_counted(tmp_path: Path) -> None:
    root, (samples,) = str(tmp_path), shards_of(12)
    for j, data in {1: b"", 4: b"not an image", 6: samples[6].image[:200], 8: samples[8].image[:-30]}.items():
        samples[j] = dataclasses.replace(samples[j], image=data)
    inputs = {"filter": publish_filter(root, [samples]), "clip": publish_clip(root, tmp_path)}
    manifest = run(Embed(EmbedConfig(batch_size=2), root=root), inputs)
    assert (manifest.num_in, manifest.num_kept, manifest.dropped) == (9, 5, {"undecodable": 4})
    (table,) = tables_of(manifest)
    kept = [samples[j] for j in (0, 2, 5, 9, 10)]
    assert table["key"].to_pylist() == [sample.key for sample in kept]
    np.testing.assert_allclose(embeddings_of(table, "image_embedding"), embed(small_clip(), kept)[0], atol=1e-3)
    np.testing.assert_allclose(embeddings_of(table, "text_embedding"), embed(small_clip(), kept)[1], atol=1e-3)
    selection = table_from_bytes(manifest.records[0].files["selection"].read(root))
    fates = dict(zip(selection["key"].to_pylist(), selection["reason"].to_pylist(), strict=True))
    bad = [samples[j].key for j in (1, 4, 6, 8)]
    assert fates == {samples[j].key: None for j in (0, 2, 5, 9, 10)} | dict.fromkeys(bad, "undecodable")
    assert kept_keys(selection) == table["key"].to_pylist()


def test_nothing_decodable_is_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    samples = [dataclasses.replace(sample, image=b"?") for sample in shards_of(3)[0]]
    inputs = {"filter": publish_filter(root, [samples]), "clip": publish_clip(root, tmp_path)}
    with pytest.raises(InputError, match="none of the 3 images could be decoded"):
        run(Embed(EmbedConfig(), root=root), inputs)


def test_empty_shards_are_left_out_but_not_all_may_be_empty(tmp_path: Path) -> None:
    root = str(tmp_path)
    clip = publish_clip(root, tmp_path)
    some = {"filter": publish_filter(root, shards_of(1, 3), drop_every=1), "clip": clip}
    with pytest.raises(InputError, match=r"none of the 4 downloaded samples passed.*too_small.*relax"):
        run(Embed(EmbedConfig(), root=root), some)
    records = publish_filter(root, shards_of(3)).records
    both = dataclasses.replace(some["filter"], records=[*some["filter"].records, *records])
    manifest = run(Embed(EmbedConfig(), root=root), {"filter": both, "clip": clip})
    assert [table.num_rows for table in tables_of(manifest)] == [3]


def test_a_selection_of_another_tar_is_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    mixed = publish_filter(root, shards_of(5, 5))
    first, second = mixed.records
    wrong = dataclasses.replace(mixed, records=[dataclasses.replace(first, inputs=second.inputs)])
    stage = Embed(EmbedConfig(), root=root)
    (shard,) = stage.plan({"filter": wrong, "clip": publish_clip(root, tmp_path)})
    with pytest.raises(IntegrityError, match=r"keeps 4 samples .* the tar has 0 of them.*run filter again"):
        stage.process(shard, output_uri(stage))


def test_appended_shards_leave_the_old_ones_alone(tmp_path: Path) -> None:
    root = str(tmp_path)
    clip = publish_clip(root, tmp_path)
    before = run(Embed(EmbedConfig(), root=root), {"filter": publish_filter(root, shards_of(4)), "clip": clip})
    names = storage.list_files(f"{root}/embed/shards")
    after = run(Embed(EmbedConfig(), root=root), {"filter": publish_filter(root, shards_of(4, 3)), "clip": clip})
    assert after.records[0] == before.records[0]
    assert len(storage.list_files(f"{root}/embed/shards").keys() - names.keys()) == 3


def test_a_damaged_tar_is_refused_as_such_and_nothing_is_committed(tmp_path: Path) -> None:
    root = str(tmp_path)
    stage = Embed(EmbedConfig(), root=root)
    (shard,) = stage.plan({"filter": publish_filter(root, shards_of(5)), "clip": publish_clip(root, tmp_path)})
    path = Path(stage.uri(shard.inputs["images"]))
    whole = path.read_bytes()
    for place in (0, 700, len(whole) - 1):  # a header, a picture, padding: the last two leave a tar that can be read
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(IntegrityError, match=r"sha256 .* is not the recorded .* damaged"):
            stage.process(shard, output_uri(stage))
    assert not storage.list_files(output_uri(stage))
    path.write_bytes(whole)
    assert stage.process(shard, output_uri(stage)).num_kept == 4


def test_the_threads_of_the_process_are_left_as_they_were(tmp_path: Path) -> None:
    root = str(tmp_path)
    inputs = {"filter": publish_filter(root, shards_of(9)), "clip": publish_clip(root, tmp_path)}
    stage = Embed(EmbedConfig(num_cpus=2.5, batch_size=2), root=root)
    seen: list[int] = []
    stage.report = lambda progress: seen.append(torch.get_num_threads())
    (shard,) = stage.plan(inputs)
    before = torch.get_num_threads()
    stage.process(shard, output_uri(stage))
    assert set(seen) == {2} and torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before


def drifted(folder: Path, **changes: object) -> Path:
    """Write weights whose header claims another architecture than that of the golden embeddings."""
    torch.manual_seed(0)
    original = ClipModel.from_config(CLIP).freeze()
    other = ClipModel.from_config(dataclasses.replace(CLIP, **changes)).freeze()  # type: ignore[arg-type]
    other.load_state_dict(original.state_dict())
    path = folder / "drifted.safetensors"
    other.save(path, metadata=golden_metadata(original))
    return path


def test_another_activation_is_refused_before_any_image(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    stage, given = Embed(EmbedConfig(), root=root), Given("clip", root)
    record = given.record(0, {"weights": ("safetensors", drifted(tmp_path, quick_gelu=True))}, {})
    inputs = {"filter": publish_filter(root, shards_of(3)), "clip": given.manifest([record])}
    (shard,) = stage.plan(inputs)
    storage.delete(stage.uri(shard.inputs["images"]))  # never reached
    with pytest.raises(IntegrityError, match=r"does not reproduce its golden .* in fp32: cosine 0\.\d+.*QuickGELU"):
        stage.process(shard, output_uri(stage))


def test_the_same_activation_passes_and_a_missing_probe_does_not(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    given = Given("clip", root)
    inputs = {"filter": publish_filter(root, shards_of(3))}
    same = given.record(0, {"weights": ("safetensors", drifted(tmp_path))}, {})
    assert run(Embed(EmbedConfig(), root=root), inputs | {"clip": given.manifest([same])}).num_kept == 3
    small_clip().save(tmp_path / "bare.safetensors")
    bare = given.record(1, {"weights": ("safetensors", tmp_path / "bare.safetensors")}, {})
    stage = Embed(EmbedConfig(), root=root)
    (shard,) = stage.plan(inputs | {"clip": given.manifest([bare])})
    with pytest.raises(IntegrityError, match="no golden embeddings"):
        stage.process(shard, output_uri(stage))
    assert METADATA_KEY in golden_metadata(small_clip())


def test_a_table_never_pairs_the_wrong_number_of_rows() -> None:
    samples = shards_of(3)[0]
    unit = np.eye(3, EMBEDDING_DIM, dtype=np.float32)
    with pytest.raises(IntegrityError, match="3 samples, 2 image and 3 text"):
        embeddings_table(samples, Rows([0, 1, 2], unit[:2], unit))


def test_an_embedding_that_is_not_finite_costs_its_sample(tmp_path: Path) -> None:
    """One, as fp16 may give of a rare image or caption; if it is many, something else is wrong."""
    root, (samples,), clip = str(tmp_path), shards_of(16), small_clip()
    word = clip.tokenize(["zebra"])[0, 1]
    with torch.no_grad():
        clip.model.token_embedding.weight[word] = torch.nan  # type: ignore[index, operator, union-attr]
    published = publish_clip(root, tmp_path, clip)
    samples[5] = dataclasses.replace(samples[5], caption="a zebra")
    samples[8] = dataclasses.replace(samples[8], image=b"?")
    stage = Embed(EmbedConfig(), root=root)
    manifest = run(stage, {"filter": publish_filter(root, [samples]), "clip": published})
    assert (manifest.num_in, manifest.num_kept) == (12, 10)
    assert manifest.dropped == {"not_finite": 1, "undecodable": 1}
    (table,) = tables_of(manifest)
    assert table["key"].to_pylist() == [samples[j].key for j in (0, 1, 2, 4, 6, 9, 10, 12, 13, 14)]
    assert np.isfinite(embeddings_of(table, "text_embedding")).all()
    np.testing.assert_allclose(
        embeddings_of(table, "text_embedding")[4:6], embed(small_clip(), [samples[6], samples[9]])[1], atol=1e-3
    )
    samples[:8] = [dataclasses.replace(sample, caption="a zebra") for sample in samples[:8]]
    (shard,) = stage.plan({"filter": publish_filter(root, [samples]), "clip": published})
    with pytest.raises(ShardError, match=r"6 of 11 samples have an embedding that is not finite.*weights of clip"):
        stage.process(shard, output_uri(stage))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    root = str(tmp_path)
    inputs = {"filter": publish_filter(root, shards_of(2)), "clip": publish_clip(root, tmp_path)}
    with pytest.raises(ConfigError, match=r"embed\.num_gpus: 0\.5, but no GPU"):
        run(Embed(EmbedConfig(num_gpus=0.5), root=root), inputs)


def test_the_stage_travels_and_settings_are_checked(tmp_path: Path) -> None:
    stage = pickle.loads(pickle.dumps(Embed(EmbedConfig(num_gpus=0.25, num_workers=4), root=str(tmp_path))))
    assert (stage.resources.num_gpus, stage.resources.max_workers) == (0.25, 4)
    for wrong in ({"batch_size": 0}, {"num_decode_threads": 0}, {"num_workers": 0}, {"num_gpus": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EmbedConfig(**wrong)  # type: ignore[arg-type]
