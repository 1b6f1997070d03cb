"""Building open_clip's models, and loading published ones. The only file that imports open_clip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from unclip_models.clip_input import ClipPreprocess
from unclip_models.clip_names import SELF_CONTAINED, refuse_missing_file

RESIZE_MODES = ("shortest", "squash")


def build_open_clip(model_config: Mapping[str, Any]) -> nn.Module:
    """Build an open_clip model from its JSON config, with the class open_clip itself would choose."""
    from open_clip.model import CLIP, CustomTextCLIP

    values = {key: value for key, value in model_config.items() if key != "custom_text"}
    if "multimodal_cfg" in values:
        raise ValueError("clip: a model with a caption decoder (CoCa) cannot be rebuilt here; choose a plain CLIP")
    return cast(nn.Module, (CustomTextCLIP if model_config.get("custom_text") else CLIP)(**values))


def published_shape(name: str) -> dict[str, Any] | None:
    """Look the architecture of a published model up, in open_clip's JSON form; None where only its weights tell it.

    Args:
        name: as for ``ClipModel.from_pretrained``.
    """
    from open_clip.factory import get_model_config

    if name.startswith(SELF_CONTAINED):
        return None
    found: dict[str, Any] | None = get_model_config(name.partition("/")[0])
    return found


def load_published(
    name: str, weights: str | None, quick_gelu: bool | None, cache_dir: str | None, device: torch.device | str
) -> tuple[nn.Module, dict[str, Any], ClipPreprocess, str]:
    """Load a published model; the arguments are those of ``ClipModel.from_pretrained``.

    Returns:
        The module, its architecture in open_clip's JSON form, its preprocessing, and a name of its origin.

    Raises:
        ValueError: if the model is unknown, cannot be loaded, or its activation is undecided or contradicts the tag.
    """
    import open_clip

    for place in (name, weights or ""):
        refuse_missing_file(place)
    if weights is None and not name.startswith(SELF_CONTAINED) and "/" in name:
        name, weights = name.split("/", 1)
    model_config, origin = _config_of(name, weights, quick_gelu, cache_dir)
    try:
        model = open_clip.create_model(
            name,
            pretrained=weights,
            device=device,
            force_quick_gelu=model_config["quick_gelu"],
            cache_dir=cache_dir,
            require_pretrained=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"clip {origin}: could not load its weights: {error}") from error
    return model, model_config, _preprocess_of(model, origin), origin


def _config_in_hub(name: str, cache_dir: str | None) -> dict[str, Any]:
    """Look the architecture up where the weights will be looked for, too."""
    from open_clip.pretrained import download_pretrained_from_hf

    path = download_pretrained_from_hf(
        name.removeprefix("hf-hub:"), filename="open_clip_config.json", cache_dir=cache_dir
    )
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    found: dict[str, Any] = config.get("model_cfg", config)
    return found


def _config_of(
    name: str, weights: str | None, quick_gelu: bool | None, cache_dir: str | None
) -> tuple[dict[str, Any], str]:
    """Look an open_clip architecture up and decide its activation; return its config and a name for messages."""
    from open_clip.factory import get_model_config

    origin = f"{name}/{weights}" if weights else name
    try:
        config = _config_in_hub(name, cache_dir) if name.startswith("hf-hub:") else get_model_config(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"clip.name: no open_clip model at {name!r}: {error}") from error
    if config is None:
        raise ValueError(f"clip.name: open_clip has no architecture {name!r}; see open_clip.list_models()")
    of_config = bool(config.get("quick_gelu", False))
    if name.startswith(SELF_CONTAINED):
        if weights:
            raise ValueError(f"clip.weights: {weights!r} would be ignored, {name} brings its own; remove it")
        of_weights = of_config
    else:
        of_weights = _activation_of_weights(name, weights, of_config, quick_gelu)
    if of_config and not of_weights:
        raise ValueError(f"clip.name: {origin} was trained with GELU, {name} has QuickGELU; use the plain name")
    if quick_gelu is not None and quick_gelu != of_weights:
        raise ValueError(f"clip.quick_gelu: {quick_gelu}, but {origin} was trained with {of_weights}; remove it")
    return {**config, "quick_gelu": of_weights}, origin


def _activation_of_weights(name: str, weights: str | None, of_config: bool, quick_gelu: bool | None) -> bool:
    """Say whether weights were trained with QuickGELU: a tag knows, a file must come with the answer."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if not weights:
        raise ValueError(f"clip.weights: missing for {name!r}; give a tag of open_clip.list_pretrained() or a file")
    if tag := get_pretrained_cfg(name, weights):
        return bool(tag.get("quick_gelu", False))
    if not Path(weights).is_file():
        known = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"clip.weights: {weights!r} is neither a file nor a tag of {name}; its tags: {known}")
    if of_config:
        return True
    if quick_gelu is None:
        raise ValueError(
            f"clip.quick_gelu: undecided for {name} with {weights}; a weights file does not say which activation it "
            "was trained with, and the wrong one gives wrong embeddings without any error. Set it to true (OpenAI, "
            "DFN, MetaCLIP) or false (most others)"
        )
    return quick_gelu


def _preprocess_of(model: nn.Module, origin: str) -> ClipPreprocess:
    """Take over the preprocessing that open_clip recorded on the loaded model."""
    recorded = cast(Any, model).visual.preprocess_cfg
    size = recorded["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1 or recorded["interpolation"] != "bicubic" or recorded["resize_mode"] not in RESIZE_MODES:
        raise ValueError(f"clip {origin}: unsupported preprocessing {recorded}; choose a square, bicubic model")
    return ClipPreprocess(
        image_size=sides.pop(),
        mean=tuple(recorded["mean"]),
        std=tuple(recorded["std"]),
        resize_mode=recorded["resize_mode"],
    )
