"""Embeddings for clip-retrieval: every row is its sample's, and a folder is there whole or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.clip_retrieval_layout import export_embeddings
from stages.errors import ConfigError, InputError, IntegrityError, UnclipError
from stages.manifest import Manifest
from stages.samples import embedding_array, selection_table, table_to_bytes
from tests.stages.small_store import Given

DIM = 6


def publish(root: str, sizes: list[int], drop_every: int = 3) -> tuple[Manifest, Manifest, dict[str, tuple]]:
    """Publish embed and curate; return their manifests and key -> (image, text, caption, kept)."""
    embed, curate = Given("embed", root), Given("curate", root)
    rng = np.random.default_rng(0)
    embedded, curated, rows = [], [], {}
    for i, size in enumerate(sizes):
        keys = [f"{i:04x}{j:06d}" for j in range(size)]
        image, text = (rng.standard_normal((size, DIM)).astype(np.float16) for _ in range(2))
        captions = [f"caption {key}, with \u00fc" for key in keys]
        kept = [j % drop_every != drop_every - 1 for j in range(size)]
        table = pa.table(
            {
                "key": pa.array(keys, pa.string()),
                "caption": pa.array(captions, pa.string()),
                "image_embedding": embedding_array(image),
                "text_embedding": embedding_array(text),
                "clip_score": pa.array((image.astype(np.float32) * text).sum(1), pa.float32()),
            }
        )
        made = embed.record(i, {"embeddings": ("parquet", table_to_bytes(table))}, {}, num_in=size, num_kept=size)
        selection = selection_table(keys, [None if k else "keep_fraction" for k in kept])
        dropped = {"keep_fraction": size - sum(kept)} if sum(kept) < size else {}
        files = {"selection": ("selection.parquet", table_to_bytes(selection))}
        counts = {"num_in": size, "num_kept": sum(kept), "dropped": dropped}
        embedded.append(made)
        curated.append(curate.record(i, files, made.files, **counts))
        rows |= {key: (image[j], text[j], captions[j], kept[j]) for j, key in enumerate(keys)}
    return embed.manifest(embedded), curate.manifest(curated), rows


def read_back(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray, str, float]]:
    """Read the three kinds of files by the order of their names, as clip-retrieval's readers do."""
    found = []
    names = [sorted((folder / part).iterdir()) for part in ("img_emb", "text_emb", "metadata")]
    for image_path, text_path, metadata_path in zip(*names, strict=True):
        image, text, metadata = np.load(image_path), np.load(text_path), pq.read_table(metadata_path)
        assert image.dtype == text.dtype == np.float16 and len(image) == len(text) == metadata.num_rows
        columns = (metadata[name].to_pylist() for name in ("image_path", "caption", "clip_score"))
        found += [
            (key, image[j], text[j], caption, s) for j, (key, caption, s) in enumerate(zip(*columns, strict=True))
        ]
    return found


@pytest.mark.parametrize("everything", [False, True])
def test_rows_are_their_samples_in_the_order_of_the_dataset(everything: bool, tmp_path: Path) -> None:
    sizes = [5, 0, 1, 2, *[4] * 10]
    embed, curate, rows = publish(str(tmp_path / "store"), sizes)
    target = tmp_path / "out"
    count = export_embeddings(embed if everything else curate, target)
    expected = [key for key in rows if everything or rows[key][3]]
    found = read_back(target)
    assert [row[0] for row in found] == expected and count == len(expected)
    for key, image, text, caption, score in found:
        assert np.array_equal(image, rows[key][0]) and np.array_equal(text, rows[key][1])
        assert caption == rows[key][2]
        assert score == pytest.approx(float((image.astype(np.float32) * text).sum()), abs=1e-5)
    names = sorted(path.name for path in (target / "img_emb").iterdir())
    assert names == [f"img_emb_{i:02d}.npy" for i in range(13)]


def test_a_single_shard_is_number_0(tmp_path: Path) -> None:
    _, curate, _ = publish(str(tmp_path / "store"), [4])
    (tmp_path / "out").mkdir()  # an empty folder is welcome
    export_embeddings(curate, tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert found == ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet", "text_emb/text_emb_0.npy"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    _, curate, _ = publish(str(tmp_path / "store"), [4])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for target in (tmp_path / "out", tmp_path / "out" / "mine.txt"):
        with pytest.raises(ConfigError, match="give a new one"):
            export_embeddings(curate, target)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    _, curate, _ = publish(root, [4, 5, 6])
    first, second, third = curate.records
    swapped = dataclasses.replace(second, files=third.files)
    miscounted = dataclasses.replace(second, num_kept=3, dropped={"keep_fraction": 2})
    cases: list[tuple[Manifest, type[UnclipError], str]] = [
        (dataclasses.replace(curate, records=(first, swapped)), IntegrityError, "not about the same samples"),
        (dataclasses.replace(curate, records=(first, miscounted)), IntegrityError, "4 samples where .* says 3"),
        (dataclasses.replace(curate, records=()), InputError, "keeps no sample"),
    ]
    for manifest, kind, message in cases:
        with pytest.raises(kind, match=message):
            export_embeddings(manifest, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
