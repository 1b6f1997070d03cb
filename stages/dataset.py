"""The training stream: images, embeddings and captions of the selected samples, joined by key, batch by batch.

``SampleOrder`` says which samples make the batch of step k; this module fetches them. A shard's tar stays on disk and
single images are read out of it, so memory holds indices, embeddings and the images cached within ``cache_gib``. One
thread works ahead of the training by a few batches; opening the shard a stream needs next and decoding run beside it,
and so does what a training makes of a decoded image before the step, such as an upsampler's crop and degradation.

An image that cannot be decoded is named, counted, and replaced by one that ``SampleOrder.substitutes`` lists: the same
one on any cluster and after any restart. A file that is missing or damaged as a whole ends the training.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from stages.data_parts import DECODING, OPENING, PREPARING, TOKENISING, PartTimes
from stages.disk_cache import DiskCache
from stages.errors import IntegrityError
from stages.open_shard import BadSampleError, OpenShard, TrainingShard
from stages.sample_order import Draw, Place, SampleOrder
from stages.units import GIB
from unclip_models.randomness import SampleRandom

logger = logging.getLogger(__name__)

T = TypeVar("T")
# (image uint8 (S, S, 3), the sample's randomness of the step) -> the sample's tensors, by name
PrepareSample = Callable[[np.ndarray, SampleRandom], Mapping[str, Tensor]]

_MEMO_CAPTIONS = 100_000
_NUM_OPENERS = 2
_POLL_S = 0.1
_MAX_WARNINGS = 100


@dataclass(frozen=True)
class Batch:
    """One rank's part of the global batch of a step.

    Attributes:
        step: optimizer step, from 0.
        indices: global sample index of every row.
        tensors: ``image`` uint8 ``(B, 3, S, S)``, or what the training prepares of it; ``image_embedding`` and
            ``text_embedding`` float32 ``(B, D)``; ``tokens`` int64 ``(B, ctx)``; those that were asked for.
        num_bad: samples that could not be decoded and were replaced.
        work_s: seconds that making the batch took, by part of the work (``stages/data_parts.py``).
    """

    step: int
    indices: Sequence[int]
    tensors: Mapping[str, Tensor]
    num_bad: int = 0
    work_s: Mapping[str, float] = field(default_factory=dict)

    def part(self, first: int, last: int, device: torch.device) -> dict[str, Tensor]:
        """Move rows ``first .. last - 1`` to a device; images become float32 in [-1, 1] there."""
        parts = {}
        for name, tensor in self.tensors.items():
            moved = tensor[first:last].to(device, non_blocking=True)
            parts[name] = moved.float().div_(127.5).sub_(1.0) if name == "image" else moved
        return parts


class Stream(Protocol):
    """Where the training loop gets its batches."""

    global_batch_size: int

    def batches(self, first_step: int, rank: int, world_size: int) -> Generator[Batch, None, None]:
        """Give this rank's batches from ``first_step`` on, without end; closing the iterator stops all its threads."""
        ...


@dataclass(frozen=True)
class MixedIn:
    """A further data set of a training: its shards, in plan order, and the store they are in."""

    shards: Sequence[TrainingShard]
    root: str


class TrainingStream:
    """The stream over committed shards.

    Args:
        shards: the data set, in plan order.
        root: the store.
        num_streams: see ``SampleOrder``.
        global_batch_size: samples per optimizer step over all ranks.
        seed: of the order, and of what ``prepare`` draws.
        image_size_px: side of the images; needed where the shards have images.
        tokenize: captions -> int64 ``(n, ctx)``, to have ``tokens``.
        embeddings: whether to have ``image_embedding`` and ``text_embedding``.
        prepare: makes a sample's tensors of its image in the threads that decode; None takes the image as it is.
            Its randomness is that of (seed, step, sample index), the very one the training step has.
        num_decode_threads: threads that decode and prepare images, beside the one that assembles batches; 0 does so in
            that one.
        prefetch_batches: batches made ahead of the training.
        cache_gib: open shards and decoded images kept per rank (and their tars, if the store is remote); what the
            present batch and the next shards need is kept in any case.
        disk_cache: where files of remote stores are kept; None reads them anew whenever a shard is opened.
        mixed_in: further data sets.
        shares: of all data sets, in this order; see ``stages.mixture.Mixture``.
    """

    def __init__(
        self,
        shards: Sequence[TrainingShard],
        *,
        root: str,
        num_streams: int,
        global_batch_size: int,
        seed: int,
        image_size_px: int | None = None,
        tokenize: Callable[[Sequence[str]], Tensor] | None = None,
        embeddings: bool = False,
        prepare: PrepareSample | None = None,
        num_decode_threads: int = 0,
        prefetch_batches: int = 4,
        cache_gib: float = 1.0,
        disk_cache: DiskCache | None = None,
        mixed_in: Sequence[MixedIn] = (),
        shares: Sequence[Fraction] = (Fraction(1),),
    ) -> None:
        self._sources = [(shard, root) for shard in shards]
        self._sources += [(shard, other.root) for other in mixed_in for shard in other.shards]
        if image_size_px is not None and any(shard.images is None for shard, _ in self._sources):
            raise IntegrityError("images are wanted for training, but a shard record names no images; run curate again")
        self.global_batch_size = global_batch_size
        self.order = SampleOrder(
            [shard.num_trained for shard in shards],
            num_streams=num_streams,
            global_batch_size=global_batch_size,
            seed=seed,
            mixed_in=[[shard.num_kept for shard in other.shards] for other in mixed_in],
            shares=shares,
        )
        self._seed = seed
        self._prepare = prepare
        self._image_size_px = image_size_px
        self._tokenize = _Memo(tokenize) if tokenize is not None else None
        self._embeddings = embeddings
        self._num_decode_threads = num_decode_threads
        self._prefetch_batches = prefetch_batches
        self._cache_bytes = int(cache_gib * GIB)
        self._disk_cache = disk_cache
        self._known_bad: set[Place] = set()

    def batches(self, first_step: int, rank: int = 0, world_size: int = 1) -> Generator[Batch, None, None]:
        """See ``Stream.batches``."""
        with contextlib.ExitStack() as stack:
            openers = stack.enter_context(ThreadPoolExecutor(_NUM_OPENERS, "unclip-open"))
            pool = stack.enter_context(ThreadPoolExecutor(max(1, self._num_decode_threads), "unclip-decode"))
            # Every stream reads one shard of each data set while its next one is opened.
            num_needed = 2 * self.order.num_datasets * (self.order.num_streams // world_size)
            cache = stack.enter_context(
                contextlib.closing(_ShardCache(self._open, openers, num_needed, self._cache_bytes))
            )
            steps = itertools.count(first_step)
            made = (self._make(step, rank, world_size, cache, pool) for step in steps)
            yield from stack.enter_context(contextlib.closing(_ahead(made, self._prefetch_batches)))

    def _make(self, step: int, rank: int, world_size: int, cache: _ShardCache, pool: ThreadPoolExecutor) -> Batch:
        times = PartTimes()
        draws = self.order.batch(step, rank, world_size)
        with times.of(OPENING):
            for draw in draws:
                cache.prepare(draw.place.shard)
            for draw in draws:
                cache.get(draw.place.shard)
        for draw in draws:
            cache.prepare(draw.upcoming)
        places = [draw.place for draw in draws]
        tensors: dict[str, Tensor] = {}
        num_bad = 0
        if self._image_size_px is not None:
            with times.of_threads(DECODING, PREPARING):
                samples, places = self._samples(step, draws, cache, pool, times)
            tensors |= _stacked(samples)
            num_bad = sum(draw.place != place for draw, place in zip(draws, places, strict=True))
        rows = [(cache.get(place.shard), place.row) for place in places]
        if self._embeddings:
            for name in ("image_embedding", "text_embedding"):
                vectors = np.stack([shard.vectors[name][row] for shard, row in rows])
                tensors[name] = torch.from_numpy(vectors.astype(np.float32))  # (B, D)
        if self._tokenize is not None:
            with times.of(TOKENISING):
                tensors["tokens"] = self._tokenize([shard.caption(row) for shard, row in rows])  # (B, ctx)
        cache.trim()
        return Batch(step, [draw.sample_index for draw in draws], tensors, num_bad, times.seconds)

    def _samples(
        self, step: int, draws: Sequence[Draw], cache: _ShardCache, pool: ThreadPoolExecutor, times: PartTimes
    ) -> tuple[list[Any], list[Place]]:
        """Decode and prepare the images of a batch; return them, and where each of them is in the end."""
        keep, prepare = cache.has_room(), self._prepare

        def attempt(index: int, place: Place) -> Any:
            try:
                with times.of(DECODING):
                    image = cache.get(place.shard).image(place.row, keep=keep)
            except BadSampleError as error:
                self._warn(place, error)
                return error
            if prepare is None:
                return image
            with times.of(PREPARING):
                return prepare(image, SampleRandom(self._seed, step, [index]))

        places = [draw.place for draw in draws]
        run = pool.map if self._num_decode_threads > 1 else map
        made = list(run(attempt, [draw.sample_index for draw in draws], places))
        for i, draw in enumerate(draws):
            substitutes = self.order.substitutes(draw.sample_index)
            while isinstance(made[i], BadSampleError):
                if (place := next(substitutes, None)) is None:
                    raise IntegrityError(f"{made[i]}, and no other of its stretch of the shard; run `unclip repair`")
                made[i], places[i] = attempt(draw.sample_index, place), place
        return made, places

    def _warn(self, place: Place, error: BadSampleError) -> None:
        """Name a bad sample the first time it is met."""
        if place in self._known_bad or len(self._known_bad) > _MAX_WARNINGS:
            return
        self._known_bad.add(place)
        logger.warning("%s; a sample that follows it takes its place", error)
        if len(self._known_bad) > _MAX_WARNINGS:
            logger.warning("further bad samples are counted (num_bad_samples), but no longer named")

    def _open(self, index: int) -> OpenShard:
        shard, root = self._sources[index]
        return OpenShard(
            shard,
            root,
            image_size_px=self._image_size_px,
            captions=self._tokenize is not None,
            vectors=self._embeddings,
            cache=self._disk_cache,
        )


def _stacked(samples: Sequence[Any]) -> dict[str, Tensor]:
    """Join samples, which are images uint8 ``(S, S, 3)`` or tensors by name, to a batch."""
    if isinstance(samples[0], np.ndarray):
        images = np.stack(samples).transpose(0, 3, 1, 2)  # (B, 3, S, S)
        return {"image": torch.from_numpy(np.ascontiguousarray(images))}
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class _ShardCache:
    """Open shards, least recently used first; they are opened on the pool."""

    def __init__(
        self, open_shard: Callable[[int], OpenShard], pool: ThreadPoolExecutor, num_needed: int, max_bytes: int
    ) -> None:
        self._open_shard = open_shard
        self._pool = pool
        self._num_needed = num_needed
        self._max_bytes = max_bytes
        self._shards: OrderedDict[int, Future[OpenShard]] = OrderedDict()

    def prepare(self, shard: int) -> None:
        """Start opening a shard, if it is not open; again if that failed, perhaps an hour before it is needed."""
        if shard not in self._shards or self._has_failed(self._shards[shard]):
            self._shards[shard] = self._pool.submit(self._open_shard, shard)
        self._shards.move_to_end(shard)

    def get(self, shard: int) -> OpenShard:
        """Return an open shard; waits until it is open."""
        return self._shards[shard].result()

    def has_room(self) -> bool:
        """Tell whether more decoded images may be kept."""
        return self._num_bytes() < self._max_bytes

    def trim(self) -> None:
        """Close the shards unused for longest, while there are more than needed and they take too much room."""
        while len(self._shards) > self._num_needed and not self.has_room():
            _, future = self._shards.popitem(last=False)
            future.exception()  # waits
            if not self._has_failed(future):
                future.result().close()

    def close(self) -> None:
        """Close all shards."""
        for future in self._shards.values():
            if not future.cancel() and future.exception() is None:
                future.result().close()
        self._shards.clear()

    @staticmethod
    def _has_failed(future: Future[OpenShard]) -> bool:
        return future.done() and future.exception() is not None

    def _num_bytes(self) -> int:
        done = (future for future in self._shards.values() if future.done() and not self._has_failed(future))
        return sum(future.result().num_bytes for future in done)


class _Memo:
    """Tokens of captions seen before; data sets repeat them epoch after epoch."""

    def __init__(self, tokenize: Callable[[Sequence[str]], Tensor]) -> None:
        self._tokenize = tokenize
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Tokenize captions; int64 ``(n, ctx)``."""
        if len(self._known) > _MEMO_CAPTIONS:
            self._known.clear()
        new = sorted(set(captions) - self._known.keys())
        if new:
            self._known.update(zip(new, self._tokenize(new), strict=True))
        return torch.stack([self._known[caption] for caption in captions])


@dataclass(frozen=True)
class _Failed:
    error: BaseException


def _ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield ``items`` while a thread makes up to ``depth`` of them ahead; closing the generator stops the thread."""
    ready: queue.Queue[T | _Failed] = queue.Queue(maxsize=max(1, depth))
    stopped = threading.Event()

    def put(item: T | _Failed) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_POLL_S)
                return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as error:
            put(_Failed(error))  # raised where the batch is awaited

    thread = threading.Thread(target=work, name="unclip-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()
