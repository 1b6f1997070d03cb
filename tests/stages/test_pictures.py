"""Pictures that users give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

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
