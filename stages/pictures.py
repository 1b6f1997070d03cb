"""Picture files in and out: PNG with text entries, GIF animations, contact sheets."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from stages.errors import InputError

Pixels = npt.NDArray[np.uint8]

GIF_FRAME_MS = 200
_GAP_PX = 2
_KNOWN_FROM = 128  # grey level from which a mask counts as white


def read_picture(path: str | Path) -> Pixels:
    """Read a picture file: uint8 ``(H, W, 3)``; what is transparent is white, as in the pictures of a download.

    Raises:
        InputError: if it is missing, no picture, or too large to be one.
    """
    return np.asarray(_opened(path, "white"))


def read_mask(path: str | Path) -> npt.NDArray[np.bool_]:
    """Read a black and white picture: bool ``(H, W)``, True where it is white; what is transparent is black.

    Raises:
        InputError: as :func:`read_picture`.
    """
    return np.asarray(_opened(path, "black").convert("L")) >= _KNOWN_FROM


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any kind; Pillow alone would turn levels of 16 bits to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _opened(path: str | Path, background: str) -> Image.Image:
    """Read a picture, upright, and lay it on a colour."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return to_rgb(upright)
            below = Image.new("RGBA", upright.size, background)
            return Image.alpha_composite(below, upright.convert("RGBA")).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a PNG or JPEG picture") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}); give a PNG or JPEG file") from None


def encode_png(pixels: Pixels, entries: Mapping[str, str]) -> bytes:
    """Encode ``(H, W, 3)`` as PNG with text entries; equal pictures give equal bytes."""
    info = PngInfo()
    for key, value in entries.items():
        info.add_itxt(key, value)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", pnginfo=info)
    return sink.getvalue()


def encode_gif(frames: Sequence[Pixels], comment: str) -> bytes:
    """Encode frames ``(H, W, 3)`` of one size as an endless animation of five frames a second."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    sink = io.BytesIO()
    first.save(
        sink, "GIF", save_all=True, append_images=others, duration=GIF_FRAME_MS, loop=0, comment=comment.encode()
    )
    return sink.getvalue()


def contact_sheet(pictures: Sequence[Pixels], columns: int | None = None) -> Pixels:
    """Lay pictures of one size out in rows, with a white gap: ``(H', W', 3)``.

    Args:
        pictures: ``(H, W, 3)`` each.
        columns: pictures in a row; None is about as many as there are rows.
    """
    count = len(pictures)
    columns = min(count, columns or int(np.ceil(np.sqrt(count))))
    rows = -(-count // columns)
    height, width = pictures[0].shape[:2]
    sheet = np.full(
        (rows * (height + _GAP_PX) - _GAP_PX, columns * (width + _GAP_PX) - _GAP_PX, 3), 255, dtype=np.uint8
    )
    for index, picture in enumerate(pictures):
        top, left = (index // columns) * (height + _GAP_PX), (index % columns) * (width + _GAP_PX)
        sheet[top : top + height, left : left + width] = picture
    return sheet
