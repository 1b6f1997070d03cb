"""Filter: which downloaded samples stay, and why the others go. Images are not rewritten.

``process`` only measures (perceptual hash and tones of every image); ``finish`` decides, from the measurements and the
download's table, by the rules of the config. So other thresholds need no image to be read again.

A sample is dropped for the first reason that applies, in the order of ``REASONS``. Of equal or nearly equal images the
earliest in shard order stays; what comes later never removes it, so appended lists leave old selections as they are.
The one exception is meant: an image that turns up under ever more URLs becomes a placeholder, and then all its samples
go.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from stages import storage
from stages.base import Resources, Result, Shard, Stage, setting
from stages.errors import InputError, ShardError, StageError, StorageError
from stages.manifest import Manifest, ShardRecord
from stages.samples import read_tar, selection_table, table_from_bytes, table_to_bytes

REASONS = (
    "too_small",
    "aspect",
    "no_caption",
    "caption_too_short",
    "caption_too_long",
    "caption_blocked",
    "image_blocked",
    "placeholder",
    "duplicate",
    "near_duplicate",
)
HASH_BITS = 64
_HASH_SIDE = 8
_GREY_SIDE_PX = 32
_TONE_SIDE = 4
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Rules on images and captions. Every rule is applied by ``finish``, so the measurements are kept."""

    min_side_px: int = setting(16, "shorter side of the served image, pixels", affects="stage")
    max_aspect: float = setting(4.0, "longer side / shorter side of the served image", affects="stage")
    require_caption: bool = setting(True, "drop samples without a caption", affects="stage")
    min_caption_length: int = setting(1, "characters, outer spaces not counted", affects="stage")
    max_caption_length: int = setting(1000, "characters, outer spaces not counted", affects="stage")
    caption_blocklist: tuple[str, ...] = setting(
        (), "regular expressions; a caption that one of them finds is dropped, case ignored", affects="stage"
    )
    # The file is identified by its content (`external`).
    image_blocklist: str | None = setting(
        None, "text file with the sha256 of one unwanted image file per line", affects="nothing"
    )
    placeholder_min_urls: int | None = setting(
        10, "URLs from which an image counts as a placeholder; null: never", affects="stage"
    )
    drop_duplicates: bool = setting(True, "keep only the first of identical image files", affects="stage")
    near_duplicate_bits: int | None = setting(
        4, f"bits of {HASH_BITS} in which perceptual hashes of near duplicates may differ; null: off", affects="stage"
    )
    near_duplicate_levels: int = setting(
        12, "levels of 255 in which the tones (4x4 thumbnail) of near duplicates may differ", affects="stage"
    )

    def __post_init__(self) -> None:
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect: {self.max_aspect} is below 1, the aspect of a square")
        if not 0 <= self.min_caption_length <= self.max_caption_length:
            raise ValueError(
                f"min_caption_length: {self.min_caption_length} is not between 0 and max_caption_length "
                f"{self.max_caption_length}"
            )
        if self.placeholder_min_urls is not None and self.placeholder_min_urls < 2:
            raise ValueError(f"placeholder_min_urls: {self.placeholder_min_urls} is below 2; write null to turn it off")
        if self.near_duplicate_bits is not None and not 0 <= self.near_duplicate_bits <= 16:
            raise ValueError(f"near_duplicate_bits: {self.near_duplicate_bits} is not between 0 and 16, or null")
        for pattern in self.caption_blocklist:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"caption_blocklist: '{pattern}' is not a regular expression ({error})") from None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The samples of one shard, in order, with what the rules look at."""

    keys: Sequence[str]
    urls: Sequence[str]
    captions: Sequence[str | None]
    sha256: Sequence[str]
    sides: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    tones: npt.NDArray[np.uint8]


class Filter(Stage[FilterConfig]):
    """Selects samples by rules; see the module's docstring."""

    name: ClassVar[str] = "filter"
    counts: ClassVar[str | None] = "download"

    @property
    def upstream(self) -> tuple[str, ...]:
        """It reads the images and tables of ``download``."""
        return ("download",)

    @property
    def resources(self) -> Resources:
        """One core."""
        return Resources(num_cpus=1.0)

    def external(self) -> Any:
        """Identify the blocklist by content.

        Raises:
            InputError: if it is missing or holds anything but sha256 sums.
        """
        if self.config.image_blocklist is None:
            return None
        return hashlib.sha256("\n".join(sorted(self._blocked_images())).encode()).hexdigest()

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Make one shard of every download shard.

        Raises:
            InputError: if nothing was downloaded.
        """
        records = inputs["download"].records
        if not any(record.num_kept for record in records):
            raise InputError("filter: the download holds no images; look at its dropped rows with unclip status")
        return [
            self.shard(index, inputs={role: record.files[role] for role in ("images", "table")})
            for index, record in enumerate(records)
        ]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Measure every image of one shard; nothing is dropped yet.

        Raises:
            ShardError: if an image does not decode.
        """
        started_at = time.monotonic()
        keys: list[str] = []
        measured: list[tuple[int, bytes]] = []
        for sample in read_tar(shard.inputs["images"].read(self.root)):
            try:
                measured.append(measure_image(sample.image))
            except (OSError, ValueError) as error:
                raise ShardError(
                    f"{shard.inputs['images'].path}: image of '{sample.key}' is damaged: {error}"
                ) from error
            keys.append(sample.key)
        scores = pa.table(
            {
                "key": pa.array(keys, pa.string()),
                "perceptual_hash": pa.array([hash_ for hash_, _ in measured], pa.uint64()),
                "tones": pa.array([tones for _, tones in measured], pa.binary(3 * _TONE_SIDE**2)),
            }
        )
        files = {"scores": ("scores.parquet", table_to_bytes(scores))}
        return self.commit(shard, output, files, started_at=started_at, num_in=len(keys), num_kept=len(keys))

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Decide on every sample of the data set and publish one selection per shard.

        Raises:
            StageError: if no sample is kept.
        """
        measured = [self._measured(record) for record in records]
        common = placeholders(measured, self.config.placeholder_min_urls)
        rules = Rules(self.config, blocked_images=self._blocked_images(), placeholder_images=common)
        final = [
            self._selected(record, part, rules.decide(part), output)
            for record, part in zip(records, measured, strict=True)
        ]
        totals: Counter[str] = Counter()
        for record in final:
            totals.update(record.dropped)
        if not any(record.num_kept for record in final):
            listed = ", ".join(f"{reason}: {count}" for reason, count in totals.most_common())
            raise StageError(f"filter: none of {totals.total()} samples is kept ({listed}); loosen these rules")
        return Result(records=final)

    def _selected(self, record: ShardRecord, part: Measured, reasons: Sequence[str | None], output: str) -> ShardRecord:
        scores = {"perceptual_hash": pa.array(part.hashes, pa.uint64())}
        content = table_to_bytes(selection_table(part.keys, reasons, scores))
        selection = self.publish(storage.join(output, f"{record.shard_id}.selection.parquet"), content)
        dropped = Counter(reason for reason in reasons if reason is not None)
        return ShardRecord(
            shard_id=record.shard_id,
            files={**record.files, "selection": selection},
            inputs=record.inputs,
            num_in=len(reasons),
            num_kept=len(reasons) - dropped.total(),
            dropped=dict(sorted(dropped.items())),
            metrics=record.metrics,
            wall_time_s=record.wall_time_s,
        )

    def _measured(self, record: ShardRecord) -> Measured:
        """Join the measurements of a shard to its table.

        Raises:
            ShardError: if the two do not name the same samples.
        """
        scores = table_from_bytes(record.files["scores"].read(self.root))
        columns = ["key", "url", "caption", "status", "sha256", "original_width", "original_height"]
        table = table_from_bytes(record.inputs["table"].read(self.root), columns)
        table = table.filter(pc.equal(table["status"], "success"))
        keys = scores["key"].to_pylist()
        if table["key"].to_pylist() != keys:
            raise ShardError(
                f"{record.inputs['images'].path}: the tar and the table beside it name different samples; "
                "run again with --force download"
            )
        sides = np.stack([table["original_width"].to_numpy(), table["original_height"].to_numpy()], axis=1)
        tones = np.frombuffer(b"".join(scores["tones"].to_pylist()), np.uint8)
        return Measured(
            keys=keys,
            urls=table["url"].to_pylist(),
            captions=table["caption"].to_pylist(),
            sha256=table["sha256"].to_pylist(),
            sides=sides.astype(np.int64),
            hashes=scores["perceptual_hash"].to_numpy(),
            tones=tones.reshape(len(keys), 3 * _TONE_SIDE**2),
        )

    def _blocked_images(self) -> frozenset[str]:
        place = self.config.image_blocklist
        if place is None:
            return frozenset()
        try:
            lines = storage.read_bytes(place).decode().split()
        except (StorageError, UnicodeDecodeError) as error:
            raise InputError(f"filter.image_blocklist: {error}") from error
        wrong = next((line for line in lines if not _SHA256.fullmatch(line.lower())), None)
        if wrong is not None:
            raise InputError(f"filter.image_blocklist: {place}: '{wrong[:80]}' is not a sha256 of 64 hex digits")
        return frozenset(line.lower() for line in lines)


class Rules:
    """The decisions, made shard by shard in order; carries what later shards must know of earlier ones.

    Args:
        config: the thresholds.
        blocked_images: sha256 of unwanted image files.
        placeholder_images: sha256 of images that occur under many URLs.
    """

    def __init__(
        self,
        config: FilterConfig,
        *,
        blocked_images: frozenset[str] = frozenset(),
        placeholder_images: frozenset[str] = frozenset(),
    ) -> None:
        self._config = config
        self._blocked_images = blocked_images
        self._placeholder_images = placeholder_images
        self._blocked_captions = [re.compile(pattern, re.IGNORECASE) for pattern in config.caption_blocklist]
        self._seen: set[str] = set()
        bits = config.near_duplicate_bits
        self._near = None if bits is None else NearDuplicates(bits, config.near_duplicate_levels)

    def decide(self, part: Measured) -> list[str | None]:
        """Return why each sample of the next shard is dropped; None where it is kept."""
        return [self._decide(part, position) for position in range(len(part.keys))]

    def _decide(self, part: Measured, position: int) -> str | None:
        config, sha256 = self._config, part.sha256[position]
        reason = self._image_rules(part.sides[position]) or self._caption_rules(part.captions[position])
        if reason is not None:
            return reason
        if sha256 in self._blocked_images:
            return "image_blocked"
        if sha256 in self._placeholder_images:
            return "placeholder"
        if config.drop_duplicates:
            if sha256 in self._seen:
                return "duplicate"
            self._seen.add(sha256)
        if self._near is not None and not self._near.add(part.hashes[position], part.tones[position]):
            return "near_duplicate"
        return None

    def _image_rules(self, sides: npt.NDArray[np.int64]) -> str | None:
        shorter, longer = int(sides.min()), int(sides.max())
        if shorter < self._config.min_side_px:
            return "too_small"
        if longer > self._config.max_aspect * shorter:
            return "aspect"
        return None

    def _caption_rules(self, caption: str | None) -> str | None:
        text = (caption or "").strip()
        if not text:
            return "no_caption" if self._config.require_caption else None
        if len(text) < self._config.min_caption_length:
            return "caption_too_short"
        if len(text) > self._config.max_caption_length:
            return "caption_too_long"
        if any(pattern.search(text) for pattern in self._blocked_captions):
            return "caption_blocked"
        return None


def placeholders(parts: Sequence[Measured], min_urls: int | None) -> frozenset[str]:
    """Return the sha256 of the images that occur under at least ``min_urls`` different URLs; none for None."""
    if min_urls is None or not parts:
        return frozenset()
    pairs = pa.table(
        {
            "sha256": pa.array([sha256 for part in parts for sha256 in part.sha256], pa.string()),
            "url": pa.array([url for part in parts for url in part.urls], pa.string()),
        }
    )
    counts = pairs.group_by("sha256").aggregate([("url", "count_distinct")])
    return frozenset(counts.filter(pc.greater_equal(counts["url_count_distinct"], min_urls))["sha256"].to_pylist())


class NearDuplicates:
    """Finds images that differ from an earlier one in a few bits of their hash and a few levels of their tones.

    The hash of luminance alone takes a red and a green shape of equal brightness for the same; the tones tell them
    apart. Hashes within ``max_bits`` of each other agree on at least one of ``max_bits + 1`` disjoint bit groups, so
    only images that share such a group are compared.

    Args:
        max_bits: bits of the hash that may differ.
        max_levels: levels, of 255, by which each of the tones may differ.
    """

    def __init__(self, max_bits: int, max_levels: int) -> None:
        self._max_bits = max_bits
        self._max_levels = max_levels
        num_groups = max_bits + 1
        # Every group takes bits from all over the hash: its first bits are alike in most images.
        self._masks = [sum(1 << bit for bit in range(group, HASH_BITS, num_groups)) for group in range(num_groups)]
        self._members: list[dict[int, list[int]]] = [{} for _ in self._masks]
        self._hashes = np.zeros(1024, np.uint64)
        self._tones = np.zeros((1024, 3 * _TONE_SIDE**2), np.int16)
        self._count = 0

    def add(self, hash_: np.uint64, tones: npt.NDArray[np.uint8]) -> bool:
        """Remember an image unless it is a near duplicate of a remembered one; return whether it was remembered."""
        keys = [int(hash_) & mask for mask in self._masks]
        candidates = [i for key, members in zip(keys, self._members, strict=True) for i in members.get(key, ())]
        if candidates and self._is_near(hash_, tones, np.asarray(candidates)):
            return False
        if self._count == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._tones = np.concatenate([self._tones, np.zeros_like(self._tones)])
        self._hashes[self._count], self._tones[self._count] = hash_, tones
        for key, members in zip(keys, self._members, strict=True):
            members.setdefault(key, []).append(self._count)
        self._count += 1
        return True

    def _is_near(self, hash_: np.uint64, tones: npt.NDArray[np.uint8], candidates: npt.NDArray[np.int64]) -> bool:
        close = candidates[np.bitwise_count(self._hashes[candidates] ^ hash_) <= self._max_bits]
        if not len(close):
            return False
        differences = np.abs(self._tones[close] - tones.astype(np.int16)).max(axis=1)
        return bool((differences <= self._max_levels).any())


# ---- measurements ---------------------------------------------------------------------------------------------------


def measure_image(data: bytes) -> tuple[int, bytes]:
    """Measure an image file.

    Args:
        data: a JPEG, PNG or WebP file.

    Returns:
        the perceptual hash (64 bits) and the tones (a 4x4 RGB thumbnail, 48 bytes).

    Raises:
        OSError: if it does not decode.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * _GREY_SIDE_PX, 2 * _GREY_SIDE_PX))
        colours = image.convert("RGB")
    grey = colours.convert("L").resize((_GREY_SIDE_PX, _GREY_SIDE_PX), Image.Resampling.BILINEAR)
    tones = colours.resize((_TONE_SIDE, _TONE_SIDE), Image.Resampling.BOX)
    return perceptual_hash(np.asarray(grey, np.float32)), tones.tobytes()


def perceptual_hash(grey: npt.NDArray[np.float32]) -> int:
    """Hash the coarse structure of a grey image: which of its 8x8 lowest cosine frequencies exceed their median.

    Args:
        grey: float array (32, 32).
    """
    frequencies = _COSINES @ grey @ _COSINES.T
    bits = frequencies > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosines() -> npt.NDArray[np.float32]:
    """Return the first rows of the type-II cosine transform, (8, 32)."""
    positions = np.arange(_GREY_SIDE_PX) + 0.5
    return np.cos(np.pi / _GREY_SIDE_PX * np.outer(np.arange(_HASH_SIDE), positions)).astype(np.float32)


_COSINES = _cosines()
