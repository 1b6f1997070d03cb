"""Pictures that users give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import image_feed, open_shard
from stages.pictures import read_mask, read_picture


def test_a_photo_is_read_upright(tmp_path: Path) -> None:
    """As cameras say it: the pixels lie on their side, a tag tells how."""
    upright = Image.new("RGB", (20, 40), "white")
    upright.paste("black", (0, 0, 20, 20))
    path, tags = tmp_path / "photo.png", Image.Exif()
    tags[0x0112] = 6  # Orientation: turn it clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=tags)
    assert np.array_equal(read_picture(path), np.asarray(upright))
    assert read_mask(path).shape == (40, 20) and not read_mask(path)[:20].any()


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_levels_of_16_bits_are_scaled(tmp_path: Path, extension: str) -> None:
    """Pillow alone clips them: nearly all of a picture would be white."""
    ramp = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    path = tmp_path / f"x.{extension}"
    Image.fromarray(ramp).save(path)
    wanted = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(read_picture(path), wanted)
    assert np.array_equal(read_mask(path), wanted[..., 0] >= 128)
    data = path.read_bytes()
    fed = image_feed.decode_image(data)
    assert fed is not None and np.array_equal(fed, wanted)
    assert np.array_equal(open_shard.decode_image(data, 64, "x"), wanted)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white_and_no_part_of_a_mask(tmp_path: Path, mode: str) -> None:
    colour = Image.new("RGBA", (8, 8), (250, 250, 250, 255))
    colour.paste((255, 0, 0, 0), (0, 0, 8, 4))
    path = tmp_path / "x.png"
    colour.convert(mode).save(path)
    assert (read_picture(path)[:4] == 255).all() and (read_picture(path)[4:] < 255).all()
    assert not read_mask(path)[:4].any() and read_mask(path)[4:].all()
