"""Near duplicates by perceptual hash: exact search within a Hamming radius, then the greedy keeper.

Hashes of 64 bits that differ in at most r bits agree on at least k of any r + k disjoint groups of bits. So there is
one table for every choice of k groups, keyed by their bits, and only images that share a key in some table are
compared; for k = 0 everything is. No pair is missed, whatever the images are: groups and tables only decide what it
costs. k is chosen by cost. Measured on one core, for a million random hashes: radius 4 needs 15 tables (k = 2) and 9 s,
radius 8 needs 45 and 3 minutes. From radius 9 on keys are too short to tell a million images apart, and all pairs are
compared: 0.7 ns a pair, 6 minutes on one core for a million images, and four times that for twice as many.

Memory: 8 bytes for the hash and 48 for the tones of every image, and up to 12 bytes per image and table (radius 4:
180 bytes). Candidates are compared in chunks, so a bucket that holds everything costs time, not memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt

from stages.keepers import NONE, Pairs, Rows, keepers_of

HASH_BITS = 64
Hashes = npt.NDArray[np.uint64]
Tones = npt.NDArray[np.uint8]

_CANDIDATES_PER_CHUNK = 1 << 20
_BULK_PAIRS_PER_CHUNK = 1 << 24
_TONES_PER_CHUNK = 1 << 16
_ROWS_PER_STRIPE = 128
_MAX_SHARED, _MAX_TABLES = 3, 64
# What a cost is made of, in ns on one core: a row put into a table, a candidate compared, a pair compared in bulk.
_ROW_NS, _CANDIDATE_NS, _BULK_NS = 150.0, 30.0, 0.7


def near_duplicates(
    hashes: Hashes, tones: Tones, *, max_bits: int, max_levels: int, plan: SearchPlan | None = None
) -> Rows:
    """Find the images that are near an earlier image that is kept.

    Args:
        hashes: perceptual hashes in rank order, ``(n,)``.
        tones: thumbnails of the images, ``(n, 48)``, 0 to 255.
        max_bits: bits of the hashes that may differ.
        max_levels: levels by which each tone may differ.
        plan: how hashes are searched; by default the cheapest way. All find the same.

    Returns:
        int64 ``(n,)``: of every near duplicate, the earliest kept image near it; ``NONE`` of every kept image.
    """
    distinct, first_of = _collapsed(hashes, tones)
    chosen = plan or plan_search(len(distinct), max_bits)
    relation = HashRelation(hashes[distinct], tones[distinct], max_bits=max_bits, max_levels=max_levels, plan=chosen)
    keepers = keepers_of(len(distinct), relation)
    # The others of an image are at no distance from the first: kept out by it, or by what keeps it out.
    keeper_of_first = np.where(keepers == NONE, NONE, distinct[keepers])
    of_image = keeper_of_first[first_of]
    is_first = np.zeros(len(hashes), np.bool_)
    is_first[distinct] = True
    return np.where((of_image == NONE) & ~is_first, distinct[first_of], of_image)


def near_any(
    hashes: Hashes, tones: Tones, given_hashes: Hashes, given_tones: Tones, *, max_bits: int, max_levels: int
) -> npt.NDArray[np.bool_]:
    """Tell which images are near at least one of some given images, such as held-out ones.

    Args:
        hashes: of the images, ``(n,)``.
        tones: of the images, ``(n, 48)``.
        given_hashes: of the given images, ``(m,)``.
        given_tones: of the given images, ``(m, 48)``.
        max_bits: bits of the hashes that may differ.
        max_levels: levels by which each tone may differ.
    """
    near = np.zeros(len(hashes), np.bool_)
    if not len(hashes) or not len(given_hashes):
        return near
    both_hashes = np.concatenate([hashes, given_hashes])
    both_tones = np.concatenate([tones, given_tones])
    plan = plan_search(len(hashes), max_bits)
    relation = HashRelation(both_hashes, both_tones, max_bits=max_bits, max_levels=max_levels, plan=plan)
    relation.narrow(np.arange(len(hashes), dtype=np.int64))
    for _, found in relation.search(np.arange(len(hashes), len(both_hashes), dtype=np.int64), after=NONE):
        near[found] = True
    return near


def _collapsed(hashes: Hashes, tones: Tones) -> tuple[Rows, Rows]:
    """Collapse images of equal hash and tones.

    Returns:
        The first row of every distinct image, ascending ``(d,)``; and the position in it of every row's image ``(n,)``.
    """
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[inverse] > 1)
    first = np.arange(len(hashes), dtype=np.int64)
    if len(repeated):
        rows = np.concatenate([hashes[repeated, None].view(np.uint8), tones[repeated]], axis=1)
        whole = np.ascontiguousarray(rows).view(f"V{rows.shape[1]}")[:, 0]
        _, index, member = np.unique(whole, return_index=True, return_inverse=True)
        first[repeated] = repeated[index[member]]
    distinct, position = np.unique(first, return_inverse=True)
    return distinct, position


# ---- what a search costs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchPlan:
    """How hashes are searched: ``num_shared`` (k) of ``num_groups`` (r + k) groups make a key; k = 0 compares all."""

    num_groups: int
    num_shared: int

    @property
    def num_tables(self) -> int:
        """Ways to choose the groups of a key."""
        return math.comb(self.num_groups, self.num_shared)

    def key_bits(self, num_hashes: int) -> int:
        """Bits of a key: those of its groups, but no more than it takes to tell that many hashes apart."""
        return min(self.num_shared * (HASH_BITS // self.num_groups), max(num_hashes - 1, 1).bit_length())

    def cost_ns(self, num_hashes: int) -> float:
        """Estimate the time to find all pairs of random hashes, on one core."""
        pairs = num_hashes**2 / 2
        if self.num_shared == 0:
            return pairs * _BULK_NS
        candidates = pairs / (1 << self.key_bits(num_hashes))
        return self.num_tables * (2 * num_hashes * _ROW_NS + candidates * _CANDIDATE_NS)


def plan_search(num_hashes: int, max_bits: int) -> SearchPlan:
    """Choose the cheapest plan to find all pairs among ``num_hashes`` hashes within ``max_bits``."""
    plans = [SearchPlan(max(max_bits + shared, 1), shared) for shared in range(_MAX_SHARED + 1)]
    usable = [p for p in plans if p.num_tables <= _MAX_TABLES and p.num_groups <= HASH_BITS]
    return min(usable, key=lambda plan: plan.cost_ns(num_hashes))


# ---- the search -----------------------------------------------------------------------------------------------------


class HashRelation:
    """Images whose hashes differ in few bits and whose tones differ in few levels; see ``keepers.Relation``.

    The hash of luminance alone takes a red and a green shape of equal brightness for the same; the tones tell them
    apart.

    Args:
        hashes: ``(n,)``.
        tones: ``(n, 48)``.
        max_bits: bits that may differ (r).
        max_levels: levels by which each tone may differ.
        plan: how to search.
    """

    def __init__(self, hashes: Hashes, tones: Tones, *, max_bits: int, max_levels: int, plan: SearchPlan) -> None:
        # The order of the bits does not change distances. Bits that are alike in most images tell little: every group
        # gets its share of them.
        self._hashes, self._groups = _dealt(hashes, plan.num_groups)
        self._tones = tones
        self._max_bits, self._max_levels = max_bits, max_levels
        self._plan = plan
        self._rows = np.zeros(0, np.int64)
        self._tables: list[_Table] = []
        self._flat: faiss.IndexBinaryFlat | None = None

    def among(self, rows: Rows) -> Pairs:
        """Compare all pairs, in stripes."""
        hashes = self._hashes[rows]
        earlier, later = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start in range(0, len(rows), _ROWS_PER_STRIPE):
            stripe = hashes[start : start + _ROWS_PER_STRIPE]
            close = np.bitwise_count(stripe[:, None] ^ hashes[None, start:]) <= self._max_bits
            i, j = np.divmod(np.flatnonzero(close), close.shape[1])
            i, j = i[i < j], j[i < j]
            a, b = self._of_near_tones(rows[start + i], rows[start + j])
            earlier.append(a)
            later.append(b)
        return np.concatenate(earlier), np.concatenate(later)

    def narrow(self, rows: Rows) -> None:
        """Build what is searched."""
        self._rows = rows
        hashes = self._hashes[rows]
        if self._plan.num_shared == 0:
            self._flat = faiss.IndexBinaryFlat(HASH_BITS)
            self._flat.add(_as_bytes(hashes))
            return
        bits = self._plan.key_bits(len(rows))
        chosen = itertools.combinations(self._groups, self._plan.num_shared)
        self._tables = [_Table(groups, bits, hashes) for groups in chosen]

    def search(self, rows: Rows, *, after: int) -> Iterator[Pairs]:
        """Find the pairs, table by table."""
        queries = self._hashes[rows]
        start = int(np.searchsorted(self._rows, after, side="right"))
        found = self._in_bulk(queries, start) if self._plan.num_shared == 0 else self._in_tables(queries, start)
        for query, position in found:
            yield self._of_near_tones(rows[query], self._rows[position])

    def _in_bulk(self, queries: Hashes, start: int) -> Iterator[Pairs]:
        assert self._flat is not None
        size = max(1, _BULK_PAIRS_PER_CHUNK // max(len(self._rows), 1))
        for first in range(0, len(queries), size):
            chunk = _as_bytes(queries[first : first + size])
            # faiss finds what is nearer than the radius, not what is at it.
            limits, _, position = self._flat.range_search(chunk, self._max_bits + 1)
            query = np.repeat(np.arange(first, first + len(chunk)), (limits[1:] - limits[:-1]).astype(np.int64))
            yield query[position >= start], position[position >= start]

    def _in_tables(self, queries: Hashes, start: int) -> Iterator[Pairs]:
        hashes = self._hashes[self._rows] if len(self._rows) < len(self._hashes) else self._hashes
        for table in self._tables:
            for query, position in table.candidates(queries):
                query, position = query[position >= start], position[position >= start]
                close = np.bitwise_count(queries[query] ^ hashes[position]) <= self._max_bits
                yield query[close], position[close]

    def _of_near_tones(self, a: Rows, b: Rows) -> Pairs:
        near = np.zeros(len(a), np.bool_)
        for start in range(0, len(a), _TONES_PER_CHUNK):
            chunk = slice(start, start + _TONES_PER_CHUNK)
            one, other = self._tones[a[chunk]], self._tones[b[chunk]]
            near[chunk] = (np.maximum(one, other) - np.minimum(one, other)).max(axis=1) <= self._max_levels
        return a[near], b[near]


class _Table:
    """Hashes by a key of some of their groups of bits: a counting sort with direct lookup."""

    def __init__(self, groups: tuple[_Group, ...], bits: int, hashes: Hashes) -> None:
        self._groups, self._mask = groups, np.uint64((1 << bits) - 1)
        keys = self._keys(hashes)
        whole = np.int32 if len(hashes) < 2**31 else np.int64
        self._starts = np.zeros((1 << bits) + 1, whole)
        np.cumsum(np.bincount(keys, minlength=1 << bits), out=self._starts[1:])
        self._positions = np.argsort(keys).astype(self._starts.dtype)

    def _keys(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        keys = np.zeros(len(hashes), np.uint64)
        for group in self._groups:
            part = hashes >> np.uint64(group.offset)
            part &= np.uint64(group.mask)
            keys <<= np.uint64(group.size)
            keys |= part
        keys &= self._mask
        return keys.view(np.int64)

    def candidates(self, queries: Hashes) -> Iterator[Pairs]:
        """Pair every query with the positions that share its key, in chunks of bounded size."""
        keys = self._keys(queries)
        starts = self._starts[keys].astype(np.int64)
        counts = self._starts[keys + 1].astype(np.int64) - starts
        ends = np.cumsum(counts)
        first = 0
        while first < len(queries):
            # As many queries as fit a chunk, and at least one.
            reached = ends[first] - counts[first] + _CANDIDATES_PER_CHUNK
            last = max(first + 1, int(np.searchsorted(ends, reached, side="right")))
            part = counts[first:last]
            query = np.repeat(np.arange(first, last), part)
            within = np.arange(len(query)) - np.repeat(np.cumsum(part) - part, part)
            yield query, self._positions[starts[query] + within].astype(np.int64)
            first = last


@dataclass(frozen=True)
class _Group:
    """Neighbouring bits of a hash."""

    offset: int
    size: int

    @property
    def mask(self) -> int:
        return (1 << self.size) - 1


def _dealt(hashes: Hashes, num_groups: int) -> tuple[Hashes, list[_Group]]:
    """Reorder the bits of all hashes: dealt to groups in turn, the most telling (most balanced) first.

    Returns:
        The hashes with their bits in the new order, and where each group lies.
    """
    ones = np.array([int(((hashes >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(HASH_BITS)])
    telling_first = np.argsort(np.abs(2 * ones - len(hashes)), kind="stable")
    dealt = np.zeros_like(hashes)
    groups: list[_Group] = []
    offset = 0
    for group in range(num_groups):
        bits = telling_first[group::num_groups]
        groups.append(_Group(offset, len(bits)))
        for bit in bits:
            dealt |= ((hashes >> np.uint64(bit)) & np.uint64(1)) << np.uint64(offset)
            offset += 1
    return dealt, groups


def _as_bytes(hashes: Hashes) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), HASH_BITS // 8)
