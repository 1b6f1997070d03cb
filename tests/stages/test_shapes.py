"""Procedural shapes: rows are functions of (settings, index); the server answers as the web does."""

from __future__ import annotations

import dataclasses
import io
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages import shapes
from stages.errors import InputError
from stages.shapes import CAPTIONS, ShapesConfig, image_bytes, picture_of, render

CLEAN = ShapesConfig(
    missing_fraction=0, broken_fraction=0, tiny_fraction=0, placeholder_fraction=0, duplicate_fraction=0,
    wrong_caption_fraction=0,
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@given(st.integers(0, 10_000), st.integers(0, 2**31))
def test_a_row_depends_on_seed_and_index_only(index: int, seed: int) -> None:
    few = ShapesConfig(num_images=10, seed=seed)
    many = ShapesConfig(num_images=100_000, seed=seed, port=9999)
    assert picture_of(few, index) == picture_of(many, index)


def test_rows_differ_and_images_of_one_caption_differ() -> None:
    files = [image_bytes(CLEAN, index) for index in range(400)]
    assert len(set(files)) == 400
    assert image_bytes(CLEAN, 7) == files[7]
    assert image_bytes(dataclasses.replace(CLEAN, seed=1), 7) != files[7]


def test_every_caption_of_the_vocabulary_occurs() -> None:
    assert len(CAPTIONS) == 8 * 7 * 4
    assert {picture_of(CLEAN, index).caption for index in range(4000)} == set(CAPTIONS)


@pytest.mark.parametrize("side", [16, 64, 100])
def test_shapes_are_large_and_inside_the_image(side: int) -> None:
    for index in range(60):
        picture = picture_of(CLEAN, index)
        image = render(picture, side).astype(int)
        assert image.shape == (side, side, 3)
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.ptp(corners, axis=0).max() == 0, "all four corners are background"
        covered = (np.abs(image - corners[0]).sum(axis=2) > 60).mean()
        assert 0.1 < covered < 0.6


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_equals_the_area_of_the_shape(shape: str) -> None:
    radius = 0.3
    picture = dataclasses.replace(
        picture_of(CLEAN, 0), shape=shape, foreground="white", background="black", centre=(0.5, 0.5), radius=radius
    )
    exact = {
        "circle": np.pi * radius**2,
        "ring": np.pi * radius**2 * 0.75,
        "square": (2 * 0.82 * radius) ** 2,
        "triangle": 3 * np.sqrt(3) / 4 * (1.18 * radius) ** 2,
    }[shape]
    image = render(picture, 256).astype(float)
    coverage = (image - image[0, 0]) / (image.max(axis=(0, 1)) - image[0, 0])
    assert coverage.mean() == pytest.approx(exact, rel=0.01)


def test_defects_occur_at_their_rates() -> None:
    config = ShapesConfig(
        missing_fraction=0.1, broken_fraction=0.1, tiny_fraction=0.1, placeholder_fraction=0.1,
        duplicate_fraction=0.2, wrong_caption_fraction=0.1,
    )  # fmt: skip
    found = Counter(picture_of(config, index).defect for index in range(2000))
    for defect in ("missing", "broken", "tiny", "placeholder", "wrong_caption"):
        assert found[defect] == pytest.approx(200, abs=60)
    files = [image_bytes(config, index) for index in range(500)]
    assert files.count(None) == sum(picture_of(config, index).defect == "missing" for index in range(500))
    originals = [i for i in range(500) if picture_of(config, i).noise_seed == (0, i, 1)]
    copies = sorted(set(range(500)) - set(originals))
    assert len(copies) == pytest.approx(100, abs=30)
    for copy in copies:
        assert files[copy] in files[:copy], "a copy shows an earlier row"
        original = files.index(files[copy])
        assert picture_of(config, copy).caption == picture_of(config, original).caption


def test_wrong_captions_are_wrong() -> None:
    config = dataclasses.replace(CLEAN, wrong_caption_fraction=1.0)
    for index in range(100):
        picture = picture_of(config, index)
        assert picture.caption in CAPTIONS
        truth = f"a {picture.foreground} {picture.shape} on a {picture.background} background"
        assert picture.caption != truth


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_the_server_answers_with_the_rows(image_format: str) -> None:
    config = ShapesConfig(
        num_images=60, port=free_port(), image_format=image_format, missing_fraction=0.3, broken_fraction=0.0
    )
    with shapes.serve(config):
        for index in range(60):
            expected = image_bytes(config, index)
            if expected is None:
                with pytest.raises(urllib.error.HTTPError, match="404") as caught:
                    urllib.request.urlopen(shapes.url_of(config, index), timeout=5)
                caught.value.close()
                continue
            with urllib.request.urlopen(shapes.url_of(config, index), timeout=5) as answer:
                data = answer.read()
            assert data == expected
            assert Image.open(io.BytesIO(data)).format == {"png": "PNG", "jpg": "JPEG"}[image_format]
        for path in ("60.png", "x.png", "../0.png", f"{0:08d}.gif"):
            with pytest.raises(urllib.error.HTTPError, match="404") as caught:
                urllib.request.urlopen(f"http://127.0.0.1:{config.port}/shapes/0/{path}", timeout=5)
            caught.value.close()


def test_a_taken_port_is_an_error_that_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"source.shapes.port.*{port}"), shapes.serve(ShapesConfig(port=port)):
            pass


def test_the_port_is_free_again_afterwards() -> None:
    config = ShapesConfig(port=free_port())
    for _ in range(2):
        with shapes.serve(config):
            pass


def test_a_worker_without_the_driver_serves_them_itself() -> None:
    config = ShapesConfig(num_images=2, missing_fraction=0.0, port=free_port())
    program = (
        "import sys; from stages.shapes import ShapesConfig, serve_on_this_machine\n"
        f"for _ in range(2): serve_on_this_machine({config!r})\n"  # the second time the port is taken
        "print('up', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "up\n"
        with urllib.request.urlopen(shapes.url_of(config, 1), timeout=5) as answer:
            assert answer.read() == image_bytes(config, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 0}, "num_images"),
        ({"image_size_px": 8}, "image_size_px"),
        ({"port": 80}, "port"),
        ({"missing_fraction": 0.9, "broken_fraction": 0.2}, "_fraction"),
        ({"tiny_fraction": -0.1}, "_fraction"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**settings)  # type: ignore[arg-type]
