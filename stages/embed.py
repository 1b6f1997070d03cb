"""Embed stage: filtered shards -> CLIP embeddings of images and captions, one Parquet table per shard.

A row is built from its sample and travels as one piece, so row i belongs to key i by construction; counts are checked
against the selection on the way in and out. Images are decoded and resized in background threads while the model works
on earlier ones. Before the first image, the worker embeds the fixed probe whose results the clip stage stored with the
weights: a library, activation or precision that changes embeddings is refused, not discovered after training.
"""

from __future__ import annotations

import contextlib
import io
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from stages import storage
from stages.base import Progress, Resources, Result, Shard, Stage, setting
from stages.errors import ConfigError, InputError, IntegrityError, ShardError
from stages.golden import check_golden
from stages.manifest import File, Manifest, ShardRecord
from stages.samples import Sample, embedding_array, kept_keys, read_tar, table_from_bytes, table_to_bytes
from stages.weights import checked_copy, weights_of

if TYPE_CHECKING:
    import torch

    from unclip_models.clip import ClipModel, ClipPreprocess

FloatArray = npt.NDArray[np.float32]

# What Pillow raises on files that are damaged, truncated, of no known format, or absurdly large.
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How images and captions are embedded; which CLIP does it is the clip stage's matter."""

    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", "number format on a GPU; a CPU always uses fp32")
    batch_size: int = setting(256, "images or captions per forward pass", affects="nothing")
    num_decode_threads: int = setting(2, "threads that decode images beside the model", affects="nothing")
    num_workers: int | None = setting(None, "shards embedded at once; null: as many as fit", affects="nothing")
    num_cpus: float = setting(1.0, "CPU cores per worker", affects="nothing")
    num_gpus: float = setting(0.0, "GPUs per worker; a fraction shares one", affects="nothing")

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_decode_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1; write 1 or more")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers: {self.num_workers} is below 1; write 1 or more, or null")
        if self.num_cpus <= 0 or self.num_gpus < 0:
            raise ValueError(f"num_cpus: {self.num_cpus}, num_gpus: {self.num_gpus}; write more than 0, and 0 or more")


class Embed(Stage[EmbedConfig]):
    """One shard of the filter stage becomes one table of embeddings."""

    name = "embed"
    counts = "filter"

    def __init__(self, config: EmbedConfig, *, root: str, seed: int = 0) -> None:
        super().__init__(config, root=root, seed=seed)
        self._encoder: Encoder | None = None

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
        """Embed the selected samples of one shard; images that cannot be decoded are dropped and counted."""
        started_at = time.monotonic()
        encoder = self._encoder_for(shard.inputs["weights"])
        keys = kept_keys(table_from_bytes(shard.inputs["selection"].read(self.root), ["key", "kept"]))
        samples = self._selected(shard, keys)
        rows = self._embed(encoder, samples)
        table = embeddings_table([samples[i] for i in rows.positions], rows)
        num_dropped = len(keys) - table.num_rows
        scores = table["clip_score"].to_numpy()
        return self.commit(
            shard,
            output,
            {"embeddings": ("parquet", table_to_bytes(table))},
            started_at=started_at,
            num_in=len(keys),
            num_kept=table.num_rows,
            dropped={"undecodable": num_dropped} if num_dropped else {},
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

    def _encoder_for(self, weights: File) -> Encoder:
        """Load the model on the first shard; later shards of the same weights find it loaded."""
        if self._encoder is None or self._encoder.weights_sha256 != weights.sha256:
            self._encoder = None
            with checked_copy(self.root, weights) as path:
                self._encoder = Encoder(str(path), weights.sha256, self.config)
        return self._encoder

    def _selected(self, shard: Shard, keys: Sequence[str]) -> list[Sample]:
        """Read the selected samples in the order of the tar."""
        wanted = frozenset(keys)
        samples = list(read_tar(shard.inputs["images"].read(self.root), keys=wanted))
        found = {sample.key for sample in samples}
        if len(wanted) != len(keys) or len(samples) != len(found) or found != wanted:
            missing = sorted(wanted - found)
            raise IntegrityError(
                f"embed shard {shard.index} ({self.uri(shard.inputs['images'])}): the selection keeps {len(keys)} "
                f"samples ({len(wanted)} distinct keys), the tar has {len(samples)} of them; first missing: "
                f"{missing[:1] or 'none'}; run filter again with --force"
            )
        return samples

    def _embed(self, encoder: Encoder, samples: Sequence[Sample]) -> Rows:
        text = encoder.encode_captions([sample.caption for sample in samples])
        positions: list[int] = []
        images: list[FloatArray] = []
        for done, (batch_positions, embeddings) in enumerate(encoder.encode_images(samples), start=1):
            positions.extend(batch_positions)
            images.append(embeddings)
            num_done = min(done * self.config.batch_size, len(samples))
            self.report(Progress(done=num_done, total=len(samples), unit="images"))
        image = np.concatenate([np.zeros((0, encoder.dim), np.float32), *images])
        return Rows(positions, image, text[positions])


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
        ShardError: if an embedding is not finite.
    """
    if not len(samples) == len(rows.image) == len(rows.text):
        raise IntegrityError(
            f"{len(samples)} samples, {len(rows.image)} image and {len(rows.text)} text embeddings; this is a bug"
        )
    for kind, values in (("image", rows.image), ("text", rows.text)):
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            key = samples[int(np.argmin(finite))].key
            raise ShardError(f"{kind} embedding of sample '{key}' is not finite; set embed.precision to bf16 or fp32")
    return pa.table(
        {
            "key": pa.array([sample.key for sample in samples], pa.string()),
            "caption": pa.array([sample.caption for sample in samples], pa.string()),
            "image_embedding": embedding_array(rows.image),
            "text_embedding": embedding_array(rows.text),
            "clip_score": pa.array((rows.image * rows.text).sum(axis=1), pa.float32()),
        }
    )


class Encoder:
    """A CLIP on its device, checked against its golden embeddings.

    Args:
        path: local weights file, written by the clip stage.
        weights_sha256: its checksum.
        config: precision, batch size and threads.

    Raises:
        ConfigError: if a GPU is asked for and there is none.
        IntegrityError: if the model does not reproduce its golden embeddings here.
    """

    def __init__(self, path: str, weights_sha256: str, config: EmbedConfig) -> None:
        import torch

        from unclip_models.checkpoint import read_metadata
        from unclip_models.clip import ClipModel

        on_gpu = config.num_gpus > 0
        if on_gpu and not torch.cuda.is_available():
            raise ConfigError(
                f"embed.num_gpus: {config.num_gpus:g}, but no GPU is visible to the worker; set it to 0 to use the CPU"
            )
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.weights_sha256 = weights_sha256
        self.config = config
        self.precision = config.precision if on_gpu else "fp32"
        self.clip: ClipModel = ClipModel.load(path, self.device)
        self.dim = self.clip.embedding_dim
        check_golden(
            self.clip,
            read_metadata(path),
            place=path,
            precisions=tuple(dict.fromkeys(("fp32", self.precision))),
            autocast=self._autocast,
        )

    def encode_captions(self, captions: Sequence[str]) -> FloatArray:
        """Embed captions, each distinct one once: unit-norm float32 ``(n, D)``."""
        distinct = sorted(set(captions))
        parts = [np.zeros((0, self.dim), np.float32)]
        for start in range(0, len(distinct), self.config.batch_size):
            tokens = self.clip.tokenize(distinct[start : start + self.config.batch_size])
            with self._autocast(self.precision):
                parts.append(self.clip.encode_text(tokens.to(self.device)).float().cpu().numpy())
        place = {caption: i for i, caption in enumerate(distinct)}
        return np.concatenate(parts)[[place[caption] for caption in captions]]

    def encode_images(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], FloatArray]]:
        """Embed images batch by batch, in order.

        Yields:
            Positions of the decodable samples of the batch, and their embeddings, unit-norm float32 ``(b, D)``.
        """
        size, threads = self.config.batch_size, self.config.num_decode_threads
        with ThreadPoolExecutor(threads, "unclip-decode") as pool:
            waiting: deque[Future[tuple[list[int], torch.Tensor]]] = deque()
            try:
                # One batch more than there are threads is in flight, so that none waits for the model.
                for start in range(0, len(samples), size):
                    waiting.append(pool.submit(_decode_batch, samples, start, size, self.clip.preprocess_config))
                    if len(waiting) > threads:
                        yield self._encode(*waiting.popleft().result())
                while waiting:
                    yield self._encode(*waiting.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _encode(self, positions: list[int], pixels: torch.Tensor) -> tuple[list[int], FloatArray]:
        if not positions:
            return positions, np.zeros((0, self.dim), np.float32)
        with self._autocast(self.precision):
            embeddings = self.clip.encode_image(pixels.to(self.device, non_blocking=True))
        return positions, np.asarray(embeddings.float().cpu().numpy())

    def _autocast(self, precision: str) -> contextlib.AbstractContextManager[Any]:
        import torch

        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def decode_image(data: bytes) -> npt.NDArray[np.uint8] | None:
    """Decode an image file to RGB, uint8 ``(3, H, W)``, its EXIF orientation ignored; None if that is impossible."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    except _UNDECODABLE:
        return None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decode_batch(
    samples: Sequence[Sample], start: int, size: int, preprocess: ClipPreprocess
) -> tuple[list[int], torch.Tensor]:
    """Decode and resize samples ``start .. start + size - 1``; runs in a background thread.

    Returns:
        Positions of the decodable ones, and their pixels, uint8 ``(b, 3, S, S)``: resized and cropped, but not yet
        normalised, so that few bytes go to the GPU.
    """
    import torch

    from unclip_models.clip import preprocess_images

    only_resize = replace(preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    positions: list[int] = []
    pixels: list[torch.Tensor] = []
    for position in range(start, min(start + size, len(samples))):
        image = decode_image(samples[position].image)
        if image is not None:
            positions.append(position)
            resized = preprocess_images(torch.from_numpy(image)[None], only_resize)
            pixels.append(resized.mul_(255).round_().to(torch.uint8))
    side = preprocess.image_size
    return positions, torch.cat(pixels) if pixels else torch.zeros(0, 3, side, side, dtype=torch.uint8)
