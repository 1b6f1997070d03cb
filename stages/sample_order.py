"""In which order a training sees its samples: a pure function of (seed, position), never of the cluster or of history.

The kept samples of all shards, in shard order, are cut into ``num_streams`` contiguous slices whose sizes differ by at
most one. Each slice is a canonical stream. A stream's samples lie in segments, one per shard it touches; every epoch
permutes the segments, and the samples inside each, by (seed, epoch, stream). Every global batch takes the same number
of samples from every stream. The streams are dealt to the ranks in blocks, so the samples of step k are the same for
any world size that divides ``num_streams``, and the position in the data is one integer: the step.

Several data sets are each cut into as many streams of their own; ``stages/mixture.py`` says which of them every
position of a stream reads. An unreadable sample is replaced by one of those that follow it (``substitutes``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from stages.errors import ConfigError, InputError
from stages.mixture import Mixture


class Place(NamedTuple):
    """Where a sample is: the shard, counted over all data sets, and its position among the shard's kept samples."""

    shard: int
    row: int


class Draw(NamedTuple):
    """One sample of a global batch.

    Attributes:
        sample_index: global sample index, counted over all steps; unique, and the key of the sample's randomness.
        place: which sample it is.
        upcoming: the shard that the same stream of the same data set reads next, to be opened ahead of time.
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
        mixed_in: kept samples of every shard of every further data set.
        shares: of all data sets, if there are several; see ``stages.mixture.Mixture``.

    Raises:
        ConfigError: if the batch is no multiple of the streams.
        InputError: if a data set has fewer samples than there are streams.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        num_streams: int,
        global_batch_size: int,
        seed: int,
        mixed_in: Sequence[Sequence[int]] = (),
        shares: Sequence[Fraction] = (Fraction(1),),
    ) -> None:
        if global_batch_size % num_streams:
            raise ConfigError(
                f"global_batch_size: {global_batch_size} is not a multiple of num_streams: {num_streams}; "
                "every batch takes the same number of samples from every stream"
            )
        self.num_streams = num_streams
        self.num_datasets = 1 + len(mixed_in)
        self.global_batch_size = global_batch_size
        self.per_stream = global_batch_size // num_streams
        self._mixture = Mixture(shares, num_streams)
        self._streams: list[list[_Stream]] = []  # by data set and stream
        first_shard = 0
        for dataset, sizes in enumerate([shard_sizes, *mixed_in]):
            self._streams.append(_streams_of(sizes, first_shard, num_streams, (seed, dataset)))
            first_shard += len(sizes)

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
            for j in range(self.per_stream):
                dataset, position = self._mixture.turn(s, step * self.per_stream + j)
                draws.append(Draw(first_index + j, *self._streams[dataset][s].read(position)))
        return draws

    def substitutes(self, sample_index: int) -> Iterator[Place]:
        """List what may stand in for a sample that cannot be read, best first.

        They are the other samples of its shard that its stream has, in the order of that epoch, from the sample on and
        round: a function of the sample's index alone, and of a shard that is open.
        """
        step, within = divmod(sample_index, self.global_batch_size)
        stream, j = divmod(within, self.per_stream)
        dataset, position = self._mixture.turn(stream, step * self.per_stream + j)
        return self._streams[dataset][stream].following(position)


class _Stream:
    """One canonical stream of a data set: its segments, and the permutations of the epoch and segment read last."""

    def __init__(self, segments: Sequence[_Segment], key: Sequence[int]) -> None:
        self._segments = segments
        self._key = key
        self._length = sum(segment.length for segment in segments)
        self._epoch = -1
        self._order: Sequence[int] = ()
        self._starts: Sequence[int] = ()
        self._rows: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.empty(0, dtype=np.int64))

    def read(self, position: int) -> tuple[Place, int]:
        """Give the sample at a position, counted over all epochs, and the shard of the next segment."""
        epoch, turn, row = self._find(position)
        segment = self._segments[self._order[turn]]
        upcoming = self._order[turn + 1] if turn + 1 < len(self._order) else self._order[turn]
        rows = self._permuted(epoch, turn)
        return Place(segment.shard, segment.first + int(rows[row])), self._segments[upcoming].shard

    def following(self, position: int) -> Iterator[Place]:
        """Give the other samples of the segment, from a position on and round."""
        epoch, turn, row = self._find(position)
        segment = self._segments[self._order[turn]]
        rows = self._permuted(epoch, turn)
        for i in range(row + 1, row + segment.length):
            yield Place(segment.shard, segment.first + int(rows[i % segment.length]))

    def _find(self, position: int) -> tuple[int, int, int]:
        """Split a position into epoch, turn of the segment in it, and place in the segment's permutation."""
        epoch, offset = divmod(position, self._length)
        self._enter(epoch)
        turn = bisect_right(self._starts, offset) - 1
        return epoch, turn, offset - self._starts[turn]

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
        seed, stream, *dataset = self._key
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([abs(seed), seed < 0, stream, epoch, purpose, *dataset]))
        )


def _streams_of(
    shard_sizes: Sequence[int], first_shard: int, num_streams: int, seed_and_dataset: tuple[int, int]
) -> list[_Stream]:
    """Cut a data set into its streams."""
    seed, dataset = seed_and_dataset
    total = sum(shard_sizes)
    if total < num_streams:
        raise InputError(
            f"{total} samples are kept, fewer than num_streams: {num_streams}; lower it or keep more samples"
        )
    streams = []
    for s in range(num_streams):
        segments = _cut(shard_sizes, first_shard, s * total // num_streams, (s + 1) * total // num_streams)
        # The key of the first data set is as it was when there could be only one.
        streams.append(_Stream(segments, (seed, s, dataset) if dataset else (seed, s)))
    return streams


def _cut(shard_sizes: Sequence[int], first_shard: int, first: int, last: int) -> list[_Segment]:
    """List the stretches of shards that the kept samples ``first .. last - 1`` of a data set lie in."""
    segments, start = [], 0
    for shard, size in enumerate(shard_sizes, first_shard):
        low, high = max(first, start), min(last, start + size)
        if low < high:
            segments.append(_Segment(shard, low - start, high - low))
        start += size
    return segments
