"""In which order a training sees its samples: a pure function of (seed, position), never of the cluster or of history.

The kept samples of all shards, in shard order, are cut into ``num_streams`` contiguous slices whose sizes differ by at
most one. Each slice is a canonical stream. A stream's samples lie in segments, one per shard it touches; every epoch
permutes the segments, and the samples inside each, by (seed, epoch, stream). Every global batch takes the same number
of samples from every stream. The streams are dealt to the ranks in blocks, so the samples of step k are the same for
any world size that divides ``num_streams``, and the position in the data is one integer: the step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from stages.errors import ConfigError, InputError


class Place(NamedTuple):
    """Where a sample is: the shard, and its position among the kept samples of the shard."""

    shard: int
    row: int


class Draw(NamedTuple):
    """One sample of a global batch.

    Attributes:
        sample_index: global sample index, counted over all steps; unique, and the key of the sample's randomness.
        place: which sample it is.
        upcoming: the shard that the same stream reads next, to be opened ahead of time.
    """

    sample_index: int
    place: Place
    upcoming: int


@dataclass(frozen=True)
class _Segment:
    """Kept samples ``first .. first + length - 1`` of one shard."""

    shard: int
    first: int
    length: int


class SampleOrder:
    """The order of the samples of one training.

    Args:
        shard_sizes: kept samples of every shard, in plan order.
        num_streams: canonical streams.
        global_batch_size: samples per optimizer step over all ranks.
        seed: of the permutations.

    Raises:
        ConfigError: if the batch is no multiple of the streams.
        InputError: if there are fewer samples than streams.
    """

    def __init__(self, shard_sizes: Sequence[int], *, num_streams: int, global_batch_size: int, seed: int) -> None:
        total = sum(shard_sizes)
        if global_batch_size % num_streams:
            raise ConfigError(
                f"global_batch_size: {global_batch_size} is not a multiple of num_streams: {num_streams}; "
                "every batch takes the same number of samples from every stream"
            )
        if total < num_streams:
            raise InputError(
                f"{total} samples are kept, fewer than num_streams: {num_streams}; lower it or keep more samples"
            )
        self.num_streams = num_streams
        self.global_batch_size = global_batch_size
        self.per_stream = global_batch_size // num_streams
        self._streams = [
            _Stream(_cut(shard_sizes, s * total // num_streams, (s + 1) * total // num_streams), seed, s)
            for s in range(num_streams)
        ]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[Draw]:
        """List the samples of one rank's part of the global batch of ``step``, in order.

        Raises:
            ConfigError: if the streams cannot be dealt evenly to the ranks.
        """
        if self.num_streams % world_size:
            raise ConfigError(
                f"num_streams: {self.num_streams} cannot be dealt evenly to {world_size} ranks; "
                "use a number of ranks that divides it"
            )
        share = self.num_streams // world_size
        draws = []
        for s in range(rank * share, (rank + 1) * share):
            first_index = step * self.global_batch_size + s * self.per_stream
            for j, (place, upcoming) in enumerate(self._streams[s].read(step * self.per_stream, self.per_stream)):
                draws.append(Draw(first_index + j, place, upcoming))
        return draws


class _Stream:
    """One canonical stream: its segments, and the permutations of the epoch and segment read last."""

    def __init__(self, segments: Sequence[_Segment], seed: int, stream: int) -> None:
        self._segments = segments
        self._key = (seed, stream)
        self._length = sum(segment.length for segment in segments)
        self._epoch = -1
        self._order: Sequence[int] = ()
        self._starts: Sequence[int] = ()
        self._rows: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, dtype=np.int64))

    def read(self, position: int, count: int) -> Iterator[tuple[Place, int]]:
        """Give ``count`` samples from ``position`` on (counted over all epochs), each with the next segment's shard."""
        for p in range(position, position + count):
            epoch, offset = divmod(p, self._length)
            self._enter(epoch)
            turn = bisect_right(self._starts, offset) - 1
            segment = self._segments[self._order[turn]]
            row = int(self._permuted(epoch, turn)[offset - self._starts[turn]])
            upcoming = self._order[turn + 1] if turn + 1 < len(self._order) else self._order[turn]
            yield Place(segment.shard, segment.first + row), self._segments[upcoming].shard

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._order = self._generator(epoch, 0).permutation(len(self._segments)).tolist()
        lengths = [self._segments[i].length for i in self._order]
        self._starts = [0, *accumulate(lengths)][:-1]
        self._epoch = epoch

    def _permuted(self, epoch: int, turn: int) -> np.ndarray:
        if self._rows[0] != (epoch, turn):
            segment = self._order[turn]
            rows = self._generator(epoch, 1 + segment).permutation(self._segments[segment].length)
            self._rows = ((epoch, turn), rows)
        return self._rows[1]

    def _generator(self, epoch: int, purpose: int) -> np.random.Generator:
        seed, stream = self._key
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([abs(seed), seed < 0, stream, epoch, purpose]))
        )


def _cut(shard_sizes: Sequence[int], first: int, last: int) -> list[_Segment]:
    """List the stretches of shards that the kept samples ``first .. last - 1`` lie in."""
    segments, start = [], 0
    for shard, size in enumerate(shard_sizes):
        low, high = max(first, start), min(last, start + size)
        if low < high:
            segments.append(_Segment(shard, low - start, high - low))
        start += size
    return segments
