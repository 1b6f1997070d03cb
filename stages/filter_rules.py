"""The rules of the filter: settings, and what can be said of a sample by itself.

A sample is dropped for the first reason that applies, in the order of ``REASONS``. Rules that need the whole data set
(from ``held_out`` on) come last, in ``stages/filter_set_rules.py``. Captions are judged once per distinct caption.
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
from stages.hash_tables import HASH_BITS

RULE_VERSION = 3  # of what the rules mean; raised whenever equal settings would decide otherwise
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
CODES = {reason: code for code, reason in enumerate(REASONS)}
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


def judge(samples: pa.Table, config: FilterConfig, lists: Lists) -> Codes:
    """Apply the rules on one sample.

    Args:
        samples: with columns ``url``, ``caption``, ``sha256``, ``original_width``, ``original_height``, ``language``
            and ``language_probability``.
        config: the rules.
        lists: what the lists named by the config hold.

    Returns:
        Position in ``REASONS`` of the first rule that drops each sample, or ``KEPT``; int8 ``(n,)``.
    """
    codes = np.full(samples.num_rows, KEPT, np.int8)
    if not samples.num_rows:
        return codes
    captions = _encoded(plain_captions(samples))
    _judge_sides(codes, samples, config)
    if lists.blocked_urls != UrlBlocklist():
        drop(codes, "url_blocked", lists.blocked_urls.blocks(samples["url"]))
    _judge_captions(codes, captions, config)
    if config.caption_languages:
        drop(codes, "caption_language", _in_other_language(samples, captions, config))
    if lists.blocked_images:
        drop(codes, "image_blocked", np.asarray(pc.is_in(samples["sha256"], value_set=_strings(lists.blocked_images))))
    return codes


def plain_captions(samples: pa.Table) -> pa.ChunkedArray:
    """Return captions without outer spaces, empty where there is none."""
    return pc.utf8_trim(pc.fill_null(samples["caption"], ""), characters=_SPACES)


def drop(codes: Codes, reason: str, condition: Flags) -> None:
    """Drop the samples that meet a condition and have not been dropped before."""
    codes[(codes == KEPT) & condition] = CODES[reason]


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


# ---- rules on one sample --------------------------------------------------------------------------------------------


def _judge_sides(codes: Codes, samples: pa.Table, config: FilterConfig) -> None:
    width, height = (samples[f"original_{side}"].to_numpy().astype(np.int64) for side in ("width", "height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    drop(codes, "too_small", shorter < config.min_side_px)
    if config.max_side_px is not None:
        drop(codes, "too_large", longer > config.max_side_px)
    drop(codes, "too_few_pixels", width * height < config.min_pixels)
    drop(codes, "aspect", longer > config.max_aspect * shorter)


def _judge_captions(codes: Codes, captions: _Encoded, config: FilterConfig) -> None:
    lengths = np.asarray(pc.utf8_length(captions.distinct))
    given = lengths > 0
    verdicts = np.full(len(lengths), KEPT, np.int8)  # of the distinct captions
    if config.require_caption:
        drop(verdicts, "no_caption", ~given)
    drop(verdicts, "caption_too_short", given & (lengths < config.min_caption_length))
    drop(verdicts, "caption_too_long", lengths > config.max_caption_length)
    if config.caption_blocklist:
        # Python's own expressions: those of pyarrow (RE2) know no lookahead and other classes of characters.
        patterns = [re.compile(pattern, re.IGNORECASE) for pattern in config.caption_blocklist]
        texts = captions.distinct.to_pylist()
        found = np.array([any(pattern.search(text) for pattern in patterns) for text in texts], np.bool_)
        drop(verdicts, "caption_blocked", given & found)
    if config.min_letter_fraction > 0:
        letters = np.asarray(pc.count_substring_regex(captions.distinct, _LETTER))
        characters = lengths - np.asarray(pc.count_substring_regex(captions.distinct, _SPACE))
        drop(verdicts, "caption_not_text", given & (letters < config.min_letter_fraction * characters))
    of_samples = verdicts[captions.codes]
    open_ = codes == KEPT
    codes[open_] = of_samples[open_]


def _in_other_language(samples: pa.Table, captions: _Encoded, config: FilterConfig) -> Flags:
    given = captions.is_given
    wanted: Flags = np.asarray(pc.is_in(samples["language"], value_set=_strings(frozenset(config.caption_languages))))
    sure: Flags = samples["language_probability"].to_numpy() >= np.float32(config.language_min_probability)
    return given & ~(wanted & sure)
