"""A small data set as curate leaves it, and a tiny model, for tests of training."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn

from stages import storage
from stages.dataset import Batch
from stages.manifest import File, Manifest, ShardRecord
from stages.open_shard import TrainingShard
from stages.samples import Sample, embedding_array, selection_table, table_to_bytes, write_tar
from unclip_models.dropout import SampleDropout, dropout_seeds
from unclip_models.randomness import SampleRandom

DIM = 16


def put(root: str, path: str, data: bytes) -> File:
    """Write a file of the store and return its record."""
    written = storage.write_bytes(storage.join(root, path), data)
    return File(path=path, sha256=written.sha256, num_bytes=written.num_bytes)


def write_dataset(
    root: str,
    sizes: Sequence[int] = (7, 12, 5),
    *,
    side_px: int = 24,
    dropped_every: int = 4,
    first_number: int = 0,
    bad: Collection[int] = (),
) -> list[TrainingShard]:
    """Write shards of ``sizes`` samples, every fourth not selected; pixel value and vectors tell samples apart.

    Samples are numbered from ``first_number`` on; those in ``bad`` have no image that could be decoded.
    """
    shards, number = [], first_number
    for index, size in enumerate(sizes):
        keys = [f"{index:04d}{i:06d}" for i in range(size)]
        numbers = list(range(number, number + size))
        number += size
        images = write_tar(
            Sample(
                key=key, image=b"no picture" if n in bad else _png(n, side_px), extension="png", caption=f"sample {n}"
            )
            for key, n in zip(keys, numbers, strict=True)
        )
        vectors = np.stack([unit_vector(n) for n in numbers])
        table = {"key": keys, "caption": [f"sample {n}" for n in numbers]}
        names = ("image_embedding", "text_embedding")
        embeddings = pa.table(table | {name: embedding_array(vectors) for name in names})
        reasons = ["dropped" if i % dropped_every == dropped_every - 1 else None for i in range(size)]
        shards.append(
            TrainingShard(
                selection=put(root, f"curate/{index}.parquet", table_to_bytes(selection_table(keys, reasons))),
                num_kept=reasons.count(None),
                images=put(root, f"download/{index}.tar", images),
                embeddings=put(root, f"embed/{index}.parquet", table_to_bytes(embeddings)),
            )
        )
    return shards


def unit_vector(number: int) -> np.ndarray:
    """Give the embedding of a sample."""
    vector = np.random.default_rng(number).standard_normal(DIM)
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def _png(number: int, side_px: int) -> bytes:
    pixels = np.full((side_px, side_px + 6, 3), number % 256, dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def manifests(root: str, shards: Sequence[TrainingShard]) -> dict[str, Manifest]:
    """Describe the data set as the manifests of curate and clip."""
    records = [
        ShardRecord(
            shard_id=f"{index:016x}",
            files={"selection": shard.selection},
            inputs={"images": shard.images, "embeddings": shard.embeddings},
            num_in=shard.num_kept,
            num_kept=shard.num_kept,
        )
        for index, shard in enumerate(shards)
        if shard.images is not None and shard.embeddings is not None
    ]
    common: dict[str, Any] = {"root": root, "version": 1, "config": {}, "inputs": {}}
    return {
        "curate": Manifest(stage="curate", fingerprint="c" * 16, records=records, **common),
        "clip": Manifest(stage="clip", fingerprint="e" * 16, records=[], metrics={"embedding_dim": DIM}, **common),
    }


class TinyModel(nn.Module):
    """Regress noised vectors; small, but with several layers, dropout and per-sample randomness."""

    def __init__(self, width: int = 12, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Linear(DIM, width), nn.SiLU(), SampleDropout(dropout), nn.Linear(width, 5), nn.Linear(5, DIM)
            )
            self.bias = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        for layer in self.body:
            x = layer(x, seeds) if isinstance(layer, SampleDropout) else layer(x)
        return x + self.bias

    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["image_embedding"]
        t = random.integers("t", 0, 100)
        noisy = x + random.normal("noise", (DIM,)) * (t / 100)[:, None]
        losses = (self(noisy, dropout_seeds(random)) - x).pow(2).sum(1)
        return losses.mean(), {"loss": losses.detach(), "t": t}


@dataclass
class VectorStream:
    """A stream without files: the vector of sample i is a function of i."""

    global_batch_size: int = 8
    poisoned_steps: frozenset[int] = frozenset()

    def batches(self, first_step: int, rank: int, world_size: int) -> Any:
        share = self.global_batch_size // world_size
        step = first_step
        while True:
            first = step * self.global_batch_size + rank * share
            indices = list(range(first, first + share))
            vectors = torch.from_numpy(np.stack([unit_vector(i) for i in indices]))
            if step in self.poisoned_steps and rank == 0:
                vectors[0, 0] = torch.nan
            yield Batch(step, indices, {"image_embedding": vectors})
            step += 1


class Disturbed(VectorStream):
    """Calls a function before it gives the batch of a step."""

    def __init__(self, **calls: Any) -> None:
        super().__init__()
        self._calls = {int(name.removeprefix("at_")): call for name, call in calls.items()}

    def batches(self, first_step: int, rank: int, world_size: int) -> Any:
        for batch in super().batches(first_step, rank, world_size):
            self._calls.get(batch.step, lambda: None)()
            yield batch
