"""Tables of 64-bit hashes in which those that are near each other share a key.

Hashes that differ in at most r bits agree on at least k of any r + k disjoint groups of bits. So there is one table for
every choice of k groups, keyed by their bits, and only hashes that share a key in some table need to be compared; for
k = 0 everything is. No pair is missed, whatever the hashes are: groups and tables only decide what a search costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HASH_BITS = 64
Hashes = npt.NDArray[np.uint64]
Tones = npt.NDArray[np.uint8]

PAIR_IN_BULK_NS = 0.7  # what comparing all pairs costs, on one core
_MAX_SHARED, _MAX_TABLES = 3, 64


@dataclass(frozen=True)
class SearchPlan:
    """How hashes are searched: ``num_shared`` (k) of ``num_groups`` (r + k) groups make a key; k = 0 compares all."""

    num_groups: int
    num_shared: int

    @property
    def num_tables(self) -> int:
        """Ways to choose the groups of a key."""
        return math.comb(self.num_groups, self.num_shared)

    @property
    def key_bits(self) -> int:
        """Bits of the shortest key."""
        return self.num_shared * (HASH_BITS // self.num_groups)


def plans_for(max_bits: int) -> list[SearchPlan]:
    """Return the plans to find all pairs within ``max_bits`` that may be worth it; the first compares everything."""
    plans = [SearchPlan(max(max_bits + shared, 1), shared) for shared in range(_MAX_SHARED + 1)]
    return [plan for plan in plans if plan.num_tables <= _MAX_TABLES and plan.num_groups <= HASH_BITS]


@dataclass(frozen=True)
class Group:
    """Neighbouring bits of a hash."""

    offset: int
    size: int

    @property
    def mask(self) -> int:
        """Its bits, moved to the lowest place."""
        return (1 << self.size) - 1


def dealt(hashes: Hashes, num_groups: int) -> tuple[Hashes, list[Group]]:
    """Reorder the bits of all hashes, which changes no distance.

    Bits that are alike in most images tell little. So bits are dealt to the groups in turn, the most telling (most
    balanced) first, and every group gets its share of them.

    Returns:
        The hashes with their bits in the new order, and where each group lies.
    """
    ones = np.array([int(((hashes >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(HASH_BITS)])
    telling_first = np.argsort(np.abs(2 * ones - len(hashes)), kind="stable")
    moved = np.zeros_like(hashes)
    groups: list[Group] = []
    offset = 0
    for group in range(num_groups):
        bits = telling_first[group::num_groups]
        groups.append(Group(offset, len(bits)))
        for bit in bits:
            moved |= ((hashes >> np.uint64(bit)) & np.uint64(1)) << np.uint64(offset)
            offset += 1
    return moved, groups


def key_groups(plan: SearchPlan, groups: list[Group]) -> Iterator[tuple[Group, ...]]:
    """Choose the groups of every table's key."""
    return itertools.combinations(groups, plan.num_shared)


def keys_of(hashes: Hashes, groups: tuple[Group, ...], num_bits: int) -> npt.NDArray[np.uint64]:
    """Return the lowest ``num_bits`` bits of the keys that some groups make, ``(n,)``."""
    keys = np.zeros(len(hashes), np.uint64)
    for group in groups:
        part = hashes >> np.uint64(group.offset)
        part &= np.uint64(group.mask)
        keys <<= np.uint64(group.size)
        keys |= part
    keys &= np.uint64((1 << num_bits) - 1)
    return keys
