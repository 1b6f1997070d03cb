"""Images decoded and resized ahead of the model: in order, in full batches, by a fixed number of threads.

What comes out depends on the images alone, never on which thread was faster: undecodable images leave no gaps, so all
batches but the last are full.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from stages.pictures import to_rgb

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unclip_models.clip_input import ClipPreprocess

_GROUP = 8  # images that a thread takes at once: handing over costs little, and no thread is left waiting for long
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ImageBatch:
    """Some decodable images.

    Attributes:
        positions: which images they are, counted as they were added; increasing.
        pixels: uint8 ``(b, 3, S, S)``, resized and cropped but not yet normalised, so that few bytes go to a GPU;
            channels last in memory.
    """

    positions: Sequence[int]
    pixels: Tensor


class ImageFeed:
    """Decode images in threads while the caller does something else; use it as a context manager.

    Args:
        preprocess: side and crop of the images.
        batch_size: images per batch.
        num_threads: threads that decode; each computes on one core.
        pinned: whether batches lie in page-locked memory, from which a GPU can fetch them by itself.
    """

    def __init__(self, preprocess: ClipPreprocess, *, batch_size: int, num_threads: int, pinned: bool = False) -> None:
        self._preprocess = preprocess
        self._batch_size = batch_size
        self._pinned = pinned
        self._group = min(_GROUP, batch_size)
        self._groups_ahead = num_threads + -(-_BATCHES_AHEAD * batch_size // self._group)
        self._pool = ThreadPoolExecutor(num_threads, "unclip-decode", initializer=_compute_on_one_core)
        self._added: list[bytes] = []
        self._num_submitted = 0
        self._waiting: deque[Future[list[Tensor | None]]] = deque()

    def __enter__(self) -> ImageFeed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, data: bytes) -> None:
        """Add an encoded image file; decoding begins at once, as far as there is room for the results."""
        self._added.append(data)
        if len(self._added) - self._num_submitted >= self._group:
            self._submit()

    def batches(self) -> Iterator[ImageBatch]:
        """Yield all decodable images, in the order added; call it once, after the last ``add``."""
        positions: list[int] = []
        pixels: list[Tensor] = []
        for position, image in enumerate(self._decoded()):
            if image is None:
                continue
            positions.append(position)
            pixels.append(image)
            if len(pixels) == self._batch_size:
                yield ImageBatch(positions, self._stacked(pixels))
                positions, pixels = [], []
        if pixels:
            yield ImageBatch(positions, self._stacked(pixels))

    def _decoded(self) -> Iterator[Tensor | None]:
        self._submit(whole=False)
        while self._waiting:
            group = self._waiting.popleft().result()
            self._submit(whole=False)
            yield from group

    def _submit(self, *, whole: bool = True) -> None:
        """Hand images to the threads until as many are on their way as memory should hold."""
        while len(self._waiting) < self._groups_ahead and self._num_submitted < len(self._added):
            start = self._num_submitted
            group = self._added[start : start + self._group]
            if whole and len(group) < self._group:
                return
            self._added[start : start + self._group] = [b""] * len(group)  # held by the thread alone from now on
            self._num_submitted += len(group)
            self._waiting.append(self._pool.submit(read_images, group, self._preprocess))

    def _stacked(self, pixels: Sequence[Tensor]) -> Tensor:
        """Stack images ``(S, S, 3)`` into a batch ``(b, 3, S, S)``."""
        import torch

        batch = torch.empty((len(pixels), *pixels[0].shape), dtype=torch.uint8, pin_memory=self._pinned)
        return torch.stack(list(pixels), out=batch).permute(0, 3, 1, 2)


def decode_image(data: bytes) -> npt.NDArray[np.uint8] | None:
    """Decode an image file to RGB, uint8 ``(H, W, 3)``, its EXIF orientation ignored; None if that is impossible."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(to_rgb(image), dtype=np.uint8)
    except MemoryError:
        raise
    except Exception:  # of what is wrong with a file, Pillow tells in exceptions of any class
        return None


def read_images(images: Sequence[bytes], preprocess: ClipPreprocess) -> list[Tensor | None]:
    """Decode, resize and crop image files to uint8 ``(S, S, 3)``; None for what cannot be decoded."""
    import torch

    from unclip_models.clip_input import resize_and_crop

    found: list[torch.Tensor | None] = []
    for data in images:
        image = decode_image(data)
        if image is None:
            found.append(None)
            continue
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # channels stay last in memory, as the resize likes it
        found.append(resize_and_crop(pixels, preprocess)[0].permute(1, 2, 0))
    return found


def _compute_on_one_core() -> None:
    """Keep torch from starting threads of its own under every decoding thread."""
    import torch

    torch.set_num_threads(1)
