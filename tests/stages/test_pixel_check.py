"""The pixel check reads rendered shapes, survives 16 pixels and noise, and does not guess where nothing is."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from stages import pixel_check, shapes
from stages.pixel_check import UNKNOWN, Reading, check, parse_caption
from stages.shapes import ShapesConfig, picture_of, render

NUM_IMAGES = 600
CONFIG = ShapesConfig(
    seed=5, missing_fraction=0, broken_fraction=0, tiny_fraction=0, placeholder_fraction=0, duplicate_fraction=0,
    wrong_caption_fraction=0,
)  # fmt: skip
Pixels = npt.NDArray[np.uint8]


def resize(image: Pixels, side: int, how: Image.Resampling) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((side, side), how))


def through_16_px(image: Pixels) -> Pixels:
    small = resize(image, 16, Image.Resampling.BOX)
    return resize(small, 64, Image.Resampling.BICUBIC)


def noisy(image: Pixels, levels: float) -> Pixels:
    noise = np.random.default_rng(0).normal(0, levels, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


VIEWS = {
    "clean 64 px": (lambda image: image, 0.99),
    "16 px": (lambda image: resize(image, 16, Image.Resampling.BOX), 0.97),
    "16 px upsampled to 64 px": (through_16_px, 0.99),
    "16 px upsampled, noise of 16 levels": (lambda image: noisy(through_16_px(image), 16), 0.98),
    "blurred": (lambda image: resize(resize(image, 12, Image.Resampling.BOX), 64, Image.Resampling.BILINEAR), 0.95),
    "noise of 24 levels": (lambda image: noisy(image, 24), 0.97),
    "faded to 60 % contrast": (lambda image: np.uint8(0.6 * image.astype(float) + 50), 0.0),
}


@pytest.mark.parametrize("view", [name for name in VIEWS if VIEWS[name][1]])
def test_accuracy(view: str) -> None:
    transform, wanted = VIEWS[view]
    num_right = 0
    for index in range(NUM_IMAGES):
        picture = picture_of(CONFIG, index)
        num_right += check(transform(render(picture, 64, 4.0))) == parse_caption(picture.caption)
    assert num_right / NUM_IMAGES >= wanted, f"{view}: {num_right / NUM_IMAGES:.3f}"


def test_the_shape_survives_fading() -> None:
    transform, _ = VIEWS["faded to 60 % contrast"]
    pictures = [picture_of(CONFIG, index) for index in range(200)]
    readings = [check(transform(render(picture, 64, 4.0))) for picture in pictures]
    assert sum(r.shape == p.shape for r, p in zip(readings, pictures, strict=True)) >= 196


@pytest.mark.parametrize("side", [32, 128, 256])
def test_other_sizes(side: int) -> None:
    pictures = [picture_of(CONFIG, index) for index in range(40)]
    assert all(check(render(picture, side, 4.0)) == parse_caption(picture.caption) for picture in pictures)


def test_vocabulary_is_that_of_the_captions() -> None:
    assert set(pixel_check.REFERENCE_COLOURS) == set(shapes.COLOURS)
    assert set(pixel_check.SHAPES) == set(shapes.SHAPES)
    readings = {parse_caption(caption) for caption in shapes.CAPTIONS}
    assert None not in readings and len(readings) == len(shapes.CAPTIONS)


def test_outline_constants_are_those_of_regular_polygons() -> None:
    angles = np.arange(3600) * 2 * math.pi / 3600
    for shape, sides in (("triangle", 3), ("square", 4)):
        sector = (angles % (2 * math.pi / sides)) - math.pi / sides
        amplitudes = np.abs(np.fft.rfft(1 / np.cos(sector)))
        relative = 2 * amplitudes[2:5] / amplitudes[0]
        assert pixel_check._OUTLINES[shape] == pytest.approx(relative, abs=5e-3)


@pytest.mark.parametrize(
    ("caption", "reading"),
    [
        ("a red circle on a blue background", Reading("red", "blue", "circle")),
        ("  A Red CIRCLE on a blue background ", Reading("red", "blue", "circle")),
        ("a red circle", None),
        ("a red dog on a blue background", None),
        ("a mauve circle on a blue background", None),
        ("", None),
    ],
)
def test_parse_caption(caption: str, reading: Reading | None) -> None:
    assert parse_caption(caption) == reading


def test_nothing_is_guessed_where_nothing_is() -> None:
    flat = np.full((64, 64, 3), (225, 30, 30), np.uint8)
    assert check(flat) == Reading(UNKNOWN, "red", UNKNOWN)
    rng = np.random.default_rng(0)
    assert check(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).shape == UNKNOWN
    halves = flat.copy()
    halves[:, 24:] = 15
    assert check(halves).shape == UNKNOWN
    two = flat.copy()
    two[8:24, 8:24] = two[40:56, 40:56] = 240
    assert check(two).shape == UNKNOWN
    bar = flat.copy()
    bar[26:38, 6:58] = 240
    assert check(bar) == Reading("white", "red", UNKNOWN)


@pytest.mark.parametrize("wrong", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((8, 8, 3), np.uint8)])
def test_wrong_arrays_are_refused(wrong: Pixels) -> None:
    with pytest.raises(ValueError, match="uint8 array"):
        check(wrong)
