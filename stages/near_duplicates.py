"""Near duplicates by perceptual hash: exact search within a Hamming radius, then the greedy keeper.

First, one table at a time, all images that have no near one at all are set aside (``stages/neighbours.py``). What is
left, in most data sets a small part, is searched with all tables at hand (``stages/hash_tables.py``).

Memory: 16 bytes per image for the first step; then, per image that has a near one, 64 bytes and up to 12 bytes per
table (radius 4: 180 bytes). Candidates are compared in chunks, so a bucket that holds everything costs time, not
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import faiss
import numpy as np
import numpy.typing as npt

from stages.hash_tables import (
    HASH_BITS,
    PAIR_IN_BULK_NS,
    Group,
    Hashes,
    SearchPlan,
    Tones,
    dealt,
    key_groups,
    keys_of,
    plans_for,
)
from stages.keepers import NONE, Pairs, Rows, keepers_of
from stages.neighbours import are_near, rows_with_neighbours

_CANDIDATES_PER_CHUNK = 1 << 20
_BULK_PAIRS_PER_CHUNK = 1 << 24
_ROWS_PER_STRIPE = 128
# What a cost is made of, in ns on one core: a row put into a table, a candidate compared.
_ROW_NS, _CANDIDATE_NS = 150.0, 30.0


def near_duplicates(
    hashes: Hashes,
    tones: Tones,
    *,
    max_bits: int,
    max_levels: int,
    among: Rows | None = None,
    plan: SearchPlan | None = None,
) -> Rows:
    """Find the images that are near an earlier image that is kept.

    Args:
        hashes: perceptual hashes in rank order, ``(n,)``.
        tones: thumbnails of the images, ``(n, 48)``, 0 to 255.
        max_bits: bits of the hashes that may differ.
        max_levels: levels by which each tone may differ.
        among: the rows to decide about, ascending ``(m,)``, as if there were no others; all by default.
        plan: how hashes are searched; by default the cheapest way. All find the same.

    Returns:
        int64 ``(m,)``: of every near duplicate, the row of the earliest kept image near it; ``NONE`` of every kept
        image.
    """
    rows = np.arange(len(hashes), dtype=np.int64) if among is None else among
    near = rows_with_neighbours(hashes, tones, rows, max_bits=max_bits, max_levels=max_levels)
    keepers = np.full(len(rows), NONE, np.int64)
    found = _decided(hashes[rows[near]], tones[rows[near]], max_bits, max_levels, plan)
    keepers[near] = np.where(found == NONE, NONE, rows[near][found])
    return keepers


def _decided(hashes: Hashes, tones: Tones, max_bits: int, max_levels: int, plan: SearchPlan | None) -> Rows:
    """Decide about all of some images; return positions among them."""
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


def plan_search(num_hashes: int, max_bits: int) -> SearchPlan:
    """Choose the cheapest plan to find all pairs among ``num_hashes`` random hashes within ``max_bits``."""
    return min(plans_for(max_bits), key=partial(_cost_ns, num_hashes))


def _cost_ns(num_hashes: int, plan: SearchPlan) -> float:
    pairs = num_hashes**2 / 2
    if plan.num_shared == 0:
        return pairs * PAIR_IN_BULK_NS
    candidates = pairs / (1 << _key_bits(num_hashes, plan))
    return plan.num_tables * (2 * num_hashes * _ROW_NS + candidates * _CANDIDATE_NS)


def _key_bits(num_hashes: int, plan: SearchPlan) -> int:
    """No more bits than it takes to tell that many hashes apart: a table is looked up by the key itself."""
    return min(plan.key_bits, max(num_hashes - 1, 1).bit_length())


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
        self._hashes, self._groups = dealt(hashes, plan.num_groups)
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
        bits = _key_bits(len(rows), self._plan)
        self._tables = [_Table(groups, bits, hashes) for groups in key_groups(self._plan, self._groups)]

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
        near = are_near(self._tones, a, b, self._max_levels)
        return a[near], b[near]


class _Table:
    """Hashes by a key of some of their groups of bits: a counting sort with direct lookup."""

    def __init__(self, groups: tuple[Group, ...], bits: int, hashes: Hashes) -> None:
        self._groups, self._bits = groups, bits
        keys = self._keys(hashes)
        whole = np.int32 if len(hashes) < 2**31 else np.int64
        self._starts = np.zeros((1 << bits) + 1, whole)
        np.cumsum(np.bincount(keys, minlength=1 << bits), out=self._starts[1:])
        self._positions = np.argsort(keys).astype(self._starts.dtype)

    def _keys(self, hashes: Hashes) -> Rows:
        return keys_of(hashes, self._groups, self._bits).view(np.int64)

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


def _as_bytes(hashes: Hashes) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(hashes).view(np.uint8).reshape(len(hashes), HASH_BITS // 8)
