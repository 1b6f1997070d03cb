"""Batches are full and in order, whatever cannot be decoded and however many threads decode."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from stages.image_feed import ImageBatch, ImageFeed, decode_image
from unclip_models.clip_input import ClipPreprocess, resize_and_crop

torch.set_num_threads(1)
PREPROCESS = ClipPreprocess(image_size=8)


def picture(index: int) -> np.ndarray:
    """Make a picture whose side differs from that of its neighbours."""
    return np.random.default_rng(index).integers(0, 256, (9 + index % 5, 8 + index % 3, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def fed(images: Sequence[bytes], batch_size: int, num_threads: int) -> list[ImageBatch]:
    with ImageFeed(PREPROCESS, batch_size=batch_size, num_threads=num_threads) as feed:
        for data in images:
            feed.add(data)
        return list(feed.batches())


@pytest.mark.parametrize(("batch_size", "num_threads"), [(1, 3), (4, 1), (10, 2), (300, 2)])
def test_batches_are_full_and_in_order(batch_size: int, num_threads: int) -> None:
    num, broken = 173, {0, 7, 8, 9, 30, 171, 172}
    images = [b"?" if i in broken else encoded(picture(i)) for i in range(num)]
    batches = fed(images, batch_size, num_threads)
    whole = [i for i in range(num) if i not in broken]
    assert [position for batch in batches for position in batch.positions] == whole
    assert [len(batch.positions) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    pixels = torch.cat([batch.pixels for batch in batches])
    assert pixels.dtype == torch.uint8 and pixels.shape == (len(whole), 3, 8, 8)
    for row, position in enumerate(whole):
        alone = torch.from_numpy(picture(position)).permute(2, 0, 1)[None]
        assert torch.equal(pixels[row], resize_and_crop(alone, PREPROCESS)[0])


def test_nothing_decodable_gives_no_batch() -> None:
    assert fed([], 4, 2) == fed([b"", b"?"], 4, 2) == []


def test_an_abandoned_feed_stops() -> None:
    images = [encoded(picture(i)) for i in range(60)]
    with pytest.raises(RuntimeError, match="enough"), ImageFeed(PREPROCESS, batch_size=2, num_threads=2) as feed:
        for data in images:
            feed.add(data)
        next(feed.batches())
        raise RuntimeError("enough")


def test_every_mode_becomes_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        sink = io.BytesIO()
        Image.new(mode, (5, 4)).save(sink, "TIFF" if mode == "CMYK" else "PNG")
        pixels = decode_image(sink.getvalue())
        assert pixels is not None and pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8


def test_damaged_images_are_told_apart() -> None:
    whole = encoded(np.full((20, 20, 3), 7, np.uint8), "JPEG")
    found = decode_image(whole)
    assert found is not None and (found == 7).all()
    for data in (b"", b"not an image", whole[:200], whole[:-30]):
        assert decode_image(data) is None
