"""Golden embeddings: what a CLIP made of a fixed probe when its weights were published, kept with the weights.

Whoever loads the weights later repeats the probe. Another activation (QuickGELU), preprocessing, tokenizer, precision
or library then shows before work starts, instead of as embeddings that do not fit what was trained on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stages.errors import IntegrityError
from stages.pictures import encode_png

if TYPE_CHECKING:
    from torch import Tensor

    from unclip_models.clip import ClipModel
    from unclip_models.clip_input import ClipPreprocess

Array = npt.NDArray[np.float32]

METADATA_KEY = "golden"
# Lowest cosine to the stored embeddings. Float32 differs between machines by about 1e-6, bfloat16 keeps three digits.
# Images from files are resized as 8-bit numbers, which rounds twice.
MIN_COSINE = {"fp32": 1 - 1e-5, "fp16": 0.999, "bf16": 0.99, "fed": 0.999}


def golden_metadata(clip: ClipModel) -> dict[str, str]:
    """Embed the probe in float32; return the entry for the metadata of the weights file."""
    image, text = _probe(clip)
    rounded = {"image": image.round(6).tolist(), "text": text.round(6).tolist()}
    return {METADATA_KEY: json.dumps(rounded)}


def check_golden(
    clip: ClipModel,
    metadata: Mapping[str, str],
    *,
    place: str,
    precisions: Sequence[str] = ("fp32",),
    autocast: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> None:
    """Repeat the probe and compare.

    Args:
        clip: the model, loaded from a weights file.
        metadata: of that file.
        place: its name, for messages.
        precisions: number formats to check; float32 belongs to them, for it shows drift that bfloat16 would hide.
        autocast: gives the context that computes in one of them.

    Raises:
        IntegrityError: if the file has no golden embeddings or the model does not reproduce them.
    """
    if METADATA_KEY not in metadata:
        raise IntegrityError(f"{place}: holds no golden embeddings; run clip again with --force")
    stored = json.loads(metadata[METADATA_KEY])
    for precision in precisions:
        with autocast(precision) if autocast else nullcontext():
            found = _probe(clip)
        for kind, values in zip(("image", "text"), found, strict=True):
            _compare(np.asarray(stored[kind], np.float32), values, kind, precision, place)


def check_feed(
    clip: ClipModel,
    metadata: Mapping[str, str],
    *,
    place: str,
    read: Callable[[Sequence[bytes], ClipPreprocess], Sequence[Tensor | None]],
) -> None:
    """Compare the probe's images once more, read from files as those of a data set are.

    Args:
        clip: the model, which has passed ``check_golden``.
        metadata: of its weights file.
        place: its name, for messages.
        read: decodes, resizes and crops image files to uint8 ``(S, S, 3)``.

    Raises:
        IntegrityError: if the model gives other embeddings then: a library reads or resizes images in another way.
    """
    import torch

    from unclip_models.clip import golden_images

    pixels = golden_images().permute(0, 2, 3, 1).numpy()
    images = read([encode_png(image, {}) for image in pixels], clip.preprocess_config)
    fed = clip.encode_image(torch.stack([image for image in images if image is not None]).permute(0, 3, 1, 2))
    stored = np.asarray(json.loads(metadata[METADATA_KEY])["image"], np.float32)
    _compare(stored, fed.float().cpu().numpy(), "image", "fed", place)


def _probe(clip: ClipModel) -> tuple[Array, Array]:
    from unclip_models.clip import golden_embeddings

    image, text = golden_embeddings(clip)
    return image.float().numpy(), text.float().numpy()


def _compare(stored: Array, found: Array, kind: str, precision: str, place: str) -> None:
    if stored.shape != found.shape:
        raise IntegrityError(f"{place}: golden {kind} embeddings are {stored.shape}, the model gives {found.shape}")
    norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(found, axis=1)
    cosine = float(((stored * found).sum(axis=1) / norms).min())
    if not cosine >= MIN_COSINE[precision]:  # a nan is refused as well
        raise IntegrityError(
            f"{place}: this CLIP does not reproduce its golden {kind} embeddings in {precision}: cosine {cosine:.6f}, "
            f"needed {MIN_COSINE[precision]}; activation (QuickGELU), preprocessing, tokenizer or a library "
            "changed. Use the versions of requirements.lock or another embed.precision, or make the weights anew with "
            "`unclip run --from clip --force`"
        )
