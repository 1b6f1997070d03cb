"""Which images have a near one at all: what the search of near duplicates can leave alone from the start.

Every table of ``stages/hash_tables.py`` is made, looked through and forgotten. A table is the keys and the rows in one
sorted array of 64-bit numbers, so it takes 8 bytes a row. Rows of equal keys lie side by side: in small buckets each
row is compared with the next one, the one after it and so on, all buckets at once; in large ones everything with
everything that has not yet been found near another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.hash_tables import PAIR_IN_BULK_NS, Hashes, SearchPlan, Tones, dealt, key_groups, keys_of, plans_for
from stages.keepers import Rows

Flags = npt.NDArray[np.bool_]

_ROWS_PER_CHUNK = 1 << 20
_PAIRS_PER_STRIPE = 1 << 21
_TONES_PER_CHUNK = 1 << 16
_SMALL_BUCKET = 128
# What a cost is made of, in ns on one core: a row put into a table; a pair compared in a small bucket, a large one.
_ROW_NS, _SMALL_NS, _LARGE_NS = 150.0, 8.0, 1.5


def rows_with_neighbours(
    hashes: Hashes, tones: Tones, rows: Rows, *, max_bits: int, max_levels: int, plan: SearchPlan | None = None
) -> Flags:
    """Tell which images are near at least one other.

    Args:
        hashes: perceptual hashes, ``(n,)``.
        tones: thumbnails, ``(n, 48)``.
        rows: of the images to compare with each other, ``(m,)``.
        max_bits: bits of the hashes that may differ.
        max_levels: levels by which each tone may differ.
        plan: which tables; by default the cheapest. All find the same. Without tables every image counts as near.

    Returns:
        bool ``(m,)``.
    """
    chosen = plan or min(plans_for(max_bits), key=lambda plan: _cost_ns(len(rows), plan))
    near = np.zeros(len(rows), np.bool_)
    if chosen.num_shared == 0:
        near[:] = True
        return near
    own, groups = dealt(hashes[rows], chosen.num_groups)
    search = _Search(own, tones, rows, near, max_bits, max_levels)
    for key in key_groups(chosen, groups):
        row_bits = max(len(rows) - 1, 1).bit_length()
        table = keys_of(own, key, min(chosen.key_bits, 64 - row_bits))
        table <<= np.uint64(row_bits)
        table |= np.arange(len(rows), dtype=np.uint64)
        table.sort()
        for chunk in _whole_buckets(table, row_bits):
            search.mark(chunk & np.uint64((1 << row_bits) - 1), chunk >> np.uint64(row_bits))
    return near


def are_near(tones: Tones, a: Rows, b: Rows, max_levels: int) -> Flags:
    """Tell of which pairs of images no tone differs by more than ``max_levels``, ``(p,)``."""
    near = np.zeros(len(a), np.bool_)
    for start in range(0, len(a), _TONES_PER_CHUNK):
        chunk = slice(start, start + _TONES_PER_CHUNK)
        one, other = tones[a[chunk]], tones[b[chunk]]
        near[chunk] = (np.maximum(one, other) - np.minimum(one, other)).max(axis=1) <= max_levels
    return near


def _cost_ns(num_rows: int, plan: SearchPlan) -> float:
    if plan.num_shared == 0:
        # Setting nothing aside costs nothing here, but all pairs later.
        return num_rows**2 / 2 * PAIR_IN_BULK_NS
    load = num_rows / (1 << plan.key_bits)  # rows of a bucket
    compared = load / 2 * _SMALL_NS if load <= _SMALL_BUCKET else load * _LARGE_NS
    return plan.num_tables * num_rows * (_ROW_NS + compared)


def _whole_buckets(table: Hashes, row_bits: int) -> Iterator[Hashes]:
    """Cut a table into chunks that part no bucket."""
    start = 0
    while start < len(table):
        stop = start + _ROWS_PER_CHUNK
        if stop < len(table):
            last = np.uint64(int(table[stop - 1]) | ((1 << row_bits) - 1))
            stop = int(np.searchsorted(table, last, side="right"))
        yield table[start:stop]
        start = stop


class _Search:
    """Marks the rows of one bucket after the other that are near another of it."""

    def __init__(self, hashes: Hashes, tones: Tones, rows: Rows, near: Flags, max_bits: int, max_levels: int) -> None:
        self._hashes, self._tones, self._rows, self._near = hashes, tones, rows, near
        self._max_bits, self._max_levels = max_bits, max_levels

    def mark(self, places: Hashes, keys: Hashes) -> None:
        """Mark the rows of whole buckets.

        Args:
            places: positions among the rows, ``(c,)``.
            keys: of them, ascending ``(c,)``.
        """
        follows = np.concatenate([[False], keys[1:] == keys[:-1], [False]])
        shared = follows[1:] | follows[:-1]  # alone in its bucket, a row is near nothing
        places, starts = places[shared].astype(np.int64), np.flatnonzero(~follows[:-1][shared])
        sizes = np.diff(starts, append=len(places))
        buckets = _Buckets(self._hashes[places], self._rows[places], self._near[places])
        large = sizes > _SMALL_BUCKET
        self._mark_neighbours(buckets, np.where(large, 1, sizes), sizes)
        for start, size in zip(starts[large].tolist(), sizes[large].tolist(), strict=True):
            self._mark_all(buckets, start, start + size)
        self._near[places[buckets.near]] = True

    def _mark_neighbours(self, buckets: _Buckets, compared: Rows, sizes: Rows) -> None:
        """Compare each row with all after it in its bucket, as far as ``compared`` rows of the bucket go."""
        ends = np.repeat(np.cumsum(sizes) - sizes + compared, sizes)
        num_later = ends - np.arange(len(ends)) - 1
        rows, distance = np.flatnonzero(num_later > 0), 1
        while len(rows):
            close = np.bitwise_count(buckets.hashes[rows] ^ buckets.hashes[rows + distance]) <= self._max_bits
            self._mark_close(buckets, rows[close], rows[close] + distance)
            distance += 1
            rows = rows[num_later[rows] >= distance]

    def _mark_all(self, buckets: _Buckets, start: int, stop: int) -> None:
        """Compare the rows of one bucket that are not marked with all of it."""
        height = max(1, _PAIRS_PER_STRIPE // (stop - start))
        own = buckets.hashes[start:stop]
        for first in range(start, stop, height):
            rows = first + np.flatnonzero(~buckets.near[first : min(first + height, stop)])
            close = np.bitwise_count(buckets.hashes[rows, None] ^ own[None]) <= self._max_bits
            close[np.arange(len(rows)), rows - start] = False
            i, j = np.divmod(np.flatnonzero(close), stop - start)
            self._mark_close(buckets, rows[i], start + j)

    def _mark_close(self, buckets: _Buckets, a: Rows, b: Rows) -> None:
        """Mark pairs of near hashes whose tones are near, too."""
        news = ~(buckets.near[a] & buckets.near[b])
        a, b = a[news], b[news]
        near = are_near(self._tones, buckets.rows[a], buckets.rows[b], self._max_levels)
        buckets.near[a[near]] = True
        buckets.near[b[near]] = True


@dataclass(frozen=True)
class _Buckets:
    """Rows of some buckets, bucket by bucket: their hashes, which rows they are, which are marked; each ``(c,)``."""

    hashes: Hashes
    rows: Rows
    near: Flags
