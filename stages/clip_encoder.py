"""A frozen CLIP on its device, as the embed stage uses it: captions and images in, unit-norm embeddings out."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stages.golden import check_feed, check_golden
from stages.image_feed import ImageFeed, read_images

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unclip_models.clip import ClipModel

FloatArray = npt.NDArray[np.float32]
_IN_FLIGHT = 2  # batches that a GPU has been given and has not finished
_CPU_BATCH = 32  # more at once overflow a core's cache: a ViT-B/32 takes a fifth longer at 256


class ClipEncoder:
    """A CLIP that has been checked against its golden embeddings.

    Args:
        path: local weights file, written by the clip stage.
        on_gpu: whether to compute on the GPU.
        precision: ``fp32``, ``bf16`` or ``fp16``; a CPU always uses fp32.
        batch_size: images or captions per forward pass; a CPU takes at most 32.
        num_threads: CPU threads of the model.

    Raises:
        IntegrityError: if the model does not reproduce its golden embeddings here.
    """

    def __init__(self, path: str, *, on_gpu: bool, precision: str, batch_size: int, num_threads: int) -> None:
        import torch

        from unclip_models.checkpoint import read_metadata
        from unclip_models.clip import ClipModel

        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.batch_size = batch_size if on_gpu else min(batch_size, _CPU_BATCH)
        self.precision = precision if on_gpu else "fp32"
        self.num_threads = num_threads
        self.clip: ClipModel = ClipModel.load(path, self.device)
        self.dim = self.clip.embedding_dim
        with self.threads():
            metadata = read_metadata(path)
            check_golden(
                self.clip,
                metadata,
                place=path,
                precisions=tuple(dict.fromkeys(("fp32", self.precision))),
                autocast=self._autocast,
            )
            check_feed(self.clip, metadata, place=path, read=read_images)

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """Compute with the worker's own number of threads inside; restore the process's afterwards."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def feed(self, num_decode_threads: int) -> ImageFeed:
        """Open a feed of images for :meth:`encode_images`."""
        return ImageFeed(
            self.clip.preprocess_config,
            batch_size=self.batch_size,
            num_threads=num_decode_threads,
            pinned=self.device.type == "cuda",
        )

    def encode_captions(self, captions: Sequence[str]) -> FloatArray:
        """Embed captions: unit-norm float32 ``(n, D)``.

        Each distinct caption is embedded once, in batches of about equal length: hardly any padding is computed.
        """
        import torch

        distinct = sorted(set(captions))
        if not distinct:
            return np.zeros((0, self.dim), np.float32)
        tokens = self.clip.tokenize(distinct)
        order = torch.argsort(tokens.argmax(dim=-1), stable=True)
        embeddings = torch.empty(len(distinct), self.dim)
        parts = [self._text(tokens[rows]) for rows in order.split(self.batch_size)]
        embeddings[order] = torch.cat(parts).cpu()
        place = {caption: i for i, caption in enumerate(distinct)}
        return np.asarray(embeddings[[place[caption] for caption in captions]].numpy())

    def encode_images(self, feed: ImageFeed, on_batch: Callable[[int], None]) -> tuple[list[int], FloatArray]:
        """Embed the images of a feed.

        Args:
            feed: to which all images have been added.
            on_batch: called after every batch with the number of images that have been dealt with.

        Returns:
            Positions of the decodable images, and their embeddings, unit-norm float32 ``(n, D)``.
        """
        import torch

        positions: list[int] = []
        parts = [torch.zeros(0, self.dim, device=self.device)]
        in_flight: deque[torch.cuda.Event] = deque()
        for batch in feed.batches():
            parts.append(self._image(batch.pixels.to(self.device, non_blocking=True)))
            positions.extend(batch.positions)
            if self.device.type == "cuda":
                # The embeddings stay on the GPU till the end: nothing but the length of its queue is waited for.
                in_flight.append(torch.cuda.Event())
                in_flight[-1].record()
                if len(in_flight) > _IN_FLIGHT:
                    in_flight.popleft().synchronize()
            on_batch(batch.positions[-1] + 1)
        return positions, np.asarray(torch.cat(parts).cpu().numpy())

    def _image(self, pixels: Tensor) -> Tensor:
        with self._autocast(self.precision):
            return self.clip.encode_image(pixels).float()

    def _text(self, tokens: Tensor) -> Tensor:
        with self._autocast(self.precision):
            return self.clip.encode_text(tokens, trim=True).float()

    def _autocast(self, precision: str) -> contextlib.AbstractContextManager[Any]:
        import torch

        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def threads_of(num_cpus: float) -> int:
    """Return how many threads a worker of ``num_cpus`` cores computes with: whole cores, at least one."""
    return max(1, math.floor(num_cpus))
