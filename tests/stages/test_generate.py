"""Generation: an image is a function of caption, seed and weights, and the PNG says which."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages import storage
from stages.errors import ConfigError, InputError, IntegrityError
from stages.generate import Generate, GenerateConfig, collect_weights, draw_rows, generate_images
from stages.manifest import Manifest
from stages.samples import embeddings_of, kept_keys, read_tar, table_from_bytes
from tests.stages.small_store import EMBEDDING_DIM, publish_data, publish_weights, run
from unclip_models.sampling_settings import DecoderSampling, PriorSampling, UpsamplerSampling

CONFIG = GenerateConfig(
    num_samples=5,
    samples_per_shard=3,
    prior=PriorSampling(steps=2, num_candidates=1),
    decoder=DecoderSampling(steps=3),
    upsampler_256=UpsamplerSampling(steps=2),
    upsampler_1024=UpsamplerSampling(steps=2),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Manifest]]:
    torch.set_num_threads(1)
    root = str(tmp_path_factory.mktemp("store"))
    return root, {**publish_weights(root), **publish_data(root)}


def samples_of(manifest: Manifest) -> list[tuple[str, str, int, bytes]]:
    return [
        (sample.key, sample.caption, sample.metadata["seed"], sample.image)
        for record in manifest.records
        for sample in read_tar(record.files["images"].read(manifest.root))
    ]


def test_images_have_captions_of_the_curated_data_and_say_where_they_come_from(
    store: tuple[str, dict[str, Manifest]],
) -> None:
    root, inputs = store
    manifest = run(Generate(CONFIG, root=root, seed=7), inputs)
    found = samples_of(manifest)
    assert [record.num_kept for record in manifest.records] == [3, 2]
    assert [(key, seed) for key, _, seed, _ in found] == [(f"{i:08d}", 7 + i) for i in range(5)]
    kept: set[str] = set()
    for record in inputs["curate"].records:
        table = table_from_bytes(record.inputs["embeddings"].read(root)).to_pydict()
        keys = set(kept_keys(table_from_bytes(record.files["selection"].read(root))))
        kept |= {caption for key, caption in zip(table["key"], table["caption"], strict=True) if key in keys}
    with Image.open(io.BytesIO(found[0][3])) as image:
        assert image.size == (32, 32) and image.mode == "RGB"
        text = image.text  # type: ignore[attr-defined]
    assert {caption for _, caption, _, _ in found} <= kept
    assert (text["caption"], text["seed"]) == (found[0][1], "7")
    assert json.loads(text["weights_sha256"]) == {
        name: file.sha256 for name, file in collect_weights(inputs, CONFIG.models).items()
    }
    assert json.loads(text["sampling"])["decoder"]["steps"] == 3
    table = table_from_bytes(manifest.records[1].files["table"].read(root))
    assert table["seed"].to_pylist() == [10, 11]
    norms = np.linalg.norm(embeddings_of(table, "image_embedding"), axis=1)
    assert embeddings_of(table, "image_embedding").shape == (2, EMBEDDING_DIM)
    assert norms == pytest.approx(1.0, abs=1e-2)


def test_neither_shards_nor_batches_nor_the_command_line_change_an_image(
    store: tuple[str, dict[str, Manifest]],
) -> None:
    root, inputs = store
    once = samples_of(run(Generate(CONFIG, root=root, seed=3), inputs))
    other = dataclasses.replace(CONFIG, samples_per_shard=5, batch_size=2)
    again = samples_of(run(Generate(other, root=root, seed=3), inputs))
    stage = Generate(CONFIG, root=root)
    alone = generate_images(stage, inputs, [once[4][1]], [once[4][2]])[0]
    for (key, caption, seed, png), twin in zip(once, again, strict=True):
        assert (key, caption, seed) == twin[:3]
        assert close(png, twin[3])
    assert close(alone.png(), once[4][3])
    assert alone.pixels.shape == (32, 32, 3)
    assert not close(generate_images(stage, inputs, [once[4][1]], [99])[0].png(), once[4][3])


def close(a: bytes, b: bytes) -> bool:
    """Compare pixels; batched arithmetic may round the last of 8 bits otherwise."""
    x, y = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (a, b))
    return x.shape == y.shape and int(np.abs(x - y).max()) <= 1


def test_equal_images_are_equal_bytes(store: tuple[str, dict[str, Manifest]]) -> None:
    root, inputs = store
    stage = Generate(CONFIG, root=root)
    first, second = (generate_images(stage, inputs, ["a réd circle — 円"], [1])[0] for _ in range(2))
    assert first.png() == second.png()
    with Image.open(io.BytesIO(first.png())) as image:
        assert image.text["caption"] == "a réd circle — 円"  # type: ignore[attr-defined]


def test_captions_from_a_file_are_used_in_turn_and_need_no_data(
    store: tuple[str, dict[str, Manifest]], tmp_path: Path
) -> None:
    root, inputs = store
    file = tmp_path / "captions.txt"
    file.write_text("a red circle\n\n  a blue ring \n")
    config = dataclasses.replace(CONFIG, captions_uri=str(file), until="decoder")
    stage = Generate(config, root=root)
    assert stage.upstream == ("clip", "prior", "decoder")
    found = samples_of(run(stage, inputs))
    assert [caption for _, caption, _, _ in found] == ["a red circle", "a blue ring"] * 2 + ["a red circle"]
    assert Image.open(io.BytesIO(found[0][3])).size == (8, 8)
    fingerprints = {name: manifest.fingerprint for name, manifest in inputs.items()}
    before = stage.fingerprint(fingerprints)
    moved = file.rename(tmp_path / "moved.txt")
    config = dataclasses.replace(config, captions_uri=str(moved))
    assert Generate(config, root=root).fingerprint(fingerprints) == before
    moved.write_text("a green square\n")
    assert Generate(config, root=root).fingerprint(fingerprints) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"\n \n", "holds no caption"), (b"\xff\xfe", "not UTF-8 text")],
)
def test_a_bad_file_of_captions_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "captions.txt"
    if content is not None:
        file.write_bytes(content)
    stage = Generate(GenerateConfig(captions_uri=str(file)), root=str(tmp_path))
    with pytest.raises(InputError, match=rf"generate\.captions_uri: .*{message}"):
        stage.external()


def test_missing_models_and_misfits_are_named(store: tuple[str, dict[str, Manifest]]) -> None:
    root, inputs = store
    stage = Generate(CONFIG, root=root)
    with pytest.raises(InputError, match="generate: prior, decoder not finished"):
        partial = {name: m for name, m in inputs.items() if name not in ("prior", "decoder")}
        generate_images(stage, partial, ["x"], [0])
    with pytest.raises(InputError, match="1 captions but 2 seeds"):
        generate_images(stage, inputs, ["x"], [0, 1])
    with pytest.raises(ConfigError, match="generate: UnCLIP: upsampler 0 takes 16 px but is given 8 px"):
        swapped = inputs | {"upsampler_256": inputs["upsampler_1024"]}
        generate_images(stage, swapped, ["x"], [0])
    with pytest.raises(ConfigError, match=r"generate: .*steps"):
        far = Generate(dataclasses.replace(CONFIG, decoder=DecoderSampling(steps=500)), root=root)
        generate_images(far, inputs, ["x"], [0])


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    inputs = publish_weights(root)
    uri = storage.join(root, inputs["prior"].records[0].files["weights"].path)
    data = bytearray(storage.read_bytes(uri))
    data[-1] ^= 1
    storage.write_bytes(uri, bytes(data))
    with pytest.raises(IntegrityError, match="it is damaged"):
        generate_images(Generate(CONFIG, root=root), inputs, ["x"], [0])


def test_the_stage_travels_to_a_worker(store: tuple[str, dict[str, Manifest]]) -> None:
    root, inputs = store
    stage = Generate(CONFIG, root=root)
    assert pickle.loads(pickle.dumps(stage)).plan(inputs) == stage.plan(inputs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_samples": 0}, "num_samples: 0"),
        ({"prior": PriorSampling(num_candidates=0)}, "prior.num_candidates: 0"),
        ({"decoder": DecoderSampling(eta=2.0)}, "decoder.eta: 2.0"),
        ({"upsampler_256": UpsamplerSampling(steps=0)}, "upsampler_256.steps: 0"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_rows", [1, 7, 12, 13, 30])
def test_every_row_is_drawn_once_before_any_is_drawn_again(num_rows: int) -> None:
    sizes = [5, 0, 4, 3]
    rows = [(int(part), int(row)) for part, row in draw_rows(sizes, num_rows, seed=4)]
    assert len(rows) == num_rows and rows == sorted(rows)
    assert all(0 <= row < sizes[part] for part, row in rows)
    counts = {pair: rows.count(pair) for pair in rows}
    assert max(counts.values()) - (min(counts.values()) if len(counts) == 12 else 0) <= 1
    assert rows == [(int(part), int(row)) for part, row in draw_rows(sizes, num_rows, seed=4)]


def test_rows_are_drawn_evenly() -> None:
    draws = np.concatenate([draw_rows([30, 70], 10, seed)[:, 0] for seed in range(200)])
    assert draws.mean() == pytest.approx(0.7, abs=0.04)


def test_a_few_of_billions_of_rows_are_drawn_without_a_list_of_all() -> None:
    drawn = draw_rows([10**12, 10**12], 4, seed=0)  # terabytes, as a list
    assert drawn.shape == (4, 2) and set(drawn[:, 0]) <= {0, 1}


def test_drawing_from_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="curate kept no sample"):
        draw_rows([0, 0], 3, seed=0)
