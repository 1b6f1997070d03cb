"""What the report shows, read from the files that finished stages name: distributions, curves, images."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from PIL import Image

from stages import storage
from stages.manifest import Manifest, ShardRecord
from stages.metrics import last_picture, read_metrics
from stages.samples import Sample, embeddings_of, kept_keys, read_tar, table_from_bytes
from stages.validation_config import LOSS as VALIDATION_LOSS

Array = npt.NDArray[np.float64]

MAX_SHARDS = 24  # of a stage that distributions are taken from; enough rows, whatever the size of the data set
MAX_PAIRS = 512  # image-caption pairs on which the CLIP is probed
MAX_IMAGES = 48
MAX_IMAGE_PX = 256
NUM_BINS, MIN_BINS = 24, 8


@dataclass(frozen=True, kw_only=True)
class Distributions:
    """Values of the downloaded samples, and of those among them that the pipeline kept.

    Attributes:
        num_shards: shards the values are from.
        num_all_shards: shards there are.
        caption_lengths: characters: of all, of the kept.
        sides: shorter side of the image as it was served, px: of all, of the kept.
    """

    num_shards: int
    num_all_shards: int
    caption_lengths: tuple[Array, Array]
    sides: tuple[Array, Array]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How well CLIP tells matching captions from others, on real pairs with different captions.

    Attributes:
        num_pairs: pairs used.
        recall_at_1: fraction of images whose own caption is the closest of all.
        recall_at_5: fraction of images whose own caption is among the five closest.
        matched: cosine of every image with its own caption.
        mismatched: cosines of images with other captions.
    """

    num_pairs: int
    recall_at_1: float
    recall_at_5: float
    matched: Array
    mismatched: Array


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """A generated image for the page.

    Attributes:
        sample: the published image.
        judged: its row of the evaluation's table, if it was judged.
    """

    sample: Sample
    judged: Mapping[str, Any] | None


def spread(records: Sequence[ShardRecord], limit: int) -> list[ShardRecord]:
    """Choose at most ``limit`` records, evenly over the stage."""
    if len(records) <= limit:
        return list(records)
    return [records[i * len(records) // limit] for i in range(limit)]


def distributions(manifests: Mapping[str, Manifest]) -> Distributions | None:
    """Read captions and sizes of downloaded samples; None before ``download`` has finished."""
    download = manifests.get("download")
    if download is None or not download.records:
        return None
    selecting = next((manifests[name] for name in ("curate", "filter") if name in manifests), None)
    selections = _selections(selecting) if selecting is not None else {}
    chosen = spread(download.records, MAX_SHARDS)
    lengths: list[list[float]] = [[], []]
    sides: list[list[float]] = [[], []]
    for record in chosen:
        rows = table_from_bytes(record.files["table"].read(download.root)).to_pylist()
        kept = _kept(selections.get(record.files["images"].sha256), selecting)
        for row in rows:
            if row["status"] != "success":
                continue
            width, height = (row.get(f"original_{side}") or row[side] for side in ("width", "height"))
            for group in (0, 1) if row["key"] in kept else (0,):
                lengths[group].append(len(row["caption"] or ""))
                sides[group].append(min(width, height))
    return Distributions(
        num_shards=len(chosen),
        num_all_shards=len(download.records),
        caption_lengths=(np.array(lengths[0]), np.array(lengths[1])),
        sides=(np.array(sides[0]), np.array(sides[1])),
    )


def _selections(manifest: Manifest) -> dict[str, ShardRecord]:
    """Index a selecting stage by the content of the images its shards are about."""
    return {record.inputs["images"].sha256: record for record in manifest.records}


def _kept(record: ShardRecord | None, selecting: Manifest | None) -> frozenset[str]:
    if record is None or selecting is None:
        return frozenset()
    return frozenset(kept_keys(table_from_bytes(record.files["selection"].read(selecting.root), ["key", "kept"])))


def clip_scores(manifests: Mapping[str, Manifest]) -> tuple[Array, Array] | None:
    """Read the CLIP scores of embedded samples: of all, and of those kept; None before ``curate`` has finished."""
    curate = manifests.get("curate")
    if curate is None:
        return None
    every: list[Array] = []
    kept: list[Array] = []
    for record in spread(curate.records, MAX_SHARDS):
        table = table_from_bytes(record.files["selection"].read(curate.root))
        if "clip_score" not in table.column_names:
            return None
        scores = np.asarray(table["clip_score"].to_numpy(), np.float64)
        every.append(scores)
        kept.append(scores[np.asarray(table["kept"].to_numpy())])
    return (np.concatenate(every), np.concatenate(kept)) if every else None


def probe_clip(manifests: Mapping[str, Manifest]) -> Probe | None:
    """Match images with captions by their embeddings; None before ``curate`` has finished, or with too few captions."""
    curate = manifests.get("curate")
    if curate is None:
        return None
    images: list[Array] = []
    texts: list[Array] = []
    seen: set[str] = set()
    for record in spread(curate.records, MAX_SHARDS):
        table = table_from_bytes(record.inputs["embeddings"].read(curate.root))
        selection = table_from_bytes(record.files["selection"].read(curate.root), ["key", "kept"])
        table = table.filter(pc.is_in(table["key"], pc.filter(selection["key"], selection["kept"]).combine_chunks()))
        z_i, z_t = (embeddings_of(table, name).astype(np.float64) for name in ("image_embedding", "text_embedding"))
        for i, caption in enumerate(table["caption"].to_pylist()):
            if caption not in seen and len(seen) < MAX_PAIRS:
                seen.add(caption)
                images.append(z_i[i])
                texts.append(z_t[i])
    if len(seen) < 6:
        return None
    cosines = np.stack(images) @ np.stack(texts).T
    matched = np.diagonal(cosines)
    rank = (cosines > matched[:, None]).sum(axis=1)
    return Probe(
        num_pairs=len(matched),
        recall_at_1=float((rank < 1).mean()),
        recall_at_5=float((rank < 5).mean()),
        matched=matched,
        mismatched=cosines[~np.eye(len(matched), dtype=bool)],
    )


def bins(groups: Sequence[Array], *, whole: bool = False) -> tuple[list[float], list[list[int]]]:
    """Count values in shared bins.

    Args:
        groups: sets of values, at least one value in all.
        whole: whether values are whole numbers, which bins must not cut unevenly.

    Returns:
        Bin edges, and the counts of every group.
    """
    values = np.concatenate(groups)
    low, high = float(values.min()), float(values.max())
    if whole:
        width = max(1, int(np.ceil((high - low + 1) / NUM_BINS)))
        room = max(0, MIN_BINS - int(high - low) // width)  # a single value should not fill the whole chart
        low, high = low - width * (room // 2), high + width * (room // 2)
        edges = np.arange(low, high + width + 0.5, width) - 0.5
    else:
        half = 0.5 if low == high else 0.0
        edges = np.linspace(low - half, high + half, NUM_BINS + 1)
    return edges.tolist(), [np.histogram(group, edges)[0].tolist() for group in groups]


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What a training wrote down of itself: points ``(step, value)``, those that are not finite left out.

    Attributes:
        loss: on the samples trained on.
        validation_loss: on samples held out, with fixed noise.
        picture: its last grid of samples: after which step, and PNG; None if it drew none, or the grid is gone.
    """

    loss: Sequence[tuple[float, float]]
    validation_loss: Sequence[tuple[float, float]] = ()
    picture: tuple[int, bytes] | None = None


def learning(manifest: Manifest) -> Learning | None:
    """Read what a training wrote down of itself; None if it keeps nothing."""
    for record in manifest.records:
        if "metrics" in record.files:
            file = record.files["metrics"]
            rows = read_metrics(file.read(manifest.root))
            folder = storage.join(manifest.root, file.path.rpartition("/")[0], record.shard_id)
            return Learning(
                loss=_points(rows, "loss"),
                validation_loss=_points(rows, VALIDATION_LOSS),
                picture=last_picture(folder),
            )
    return None


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


@dataclass(frozen=True, kw_only=True)
class Fetching:
    """How the network and the hosts did while a data set was downloaded, over the shards that asked any.

    Attributes:
        attempts: of rows, retries among them.
        retries: attempts after the first.
        hosts: shard by shard, so one that several shards ask counts as often.
        hosts_down: given up because they could not be reached.
        hosts_busy: given up because of the pauses they asked for.
        pauses_s: that hosts asked for and were granted.
        lookups: of names.
        failed_lookups: those without an address.
        median_lookup_s: half of the shards had a median below this.
        worst_lookup_s: the slowest of all.
    """

    attempts: int
    retries: int
    hosts: int
    hosts_down: int
    hosts_busy: int
    pauses_s: float
    lookups: int
    failed_lookups: int
    median_lookup_s: float
    worst_lookup_s: float


def fetching(download: Manifest) -> Fetching | None:
    """Add up what the records of shards say of the network; None if no shard asked any host."""
    shards = [record.metrics for record in download.records if record.metrics.get("attempts")]
    if not shards:
        return None

    def total(name: str) -> float:
        return float(sum(shard.get(name, 0) for shard in shards))

    return Fetching(
        attempts=int(total("attempts")),
        retries=int(total("retries")),
        hosts=int(total("hosts")),
        hosts_down=int(total("hosts_down")),
        hosts_busy=int(total("hosts_busy")),
        pauses_s=total("host_pauses_s"),
        lookups=int(total("dns_lookups")),
        failed_lookups=int(total("dns_failures")),
        median_lookup_s=float(np.median([shard.get("dns_median_s", 0.0) for shard in shards])),
        worst_lookup_s=max(shard.get("dns_worst_s", 0.0) for shard in shards),
    )


def spectrum(manifest: Manifest) -> Array:
    """Return each principal axis's share of the variance, decreasing ``(D,)``."""
    if "spectrum" in manifest.metrics:
        return np.asarray(manifest.metrics["spectrum"], np.float64)
    from safetensors.numpy import load

    eigenvalues = np.asarray(load(manifest.files["pca"].read(manifest.root))["eigenvalues"], np.float64)
    return cast(Array, eigenvalues / eigenvalues.sum())


def shown_images(manifests: Mapping[str, Manifest]) -> list[ShownImage]:
    """Read some generated images, evenly over all, with what the evaluation says of them."""
    generate = manifests.get("generate")
    if generate is None:
        return []
    judged = _judged(manifests["evaluate"]) if "evaluate" in manifests else {}
    samples = list(_some_samples(generate))
    return [ShownImage(sample=sample, judged=judged.get(sample.key)) for sample in samples]


def _some_samples(generate: Manifest) -> Iterator[Sample]:
    """Yield ``MAX_IMAGES`` samples, evenly spread, reading only the shards they are in."""
    total = generate.num_kept
    count = min(total, MAX_IMAGES)
    wanted = {i * total // count for i in range(count)}
    start = 0
    for record in generate.records:
        if wanted & set(range(start, start + record.num_kept)):
            for i, sample in enumerate(read_tar(record.files["images"].read(generate.root))):
                if start + i in wanted:
                    yield sample
        start += record.num_kept


def _judged(evaluate: Manifest) -> dict[str, dict[str, Any]]:
    rows = [
        row
        for record in evaluate.records
        if "table" in record.files
        for row in table_from_bytes(record.files["table"].read(evaluate.root)).to_pylist()
    ]
    return {row["key"]: row for row in rows if row["set"] == "generated"}


def page_image(data: bytes) -> tuple[bytes, str, int]:
    """Prepare an image for the page: as it is when small, shrunk when large.

    Returns:
        The encoded image, its media type, and its side in px.
    """
    with Image.open(io.BytesIO(data)) as image:
        side = max(image.size)
        if side <= MAX_IMAGE_PX:
            return data, f"image/{(image.format or 'png').lower()}", side
        small = image.convert("RGB")
    small.thumbnail((MAX_IMAGE_PX, MAX_IMAGE_PX), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=88)
    return sink.getvalue(), "image/jpeg", MAX_IMAGE_PX
