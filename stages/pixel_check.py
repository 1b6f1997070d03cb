"""What an image of a coloured shape shows, read from its pixels alone: colours by value, the shape by geometry.

An independent judge for generated images: it knows nothing of CLIP, of the models or of how the pictures are drawn, and
nothing may be trained on it or selected by it. The reading is in the words of the captions
``a <foreground> <shape> on a <background> background``.

The shape is told from its outline in polar form, r(angle) around the centre: of its Fourier coefficients, a triangle
has the third, a square the fourth, a circle none; a ring has a hole in the middle.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

UNKNOWN = "unknown"

# What the colour words mean, RGB.
REFERENCE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 170, 50),
    "blue": (30, 60, 225),
    "yellow": (245, 225, 40),
    "cyan": (40, 205, 225),
    "magenta": (225, 40, 215),
    "white": (240, 240, 240),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "ring")

_CAPTION = re.compile(r"an? (\w+) (\w+) on an? (\w+) background")
_MIN_CONTRAST = 45.0  # distance of foreground and background in RGB levels below which there is no shape
_MIN_AREA_FRACTION = 0.03
_MAX_AREA_FRACTION = 0.75
_MIN_SHARE = 0.75  # of the foreground pixels that the largest connected part must hold
_NUM_ANGLES = 96

# Relative Fourier amplitudes (orders 2, 3, 4) of the exact outlines r(angle), the regular polygons' being 1/cos(angle)
# on each side.
_OUTLINES: dict[str, tuple[float, float, float]] = {
    "circle": (0.0, 0.0, 0.0),
    "square": (0.0, 0.0, 0.139),
    "triangle": (0.0, 0.275, 0.0),
}
_MAX_DEVIATION = 0.13


@dataclass(frozen=True)
class Reading:
    """What an image or a caption says; each word may be ``UNKNOWN``."""

    foreground: str
    background: str
    shape: str


def parse_caption(caption: str) -> Reading | None:
    """Read a caption; None if it is not of the form ``a <colour> <shape> on a <colour> background``."""
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        return None
    foreground, shape, background = match.groups()
    if foreground not in REFERENCE_COLOURS or background not in REFERENCE_COLOURS or shape not in SHAPES:
        return None
    return Reading(foreground=foreground, background=background, shape=shape)


def check(image: npt.NDArray[np.uint8]) -> Reading:
    """Read an image.

    Args:
        image: uint8 array (H, W, 3), RGB, at least 12 pixels on each side.

    Returns:
        the colours and the shape; ``UNKNOWN`` for what cannot be told.

    Raises:
        ValueError: if the array is not such an image.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < 12:
        raise ValueError(f"image: {image.dtype} {image.shape} is not a uint8 array (H, W, 3) of at least 12x12 pixels")
    pixels = image.astype(np.float32)
    background = _border_colour(pixels)
    foreground = _foreground_colour(pixels, background)
    if foreground is None:
        return Reading(foreground=UNKNOWN, background=_name_of(background), shape=UNKNOWN)
    shape = _shape_of(_coverage(pixels, background, foreground))
    return Reading(foreground=_name_of(foreground), background=_name_of(background), shape=shape)


def _border_colour(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the median colour (3,) of the pixels along the border."""
    width = max(1, min(pixels.shape[:2]) // 16)
    inner = np.zeros(pixels.shape[:2], bool)
    inner[width:-width, width:-width] = True
    return np.asarray(np.median(pixels[~inner], axis=0))


def _foreground_colour(
    pixels: npt.NDArray[np.float32], background: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32] | None:
    """Return the median colour (3,) of what differs most from the background; None without contrast."""
    contrast = np.linalg.norm(pixels - background, axis=2)
    strongest = float(np.quantile(contrast, 0.97))
    if strongest < _MIN_CONTRAST:
        return None
    return np.asarray(np.median(pixels[contrast > 0.75 * strongest], axis=0))


def _name_of(colour: npt.NDArray[np.float32]) -> str:
    return min(REFERENCE_COLOURS, key=lambda name: float(np.sum((colour - REFERENCE_COLOURS[name]) ** 2)))


def _coverage(
    pixels: npt.NDArray[np.float32], background: npt.NDArray[np.float32], foreground: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return how far each pixel lies from background (0) to foreground (1), shape (H, W)."""
    axis = foreground - background
    return np.clip((pixels - background) @ axis / float(axis @ axis), 0.0, 1.0).astype(np.float32)


def _shape_of(coverage: npt.NDArray[np.float32]) -> str:
    solid = (coverage > 0.5).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas) or areas.max() < _MIN_SHARE * areas.sum():
        return UNKNOWN
    part = (labels == 1 + int(areas.argmax())).astype(np.uint8)
    contours, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(part), contours, -1, color=1, thickness=cv2.FILLED)
    area = int(filled.sum())
    if not _MIN_AREA_FRACTION <= area / filled.size <= _MAX_AREA_FRACTION:
        return UNKNOWN
    rows, columns = np.nonzero(filled)
    centre = (float(columns.mean()), float(rows.mean()))
    # Only the soft edge of this part counts; specks elsewhere are noise.
    soft = np.where(cv2.dilate(filled, np.ones((3, 3), np.uint8)) > 0, coverage, 0.0).astype(np.float32)
    hole_radius = 0.25 * math.sqrt(area / math.pi)
    hollow = _mean_within(soft, centre, hole_radius) < 0.5
    outline = _outline(np.maximum(soft, filled.astype(np.float32)) if hollow else soft, centre)
    amplitudes = np.abs(np.fft.rfft(outline))
    relative = 2 * amplitudes[2:5] / amplitudes[0]
    name = min(_OUTLINES, key=lambda shape: math.dist(_OUTLINES[shape], relative))
    if math.dist(_OUTLINES[name], relative) > _MAX_DEVIATION:
        return UNKNOWN
    if hollow:
        return "ring" if name == "circle" else UNKNOWN
    return name


def _mean_within(coverage: npt.NDArray[np.float32], centre: tuple[float, float], radius_px: float) -> float:
    rows, columns = np.indices(coverage.shape)
    near = np.hypot(columns - centre[0], rows - centre[1]) <= max(radius_px, 0.71)
    return float(coverage[near].mean())


def _outline(coverage: npt.NDArray[np.float32], centre: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Return the outline r(angle) as the covered length along each ray from the centre, (_NUM_ANGLES,), pixels."""
    reach = int(math.hypot(*coverage.shape))
    flags = cv2.INTER_LINEAR | cv2.WARP_POLAR_LINEAR | cv2.WARP_FILL_OUTLIERS
    polar = cv2.warpPolar(coverage, (4 * reach, _NUM_ANGLES), centre, reach, flags)
    return np.asarray(polar.sum(axis=1) / 4)
