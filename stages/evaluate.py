"""Judge the generated images: distances to real ones on CLIP features, agreement with their captions, and the gate.

Every number is given together with the same number for real images the distances were not fitted on (``real_...``): the
floor or ceiling that a perfect generator would reach, with as few images where ``num_real`` is at least twice what is
generated. The caption accuracy is read from pixels alone by ``stages/pixel_check.py``, which shares nothing with CLIP
or the generators; it needs captions of coloured shapes.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from stages import pixel_check
from stages.base import Progress, Resources, Result, Shard, Stage, setting
from stages.distances import (
    effective_number,
    frechet_distance,
    kernel_distance,
    manifold_scores,
    mean_pairwise_distance,
    nearest,
)
from stages.errors import InputError
from stages.manifest import Manifest, ShardRecord
from stages.samples import Sample, embeddings_of, kept_keys, read_tar, table_from_bytes, table_to_bytes
from stages.weights import checked_copy, weights_of

Features = npt.NDArray[np.float64]
QUESTIONS = ("foreground", "background", "shape", "colours", "all")
_Z_95 = 1.959964  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Thresholds that new models must meet to be promoted; a threshold of null is not checked."""

    max_frechet_distance: float | None = setting(None, "largest Frechet distance on CLIP features", affects="stage")
    max_kernel_distance: float | None = setting(None, "largest KID on CLIP features", affects="stage")
    min_clip_score: float | None = setting(None, "smallest mean cosine of image and caption", affects="stage")
    min_precision: float | None = setting(None, "smallest precision, 0 to 1", affects="stage")
    min_recall: float | None = setting(None, "smallest recall, 0 to 1", affects="stage")
    min_caption_accuracy: float | None = setting(
        None, "smallest fraction of images that show all of their caption, 0 to 1", affects="stage"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the generated images are judged."""

    num_real: int = setting(10_000, "real images to compare with, at most")
    num_neighbours: int = setting(3, "neighbours that bound the manifolds of precision and recall")
    gate: GateConfig = setting(factory=GateConfig, help="thresholds for promotion", affects="stage")
    batch_size: int = setting(256, "images embedded at once", affects="nothing")
    num_cpus: float = setting(1.0, "CPU cores", affects="nothing")
    num_gpus: float = setting(0.0, "GPUs", affects="nothing")

    def __post_init__(self) -> None:
        if self.num_neighbours < 1:
            raise ValueError(f"num_neighbours: {self.num_neighbours} is below 1; the papers use 3 to 5")
        if self.num_real < 2 * self.min_images:
            raise ValueError(f"num_real: {self.num_real} is too few; write {2 * self.min_images} or more")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} is below 1; write for example 256")

    @property
    def min_images(self) -> int:
        """Images that a set needs for every metric to be defined."""
        return max(3, self.num_neighbours + 1)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images to be judged, or to judge by.

    Attributes:
        keys: one per image.
        captions: one per image.
        features: CLIP image embeddings, unit-norm up to half precision, ``(n, D)``.
        clip_scores: cosine of each image with its own caption ``(n,)``.
    """

    keys: Sequence[str]
    captions: Sequence[str]
    features: Features
    clip_scores: Features

    def take(self, rows: npt.NDArray[np.int64]) -> ImageSet:
        """Return the images at ``rows``, in that order."""
        return ImageSet(
            keys=[self.keys[row] for row in rows],
            captions=[self.captions[row] for row in rows],
            features=self.features[rows],
            clip_scores=self.clip_scores[rows],
        )


@dataclass(frozen=True, kw_only=True)
class PixelReading:
    """What the pixel check says of one image, beside its caption.

    Attributes:
        shown: what the image shows; words that cannot be told are ``pixel_check.UNKNOWN``.
        right: question -> whether the image answers it as its caption does.
    """

    shown: pixel_check.Reading
    right: Mapping[str, bool]


class Evaluate(Stage[EvaluateConfig]):
    """Generated and real images -> metrics and a verdict; see the module's docstring."""

    name: ClassVar[str] = "evaluate"
    uses_seed: ClassVar[bool] = True

    @property
    def upstream(self) -> tuple[str, ...]:
        """The images, what they are compared with, and the eye that compares."""
        return ("generate", "curate", "clip")

    @property
    def resources(self) -> Resources:
        """See ``EvaluateConfig``."""
        return Resources(num_cpus=self.config.num_cpus, num_gpus=self.config.num_gpus)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Plan the one shard: all generated images, and shards of real ones up to ``num_real`` images."""
        self._refuse_too_few(inputs)
        files = {"weights": weights_of(inputs["clip"])}
        for i, record in enumerate(inputs["generate"].records):
            files[f"generated#{i}"] = record.files["images"]
        for i, record in enumerate(self._choose_real(inputs["curate"].records)):
            files[f"images#{i}"] = record.inputs["images"]
            files[f"embeddings#{i}"] = record.inputs["embeddings"]
            files[f"selection#{i}"] = record.files["selection"]
        return [self.shard(0, inputs=files)]

    def _refuse_too_few(self, inputs: Mapping[str, Manifest]) -> None:
        needed = self.config.min_images
        if (found := inputs["generate"].num_kept) < needed:
            raise InputError(f"evaluate: {found} generated images, {needed} are needed; raise generate.num_samples")
        if (found := inputs["curate"].num_kept) < 2 * needed:
            raise InputError(f"evaluate: curate kept {found} samples, {2 * needed} are needed; loosen its thresholds")

    def _choose_real(self, records: Sequence[ShardRecord]) -> list[ShardRecord]:
        """Take whole shards in random order until they hold enough images; reading a few of all would read all."""
        chosen: list[ShardRecord] = []
        num_images = 0
        for i in np.random.default_rng(self.seed).permutation(len(records)):
            if num_images >= self.config.num_real:
                break
            if records[i].num_kept:
                chosen.append(records[i])
                num_images += records[i].num_kept
        return chosen

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Measure everything."""
        started_at = time.monotonic()
        generated, images = self._generated(shard)
        reference, control = self._real(shard, num_generated=len(generated.keys))
        read_generated = read_all(generated, images)
        read_control = read_all(control, self._images_of(shard, control)) if read_generated else {}
        metrics = measure(reference, control, generated, num_neighbours=self.config.num_neighbours)
        metrics |= caption_accuracy(read_generated.values())
        metrics |= {f"real_{name}": value for name, value in caption_accuracy(read_control.values()).items()}
        tables = [
            _table("generated", generated, read_generated, reference),
            _table("real", control, read_control, reference),
        ]
        files = {
            "metrics": ("metrics.json", json.dumps(metrics, indent=1, sort_keys=True).encode()),
            "table": ("parquet", table_to_bytes(pa.concat_tables(tables))),
        }
        num = len(generated.keys)
        return self.commit(shard, output, files, started_at=started_at, num_in=num, num_kept=num)

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Hold the metrics against the gate. A failed gate does not fail the stage: promotion asks for it later."""
        metrics = json.loads(records[0].files["metrics"].read(self.root))
        return Result(records=records, metrics={**metrics, "gate": judge(metrics, self.config.gate)})

    # ---- reading --------------------------------------------------------------------------------------------------

    def _generated(self, shard: Shard) -> tuple[ImageSet, dict[str, npt.NDArray[np.uint8]]]:
        """Read and embed the generated images."""
        import torch

        from unclip_models.clip import ClipModel

        device = "cuda" if torch.cuda.is_available() else "cpu"
        with checked_copy(self.root, shard.inputs["weights"]) as path:
            clip = ClipModel.load(path, device)
        files = _roles(shard, "generated")
        samples = self._samples_of(shard, files)
        image_parts, text_parts = [], []
        keys, captions = list[str](), list[str]()
        images: dict[str, npt.NDArray[np.uint8]] = {}
        while part := list(itertools.islice(samples, self.config.batch_size)):
            pixels = [_pixels(sample.image) for sample in part]
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
            image_parts.append(clip.encode_image(batch.to(device)).cpu().numpy())
            text_parts.append(clip.encode_text(clip.tokenize([sample.caption for sample in part])).cpu().numpy())
            keys += [sample.key for sample in part]
            captions += [sample.caption for sample in part]
            # Those of which pixels can tell something: tens of thousands of large images would not fit.
            images |= {s.key: p for s, p in zip(part, pixels, strict=True) if pixel_check.parse_caption(s.caption)}
        # Rounded as the real images' embeddings are, which come from the embed stage in half precision.
        features = np.concatenate(image_parts).astype(np.float16).astype(np.float64)
        texts = np.concatenate(text_parts).astype(np.float16).astype(np.float64)
        found = ImageSet(
            keys=keys,
            captions=captions,
            features=features,
            clip_scores=np.einsum("nd,nd->n", features, texts),
        )
        return found, images

    def _samples_of(self, shard: Shard, roles: Sequence[str]) -> Iterator[Sample]:
        """Read the tars of some roles one by one."""
        for done, role in enumerate(roles):
            self.report(Progress(done=done, total=len(roles), unit="shards"))
            yield from read_tar(shard.inputs[role].read(self.root))
        self.report(Progress(done=len(roles), total=len(roles), unit="shards"))

    def _real(self, shard: Shard, *, num_generated: int) -> tuple[ImageSet, ImageSet]:
        """Read real images' embeddings; return the reference, and a disjoint control set of the generated's size."""
        parts = [self._kept_embeddings(shard, role) for role in _roles(shard, "embeddings")]
        real = ImageSet(
            keys=[key for part in parts for key in part.keys],
            captions=[caption for part in parts for caption in part.captions],
            features=np.concatenate([part.features for part in parts]),
            clip_scores=np.concatenate([part.clip_scores for part in parts]),
        )
        order = np.random.default_rng(self.seed).permutation(len(real.keys))[: self.config.num_real]
        num_control = min(num_generated, len(order) // 2)
        return real.take(order[num_control:]), real.take(order[:num_control])

    def _kept_embeddings(self, shard: Shard, role: str) -> ImageSet:
        table = table_from_bytes(shard.inputs[role].read(self.root))
        selection = table_from_bytes(shard.inputs[role.replace("embeddings", "selection")].read(self.root))
        table = table.filter(pc.is_in(table["key"], pa.array(kept_keys(selection), pa.string())))
        images, texts = (
            embeddings_of(table, name).astype(np.float64) for name in ("image_embedding", "text_embedding")
        )
        return ImageSet(
            keys=table["key"].to_pylist(),
            captions=table["caption"].to_pylist(),
            features=images,
            clip_scores=np.einsum("nd,nd->n", images, texts),
        )

    def _images_of(self, shard: Shard, wanted: ImageSet) -> dict[str, npt.NDArray[np.uint8]]:
        asked = zip(wanted.keys, wanted.captions, strict=True)
        keys = frozenset(key for key, caption in asked if pixel_check.parse_caption(caption))
        return {
            sample.key: _pixels(sample.image)
            for role in _roles(shard, "images")
            for sample in read_tar(shard.inputs[role].read(self.root), keys=keys)
        }


def measure(reference: ImageSet, control: ImageSet, generated: ImageSet, *, num_neighbours: int) -> dict[str, Any]:
    """Measure generated images, and real ones as control, against reference images.

    Returns:
        Metric -> value of the generated images; ``real_<metric>`` -> of the control; ``num_...`` -> images in each set.
    """
    metrics: dict[str, Any] = {
        "num_generated": len(generated.keys),
        "num_reference": len(reference.keys),
        "num_control": len(control.keys),
    }
    for prefix, images in (("", generated), ("real_", control)):
        kernel = kernel_distance(images.features, reference.features)
        manifold = manifold_scores(reference.features, images.features, num_neighbours=num_neighbours)
        num = len(images.keys)
        values = {
            "frechet_distance": frechet_distance(images.features, reference.features),
            "kernel_distance": kernel.value,
            "kernel_distance_error": kernel.standard_error,
            "clip_score": float(images.clip_scores.mean()),
            "clip_score_error": float(images.clip_scores.std(ddof=1) / math.sqrt(num)),
            **asdict(manifold),
            "diversity": mean_pairwise_distance(images.features),
            "effective_number": effective_number(images.features),
        }
        if (spread := diversity_within_captions(images)) is not None:
            values["diversity_within_captions"] = spread
        metrics |= {f"{prefix}{name}": value for name, value in values.items()}
    return metrics


def diversity_within_captions(images: ImageSet) -> float | None:
    """Return the mean of 1 - cosine over pairs of images of one caption; None where no caption has two.

    It falls where guidance makes all images of a caption alike (unCLIP, Figure 9), which diversity over captions hides.
    """
    groups: dict[str, list[int]] = {}
    for row, caption in enumerate(images.captions):
        groups.setdefault(caption, []).append(row)
    spreads = [mean_pairwise_distance(images.features[rows]) for rows in groups.values() if len(rows) > 1]
    return float(np.mean(spreads)) if spreads else None


def read_all(images: ImageSet, pixels: Mapping[str, npt.NDArray[np.uint8]]) -> dict[str, PixelReading]:
    """Compare images with their captions; key -> reading, without the images whose caption is not one of shapes."""
    asked = zip(images.keys, images.captions, strict=True)
    found = {key: _read(caption, pixels[key]) for key, caption in asked if key in pixels}
    return {key: reading for key, reading in found.items() if reading is not None}


def caption_accuracy(readings: Iterable[PixelReading]) -> dict[str, Any]:
    """Count how often images show what their captions say.

    Returns:
        ``num_checked``; for each of ``QUESTIONS``, ``caption_accuracy_<question>`` and its 95% bounds ``..._low`` and
        ``..._high``. Empty when nothing could be checked.
    """
    checked = list(readings)
    if not checked:
        return {}
    found: dict[str, Any] = {"num_checked": len(checked)}
    for question in QUESTIONS:
        num_right = sum(reading.right[question] for reading in checked)
        name = f"caption_accuracy_{question}"
        low, high = wilson_interval(num_right, len(checked))
        found |= {name: num_right / len(checked), f"{name}_low": low, f"{name}_high": high}
    return found


def wilson_interval(num_right: int, num: int) -> tuple[float, float]:
    """Return the 95% interval of a fraction (Wilson 1927); sensible also near 0 and 1 and for few observations."""
    fraction, z2 = num_right / num, _Z_95**2 / num
    centre = (fraction + z2 / 2) / (1 + z2)
    half = _Z_95 * math.sqrt(fraction * (1 - fraction) / num + z2 / (4 * num)) / (1 + z2)
    # At the ends the bound is exact; the sum above would miss it by rounding.
    return (0.0 if num_right == 0 else centre - half, 1.0 if num_right == num else centre + half)


def judge(metrics: Mapping[str, Any], gate: GateConfig) -> dict[str, Any]:
    """Hold metrics against the thresholds.

    Returns:
        ``passed``; ``num_checked`` thresholds; ``reasons``, one line for each that is not met. A threshold on a metric
        that could not be measured is not met.
    """
    reasons: list[str] = []
    thresholds = {f.name: getattr(gate, f.name) for f in fields(gate) if getattr(gate, f.name) is not None}
    for name, threshold in thresholds.items():
        bound, _, metric = name.partition("_")
        value = metrics.get("caption_accuracy_all" if metric == "caption_accuracy" else metric)
        if value is None:
            reasons.append(f"{metric} was not measured ({name} is {threshold:g})")
        elif not (value <= threshold if bound == "max" else value >= threshold):
            side = "above" if bound == "max" else "below"
            reasons.append(f"{metric} {value:.4g} is {side} {name} {threshold:g}")
    return {"passed": not reasons, "num_checked": len(thresholds), "reasons": reasons}


def _roles(shard: Shard, kind: str) -> list[str]:
    return [role for role in shard.inputs if role.startswith(f"{kind}#")]


def _pixels(data: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _read(caption: str, pixels: npt.NDArray[np.uint8]) -> PixelReading | None:
    """Compare an image with its caption; None if the caption is not one of coloured shapes."""
    asked = pixel_check.parse_caption(caption)
    if asked is None:
        return None
    shown = pixel_check.check(pixels)
    right = {name: getattr(asked, name) == getattr(shown, name) for name in ("foreground", "background", "shape")}
    right["colours"] = right["foreground"] and right["background"]
    right["all"] = right["colours"] and right["shape"]
    return PixelReading(shown=shown, right=right)


def _table(name: str, images: ImageSet, readings: Mapping[str, PixelReading], reference: ImageSet) -> pa.Table:
    """Build the table of a set of judged images; the columns of the pixel check are null where it does not apply."""
    rows, distances = nearest(images.features, reference.features)
    read = [readings.get(key) for key in images.keys]
    columns: dict[str, Any] = {
        "key": pa.array(images.keys, pa.string()),
        "set": pa.array([name] * len(read), pa.string()),
        "caption": pa.array(images.captions, pa.string()),
        "clip_score": pa.array(images.clip_scores, pa.float32()),
        "nearest_key": pa.array([reference.keys[row] for row in rows], pa.string()),
        "nearest_distance": pa.array(distances, pa.float32()),
    }
    for word in ("foreground", "background", "shape"):
        columns[f"shown_{word}"] = pa.array([getattr(r.shown, word) if r else None for r in read], pa.string())
    for question in QUESTIONS:
        columns[f"right_{question}"] = pa.array([r.right[question] if r else None for r in read], pa.bool_())
    return pa.table(columns)
