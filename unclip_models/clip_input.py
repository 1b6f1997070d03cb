"""What CLIP's towers take: captions as byte-pair tokens, images resized, cropped and normalised."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipPreprocess:
    """How an image becomes the vision tower's input (bicubic, antialiased resize)."""

    image_size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resize_mode: Literal["shortest", "squash"] = "shortest"


@functools.lru_cache(maxsize=4)
def _tokenizer(clean: str) -> Any:
    # The file alone: importing open_clip, with its model zoo, takes many seconds where only tokens are needed.
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(clean=clean)


def tokenize(captions: Sequence[str], context_length: int, *, clean: str = "lower") -> Tensor:
    """Turn captions into CLIP byte-pair tokens.

    Args:
        captions: B strings; the empty string gives start and end tokens only.
        context_length: tokens per row; longer captions are cut, keeping the end token.
        clean: open_clip's text cleaning (``lower``, ``whitespace`` or ``canonicalize``).

    Returns:
        int64 ``(B, context_length)``: start, caption, end, then zeros as padding.
    """
    if isinstance(captions, str):
        raise ValueError("tokenize: got one string; give a sequence of captions")
    if context_length < 2:
        raise ValueError(f"tokenize: context_length {context_length}; start and end tokens alone need 2")
    if not captions:
        return torch.zeros(0, context_length, dtype=torch.long)
    return cast(Tensor, _tokenizer(clean)(list(captions), context_length=context_length))


def preprocess_images(images: Tensor | Sequence[Tensor], config: ClipPreprocess) -> Tensor:
    """Resize, centre-crop and normalise images as the vision tower expects.

    Args:
        images: a batch ``(B, 3, H, W)``, or a sequence of ``(3, H, W)`` of differing sides; uint8, or floating point
            in [-1, 1] (the range of the generators).
        config: side, crop and statistics.

    Returns:
        float32 ``(B, 3, image_size, image_size)``.

    Raises:
        ValueError: if the images are not RGB or of another dtype.
    """
    if not isinstance(images, Tensor):
        return torch.cat([preprocess_images(image[None], config) for image in images])
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"preprocess_images: shape {tuple(images.shape)}; give RGB images (B, 3, H, W)")
    if images.dtype == torch.uint8:
        x = images.float()
    elif images.is_floating_point():
        x = (images.float() + 1) * 127.5
    else:
        raise ValueError(f"preprocess_images: dtype {images.dtype}; give uint8, or floating point in [-1, 1]")
    x = resize_and_crop(x, config)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (config.mean, config.std))
    return (x / 255 - mean) / std


def resize_and_crop(x: Tensor, config: ClipPreprocess) -> Tensor:
    """Resize images to the side of the vision tower and cut out their centre.

    Args:
        x: images ``(B, 3, H, W)`` of values from 0 to 255, of any floating point; or uint8 on a CPU: that is five times
            as fast and nearer to Pillow, with which published models were trained, for Pillow too rounds twice.
        config: side and crop.

    Returns:
        Whole numbers from 0 to 255, ``(B, 3, image_size, image_size)``, of the dtype of ``x``.
    """
    size, (height, width) = config.image_size, x.shape[-2:]
    if (height, width) == (size, size):
        return x
    target = (size, size)
    if config.resize_mode == "shortest":
        short = min(height, width)
        target = (int(size * height / short), int(size * width / short))
    x = F.interpolate(x, size=target, mode="bicubic", antialias=True, align_corners=False)
    if x.is_floating_point():
        x = x.clamp(0, 255).round()  # published models were trained on 8-bit images after the resize
    top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return x[:, :, top : top + size, left : left + size]
