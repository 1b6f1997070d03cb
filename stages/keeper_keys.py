"""Keys of the samples that keep others out: looked up once, in the tables of the shards that hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from stages.keepers import NONE, Rows
from stages.manifest import ShardRecord
from stages.ranks import parts_of

_IO_THREADS = 16


class KeeperKeys:
    """Of a decision on all samples of a data set.

    Args:
        records: of all shards.
        keepers: of every sample, the position of the one that keeps it out, or ``NONE``; ``(n,)``.
        read: returns the keys of all samples of a shard.
    """

    def __init__(
        self, records: Sequence[ShardRecord], keepers: Rows, read: Callable[[ShardRecord], pa.ChunkedArray]
    ) -> None:
        self._rows = np.unique(keepers[keepers != NONE])
        held = []
        for record, part in zip(records, parts_of(records), strict=True):
            first, last = np.searchsorted(self._rows, [part.start, part.stop])
            if last > first:
                held.append((record, pa.array(self._rows[first:last] - part.start)))
        with ThreadPoolExecutor(_IO_THREADS) as pool:
            found = pool.map(lambda pair: read(pair[0]).take(pair[1]), held)
            # Texts get long offsets, for those of a large data set exceed 2 GiB.
            self._keys = pa.chunked_array([keys.cast(pa.large_string()) for keys in found], pa.large_string())
        self._keys = self._keys.combine_chunks()

    def of(self, keepers: Rows) -> pa.Array:
        """Return the keys of some keepers, null for ``NONE``, ``(m,)``."""
        places = np.searchsorted(self._rows, keepers)
        return self._keys.take(pa.array(places, mask=keepers == NONE))
