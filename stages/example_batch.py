"""A training sample's shapes without its data: for counting arithmetic and memory on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unclip_models.settings import DecoderConfig, UpsamplerConfig


def example_batch(model: Any, *, whole: bool = False) -> dict[str, Tensor]:
    """Make tensors of the shapes of one training sample, on the meta device.

    Args:
        model: config of the prior, decoder or upsampler.
        whole: whether an upsampler's image is a whole one, as when it draws, instead of the crop it is trained on.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(model, UpsamplerConfig):
        side_px = model.image_size if whole else model.crop_px
        small_px = side_px // model.factor
        shapes = {"image": (1, 3, side_px, side_px), "low_res": (1, 3, small_px, small_px)}
    else:
        shapes = dict.fromkeys(("image_embedding", "text_embedding"), (1, model.embedding_dim))
    if isinstance(model, DecoderConfig):
        shapes["image"] = (1, 3, model.image_size, model.image_size)
    batch = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if hasattr(model, "text"):
        batch["tokens"] = torch.empty(1, model.text.context_length, dtype=torch.int64, device="meta")
        if model.text.kind == "clip":
            batch["text_sequence"] = torch.empty(1, model.text.context_length, model.text.width, device="meta")
    return batch
