"""The rank of samples: their position in the data set, whatever shards they came in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.keepers import NONE, Rows
from stages.manifest import ShardRecord

Codes = TypeVar("Codes", bound=npt.NDArray[np.signedinteger])


def rank_order(lists: pa.ChunkedArray, rows: pa.ChunkedArray) -> Rows:
    """Sort samples by rank: by list, in the order in which the lists first appear, then by row.

    Args:
        lists: name of the list that every sample comes from, ``(n,)``.
        rows: its row in that list, ``(n,)``.

    Returns:
        int64 ``(n,)``: the positions of the samples, earliest rank first.
    """
    # A dictionary holds values in the order of their first appearance.
    codes = np.asarray(lists.dictionary_encode().combine_chunks().indices) if len(lists) else np.zeros(0, np.int32)
    return np.lexsort((rows.to_numpy(), codes)).astype(np.int64)


def in_given_order(order: Rows, codes: Codes, keepers: Rows) -> tuple[Codes, Rows]:
    """Bring a decision by rank into the order in which the samples came.

    Args:
        order: of ``rank_order``, of all samples.
        codes: of every sample by rank, ``(n,)``.
        keepers: rank of the sample that keeps each one out, or ``NONE``, by rank, ``(n,)``.

    Returns:
        Both in the order in which the samples came; the keepers as positions in it.
    """
    given_codes, given_keepers = np.empty_like(codes), np.empty_like(keepers)
    given_codes[order] = codes
    given_keepers[order] = np.where(keepers == NONE, NONE, order[keepers])
    return given_codes, given_keepers


def parts_of(records: Sequence[ShardRecord]) -> list[slice]:
    """Return which rows of the whole data set are each record's, in the order of the records."""
    stops = np.cumsum([record.num_in for record in records], dtype=np.int64).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
