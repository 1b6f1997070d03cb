"""The filter's rules on a sample among all others: held-out images, placeholders, duplicates, repeated captions.

The decision depends on the samples, their order and the settings alone. Of equal or nearly equal images the earliest
that no other rule drops stays.

What these rules look at is kept as a few numbers per sample: 93 bytes with the default rules, 109 with all. Image
files and captions are known by 128 bits of their hash: that any two different ones of 5 billion agree in them has a
chance below 1 in 10**19. The decision takes some 40 bytes more, and what the search of near duplicates needs
(``stages/near_duplicates.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.blocklists import HeldOut
from stages.filter_rules import CODES, KEPT, Codes, FilterConfig, drop, plain_captions
from stages.hash_tables import Hashes, Tones
from stages.image_hash import NUM_TONES
from stages.keepers import NONE, Rows
from stages.near_duplicates import near_any, near_duplicates

Flags = npt.NDArray[np.bool_]
Identities = npt.NDArray[np.uint64]

_ROWS_PER_CHUNK = 1 << 20
_MISSING = 0  # identity of a text that is not there


@dataclass(frozen=True)
class Verdicts:
    """The decision on n samples.

    Attributes:
        codes: position in ``REASONS``, or ``KEPT``; int8 ``(n,)``.
        keepers: of duplicates and near duplicates, the row that keeps them out, else ``NONE``; int64 ``(n,)``.
    """

    codes: Codes
    keepers: Rows


class Facts:
    """What the rules look at, of n samples; what a config's rules do not look at has no rows.

    Args:
        num_samples: n.
        config: the rules.

    Attributes:
        codes: verdict of the rules on one sample; int8 ``(n,)``.
        hashes: perceptual hashes; uint64 ``(n,)``.
        tones: uint8 ``(n, 48)``.
        files: identity of the image file; uint64 ``(n, 2)``.
        urls: hash of the URL; int64 ``(n,)``.
        captions: identity of the caption without outer spaces; uint64 ``(n, 2)``.
    """

    def __init__(self, num_samples: int, config: FilterConfig) -> None:
        self.codes: Codes = np.full(num_samples, KEPT, np.int8)
        compared = num_samples if config.near_duplicate_bits is not None or config.held_out_images is not None else 0
        self.hashes: Hashes = np.zeros(compared, np.uint64)
        self.tones: Tones = np.zeros((compared, NUM_TONES), np.uint8)
        counted = num_samples if config.placeholder_min_urls is not None else 0
        self.files: Identities = np.zeros((num_samples if config.drop_duplicates else counted, 2), np.uint64)
        self.urls = np.zeros(counted, np.int64)
        self.captions: Identities = np.zeros((num_samples if config.max_caption_repeats else 0, 2), np.uint64)

    def note(self, part: slice, samples: pa.Table, codes: Codes) -> None:
        """Note what is known of some samples; threads may do so side by side.

        Args:
            part: which of the n samples they are.
            samples: with columns ``url``, ``caption``, ``sha256``, ``perceptual_hash`` and ``tones``.
            codes: verdict of the rules on one sample.
        """
        self.codes[part] = codes
        if len(self.hashes):
            self.hashes[part] = samples["perceptual_hash"].to_numpy()
            self.tones[part] = _tones_of(samples)
        if len(self.files):
            sums = np.frombuffer(bytes.fromhex("".join(samples["sha256"].to_pylist())), np.uint64)
            self.files[part] = sums.reshape(-1, 4)[:, :2]
        if len(self.urls):
            # Python's own hash differs from process to process; all of these are of this one.
            hashed = (hash(url) if url else _MISSING for url in samples["url"].to_pylist())
            self.urls[part] = np.fromiter(hashed, np.int64, samples.num_rows)
        if len(self.captions):
            self.captions[part] = _identities(plain_captions(samples).to_pylist())

    def forget(self, name: str) -> None:
        """Give the memory of one of the attributes back."""
        setattr(self, name, getattr(self, name)[:0].copy())  # a mere slice would hold on to all of it

    def sort(self, order: Rows) -> None:
        """Bring the samples into another order, ``(n,)``."""
        for name, values in vars(self).items():
            if len(values):
                setattr(self, name, values[order])


def decide(facts: Facts, config: FilterConfig, held_out: HeldOut) -> Verdicts:
    """Decide on all samples of a data set.

    Args:
        facts: of them, in rank order; forgotten as far as they are no longer needed.
        config: the rules.
        held_out: the images that nothing like may be trained on.
    """
    codes = facts.codes
    if len(held_out.hashes):
        _drop_held_out(codes, facts, config, held_out)
    if config.placeholder_min_urls is not None:
        _drop_placeholders(codes, facts, config.placeholder_min_urls)
    facts.forget("urls")
    verdicts = Verdicts(codes, np.full(len(codes), NONE, np.int64))
    while True:
        if config.drop_duplicates:
            _drop_copies(verdicts, facts.files)
        if config.max_caption_repeats is None:  # else they may be asked again
            facts.forget("files")
        if config.near_duplicate_bits is not None:
            _drop_near_duplicates(verdicts, facts, config.near_duplicate_bits, config.near_duplicate_levels)
        if config.max_caption_repeats is None:
            return verdicts
        _drop_repeats(codes, facts.captions, config.max_caption_repeats)
        if not _reopen(verdicts, facts.captions):
            return verdicts


def _tones_of(samples: pa.Table) -> Tones:
    column = samples["tones"].combine_chunks()
    values = np.frombuffer(column.buffers()[1], np.uint8)
    return values[column.offset * NUM_TONES :][: len(column) * NUM_TONES].reshape(-1, NUM_TONES)


def _identities(texts: Sequence[str]) -> Identities:
    """Hash texts, ``(n, 2)``; an empty one is ``_MISSING``."""
    digests = (hashlib.blake2b(text.encode(), digest_size=16).digest() if text else bytes(16) for text in texts)
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


# ---- the rules ------------------------------------------------------------------------------------------------------


def _drop_held_out(codes: Codes, facts: Facts, config: FilterConfig, held_out: HeldOut) -> None:
    # What is searched is built of a part of the samples at a time; they would not fit beside it.
    for start in range(0, len(codes), _ROWS_PER_CHUNK):
        chunk = slice(start, start + _ROWS_PER_CHUNK)
        near = near_any(
            facts.hashes[chunk],
            facts.tones[chunk],
            held_out.hashes,
            held_out.tones,
            max_bits=config.held_out_bits,
            max_levels=config.held_out_levels,
        )
        drop(codes[chunk], "held_out", near)


def _drop_placeholders(codes: Codes, facts: Facts, min_urls: int) -> None:
    """Drop the samples whose image file occurs under at least ``min_urls`` different URLs."""
    rows, files = _repeated(facts.files, np.arange(len(codes), dtype=np.int64))
    urls = facts.urls[rows]
    order = np.lexsort((urls, files))
    files_sorted, urls_sorted = files[order], urls[order]
    is_new = urls_sorted != _MISSING
    is_new[1:] &= (files_sorted[1:] != files_sorted[:-1]) | (urls_sorted[1:] != urls_sorted[:-1])
    num_urls = np.bincount(files_sorted[is_new], minlength=len(rows))
    many = np.zeros(len(codes), np.bool_)
    many[rows[num_urls[files] >= min_urls]] = True
    drop(codes, "placeholder", many)


def _drop_copies(verdicts: Verdicts, identities: Identities) -> None:
    rows, files = _repeated(identities, np.flatnonzero(verdicts.codes == KEPT))
    _, starts = np.unique(files, return_index=True)
    keeper = rows[starts][files]
    copies = rows != keeper
    verdicts.codes[rows[copies]] = CODES["duplicate"]
    verdicts.keepers[rows[copies]] = keeper[copies]


def _drop_near_duplicates(verdicts: Verdicts, facts: Facts, max_bits: int, max_levels: int) -> None:
    open_ = np.flatnonzero(verdicts.codes == KEPT)
    found = near_duplicates(facts.hashes, facts.tones, max_bits=max_bits, max_levels=max_levels, among=open_)
    near = found != NONE
    verdicts.codes[open_[near]] = CODES["near_duplicate"]
    verdicts.keepers[open_[near]] = found[near]
    # A copy of a near duplicate is kept out by what keeps that one out.
    copies = np.flatnonzero(verdicts.codes == CODES["duplicate"])
    first = verdicts.keepers[copies]
    verdicts.keepers[copies] = np.where(verdicts.keepers[first] == NONE, first, verdicts.keepers[first])


def _drop_repeats(codes: Codes, captions: Identities, max_repeats: int) -> None:
    """Drop what comes after the first ``max_repeats`` samples of a caption; an empty caption repeats nothing."""
    given = (codes == KEPT) & (captions[:, 0] != _MISSING)
    rows, texts = _repeated(captions, np.flatnonzero(given))
    _, starts, counts = np.unique(texts, return_index=True, return_counts=True)
    place = np.arange(len(rows)) - np.repeat(starts, counts)
    codes[rows[place >= max_repeats]] = CODES["caption_repeated"]


def _reopen(verdicts: Verdicts, captions: Identities) -> bool:
    """Reopen what was dropped in favour of samples that do not stay themselves; tell whether anything was.

    Those went for their captions, or for what was reopened before. A drop for a caption is for good, and with these
    settled the others settle in the order of their ranks, so there is an end.
    """
    behind = np.flatnonzero(verdicts.keepers != NONE)
    orphans = behind[verdicts.codes[verdicts.keepers[behind]] != KEPT]
    keepers = verdicts.keepers[orphans]
    # What comes after a sample and has the caption for which that one went, goes for it, too.
    too_many = verdicts.codes[keepers] == CODES["caption_repeated"]
    too_many &= (captions[orphans] == captions[keepers]).all(axis=1)
    verdicts.codes[orphans] = np.where(too_many, CODES["caption_repeated"], KEPT)
    verdicts.keepers[orphans] = NONE
    return not too_many.all()


def _repeated(identities: Identities, rows: Rows) -> tuple[Rows, Rows]:
    """Find the rows, of some (ascending), whose identity another of them shares.

    Returns:
        The rows, identity by identity and ascending in each, ``(r,)``; and the number of the identity of each of them,
        ``0, 0, .., 1, 1, ..``.
    """
    words = identities[rows, 0]
    ascending = np.sort(words)
    shared = np.unique(ascending[1:][ascending[1:] == ascending[:-1]])
    del ascending
    found = np.zeros(len(rows), np.bool_)
    for start in range(0, len(rows) if len(shared) else 0, _ROWS_PER_CHUNK):
        chunk = slice(start, start + _ROWS_PER_CHUNK)
        place = np.minimum(np.searchsorted(shared, words[chunk]), len(shared) - 1)
        found[chunk] = shared[place] == words[chunk]
    rows = rows[found]
    own = identities[rows]
    order = np.lexsort((own[:, 1], own[:, 0]))
    rows, own = rows[order], own[order]
    starts = np.ones(len(rows), np.bool_)
    starts[1:] = (own[1:] != own[:-1]).any(axis=1)
    number = np.cumsum(starts) - 1
    shared_by = np.bincount(number)[number] if len(rows) else number
    rows, number = rows[shared_by > 1], number[shared_by > 1]
    return rows, np.unique(number, return_inverse=True)[1]
