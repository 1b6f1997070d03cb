"""Overlapping tiles over an image, and the weights that blend what a network says of each (bounds the memory)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """One tile's place in the image, and the weight of its pixels ``(tile_px, tile_px)``."""

    top: int
    left: int
    weight: Tensor


class Tiling:
    """Square tiles that overlap and cover a square image, with smooth weights that sum to 1 in every pixel.

    Towards a neighbour, a tile's weight is 0 in the outer quarter of the overlap, where the network saw the zeros
    around the tile, then rises as a raised cosine and is 1 from the inner quarter on.

    Args:
        side_px: of the image.
        tile_px: side of a tile; a multiple of ``multiple_px``. One as large as the image makes a single tile.
        overlap_px: of neighbours, at least; a multiple of ``multiple_px`` and at most half a tile. None: a quarter of
            a tile, rounded up to a multiple.
        multiple_px: of the U-Net, whose levels then halve a tile where they halve the image.
        device: of the weights.

    Raises:
        ValueError: if the numbers do not fit.
    """

    def __init__(
        self,
        side_px: int,
        tile_px: int,
        overlap_px: int | None,
        multiple_px: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if tile_px < 1 or tile_px % multiple_px:
            raise ValueError(f"tile_px: {tile_px}; it must be a multiple of {multiple_px} (levels of the U-Net)")
        self.tile_px = min(tile_px, side_px)
        if overlap_px is None:
            overlap_px = multiple_px * math.ceil(tile_px / 4 / multiple_px)
        if self.tile_px < side_px and (overlap_px < 0 or overlap_px % multiple_px or 2 * overlap_px > tile_px):
            raise ValueError(
                f"tile_overlap_px: {overlap_px} with tile_px {tile_px}; it must be a multiple of {multiple_px} (levels "
                "of the U-Net), from 0 to half a tile"
            )
        last = side_px - self.tile_px
        starts = [*range(0, last, max(1, self.tile_px - overlap_px)), last]
        profiles = [self._profile(overlap_px, start > 0, start < last) for start in starts]
        total = torch.zeros(side_px)
        for start, profile in zip(starts, profiles, strict=True):
            total[start : start + self.tile_px] += profile
        parts = [profile / total[start : start + self.tile_px] for start, profile in zip(starts, profiles, strict=True)]
        self.tiles = [
            Tile(top, left, torch.outer(rows, columns).to(device))
            for top, rows in zip(starts, parts, strict=True)
            for left, columns in zip(starts, parts, strict=True)
        ]

    def _profile(self, overlap_px: int, before: bool, after: bool) -> Tensor:
        """Weigh a tile's pixels along one axis, before they are made to sum to 1; ``(tile_px,)``."""
        position = (torch.arange(overlap_px) + 0.5) / max(1, overlap_px)
        ramp = torch.sin((2 * position - 0.5).clamp(0, 1) * (math.pi / 2)) ** 2
        profile = torch.ones(self.tile_px)
        if before:
            profile[:overlap_px] *= ramp
        if after:
            profile[self.tile_px - overlap_px :] *= ramp.flip(0)
        return profile

    def cut(self, images: Tensor, places: Sequence[tuple[int, Tile]]) -> Tensor:
        """Cut (row, tile) places out of ``(B, C, S, S)``: ``(len(places), C, tile_px, tile_px)``."""
        px = self.tile_px
        return torch.stack([images[i, :, tile.top : tile.top + px, tile.left : tile.left + px] for i, tile in places])
