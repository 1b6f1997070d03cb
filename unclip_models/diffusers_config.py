"""Infer the configs of our models from those that diffusers keeps, for folders that another project wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_models.settings import (
    ClipTextConfig,
    DecoderConfig,
    DiffusionConfig,
    DiffusionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)

# Our words, and those of diffusers' schedulers.
BETAS = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
PREDICTIONS = {"epsilon": "epsilon", "x_start": "sample", "v": "v_prediction"}
# Settings of diffusers that change what a network computes but not the names or shapes of its weights.
_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "time_embed_act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "center_input_sample": (False,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "norm_in_type": (None,),
    "embedding_proj_norm_type": (None,),
}


def infer_config(folder: Path, kind: str) -> Any:
    """Infer our config from diffusers' own, for a pipeline in the manner of Karlo.

    Raises:
        ValueError: if a config is missing, or asks for what our models do not do.
    """
    readers = {"prior": _infer_prior, "decoder": _infer_decoder, "upsampler": _infer_upsampler}
    if kind not in readers:
        raise ValueError(f"kind {kind!r}: choose from {', '.join(readers)}")
    try:
        return readers[kind](folder)
    except KeyError as error:
        raise ValueError(f"{folder}: its config does not say {error}; it is of another architecture") from None


def _require_plain(values: Mapping[str, Any], folder: Path) -> None:
    """Refuse settings of diffusers that leave no trace in the weights' names, and that our networks do not have."""
    for name, known in _KNOWN_VALUES.items():
        if name in values and values[name] not in known:
            raise ValueError(f"{folder}: {name} is {values[name]!r}; this project's networks have {known[0]!r}")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); give a folder that diffusers' save_pretrained made"
        ) from None
    _require_plain(values, folder)
    return values


def _infer_prior(folder: Path) -> DiffusionPriorConfig:
    values = _read_config(folder / "prior")
    width = values["num_attention_heads"] * values["attention_head_dim"]
    return DiffusionPriorConfig(
        embedding_dim=values["embedding_dim"],
        text=ClipTextConfig(context_length=values["num_embeddings"], width=values["embedding_dim"]),
        width=width,
        layers=values["num_layers"],
        heads=values["num_attention_heads"],
        embedding_scaling="mean_std",
        raw_embeddings=True,
        diffusion=_infer_diffusion(folder / "prior_scheduler", "x_start", learned=False),
    )


def _infer_decoder(folder: Path) -> DecoderConfig:
    unet, text = _read_config(folder / "decoder"), _read_config(folder / "text_proj")
    return DecoderConfig(
        image_size=unet["sample_size"],
        embedding_dim=text["clip_embeddings_dim"],
        num_image_tokens=text["clip_extra_context_tokens"],
        unet=_infer_unet(unet),
        text=ClipTextConfig(width=text["clip_embeddings_dim"]),
        context_width=unet["cross_attention_dim"],
        null_embedding="learned",
        embedding_scale=1.0,
        raw_embeddings=True,
        diffusion=_infer_diffusion(folder / "decoder_scheduler", "epsilon", learned=unet["out_channels"] == 6),
    )


def _infer_upsampler(folder: Path) -> UpsamplerConfig:
    unet = _read_config(folder / "super_res_first")
    side = unet["sample_size"]
    return UpsamplerConfig(
        image_size=side,
        input_size=side // 4,
        enlarge_mode="bicubic",
        unet=_infer_unet(unet),
        diffusion=_infer_diffusion(folder / "super_res_scheduler", "epsilon", learned=unet["out_channels"] == 6),
    )


def _infer_diffusion(folder: Path, prediction: str, *, learned: bool) -> DiffusionConfig:
    """Read the process off a scheduler's config, where there is one; else take Karlo's.

    Raises:
        ValueError: for a schedule or prediction that this project does not have.
    """
    path = folder / "scheduler_config.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    given = {
        "schedule": (BETAS, values.get("beta_schedule", "squaredcos_cap_v2")),
        "prediction": (PREDICTIONS, values.get("prediction_type", PREDICTIONS[prediction])),
    }
    found: dict[str, Any] = {"num_timesteps": values.get("num_train_timesteps", 1000)}
    for name, (ours_to_theirs, theirs) in given.items():
        known = {value: key for key, value in ours_to_theirs.items()}
        if theirs not in known:
            raise ValueError(f"{path}: {name} is {theirs!r}; this project has {', '.join(known)}")
        found[name] = known[theirs]
    if learned or values.get("variance_type") == "fixed_large":
        found["variance"] = "learned_range" if learned else "fixed_large"
    return DiffusionConfig(**found)


def _infer_unet(values: Mapping[str, Any]) -> UNetConfig:
    widths = values["block_out_channels"]
    side = values["sample_size"]
    attention = [side // 2**level for level, name in enumerate(values["down_block_types"]) if "Attn" in name]
    return UNetConfig(
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=values["layers_per_block"],
        attention_resolutions=tuple(attention),
        head_channels=_infer_head_channels(values),
        dropout=values.get("dropout", 0.0),
        use_scale_shift_norm=values["resnet_time_scale_shift"] == "scale_shift",
        norm_groups=values["norm_num_groups"],
        norm_group_min_channels=1,
    )


def _infer_head_channels(values: Mapping[str, Any]) -> int:
    """Read the width of a head; without attention it does not matter."""
    if not any("Attn" in name for name in values["down_block_types"]):
        return UNetConfig.head_channels
    given = values.get("attention_head_dim", 8)
    widths = {given} if isinstance(given, int) else set(given)
    if len(widths) != 1:
        raise ValueError(f"attention_head_dim: {given}; this project's levels share one width of a head")
    return int(widths.pop())
