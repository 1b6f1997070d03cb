"""What tells images apart after re-encoding and resizing: a perceptual hash of 64 bits, and tones of 48 bytes."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from stages.pictures import to_rgb

NUM_TONES = 48
_HASH_SIDE = 8
_GREY_SIDE_PX = 32
_TONE_SIDE = 4
# Flat and symmetric images have frequencies of nothing; what rounding to 8 bits leaves of one has a spread of 5.
_LEAST_FREQUENCY = 16.0


def measure_image(data: bytes) -> tuple[int, bytes]:
    """Measure an image file.

    Args:
        data: a JPEG, PNG or WebP file.

    Returns:
        the perceptual hash (64 bits) and the tones (a 4x4 RGB thumbnail, 48 bytes).

    Raises:
        OSError: if it does not decode.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * _GREY_SIDE_PX, 2 * _GREY_SIDE_PX))
        colours = to_rgb(image)
    grey = colours.convert("L").resize((_GREY_SIDE_PX, _GREY_SIDE_PX), Image.Resampling.BILINEAR)
    tones = colours.resize((_TONE_SIDE, _TONE_SIDE), Image.Resampling.BOX)
    return perceptual_hash(np.asarray(grey, np.float64)), tones.tobytes()


def perceptual_hash(grey: npt.NDArray[np.float64]) -> int:
    """Hash the coarse structure of a grey image: which of its 8x8 lowest cosine frequencies exceed their median.

    Args:
        grey: levels of 0 to 255, (32, 32).
    """
    frequencies = _COSINES @ grey @ _COSINES.T
    bits = frequencies > np.median(frequencies) + _LEAST_FREQUENCY
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosines() -> npt.NDArray[np.float64]:
    """Return the first rows of the type-II cosine transform, (8, 32)."""
    positions = np.arange(_GREY_SIDE_PX) + 0.5
    return np.cos(np.pi / _GREY_SIDE_PX * np.outer(np.arange(_HASH_SIDE), positions))


_COSINES = _cosines()
