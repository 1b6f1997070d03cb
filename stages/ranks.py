"""The rank of samples: their position in the data set, whatever shards they came in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stages.keepers import Rows


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
