"""The training stream against the data it was made of."""

from __future__ import annotations

import dataclasses
import io
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from stages.dataset import Batch, TrainingStream, _ShardCache
from stages.errors import IntegrityError, StorageError
from stages.open_shard import OpenShard, TrainingShard, decode_image
from stages.samples import selection_table, table_to_bytes
from tests.stages.training_data import DIM, put, unit_vector, write_dataset
from unclip_models.randomness import SampleRandom
from unclip_models.settings import UNetConfig, UpsamplerConfig
from unclip_models.upsampler import Upsampler, training_sample

SIZES = (7, 12, 5)


def stream_of(shards: Sequence[TrainingShard], root: str, **options: Any) -> TrainingStream:
    defaults: dict[str, Any] = {"num_streams": 2, "global_batch_size": 4, "seed": 0, "embeddings": True}
    defaults |= {"image_size_px": 8, "tokenize": number_of}
    return TrainingStream(shards, root=root, **(defaults | options))


def number_of(captions: Sequence[str]) -> torch.Tensor:
    """Stand in for a tokenizer: the number in ``sample 12``."""
    return torch.tensor([[int(caption.split()[1])] for caption in captions])


def take(stream: TrainingStream, count: int, first_step: int = 0, **position: int) -> list[Batch]:
    batches = stream.batches(first_step, **position)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def numbers(batch: Batch) -> list[int]:
    return batch.tensors["tokens"][:, 0].tolist()


def test_rows_are_joined_by_key(root: str) -> None:
    shards = write_dataset(root, SIZES)
    seen: set[int] = set()
    for batch in take(stream_of(shards, root), 5):
        for row, number in enumerate(numbers(batch)):
            image = batch.tensors["image"][row]
            assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
            assert image.unique().tolist() == [number]
            for name in ("image_embedding", "text_embedding"):
                assert torch.allclose(batch.tensors[name][row], torch.from_numpy(unit_vector(number)), atol=1e-3)
            seen.add(number)
    offsets = np.cumsum((0, *SIZES[:-1]))
    dropped = {int(o) + i for o, size in zip(offsets, SIZES, strict=True) for i in range(3, size, 4)}
    assert seen == set(range(sum(SIZES))) - dropped  # 18 kept, 20 drawn: one epoch is through
    assert batch.tensors["image_embedding"].shape == (4, DIM)


def test_resume_and_world_size_do_not_change_the_samples(tmp_path: Path) -> None:
    root = str(tmp_path)
    stream = stream_of(write_dataset(root, SIZES), root, num_decode_threads=2)
    straight = take(stream, 12)
    resumed = take(stream, 5, first_step=7)
    for a, b in zip(straight[7:], resumed, strict=True):
        assert (a.step, list(a.indices)) == (b.step, list(b.indices))
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    halves = [take(stream, 12, rank=rank, world_size=2) for rank in range(2)]
    for whole, left, right in zip(straight, *halves, strict=True):
        assert [*left.indices, *right.indices] == list(whole.indices)
        assert numbers(left) + numbers(right) == numbers(whole)


def test_what_threads_keep_of_one_sample_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch holds a sample twice, two threads decode it; both are held up until the other has begun."""
    root = str(tmp_path)
    meeting = threading.Barrier(2, timeout=30)

    def decode_together(data: bytes, side_px: int, place: str) -> np.ndarray:
        meeting.wait()
        return decode_image(data, side_px, place)

    monkeypatch.setattr("stages.open_shard.decode_image", decode_together)
    (shard,) = write_dataset(root, (3,))
    opened = OpenShard(shard, root, image_size_px=8, captions=False, vectors=False)
    before = opened.num_bytes
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda row: opened.image(row, keep=True), [1, 1])
    assert np.array_equal(one, other) and opened.num_bytes - before == one.nbytes == 8 * 8 * 3
    opened.close()


def test_pairs_prepared_by_the_stream_are_those_of_the_step(tmp_path: Path) -> None:
    """Bit for bit, whatever the threads, the restart and the number of ranks."""
    root = str(tmp_path)
    shards = write_dataset(root, SIZES)
    config = UpsamplerConfig(
        image_size=16,
        input_size=4,
        crop_fraction=0.5,
        degradation="bsr",
        degradation_probability=0.8,
        unet=UNetConfig(model_channels=8, channel_mult=(1,), num_res_blocks=1),
    )
    model, expected = Upsampler(config), []
    for batch in take(stream_of(shards, root, image_size_px=16), 6):
        images = batch.part(0, 4, torch.device("cpu"))["image"]
        expected.append(model.training_pair(images, SampleRandom(0, batch.step, batch.indices)))

    def check(batches: Sequence[Batch], first_step: int = 0, rows: slice = slice(None)) -> None:
        for batch, (crops, low_res) in zip(batches, expected[first_step:], strict=True):
            assert numbers(batch) and batch.tensors["image"].dtype == torch.uint8
            assert torch.equal(batch.part(0, 4, torch.device("cpu"))["image"], crops[rows])
            assert torch.equal(batch.tensors["low_res"], low_res[rows])

    prepare = partial(training_sample, config)
    for num_threads in (0, 3):
        stream = stream_of(shards, root, image_size_px=16, prepare=prepare, num_decode_threads=num_threads)
        check(take(stream, 6))
    check(take(stream, 2, first_step=4), first_step=4)
    for rank in range(2):
        check(take(stream, 6, rank=rank, world_size=2), rows=slice(2 * rank, 2 * rank + 2))


def test_an_error_of_the_preparation_is_raised_where_the_batch_is_awaited(tmp_path: Path) -> None:
    def prepare(image: np.ndarray, random: SampleRandom) -> dict[str, torch.Tensor]:
        raise ValueError(f"sample {random.indices[0]} of {image.shape}")

    stream = stream_of(write_dataset(str(tmp_path), SIZES), str(tmp_path), prepare=prepare, num_decode_threads=2)
    with pytest.raises(ValueError, match=r"sample \d of \(8, 8, 3\)"):
        take(stream, 1)


def test_a_tiny_cache_changes_nothing_but_the_work(tmp_path: Path) -> None:
    root = str(tmp_path)
    shards = write_dataset(root, (6,) * 12)
    roomy = take(stream_of(shards, root), 30)
    tight = take(stream_of(shards, root, cache_gib=0.0), 30)
    assert [numbers(batch) for batch in roomy] == [numbers(batch) for batch in tight]


def test_captions_come_from_the_tar_without_embeddings(tmp_path: Path) -> None:
    root = str(tmp_path)
    shards = write_dataset(root, SIZES)
    bare = [dataclasses.replace(shard, embeddings=None) for shard in shards]
    a = take(stream_of(shards, root), 3)
    b = take(stream_of(bare, root, embeddings=False), 3)
    assert [numbers(batch) for batch in a] == [numbers(batch) for batch in b]


def test_closing_stops_all_threads(tmp_path: Path) -> None:
    root = str(tmp_path)
    take(stream_of(write_dataset(root, SIZES), root, num_decode_threads=3), 2)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("unclip-")]


def test_a_missing_key_is_an_error(tmp_path: Path) -> None:
    root = str(tmp_path)
    shards = write_dataset(root, (4,))
    keys = ["0000000000", "stranger", "0000000002"]
    table = selection_table(keys, [None, None, None])
    wrong = dataclasses.replace(shards[0], selection=put(root, "x.parquet", table_to_bytes(table)))
    with pytest.raises(IntegrityError, match=r"embed/0.parquet: holds no sample stranger"):
        take(stream_of([wrong], root), 1)
    with pytest.raises(IntegrityError, match=r"download/0.tar: holds no sample stranger"):
        take(stream_of([dataclasses.replace(wrong, embeddings=None)], root, embeddings=False, tokenize=None), 1)


def test_a_wrong_count_is_an_error(tmp_path: Path) -> None:
    root = str(tmp_path)
    shard = dataclasses.replace(write_dataset(root, (8,))[0], num_kept=5)
    with pytest.raises(IntegrityError, match="selects 6 samples, its record says 5"):
        take(stream_of([shard], root), 1)


@pytest.mark.parametrize(("path", "error"), [("download/0.tar", IntegrityError), ("embed/0.parquet", IntegrityError)])
def test_damage_is_noticed(tmp_path: Path, path: str, error: type[Exception]) -> None:
    root = str(tmp_path)
    shards = write_dataset(root, (8,))
    file = tmp_path / path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(error, match=path):
        take(stream_of(shards, root), 1)


def test_a_lost_file_is_an_error_at_once(tmp_path: Path) -> None:
    root = str(tmp_path)
    shards = write_dataset(root, (8,))
    (tmp_path / "download/0.tar").unlink()
    with pytest.raises(StorageError, match=r"download/0.tar"):
        take(stream_of(shards, root), 1)


def test_a_shard_that_could_not_be_opened_ahead_is_opened_when_it_is_needed(tmp_path: Path) -> None:
    """A store may be away for a while, long before a shard is needed."""
    shards = write_dataset(str(tmp_path), (4, 4))
    tar, aside = tmp_path / "download/0.tar", tmp_path / "aside"
    with ThreadPoolExecutor(1) as pool:
        options: dict[str, Any] = {"image_size_px": 8, "captions": False, "vectors": False}
        cache = _ShardCache(lambda index: OpenShard(shards[index], str(tmp_path), **options), pool, 1, 0)
        tar.rename(aside)
        for index in (0, 1):
            cache.prepare(index)
        with pytest.raises(StorageError):
            cache.get(0)
        cache.trim()  # lets go of it, for want of room
        cache.prepare(0)
        with pytest.raises(StorageError):
            cache.get(0)
        aside.rename(tar)
        cache.prepare(0)
        assert cache.get(0).image(0, keep=False).shape == (8, 8, 3)
        cache.close()


def test_part_moves_images_to_minus_one_to_one() -> None:
    batch = Batch(0, [0, 1], {"image": torch.tensor([[[[0, 255]]], [[[51, 102]]]], dtype=torch.uint8)})
    assert batch.part(0, 1, torch.device("cpu"))["image"].tolist() == [[[[-1.0, 1.0]]]]
    assert torch.allclose(batch.part(1, 2, torch.device("cpu"))["image"], torch.tensor([-0.6, -0.2]))


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return sink.getvalue()


def test_an_image_of_the_right_size_is_not_touched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(_encoded(pixels, "PNG"), 16, "here"), pixels)


def test_the_central_square_is_kept() -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    assert (decode_image(_encoded(pixels, "PNG"), 10, "here") == 200).all()


def test_a_large_jpeg_decoded_small_looks_the_same() -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (512, 1))] * 3, axis=2)
    small = decode_image(_encoded(pixels, "JPEG"), 32, "here").astype(float)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(small - expected).max() < 4


def test_a_broken_image_is_named() -> None:
    with pytest.raises(IntegrityError, match=r"x\.tar: sample 7: cannot decode the image"):
        decode_image(b"not an image", 8, "x.tar: sample 7")


def test_images_are_required_where_they_are_wanted(tmp_path: Path) -> None:
    shard = dataclasses.replace(write_dataset(str(tmp_path), (8,))[0], images=None)
    with pytest.raises(IntegrityError, match="a shard record names no images"):
        stream_of([shard], str(tmp_path))


def test_columns_are_read_in_any_row_order(tmp_path: Path) -> None:
    """The rows of the embeddings may come in another order than those of the selection."""
    root = str(tmp_path)
    shard = write_dataset(root, (8,))[0]
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "embed/0.parquet")
    shuffled = table.take(pa.array([5, 3, 7, 0, 1, 6, 2, 4]))
    moved = dataclasses.replace(shard, embeddings=put(root, "embed/s.parquet", table_to_bytes(shuffled)))
    a, b = take(stream_of([shard], root), 3), take(stream_of([moved], root), 3)
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(x.tensors[name], y.tensors[name]) for name in x.tensors)
