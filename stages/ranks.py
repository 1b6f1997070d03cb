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


class Ranks:
    """The ranks of all samples of a data set: by list, in the order in which the lists first appear, then by row.

    Args:
        records: of all shards.
    """

    def __init__(self, records: Sequence[ShardRecord]) -> None:
        self._parts = parts_of(records)
        num_samples = self._parts[-1].stop if records else 0
        self._names: list[Sequence[str]] = [()] * len(records)
        self._lists, self._rows = np.zeros(num_samples, np.int32), np.zeros(num_samples, np.int64)

    def note(self, shard: int, samples: pa.Table) -> None:
        """Note the samples of one shard; threads may do so side by side.

        Args:
            shard: position of its record.
            samples: with columns ``list``, the name of the list that each comes from, and ``row``, its row in that.
        """
        coded = samples["list"].combine_chunks().dictionary_encode()
        self._names[shard] = coded.dictionary.to_pylist()
        self._lists[self._parts[shard]] = coded.indices
        self._rows[self._parts[shard]] = samples["row"]

    def order(self) -> Rows | None:
        """Sort the samples, once all shards are noted.

        Returns:
            int64 ``(n,)``: their positions, earliest rank first; None where they lie in that order already.
        """
        known: dict[str, int] = {}
        for names, part in zip(self._names, self._parts, strict=True):
            numbers = np.array([known.setdefault(name, len(known)) for name in names], np.int32)
            self._lists[part] = numbers[self._lists[part]]
        lists, rows = self._lists, self._rows
        ahead = lists[1:] > lists[:-1]
        ahead |= (lists[1:] == lists[:-1]) & (rows[1:] > rows[:-1])
        return None if ahead.all() else np.lexsort((rows, lists)).astype(np.int64)


def in_given_order(order: Rows | None, codes: Codes, keepers: Rows) -> tuple[Codes, Rows]:
    """Bring a decision by rank into the order in which the samples came.

    Args:
        order: positions of all samples, earliest rank first, or None where they came in that order.
        codes: of every sample by rank, ``(n,)``.
        keepers: rank of the sample that keeps each one out, or ``NONE``, by rank, ``(n,)``.

    Returns:
        Both in the order in which the samples came; the keepers as positions in it.
    """
    if order is None:
        return codes, keepers
    given_codes, given_keepers = np.empty_like(codes), np.empty_like(keepers)
    given_codes[order] = codes
    given_keepers[order] = np.where(keepers == NONE, NONE, order[keepers])
    return given_codes, given_keepers


def parts_of(records: Sequence[ShardRecord]) -> list[slice]:
    """Return which rows of the whole data set are each record's, in the order of the records."""
    stops = np.cumsum([record.num_in for record in records], dtype=np.int64).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
