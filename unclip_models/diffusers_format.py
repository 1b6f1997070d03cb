"""Write models as diffusers reads them, and read what diffusers wrote, without importing diffusers.

A model becomes a folder. Where a diffusers class holds it, its weights lie in that class's own format, loadable by
``from_pretrained``:

* diffusion prior: ``prior/`` (``PriorTransformer``) and ``prior_scheduler/``;
* decoder: ``decoder/`` (``UNet2DConditionModel``), ``decoder_scheduler/`` and, if it reads CLIP's text, ``text_proj/``
  (``UnCLIPTextProjModel``);
* upsampler: ``super_res_first/`` (``UNet2DModel``) and ``super_res_scheduler/``.

What no diffusers class holds (a caption encoder of the model's own, the empty caption, measured tables) stays in
``unclip.safetensors`` with the model's config. A folder without that file, such as a published Karlo pipeline, is read
too; the config is then inferred. An autoregressive prior has no class in diffusers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from unclip_models.checkpoint import (
    architecture_header,
    build,
    config_from_header,
    finish_loading,
    read_weights,
    save_tensors,
    write_weights,
)
from unclip_models.decoder import Decoder
from unclip_models.diffusers_config import BETAS, PREDICTIONS, infer_config
from unclip_models.diffusers_names import attention_levels, prior_rules, text_proj_rules, unet_rules
from unclip_models.prior import DiffusionPrior
from unclip_models.settings import DecoderConfig, DiffusionConfig, DiffusionPriorConfig, UNetConfig
from unclip_models.unet import GroupNorm
from unclip_models.upsampler import Upsampler
from unclip_models.weight_rules import Rule, to_ours, to_theirs

OWN_FILE = "unclip.safetensors"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_NULL = "learned_classifier_free_guidance_embeddings"
_VARIANCES = {"fixed_small": "fixed_small_log", "fixed_large": "fixed_large", "learned_range": "learned_range"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One diffusers model in a folder: its class and config, and the rules for its weights."""

    folder: str
    config: Mapping[str, Any]
    rules: list[Rule]


# ---- writing --------------------------------------------------------------------------------------------------------


def export_diffusers(model: nn.Module, folder: str | Path) -> list[Path]:
    """Write a model; see the module's docstring for the layout.

    Args:
        model: a ``DiffusionPrior``, ``Decoder`` or ``Upsampler``.
        folder: made if it is missing; files of the same names are replaced.

    Returns:
        The files written.

    Raises:
        ValueError: if diffusers has no class for the model as it is configured.
    """
    folder = Path(folder)
    parts, scheduler = parts_of(model)
    left = dict(model.state_dict())
    written = []
    for part in parts:
        theirs, left = to_theirs(left, part.rules)
        if part.folder == "text_proj":
            theirs.setdefault(_NULL, torch.zeros(cast(Decoder, model).config.embedding_dim))
        written += _write_part(folder / part.folder, part.config, theirs)
    written.append(_write_json(folder / scheduler[0] / "scheduler_config.json", scheduler[1]))
    write_weights(folder / OWN_FILE, left, architecture_header(model))
    return [*written, folder / OWN_FILE]


def parts_of(model: nn.Module) -> tuple[list[Part], tuple[str, dict[str, Any]]]:
    """Return the diffusers models that a model of ours becomes, and the folder and config of its scheduler.

    Raises:
        ValueError: if diffusers has no class for it.
    """
    if isinstance(model, DiffusionPrior):
        return [_prior_part(model.config, model.text_scale)], _scheduler("prior", model.config.diffusion, 5.0)
    if isinstance(model, Decoder):
        config = model.config
        parts = [_decoder_part(model)]
        if config.text.kind == "clip":
            parts.append(_text_proj_part(config))
        return parts, _scheduler("decoder", config.diffusion, 1.0)
    if isinstance(model, Upsampler):
        return [_upsampler_part(model)], _scheduler("super_res", model.config.diffusion, 1.0)
    raise ValueError(
        f"{type(model).__name__}: diffusers has no class for it; keep it in this project's own format (.safetensors)"
    )


def _prior_part(config: DiffusionPriorConfig, text_scale: float) -> Part:
    _require_captions_of_embedding_dim("prior", config.text.width, config.embedding_dim)
    values = {
        "_class_name": "PriorTransformer",
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.layers,
        "embedding_dim": config.embedding_dim,
        "num_embeddings": config.text.context_length,
        "additional_embeddings": 4,
    }
    return Part("prior", values, prior_rules(config, text_scale))


def _decoder_part(model: Decoder) -> Part:
    config = model.config
    if not config.unet.attention_resolutions:
        raise ValueError(
            "decoder.unet.attention_resolutions: empty; UNet2DConditionModel needs attention in the middle"
        )
    attention = attention_levels(config.unet, config.image_size)
    down = ["SimpleCrossAttnDownBlock2D" if has else "ResnetDownsampleBlock2D" for has in attention]
    up = ["SimpleCrossAttnUpBlock2D" if has else "ResnetUpsampleBlock2D" for has in reversed(attention)]
    values = {
        "_class_name": "UNet2DConditionModel",
        **_unet_values(model.unet, config.image_size, 3),
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "attention_head_dim": _head_channels(config.unet, attention),
        "cross_attention_dim": config.context_width or config.text.width,
        "class_embed_type": "identity",
    }
    return Part("decoder", values, unet_rules(config.unet, config.image_size))


def _text_proj_part(config: DecoderConfig) -> Part:
    _require_captions_of_embedding_dim("decoder", config.text.width, config.embedding_dim)
    values = {
        "_class_name": "UnCLIPTextProjModel",
        "clip_extra_context_tokens": config.num_image_tokens,
        "clip_embeddings_dim": config.embedding_dim,
        "time_embed_dim": config.unet.embedding_channels,
        "cross_attention_dim": config.context_width or config.text.width,
    }
    return Part("text_proj", values, text_proj_rules(config))


def _upsampler_part(model: Upsampler) -> Part:
    config = model.config
    if config.max_noise_level > 0:
        raise ValueError(
            f"upsampler.max_noise_level: {config.max_noise_level}; UNet2DModel is not told the noise level of its input"
        )
    num_levels = len(config.unet.channel_mult)
    values = {
        "_class_name": "UNet2DModel",
        **_unet_values(model.unet, config.image_size, 6),
        "down_block_types": ["ResnetDownsampleBlock2D"] * num_levels,
        "up_block_types": ["ResnetUpsampleBlock2D"] * num_levels,
        "add_attention": False,
    }
    return Part("super_res_first", values, unet_rules(config.unet, config.image_size))


def _unet_values(unet: nn.Module, image_size: int, in_channels: int) -> dict[str, Any]:
    config = cast(UNetConfig, unet.config)
    if not config.resblock_updown:
        raise ValueError("unet.resblock_updown: false; diffusers resamples these blocks inside residual blocks only")
    if config.channel_mult[0] != 1:
        raise ValueError(
            f"unet.channel_mult: {config.channel_mult}; diffusers embeds timesteps as wide as the first level, so the "
            "first must be 1"
        )
    groups = sorted({norm.num_groups for norm in unet.modules() if isinstance(norm, GroupNorm)})
    if len(groups) != 1:
        raise ValueError(
            f"unet.norm_groups: this network's norms have {groups} groups, diffusers has one number for all; widths "
            "from 128 on that are multiples of 32 have 32"
        )
    return {
        "sample_size": image_size,
        "in_channels": in_channels,
        "out_channels": cast(Tensor, cast(Any, unet).out[2].weight).shape[0],
        "layers_per_block": config.num_res_blocks,
        "block_out_channels": [config.model_channels * mult for mult in config.channel_mult],
        "dropout": config.dropout,
        "norm_num_groups": groups[0],
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
    }


def _head_channels(config: UNetConfig, attention: list[bool]) -> int:
    """Return diffusers' ``attention_head_dim``.

    A level narrower than a head has one head of its own width. diffusers takes a list of one entry per level, but reads
    it in the same order on the way down and up, so a U-Net can have one number only.
    """
    levels = [*zip(config.channel_mult, attention, strict=True), (config.channel_mult[-1], True)]  # the middle has it
    found = sorted({min(config.head_channels, config.model_channels * mult) for mult, has in levels if has})
    if len(found) != 1:
        raise ValueError(
            f"unet.head_channels: {config.head_channels}; heads are {found} channels wide at these levels, diffusers "
            f"has one width for all; train with {math.gcd(*found)}"
        )
    return found[0]


def _require_captions_of_embedding_dim(model: str, width: int, dim: int) -> None:
    if width != dim:
        raise ValueError(
            f"{model}.text.width: {width}, embedding_dim: {dim}; diffusers' classes read captions of as many channels "
            "as CLIP's embeddings have"
        )


def _scheduler(name: str, diffusion: DiffusionConfig, clip_range: float) -> tuple[str, dict[str, Any]]:
    return f"{name}_scheduler", {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_start": 1e-4 * 1000 / diffusion.num_timesteps,
        "beta_end": 2e-2 * 1000 / diffusion.num_timesteps,
        "beta_schedule": BETAS[diffusion.schedule],
        "prediction_type": PREDICTIONS[diffusion.prediction],
        "variance_type": _VARIANCES[diffusion.variance],
        "clip_sample": True,
        "clip_sample_range": clip_range,
        "timestep_spacing": "linspace",
    }


def _write_part(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS_FILE
    save_tensors({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, path, {"format": "pt"})
    return [_write_json(folder / "config.json", config), path]


def _write_json(path: Path, values: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return path


# ---- reading --------------------------------------------------------------------------------------------------------


def import_diffusers(folder: str | Path, kind: str) -> nn.Module:
    """Read a model from a folder that :func:`export_diffusers` wrote, or that holds a published Karlo pipeline.

    Args:
        folder: the folder with ``prior/``, or ``decoder/`` and ``text_proj/``, or ``super_res_first/`` in it.
        kind: ``prior``, ``decoder`` or ``upsampler``.

    Returns:
        The model, in eval mode. One that reads CLIP's text and was not written here does not know the empty caption
        yet; see ``ClipText.set_null_caption``.

    Raises:
        ValueError: if a file is missing or damaged, or the weights are of another architecture.
    """
    folder = Path(folder)
    own_path = folder / OWN_FILE
    header, own = read_weights(own_path) if own_path.is_file() else ({}, {})
    config = config_from_header(header, own_path) if own_path.is_file() else infer_config(folder, kind)
    with torch.device("meta"):
        model = build(config)
    _require_kind(model, kind, folder)
    tensors = dict(own)
    for part in parts_of(model)[0]:
        tensors |= _read_part(folder / part.folder, part)
    return finish_loading(model, tensors, folder, may_lack=_unknown_elsewhere)


def _read_part(folder: Path, part: Part) -> dict[str, Tensor]:
    _, state = read_weights(_weights_file(folder))
    if part.folder == "text_proj" and all(_NULL not in rule.theirs for rule in part.rules):
        state.pop(_NULL, None)
    return to_ours(state, part.rules, str(folder))


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a folder of diffusers weights in safetensors format")
    return path


def _unknown_elsewhere(name: str) -> bool:
    """Say whether other projects do not store a tensor: it is then left as a new model has it."""
    return name == "gamma" or name.startswith("text_encoder.null_")


def _require_kind(model: nn.Module, kind: str, folder: Path) -> None:
    kinds = {"prior": DiffusionPrior, "decoder": Decoder, "upsampler": Upsampler}
    if kind not in kinds:
        raise ValueError(f"kind {kind!r}: choose from {', '.join(kinds)}")
    if not isinstance(model, kinds[kind]):
        raise ValueError(f"{folder}: holds a {type(model).__name__}, not a {kind}")
