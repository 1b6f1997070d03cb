"""The rules of the filter: settings, and the decision on all samples of a data set at once.

``decide`` is a function of the samples, their order and the settings alone. A sample is dropped for the first reason
that applies, in the order of ``REASONS``. Rules that look at several samples (from ``placeholder`` on) come last: of
equal or nearly equal images the earliest that no other rule drops stays.

Memory per sample: what Arrow holds of key, URL, caption and sha256, 90 bytes of numbers beside them, and what the
search of near duplicates takes (``stages/near_duplicates.py``). Captions are judged once per distinct caption.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.base import setting
from stages.blocklists import HeldOut, UrlBlocklist
from stages.image_hash import NUM_TONES
from stages.keepers import NONE, Rows
from stages.near_duplicates import HASH_BITS, near_any, near_duplicates

RULE_VERSION = 2  # of what the rules mean; raised whenever equal settings would decide otherwise
REASONS = (
    "too_small",
    "too_large",
    "too_few_pixels",
    "aspect",
    "url_blocked",
    "no_caption",
    "caption_too_short",
    "caption_too_long",
    "caption_blocked",
    "caption_not_text",
    "caption_language",
    "image_blocked",
    "held_out",
    "placeholder",
    "duplicate",
    "near_duplicate",
    "caption_repeated",
)
KEPT = -1
_CODES = {reason: code for code, reason in enumerate(REASONS)}
_SPACES = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())  # none lies beyond
_LETTER = r"[\p{L}\p{M}]"  # with the marks that vowels of many scripts are written with
_SPACE = r"[\s\p{Z}]"
_LANGUAGE = re.compile(r"[a-z]{2,3}")

Flags = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Rules on images and captions. Every rule is applied by ``finish``, so the measurements are kept."""

    min_side_px: int = setting(16, "shorter side of the served image, pixels", affects="stage")
    max_side_px: int | None = setting(None, "longer side of the served image, pixels; null: any", affects="stage")
    min_pixels: int = setting(0, "width x height of the served image, pixels", affects="stage")
    max_aspect: float = setting(4.0, "longer side / shorter side of the served image", affects="stage")
    # The files and the folder are identified by their content (`external`).
    url_blocklist: str | None = setting(
        None,
        "text file with a host (example.com, its subdomains included) or URL prefix per line",
        affects="nothing",
    )
    require_caption: bool = setting(True, "drop samples without a caption", affects="stage")
    min_caption_length: int = setting(1, "characters, outer spaces not counted", affects="stage")
    max_caption_length: int = setting(1000, "characters, outer spaces not counted", affects="stage")
    caption_blocklist: tuple[str, ...] = setting(
        (), "regular expressions; a caption that one of them finds is dropped, case ignored", affects="stage"
    )
    min_letter_fraction: float = setting(
        0.0, "share of letters among the characters of a caption that are not spaces, 0 to 1", affects="stage"
    )
    caption_languages: tuple[str, ...] = setting(
        (), "ISO 639 codes of the languages that captions may have, such as en; none: any", affects="stage"
    )
    language_min_probability: float = setting(
        0.0, "lowest probability of the caption's language, 0 to 1, with caption_languages", affects="stage"
    )
    image_blocklist: str | None = setting(
        None, "text file with the sha256 of one unwanted image file per line", affects="nothing"
    )
    held_out_images: str | None = setting(
        None, "folder of images, local or s3://, that nothing like may be trained on", affects="nothing"
    )
    held_out_bits: int = setting(
        4, f"bits of {HASH_BITS} in which a sample's hash may differ from a held-out image's", affects="stage"
    )
    held_out_levels: int = setting(
        12, "levels of 255 in which a sample's tones may differ from a held-out image's", affects="stage"
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
    max_caption_repeats: int | None = setting(
        None, "samples with the same caption that are kept; null: any number", affects="stage"
    )

    def __post_init__(self) -> None:
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect: {self.max_aspect} is below 1, the aspect of a square")
        if self.max_side_px is not None and self.max_side_px < max(self.min_side_px, 1):
            raise ValueError(f"max_side_px: {self.max_side_px} is below min_side_px {self.min_side_px}, or 1")
        if not 0 <= self.min_caption_length <= self.max_caption_length:
            raise ValueError(
                f"min_caption_length: {self.min_caption_length} is not between 0 and max_caption_length "
                f"{self.max_caption_length}"
            )
        if self.placeholder_min_urls is not None and self.placeholder_min_urls < 2:
            raise ValueError(f"placeholder_min_urls: {self.placeholder_min_urls} is below 2; write null to turn it off")
        if self.near_duplicate_bits is not None and not 0 <= self.near_duplicate_bits <= 16:
            raise ValueError(f"near_duplicate_bits: {self.near_duplicate_bits} is not between 0 and 16, or null")
        if not 0 <= self.held_out_bits <= 16:
            raise ValueError(f"held_out_bits: {self.held_out_bits} is not between 0 and 16")
        if self.max_caption_repeats is not None and self.max_caption_repeats < 1:
            raise ValueError(f"max_caption_repeats: {self.max_caption_repeats} is below 1; write null to turn it off")
        for name in ("min_letter_fraction", "language_min_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not between 0 and 1")
        wrong = next((code for code in self.caption_languages if not _LANGUAGE.fullmatch(code)), None)
        if wrong is not None:
            raise ValueError(f"caption_languages: '{wrong}' is not an ISO 639 code; write en for English")
        for pattern in self.caption_blocklist:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"caption_blocklist: '{pattern}' is not a regular expression ({error})") from None


@dataclass(frozen=True, kw_only=True)
class Lists:
    """What the lists outside the store hold."""

    blocked_images: frozenset[str] = frozenset()
    blocked_urls: UrlBlocklist = field(default_factory=UrlBlocklist)
    held_out: HeldOut = field(default_factory=HeldOut)


@dataclass(frozen=True)
class Verdicts:
    """The decision on n samples.

    Attributes:
        codes: position in ``REASONS``, or ``KEPT``; int8 ``(n,)``.
        keepers: of duplicates and near duplicates, the row that keeps them out, else ``NONE``; int64 ``(n,)``.
    """

    codes: Codes
    keepers: Rows


def decide(samples: pa.Table, config: FilterConfig, lists: Lists) -> Verdicts:
    """Decide on all samples of a data set.

    Args:
        samples: one row per sample in rank order, with columns ``url``, ``caption``, ``sha256``, ``original_width``,
            ``original_height``, ``perceptual_hash``, ``tones``, ``language`` and ``language_probability``.
        config: the rules.
        lists: what the lists named by the config hold.
    """
    verdicts = Verdicts(np.full(samples.num_rows, KEPT, np.int8), np.full(samples.num_rows, NONE, np.int64))
    if not samples.num_rows:
        return verdicts
    captions = _encoded(pc.utf8_trim(pc.fill_null(samples["caption"], ""), characters=_SPACES))
    files = _encoded(samples["sha256"])
    hashes, tones = hashes_of(samples), tones_of(samples)
    _judge_sides(verdicts.codes, samples, config)
    if lists.blocked_urls != UrlBlocklist():
        _drop(verdicts.codes, "url_blocked", lists.blocked_urls.blocks(samples["url"]))
    _judge_captions(verdicts.codes, captions, config)
    if config.caption_languages:
        _drop(verdicts.codes, "caption_language", _in_other_language(samples, captions, config))
    _drop(verdicts.codes, "image_blocked", files.flags(pc.is_in, value_set=_strings(lists.blocked_images)))
    held_out = lists.held_out
    bits, levels = config.held_out_bits, config.held_out_levels
    near = near_any(hashes, tones, held_out.hashes, held_out.tones, max_bits=bits, max_levels=levels)
    _drop(verdicts.codes, "held_out", near)
    if config.placeholder_min_urls is not None:
        _drop(verdicts.codes, "placeholder", _under_many_urls(files, samples["url"], config.placeholder_min_urls))
    if config.drop_duplicates:
        _drop_copies(verdicts, files)
    if config.near_duplicate_bits is not None:
        _drop_near_duplicates(verdicts, hashes, tones, config.near_duplicate_bits, config.near_duplicate_levels)
    if config.max_caption_repeats is not None:
        _drop_repeats(verdicts.codes, captions, config.max_caption_repeats)
    return verdicts


def hashes_of(samples: pa.Table) -> npt.NDArray[np.uint64]:
    """Return the perceptual hashes, uint64 ``(n,)``."""
    return np.asarray(samples["perceptual_hash"].to_numpy(), np.uint64)


def tones_of(samples: pa.Table) -> npt.NDArray[np.uint8]:
    """Return the tones, uint8 ``(n, 48)``."""
    column = samples["tones"].combine_chunks()
    values = np.frombuffer(column.buffers()[1], np.uint8)
    return values[column.offset * NUM_TONES :][: len(column) * NUM_TONES].reshape(-1, NUM_TONES)


# ---- columns of few distinct texts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    """Texts as numbers: the i-th is ``distinct[codes[i]]``."""

    codes: npt.NDArray[np.int32]
    distinct: pa.Array

    @property
    def is_given(self) -> Flags:
        """Whether each text has any characters, ``(n,)``."""
        return self.flags(lambda texts: pc.not_equal(texts, ""))

    def flags(self, function: Callable[..., Any], **options: Any) -> Flags:
        """Apply a boolean function of pyarrow.compute to the distinct texts."""
        of_distinct: Flags = np.asarray(function(self.distinct, **options), np.bool_)
        return of_distinct[self.codes]


def _encoded(texts: pa.ChunkedArray) -> _Encoded:
    coded = texts.dictionary_encode().combine_chunks()
    return _Encoded(np.asarray(coded.indices), coded.dictionary)


def _strings(values: frozenset[str]) -> pa.Array:
    return pa.array(sorted(values), pa.large_string())


def _drop(codes: Codes, reason: str, condition: Flags) -> None:
    """Drop the samples that meet a condition and have not been dropped before."""
    codes[(codes == KEPT) & condition] = _CODES[reason]


# ---- rules on one sample --------------------------------------------------------------------------------------------


def _judge_sides(codes: Codes, samples: pa.Table, config: FilterConfig) -> None:
    width, height = (samples[f"original_{side}"].to_numpy().astype(np.int64) for side in ("width", "height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    _drop(codes, "too_small", shorter < config.min_side_px)
    if config.max_side_px is not None:
        _drop(codes, "too_large", longer > config.max_side_px)
    _drop(codes, "too_few_pixels", width * height < config.min_pixels)
    _drop(codes, "aspect", longer > config.max_aspect * shorter)


def _judge_captions(codes: Codes, captions: _Encoded, config: FilterConfig) -> None:
    lengths = np.asarray(pc.utf8_length(captions.distinct))
    given = lengths > 0
    verdicts = np.full(len(lengths), KEPT, np.int8)  # of the distinct captions
    if config.require_caption:
        _drop(verdicts, "no_caption", ~given)
    _drop(verdicts, "caption_too_short", given & (lengths < config.min_caption_length))
    _drop(verdicts, "caption_too_long", lengths > config.max_caption_length)
    if config.caption_blocklist:
        # Python's own expressions: those of pyarrow (RE2) know no lookahead and other classes of characters.
        patterns = [re.compile(pattern, re.IGNORECASE) for pattern in config.caption_blocklist]
        texts = captions.distinct.to_pylist()
        found = np.array([any(pattern.search(text) for pattern in patterns) for text in texts], np.bool_)
        _drop(verdicts, "caption_blocked", given & found)
    if config.min_letter_fraction > 0:
        letters = np.asarray(pc.count_substring_regex(captions.distinct, _LETTER))
        characters = lengths - np.asarray(pc.count_substring_regex(captions.distinct, _SPACE))
        _drop(verdicts, "caption_not_text", given & (letters < config.min_letter_fraction * characters))
    of_samples = verdicts[captions.codes]
    open_ = codes == KEPT
    codes[open_] = of_samples[open_]


def _in_other_language(samples: pa.Table, captions: _Encoded, config: FilterConfig) -> Flags:
    given = captions.is_given
    wanted: Flags = np.asarray(pc.is_in(samples["language"], value_set=_strings(frozenset(config.caption_languages))))
    sure: Flags = samples["language_probability"].to_numpy() >= np.float32(config.language_min_probability)
    return given & ~(wanted & sure)


# ---- rules on several samples ---------------------------------------------------------------------------------------


def _under_many_urls(files: _Encoded, urls: pa.ChunkedArray, min_urls: int) -> Flags:
    """Tell which samples' image files occur under at least ``min_urls`` different URLs."""
    pairs = pa.table({"file": pa.array(files.codes), "url": urls})
    counts = pairs.group_by("file").aggregate([("url", "count_distinct")])
    many = np.zeros(len(files.distinct), np.bool_)
    many[counts["file"].to_numpy()] = counts["url_count_distinct"].to_numpy() >= min_urls
    return many[files.codes]


def _drop_copies(verdicts: Verdicts, files: _Encoded) -> None:
    open_ = np.flatnonzero(verdicts.codes == KEPT)
    first = np.full(len(files.distinct), len(files.codes), np.int64)
    np.minimum.at(first, files.codes[open_], open_)
    keeper = first[files.codes[open_]]
    copies = open_[keeper != open_]
    verdicts.codes[copies] = _CODES["duplicate"]
    verdicts.keepers[copies] = keeper[keeper != open_]


def _drop_near_duplicates(
    verdicts: Verdicts, hashes: npt.NDArray[np.uint64], tones: npt.NDArray[np.uint8], max_bits: int, max_levels: int
) -> None:
    open_ = np.flatnonzero(verdicts.codes == KEPT)
    keepers = near_duplicates(hashes[open_], tones[open_], max_bits=max_bits, max_levels=max_levels)
    near = keepers != NONE
    verdicts.codes[open_[near]] = _CODES["near_duplicate"]
    verdicts.keepers[open_[near]] = open_[keepers[near]]
    # A copy of a near duplicate is kept out by what keeps that one out.
    copies = np.flatnonzero(verdicts.codes == _CODES["duplicate"])
    first = verdicts.keepers[copies]
    verdicts.keepers[copies] = np.where(verdicts.keepers[first] == NONE, first, verdicts.keepers[first])


def _drop_repeats(codes: Codes, captions: _Encoded, max_repeats: int) -> None:
    """Drop what comes after the first ``max_repeats`` samples of a caption; an empty caption repeats nothing."""
    open_ = np.flatnonzero((codes == KEPT) & captions.is_given)
    order = np.argsort(captions.codes[open_], kind="stable")
    _, starts, counts = np.unique(captions.codes[open_][order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    codes[open_[order[place >= max_repeats]]] = _CODES["caption_repeated"]
