"""Embed stage: filtered shards -> CLIP embeddings of images and captions, one Parquet table per shard.

A row is built from its sample and travels as one piece, so row i belongs to key i by construction; counts are checked
against the selection on the way in and out. A selection table beside it names the samples that could not be embedded.
Images are decoded and resized in background threads from the moment they are read, while the model works on captions
and earlier images. Before the first image, the worker embeds the fixed probe whose results the clip stage stored with
the weights: a library, activation or precision that changes embeddings is refused, not discovered after training.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages import storage
from stages.base import Progress, Resources, Result, Shard, Stage, refuse_below, setting
from stages.clip_encoder import ClipEncoder, threads_of
from stages.errors import ConfigError, InputError, IntegrityError, ShardError
from stages.manifest import File, Manifest, ShardRecord
from stages.samples import (
    Sample,
    embedding_array,
    kept_keys,
    read_tar,
    selection_table,
    table_from_bytes,
    table_to_bytes,
)
from stages.weights import checked_copy, weights_of

FloatArray = npt.NDArray[np.float32]

UNDECODABLE, NOT_FINITE = "undecodable", "not_finite"
_MOST_NOT_FINITE = 0.1  # of a shard; where it is more, something else is wrong than the rare sample


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How images and captions are embedded; which CLIP does it is the clip stage's matter."""

    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "number format on a GPU; a CPU always uses fp32")
    batch_size: int = setting(256, "images or captions per forward pass; a CPU takes at most 32", affects="nothing")
    num_decode_threads: int = setting(2, "threads that decode images beside the model", affects="nothing")
    num_workers: int | None = setting(None, "shards embedded at once; null: as many as fit", affects="nothing")
    num_cpus: float = setting(1.0, "CPU cores per worker; the model uses as many threads", affects="nothing")
    num_gpus: float = setting(0.0, "GPUs per worker; a fraction shares one", affects="nothing")

    def __post_init__(self) -> None:
        refuse_below(self, 1, "batch_size", "num_decode_threads")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers: {self.num_workers} is below 1; write 1 or more, or null")
        if self.num_cpus <= 0 or self.num_gpus < 0:
            raise ValueError(f"num_cpus: {self.num_cpus}, num_gpus: {self.num_gpus}; write more than 0, and 0 or more")


class Embed(Stage[EmbedConfig]):
    """One shard of the filter stage becomes one table of embeddings."""

    name = "embed"
    repeatable = False
    counts = "filter"
    version = 2

    def __init__(self, config: EmbedConfig, *, root: str, seed: int = 0) -> None:
        super().__init__(config, root=root, seed=seed)
        self._loaded: tuple[str, ClipEncoder] | None = None

    @property
    def upstream(self) -> tuple[str, ...]:
        """The samples, and the model."""
        return ("filter", "clip")

    @property
    def resources(self) -> Resources:
        """CPU cores and GPU share of one worker."""
        c = self.config
        return Resources(num_cpus=c.num_cpus, num_gpus=c.num_gpus, max_workers=c.num_workers)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Plan one shard per shard of the filter stage that has samples left.

        Raises:
            InputError: if the filters left no sample.
        """
        samples = inputs["filter"]
        if samples.num_kept == 0:
            raise InputError(
                f"embed: none of the {samples.num_in} downloaded samples passed the filters (dropped: "
                f"{samples.dropped}); relax the filter settings that dropped most"
            )
        weights = weights_of(inputs["clip"])
        return [
            self.shard(
                i,
                inputs={"images": r.inputs["images"], "selection": r.files["selection"], "weights": weights},
            )
            # Shards of which nothing is left are all alike.
            for i, r in enumerate(record for record in samples.records if record.num_kept)
        ]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Embed the selected samples of one shard.

        Images that cannot be decoded are dropped, named and counted, and so are samples with embeddings not finite.

        Raises:
            ShardError: if many embeddings are not finite.
        """
        started_at = time.monotonic()
        encoder = self._encoder_for(shard.inputs["weights"])
        keys = kept_keys(table_from_bytes(shard.inputs["selection"].read(self.root), ["key", "kept"]))
        samples, rows = self._embed(encoder, shard, keys)
        good = self._finite(rows)
        table = embeddings_table([samples[i] for i in good.positions], good)
        fates: dict[int, str | None] = {**dict.fromkeys(rows.positions, NOT_FINITE), **dict.fromkeys(good.positions)}
        reasons = [fates.get(i, UNDECODABLE) for i in range(len(samples))]
        scores = table["clip_score"].to_numpy()
        selection = selection_table([sample.key for sample in samples], reasons)
        return self.commit(
            shard,
            output,
            {
                "embeddings": ("parquet", table_to_bytes(table)),
                "selection": ("selection.parquet", table_to_bytes(selection)),
            },
            started_at=started_at,
            num_in=len(keys),
            num_kept=table.num_rows,
            dropped=dict(sorted(Counter(reason for reason in reasons if reason is not None).items())),
            metrics={"clip_score_sum": float(scores.sum(dtype=np.float64)), "embedding_dim": encoder.dim},
        )

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Sum up the counts and the mean CLIP score.

        Raises:
            InputError: if no image of the whole dataset could be decoded.
        """
        num_kept = sum(r.num_kept for r in records)
        if num_kept == 0:
            raise InputError(
                f"embed: none of the {sum(r.num_in for r in records)} images could be decoded; look at the shards "
                f"named in {storage.join(self.root, self.name, 'shards')} and run download again"
            )
        total = sum(r.metrics["clip_score_sum"] for r in records)
        metrics = {
            "num_embeddings": num_kept,
            "embedding_dim": int(records[0].metrics["embedding_dim"]),
            "clip_score_mean": total / num_kept,
        }
        return Result(records=records, metrics=metrics)

    def _encoder_for(self, weights: File) -> ClipEncoder:
        """Load the model on the first shard; later shards of the same weights find it loaded.

        Raises:
            ConfigError: if a GPU is asked for and there is none.
        """
        import torch

        c = self.config
        if c.num_gpus > 0 and not torch.cuda.is_available():
            raise ConfigError(
                f"embed.num_gpus: {c.num_gpus:g}, but no GPU is visible to the worker; set it to 0 to use the CPU"
            )
        if self._loaded is None or self._loaded[0] != weights.sha256:
            self._loaded = None
            with checked_copy(self.root, weights) as path:
                encoder = ClipEncoder(
                    str(path),
                    on_gpu=c.num_gpus > 0,
                    precision=c.precision,
                    batch_size=c.batch_size,
                    num_threads=threads_of(c.num_cpus),
                )
            self._loaded = (weights.sha256, encoder)
        return self._loaded[1]

    def _embed(self, encoder: ClipEncoder, shard: Shard, keys: Sequence[str]) -> tuple[list[Sample], Rows]:
        """Read the selected samples of a shard and embed them.

        Returns:
            The samples in the order of the tar, without their image files, and the embeddings.
        """
        file = shard.inputs["images"]
        tar = storage.read_bytes(self.uri(file), expected_bytes=file.num_bytes)
        with (
            _checked_meanwhile(file, tar, self.uri(file)),
            encoder.threads(),
            encoder.feed(self.config.num_decode_threads) as feed,
        ):
            samples = []
            for sample in read_tar(tar, keys=frozenset(keys)):
                feed.add(sample.image)
                samples.append(replace(sample, image=b""))
            self._check_complete(shard, keys, samples)
            text = encoder.encode_captions([sample.caption for sample in samples])

            def report(num_done: int) -> None:
                self.report(Progress(done=num_done, total=len(samples), unit="images"))

            positions, image = encoder.encode_images(feed, report)
        return samples, Rows(positions, image, text[positions])

    def _finite(self, rows: Rows) -> Rows:
        """Leave out samples with an embedding that is not finite: of millions, one has a number too large for fp16."""
        finite = np.isfinite(np.concatenate([rows.image, rows.text], axis=1)).all(axis=1)
        num_bad = len(finite) - int(finite.sum())
        if num_bad > _MOST_NOT_FINITE * len(finite):
            remedy = "set it to bf16 or fp32" if self.config.precision == "fp16" else "look at the weights of clip"
            raise ShardError(
                f"{num_bad} of {len(finite)} samples have an embedding that is not finite (embed.precision: "
                f"{self.config.precision}); {remedy}"
            )
        positions = [position for position, good in zip(rows.positions, finite, strict=True) if good]
        return Rows(positions, rows.image[finite], rows.text[finite])

    def _check_complete(self, shard: Shard, keys: Sequence[str], samples: Sequence[Sample]) -> None:
        """Refuse a tar that does not hold each selected sample once."""
        wanted, found = frozenset(keys), {sample.key for sample in samples}
        if len(wanted) != len(keys) or len(samples) != len(found) or found != wanted:
            missing = sorted(wanted - found)
            raise IntegrityError(
                f"embed shard {shard.index} ({self.uri(shard.inputs['images'])}): the selection keeps {len(keys)} "
                f"samples ({len(wanted)} distinct keys), the tar has {len(samples)} of them; first missing: "
                f"{missing[:1] or 'none'}; run filter again with --force"
            )


@contextlib.contextmanager
def _checked_meanwhile(file: File, data: bytes, uri: str) -> Iterator[None]:
    """Compute a checksum beside the work inside; what that work met in a damaged file is told as the damage it is.

    Raises:
        IntegrityError: at the end, if the checksum differs from the record.
    """
    with ThreadPoolExecutor(1, "unclip-checksum") as pool:
        checked = pool.submit(file.check, data, uri)
        try:
            yield
        finally:
            checked.result()


@dataclass(frozen=True)
class Rows:
    """Embeddings of the decodable samples of a shard.

    Attributes:
        positions: which samples they are.
        image: z_i, unit-norm float32 ``(n, D)``.
        text: z_t, unit-norm float32 ``(n, D)``.
    """

    positions: Sequence[int]
    image: FloatArray
    text: FloatArray


def embeddings_table(samples: Sequence[Sample], rows: Rows) -> pa.Table:
    """Build the table of a shard: ``key``, ``caption``, both embeddings in half precision, and their cosine.

    Raises:
        IntegrityError: if the numbers of samples and embeddings differ.
    """
    if not len(samples) == len(rows.image) == len(rows.text):
        raise IntegrityError(
            f"{len(samples)} samples, {len(rows.image)} image and {len(rows.text)} text embeddings; this is a bug"
        )
    return pa.table(
        {
            "key": pa.array([sample.key for sample in samples], pa.string()),
            "caption": pa.array([sample.caption for sample in samples], pa.string()),
            "image_embedding": embedding_array(rows.image),
            "text_embedding": embedding_array(rows.text),
            "clip_score": pa.array((rows.image * rows.text).sum(axis=1), pa.float32()),
        }
    )
