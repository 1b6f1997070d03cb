"""Our loader against raw webdataset reading of the same shards, and the cost of resuming deep in an epoch.

``python -m tests.benchmarks.bench_loader`` writes shards of 256 px JPEGs and reads them decoded to 64 px, captions with
them, in batches:

* ours: ``TrainingStream``, which shuffles, joins by key and checks checksums; nothing decoded is kept;
* webdataset: one shard after the other, unshuffled, with our decoder (JPEGs decoded at reduced size);
* webdataset, plain: likewise, with the usual decoder (Pillow at full size, then resized).

On one core all read in one process, on two webdataset has two worker processes and ours two threads. Each measurement
is a process of its own, pinned to its cores; rounds are interleaved, medians are printed. At the end: the time to the
first batch, and to the hundredth, from step 0 and from 90% of an epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from stages.dataset import TrainingStream
from stages.manifest import File
from stages.open_shard import TrainingShard, decode_image
from stages.samples import Sample, embedding_array, selection_table, table_to_bytes, write_tar
from tests.stages.training_data import put

STORED_PX, WANTED_PX, BATCH = 256, 64, 64


def photo(seed: int) -> bytes:
    """Draw smooth shapes with some grain, about 20 kB as a JPEG."""
    rng = np.random.default_rng(seed)
    shapes = cv2.GaussianBlur(rng.random((STORED_PX, STORED_PX, 3)).astype(np.float32), (0, 0), 4)
    shapes = 0.5 + (shapes - 0.5) * 6 + 0.02 * rng.standard_normal(shapes.shape)
    sink = io.BytesIO()
    Image.fromarray((np.clip(shapes, 0, 1) * 255).astype(np.uint8)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def write_shards(
    root: str, num_shards: int, num_samples: int, *, num_pictures: int = 200, embedding_dim: int | None = None
) -> list[TrainingShard]:
    """Write the data, and which files it is; a few hundred pictures are repeated."""
    pictures = [photo(seed) for seed in range(num_pictures)]
    shards = []
    for index in range(num_shards):
        keys = [f"{index:04d}{i:06d}" for i in range(num_samples)]
        tar = write_tar(
            Sample(key=key, image=pictures[(index + i) % num_pictures], extension="jpg", caption=caption_of(i))
            for i, key in enumerate(keys)
        )
        selection = table_to_bytes(selection_table(keys, [None] * num_samples))
        shards.append(
            TrainingShard(
                selection=put(root, f"curate/{index}.parquet", selection),
                num_kept=num_samples,
                images=put(root, f"download/{index}.tar", tar),
                embeddings=put_embeddings(root, index, keys, embedding_dim) if embedding_dim else None,
            )
        )
    Path(root, "shards.json").write_text(json.dumps([dataclasses.asdict(shard) for shard in shards]))
    return shards


def put_embeddings(root: str, index: int, keys: Sequence[str], dim: int) -> File:
    """Write vectors of unit norm for the samples of a shard."""
    vectors = np.random.default_rng(index).standard_normal((2, len(keys), dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    captions = [caption_of(i) for i in range(len(keys))]
    columns = {"image_embedding": embedding_array(vectors[0]), "text_embedding": embedding_array(vectors[1])}
    table = pa.table({"key": keys, "caption": captions, **columns})
    return put(root, f"embed/{index}.parquet", table_to_bytes(table))


def caption_of(row: int) -> str:
    return f"a picture, number {row}"


def lengths(captions: Sequence[str]) -> torch.Tensor:
    """Stand in for a tokenizer."""
    return torch.tensor([[len(caption)] for caption in captions])


def stream_of(shards: Sequence[TrainingShard], root: str, num_threads: int) -> TrainingStream:
    return TrainingStream(
        shards,
        root=root,
        num_streams=8,
        global_batch_size=BATCH,
        seed=0,
        image_size_px=WANTED_PX,
        tokenize=lengths,
        num_decode_threads=num_threads,
        cache_gib=0.0,
    )


def ours(shards: Sequence[TrainingShard], root: str, num_cores: int) -> Iterator[int]:
    num_steps = sum(shard.num_kept for shard in shards) // BATCH
    stream = stream_of(shards, root, num_cores if num_cores > 1 else 0)
    with contextlib.closing(stream.batches(0)) as batches:
        for batch in itertools.islice(batches, num_steps):
            yield len(batch.tensors["image"])


def full_size(data: bytes) -> np.ndarray:
    """Decode as most do: all pixels, then resize."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((WANTED_PX, WANTED_PX), Image.Resampling.BICUBIC))


def reduced(data: bytes) -> np.ndarray:
    return decode_image(data, WANTED_PX, "webdataset")


def _decoded(decode: Callable[[bytes], np.ndarray], sample: dict[str, Any]) -> tuple[np.ndarray, str]:
    return decode(sample["jpg"]), sample["txt"].decode()


def _collated(rows: Sequence[tuple[np.ndarray, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(np.stack([image for image, _ in rows])).permute(0, 3, 1, 2).contiguous()
    return images, lengths([caption for _, caption in rows])


def webdataset(
    shards: Sequence[TrainingShard], root: str, num_cores: int, decode: Callable[[bytes], np.ndarray]
) -> Iterator[int]:
    import webdataset as wds

    urls = [f"{root}/{shard.images.path}" for shard in shards if shard.images is not None]
    data = wds.WebDataset(urls, shardshuffle=False).map(partial(_decoded, decode))
    workers = num_cores if num_cores > 1 else 0
    for images, _ in torch.utils.data.DataLoader(data, BATCH, num_workers=workers, collate_fn=_collated):
        yield len(images)


LOADERS: dict[str, Callable[[Sequence[TrainingShard], str, int], Iterator[int]]] = {
    "ours": ours,
    "webdataset": partial(webdataset, decode=reduced),
    "webdataset, plain": partial(webdataset, decode=full_size),
}


def measure(root: str, name: str, num_cores: int) -> float:
    """Read one epoch in this process; samples per second, from the first request to the last batch."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])
    torch.set_num_threads(1)
    shards = read_shards(root)
    started_at = time.perf_counter()
    num_samples = sum(LOADERS[name](shards, root, num_cores))
    return num_samples / (time.perf_counter() - started_at)


def measure_start(root: str, fraction: float) -> tuple[float, float]:
    """Start at a point of the epoch; seconds to the first batch, and to the hundredth."""
    shards = read_shards(root)
    started_at = time.perf_counter()
    stream = stream_of(shards, root, 0)
    first_step = int(fraction * sum(shard.num_kept for shard in shards) // BATCH)
    with contextlib.closing(stream.batches(first_step)) as batches:
        next(batches)
        first_s = time.perf_counter() - started_at
        for _ in itertools.islice(batches, 99):
            pass
        return first_s, time.perf_counter() - started_at


def read_shards(root: str) -> list[TrainingShard]:
    shards = []
    for values in json.loads(Path(root, "shards.json").read_text()):
        files = {name: File(**value) for name, value in values.items() if isinstance(value, dict)}
        shards.append(TrainingShard(**{**values, **files}))
    return shards


def in_a_process(*arguments: str) -> Any:
    command = [sys.executable, "-m", "tests.benchmarks.bench_loader", "--measure", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2000, help="per shard")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, root, *rest = args.measure
        print(
            json.dumps(measure(root, rest[0], int(rest[1])) if kind == "read" else measure_start(root, float(rest[0])))
        )
        return
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as root:
        write_shards(root, args.shards, args.samples)
        for num_cores in range(1, min(2, len(os.sched_getaffinity(0))) + 1):
            rates: dict[str, list[float]] = {name: [] for name in LOADERS}
            for _ in range(args.rounds):
                for name in LOADERS:
                    rates[name].append(in_a_process("read", root, name, str(num_cores)))
            medians = {name: statistics.median(found) for name, found in rates.items()}
            print(f"{num_cores} core(s), samples/s (median of {args.rounds}; range)")
            for name, median in medians.items():
                spread = f"{min(rates[name]):.0f} - {max(rates[name]):.0f}"
                print(f"  {name:20} {median:7.0f}  ({spread})  ours is {medians['ours'] / median:.2f}x")
        starts: dict[float, list[list[float]]] = {0.0: [], 0.9: []}
        for _ in range(args.rounds):
            for fraction, found in starts.items():
                found.append(in_a_process("start", root, str(fraction)))
        print("seconds to the first batch, and to the hundredth (medians)")
        for fraction, found in starts.items():
            first_s, hundred_s = (statistics.median(column) for column in zip(*found, strict=True))
            print(f"  from {fraction:4.0%} of an epoch   {first_s:.3f}   {hundred_s:.3f}")


if __name__ == "__main__":
    main()
