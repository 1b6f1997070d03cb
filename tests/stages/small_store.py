"""A small finished run, written with the contract's own tools: real shapes, a real (untrained) CLIP, real models.

Only the stages under test are run; those before them are published here in the layout of their contract.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.numpy import save
from torch import nn

from stages import shapes, storage
from stages.base import Stage
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import File, Manifest, ShardRecord, digest_of
from stages.runner import run_stage
from stages.samples import Sample, embedding_array, selection_table, table_to_bytes, write_tar
from unclip_models.checkpoint import build, save_model
from unclip_models.clip import ClipModel
from unclip_models.settings import (
    ClipModelConfig,
    DecoderConfig,
    DiffusionConfig,
    DiffusionPriorConfig,
    TextEncoderConfig,
    UNetConfig,
    UpsamplerConfig,
)

EMBEDDING_DIM, CONTEXT_LENGTH, IMAGE_SIZE_PX = 16, 16, 32
SHAPES = shapes.ShapesConfig(num_images=10_000, image_size_px=IMAGE_SIZE_PX, noise_levels=2.0)
TEXT = TextEncoderConfig(context_length=CONTEXT_LENGTH, width=16, layers=1, heads=2)
CLIP = ClipModelConfig(
    embedding_dim=EMBEDDING_DIM,
    context_length=CONTEXT_LENGTH,
    vision_width=32,
    vision_layers=1,
    vision_heads=2,
    text_width=32,
    text_layers=1,
    text_heads=2,
)
PROCESS = DiffusionConfig(num_timesteps=12)


def unet(**values: Any) -> UNetConfig:
    return UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, **values)


GENERATORS = {
    "prior": DiffusionPriorConfig(
        embedding_dim=EMBEDDING_DIM,
        text=TEXT,
        width=16,
        layers=1,
        heads=2,
        diffusion=DiffusionConfig(num_timesteps=12, prediction="x_start"),
    ),
    "decoder": DecoderConfig(
        image_size=8,
        embedding_dim=EMBEDDING_DIM,
        text=TEXT,
        unet=unet(attention_resolutions=(4,)),
        diffusion=DiffusionConfig(num_timesteps=12, variance="learned_range"),
    ),
    "upsampler_256": UpsamplerConfig(image_size=16, input_size=8, crop_fraction=1.0, unet=unet(), diffusion=PROCESS),
    "upsampler_1024": UpsamplerConfig(image_size=32, input_size=16, crop_fraction=1.0, unet=unet(), diffusion=PROCESS),
}


class Given(Stage[None]):
    """A stage whose output is published by hand."""

    def __init__(self, name: str, root: str) -> None:
        super().__init__(None, root=root)
        self.name = name  # type: ignore[misc]

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Any]:
        return []

    def process(self, shard: Any, output: str) -> ShardRecord:
        raise NotImplementedError

    def record(self, index: int, files: Mapping[str, Any], inputs: Mapping[str, File], **counts: Any) -> ShardRecord:
        contents = [content for _, content in files.values()]
        hashes = [digest_of(content.hex()) for content in contents if isinstance(content, bytes)]
        shard = self.shard(index, inputs=inputs, place=index, contents=hashes)
        return self.commit(
            shard, storage.join(self.root, self.name, "shards"), files, started_at=time.monotonic(), **counts
        )

    def manifest(self, records: Sequence[ShardRecord], upstream: Sequence[Manifest] = (), **fields: Any) -> Manifest:
        values: dict[str, Any] = {"config": {}, "created_at": "2026-01-01T00:00:00+00:00", "wall_time_s": 12.5} | fields
        found = Manifest(
            root=self.root,
            stage=self.name,
            version=1,
            fingerprint=self.fingerprint({}),
            inputs={m.stage: {"fingerprint": m.fingerprint, "digest": m.digest} for m in upstream},
            records=tuple(records),
            **values,
        )
        found.write()
        return found


def run(stage: Stage[Any], inputs: Mapping[str, Manifest]) -> Manifest:
    """Run a real stage to its end."""
    fingerprint = stage.fingerprint({name: manifest.fingerprint for name, manifest in inputs.items()})
    used = {name: inputs[name] for name in stage.upstream}
    return run_stage(stage, fingerprint, used, LocalExecutor(), ClusterConfig(backoff_s=0.0, max_attempts=1))


def small_clip() -> ClipModel:
    torch.manual_seed(0)
    return ClipModel.from_config(CLIP).freeze()


def seeded_model(name: str) -> nn.Module:
    """Build an untrained model in which no layer is zero, so that every input shows in the output."""
    torch.manual_seed(1)
    model = build(GENERATORS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


def publish_weights(
    root: str, curve: Sequence[Mapping[str, Any]] = (), grids: Mapping[str, bytes] | None = None
) -> dict[str, Manifest]:
    """Publish untrained weights of every model.

    Args:
        root: the store.
        curve: the metrics of each training.
        grids: name of a training -> the PNG it drew after step 7.
    """
    found: dict[str, Manifest] = {}
    lines = "".join(json.dumps(row) + "\n" for row in curve).encode()
    for name in ("clip", *GENERATORS):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.safetensors"
            small_clip().save(path) if name == "clip" else save_model(seeded_model(name), path)
            stage = Given(name, root)
            files: dict[str, Any] = {"weights": ("safetensors", path)}
            if name != "clip" and lines:
                files["metrics"] = ("metrics.jsonl", lines)
            record = stage.record(0, files, {})
        if grids and name in grids:
            folder = record.files["metrics"].path.removesuffix(".metrics.jsonl")
            storage.write_bytes(storage.join(root, folder, "samples", "step-000007.png"), grids[name])
        found[name] = stage.manifest([record], metrics={"embedding_dim": EMBEDDING_DIM} if name == "clip" else {})
    return found


def sample_of(index: int) -> Sample:
    """Render row ``index`` of the shapes as a sample."""
    picture = shapes.picture_of(SHAPES, index)
    sink = io.BytesIO()
    Image.fromarray(shapes.render(picture, IMAGE_SIZE_PX, SHAPES.noise_levels)).save(sink, "PNG")
    return Sample(key=f"{index:010x}", image=sink.getvalue(), extension="png", caption=picture.caption)


def embed(clip: ClipModel, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Embed the images and the captions of samples: two float32 ``(n, D)``."""
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(sample.image))) for sample in samples])
    images = clip.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return images.numpy(), clip.encode_text(clip.tokenize([sample.caption for sample in samples])).numpy()


def publish_data(root: str, num_shards: int = 2, num_rows: int = 20, drop_every: int = 5) -> dict[str, Manifest]:
    """Publish download, filter, embed and curate of shapes; every ``drop_every``-th row is dropped by curate."""
    stages = {name: Given(name, root) for name in ("download", "filter", "embed", "curate")}
    records: dict[str, list[ShardRecord]] = {name: [] for name in stages}
    clip = small_clip()
    for i in range(num_shards):
        samples = [sample_of(i * num_rows + j) for j in range(num_rows)]
        keys = [sample.key for sample in samples]
        tables = {"images": ("tar", write_tar(samples)), "table": ("parquet", table_to_bytes(_rows(samples)))}
        download = stages["download"].record(
            i, tables, {}, num_in=num_rows + 2, num_kept=num_rows, dropped={"http_404": 1, "timeout": 1}
        )
        chosen = {"selection": ("parquet", table_to_bytes(selection_table(keys, [None] * num_rows)))}
        kept = stages["filter"].record(i, chosen, download.files, num_in=num_rows, num_kept=num_rows)
        images, texts = embed(clip, samples)
        embeddings = {
            "key": pa.array(keys),
            "caption": pa.array([sample.caption for sample in samples]),
            "image_embedding": embedding_array(images),
            "text_embedding": embedding_array(texts),
            "clip_score": pa.array((images * texts).sum(axis=1), pa.float32()),
        }
        inputs = {"images": download.files["images"], "selection": kept.files["selection"]}
        made = {"embeddings": ("parquet", table_to_bytes(pa.table(embeddings)))}
        embedded = stages["embed"].record(i, made, inputs, num_in=num_rows, num_kept=num_rows)
        reasons = ["low_clip_score" if j % drop_every == 0 else None for j in range(num_rows)]
        num_dropped = sum(reason is not None for reason in reasons)
        records["download"].append(download)
        records["filter"].append(kept)
        records["embed"].append(embedded)
        records["curate"].append(
            stages["curate"].record(
                i,
                {"selection": ("parquet", table_to_bytes(selection_table(keys, reasons)))},
                {"images": download.files["images"], "embeddings": embedded.files["embeddings"]},
                num_in=num_rows,
                num_kept=num_rows - num_dropped,
                dropped={"low_clip_score": num_dropped},
            )
        )
    return {name: stages[name].manifest(records[name]) for name in stages}


def _rows(samples: Sequence[Sample]) -> pa.Table:
    """Build the table of a downloaded shard: its samples, and two rows that failed."""
    num = len(samples)
    return pa.table(
        {
            "key": pa.array([sample.key for sample in samples] + ["f0", "f1"]),
            "caption": pa.array([sample.caption for sample in samples] + ["a lost image", "another one"]),
            "status": pa.array(["success"] * num + ["failed"] * 2),
            "reason": pa.array([None] * num + ["http_404", "timeout"]),
            "width": pa.array([IMAGE_SIZE_PX] * num + [None] * 2, pa.int64()),
            "height": pa.array([IMAGE_SIZE_PX] * num + [None] * 2, pa.int64()),
        }
    )


def publish_generated(root: str, samples: Sequence[Sample]) -> Manifest:
    """Publish given images as if a perfect (or wilfully wrong) stack had generated them."""
    stage = Given("generate", root)
    keyed = [
        Sample(key=f"{i:08d}", image=s.image, extension="png", caption=s.caption, metadata={"seed": i})
        for i, s in enumerate(samples)
    ]
    table = pa.table({"key": [s.key for s in keyed], "caption": [s.caption for s in keyed], "seed": range(len(keyed))})
    files = {"images": ("tar", write_tar(keyed)), "table": ("parquet", table_to_bytes(table))}
    return stage.manifest([stage.record(0, files, {}, num_in=len(keyed), num_kept=len(keyed))])


def publish_pca(root: str, num_components: int = 6) -> Manifest:
    """Publish a PCA with a geometric spectrum."""
    eigenvalues = np.array([0.5 * 0.6**i for i in range(EMBEDDING_DIM)])
    tensors = {
        "mean": np.zeros(EMBEDDING_DIM, np.float32),
        "axes": np.eye(EMBEDDING_DIM, dtype=np.float32)[:num_components],
        "eigenvalues": eigenvalues,
    }
    stage = Given("pca", root)
    file = stage.publish(storage.join(root, "pca", "given", "pca.safetensors"), save(tensors))
    return stage.manifest([], files={"pca": file}, metrics={"num_components": num_components, "effective_rank": 3.1})


def loss_curve(num_steps: int = 120) -> list[dict[str, Any]]:
    """Make a plausible noisy loss curve."""
    noise = np.random.default_rng(0).normal(0, 0.05, num_steps)
    return [
        {"step": step, "loss": (0.05 + math.exp(-step / 30)) * math.exp(noise[step - 1])}
        | ({"validation_loss": 0.06 + math.exp(-step / 30)} if step % 40 == 0 else {})
        for step in range(1, num_steps + 1)
    ]
