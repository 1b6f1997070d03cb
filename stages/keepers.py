"""The greedy keeper: of things that are near each other, the earliest stays.

Walking rows in order, a row is dropped if it is near an earlier row that was kept. The outcome depends on the order of
the rows and on who is near whom, and on nothing else. Who is near whom is a ``Relation``: perceptual hashes
(``stages/near_duplicates.py``) or embeddings (``stages/semantic_duplicates.py``).

Rows are decided block by block. Inside a block all pairs are compared; then the kept rows of the block look for later
rows near them, which are dropped at once and never looked at again. So no list of all pairs is ever held, which for n
images of one motif would have n**2 / 2 entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Pairs = tuple[Rows, Rows]

NONE = -1
_ROWS_PER_BLOCK = 1024


class Relation(Protocol):
    """Who is near whom among rows ``0 .. n - 1``: symmetric and fixed."""

    def among(self, rows: Rows) -> Pairs:
        """Return all pairs of near rows among ``rows`` (ascending), the earlier row of each pair first."""

    def narrow(self, rows: Rows) -> None:
        """Make ``search`` look among ``rows`` (ascending) only, from now on; called before the first search."""

    def search(self, rows: Rows, *, after: int) -> Iterable[Pairs]:
        """Find rows after ``after`` that are near ``rows``.

        Yields:
            Pairs of one of ``rows`` and a row near it, in chunks; a pair may come repeatedly.
        """


def keepers_of(num_rows: int, relation: Relation, *, rows_per_block: int = _ROWS_PER_BLOCK) -> Rows:
    """Decide which rows stay.

    Args:
        num_rows: n; rows are walked in the order ``0 .. n - 1``.
        relation: who is near whom.
        rows_per_block: rows compared pair by pair at once; changes speed and memory, never the outcome.

    Returns:
        int64 ``(n,)``: of every dropped row, the earliest kept row near it; ``NONE`` of every kept row.
    """
    nobody = num_rows  # later than every row, so that the earliest keeper is a minimum
    keepers = np.full(num_rows, nobody, np.int64)
    undecided = np.arange(num_rows, dtype=np.int64)
    num_searchable = 0
    while len(undecided):
        block, undecided = undecided[:rows_per_block], undecided[rows_per_block:]
        _decide(keepers, relation.among(block), nobody)
        if not len(undecided):
            break
        # What `search` looks through is built anew whenever half of it has been decided.
        if not num_searchable or 2 * len(undecided) <= num_searchable:
            relation.narrow(undecided)
            num_searchable = len(undecided)
        for keeper, found in relation.search(block[keepers[block] == nobody], after=int(block[-1])):
            np.minimum.at(keepers, found, keeper)
        undecided = undecided[keepers[undecided] == nobody]
    keepers[keepers == nobody] = NONE
    return keepers


def _decide(keepers: Rows, pairs: Pairs, nobody: int) -> None:
    """Decide the rows of one block from all its pairs, in order."""
    order = np.argsort(pairs[0], kind="stable")
    earlier, starts = np.unique(pairs[0][order], return_index=True)
    for row, near in zip(earlier, np.split(pairs[1][order], starts[1:]), strict=False):
        if keepers[row] == nobody:
            keepers[near] = np.minimum(keepers[near], row)
