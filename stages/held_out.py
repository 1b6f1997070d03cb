"""Samples that a training never sees, so that its loss on them says how it does on new ones.

Which samples those are is a function of the data alone. They lie in at most ``MAX_SHARDS`` shards spread evenly over
the data set, each giving in proportion to its size; within a shard they are those whose keys have the smallest hashes.
All models of a run therefore leave out the same samples, and an open shard has them behind the ones to train on
(``held_out_last``), so that the order of the training (``stages/sample_order.py``) only sees smaller shards.
"""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.dataset import Batch, PrepareSample
from stages.errors import InputError, IntegrityError
from stages.open_shard import BadSampleError, OpenShard, TrainingShard, sample_number
from unclip_models.randomness import SampleRandom

logger = logging.getLogger(__name__)

MAX_SHARDS = 16


def held_out_counts(shard_sizes: Sequence[int], num_samples: int, *, share: float = 0.5) -> list[int]:
    """Say how many samples every shard holds out.

    Args:
        shard_sizes: kept samples of every shard, in plan order.
        num_samples: to hold out in all.
        share: of the samples that may be held out at most; 1 for a set that is not trained on.

    Raises:
        InputError: if that is more than this share of the samples of the shards they would come from.
    """
    num_shards = len(shard_sizes)
    chosen = sorted({i * num_shards // MAX_SHARDS for i in range(MAX_SHARDS)}) if num_shards > MAX_SHARDS else None
    sizes = [size if chosen is None or i in chosen else 0 for i, size in enumerate(shard_sizes)]
    total = sum(sizes)
    if num_samples > share * total:
        raise InputError(
            f"{num_samples} samples cannot be held out of the {total} in {min(num_shards, MAX_SHARDS)} shards, at most "
            f"{'half' if share == 0.5 else 'all'} may be; lower validation.num_samples"
        )
    ends = [end * num_samples // max(total, 1) for end in accumulate(sizes, initial=0)]
    return [end - start for start, end in pairwise(ends)]


class HeldOut(Protocol):
    """Where validation gets its samples."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def load(self, first: int, last: int, *, whole: bool = False) -> Batch:
        """Fetch the samples ``first .. last - 1``.

        Args:
            first: position among the held-out samples.
            last: likewise.
            whole: images as they are, not what the training makes of them.

        Returns:
            The batch; its indices are functions of the samples' keys.
        """
        ...


class HeldOutSamples:
    """The held-out samples of committed shards.

    Args:
        shards: the data set, in plan order, with ``num_held_out`` set.
        root: the store.
        seed: of what ``prepare`` draws.
        image_size_px: side of the images; None leaves them alone.
        tokenize: captions -> int64 ``(n, ctx)``, to have ``tokens``.
        embeddings: whether to have ``image_embedding`` and ``text_embedding``.
        prepare: makes a sample's tensors of its image; None takes the image as it is.
    """

    def __init__(
        self,
        shards: Sequence[TrainingShard],
        *,
        root: str,
        seed: int,
        image_size_px: int | None = None,
        tokenize: Callable[[Sequence[str]], Tensor] | None = None,
        embeddings: bool = False,
        prepare: PrepareSample | None = None,
    ) -> None:
        self._shards = shards
        self._root = root
        self._seed = seed
        self._image_size_px = image_size_px
        self._tokenize = tokenize
        self._embeddings = embeddings
        self._prepare = prepare
        self._told: set[tuple[object, ...]] = set()
        self._starts = list(accumulate((shard.num_held_out for shard in shards), initial=0))

    def __len__(self) -> int:
        """See ``HeldOut``."""
        return self._starts[-1]

    def load(self, first: int, last: int, *, whole: bool = False) -> Batch:
        """See ``HeldOut.load``."""
        rows = list(self._rows(first, last, whole))
        names = rows[0][1].keys()
        tensors = {name: torch.stack([row[name] for _, row in rows]) for name in names}
        return Batch(0, [index for index, _ in rows], tensors)

    def _rows(self, first: int, last: int, whole: bool) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        position = first
        while position < last:
            number = bisect_right(self._starts, position) - 1
            shard = self._shards[number]
            end = min(last, self._starts[number + 1])
            with contextlib.closing(self._open(shard)) as opened:
                for row in range(position - self._starts[number], end - self._starts[number]):
                    yield self._good_sample(opened, shard, row, whole)
            position = end

    def _good_sample(
        self, opened: OpenShard, shard: TrainingShard, row: int, whole: bool
    ) -> tuple[int, Mapping[str, Tensor]]:
        """Return a held-out sample, or the next one of its shard that can be decoded: the same in every look.

        Raises:
            IntegrityError: if there is none.
        """
        for turn in range(shard.num_held_out):
            try:
                return self._sample(opened, shard.num_trained + (row + turn) % shard.num_held_out, whole)
            except BadSampleError as error:
                if error.args not in self._told:
                    self._told.add(error.args)
                    logger.warning("%s; of the held-out samples the one after it is looked at twice", error)
        raise IntegrityError(
            f"none of the {shard.num_held_out} held-out samples of a shard can be decoded; run `unclip repair`, or set "
            "validation.num_samples to 0"
        )

    def _sample(self, shard: OpenShard, row: int, whole: bool) -> tuple[int, Mapping[str, Tensor]]:
        index = sample_number(shard.keys[row])
        tensors: dict[str, Tensor] = {}
        if self._image_size_px is not None:
            image = shard.image(row, keep=False)  # (S, S, 3)
            if whole or self._prepare is None:
                tensors["image"] = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()  # (3, S, S)
            else:
                tensors |= self._prepare(image, SampleRandom(self._seed, 0, [index]))
        if self._embeddings:
            for name in ("image_embedding", "text_embedding"):
                tensors[name] = torch.from_numpy(shard.vectors[name][row].astype(np.float32))  # (D,)
        if self._tokenize is not None:
            tensors["tokens"] = self._tokenize([shard.caption(row)])[0]  # (ctx,)
        return index, tensors

    def _open(self, shard: TrainingShard) -> OpenShard:
        return OpenShard(
            shard,
            self._root,
            image_size_px=self._image_size_px,
            captions=self._tokenize is not None,
            vectors=self._embeddings,
        )
