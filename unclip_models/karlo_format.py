"""Read and write weights in the layout of Karlo and of ADM, the code base it and GLIDE grew from.

Our U-Net has ADM's names; only attention differs, whose projections are convolutions of one pixel there. Karlo adds a
prior and the decoder's projections. Shapes tell nearly everything about a network; what they cannot tell (the side of
the image, the width of a head) is asked for.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from unclip_models.checkpoint import build, finish_loading, read_weights
from unclip_models.decoder import Decoder
from unclip_models.prior import DiffusionPrior
from unclip_models.settings import (
    ClipTextConfig,
    DecoderConfig,
    DiffusionConfig,
    DiffusionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_models.upsampler import Upsampler
from unclip_models.weight_rules import Rule, affine, copy, interleaved, pointwise, reshaped, scaled, to_ours, to_theirs

KINDS = ("prior", "decoder", "upsampler")
_ONE_PIXEL = ("qkv.weight", "encoder_kv.weight", "proj_out.weight")
# Where the networks may lie in a checkpoint, most specific first.
_UNET_PREFIXES = ("model_first_steps.", "model.", "")
_PRIOR_PREFIXES = ("model.", "")
_TEXT_PROJ = {
    "text_to_context.0": "text_seq_proj.0",
    "text_to_context.1": "text_seq_proj.1",
    "text_to_time": "text_feat_proj",
}
_IMAGE_PROJ = {"image_to_tokens": "clip_tok_proj", "image_to_time": "clip_emb"}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What weights cannot tell.

    Attributes:
        image_size: side of the (output) image in px; None is 64 for a decoder and 256 for an upsampler.
        input_size: side of an upsampler's input in px.
        head_channels: channels per attention head.
        schedule: noise schedule the network was trained with.
        prediction: what an image network predicts.
        context_length: tokens of a decoder's captions.
    """

    image_size: int | None = None
    input_size: int = 64
    head_channels: int = 64
    schedule: str = "cosine"
    prediction: str = "epsilon"
    context_length: int = 77


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a .ckpt, .pt or .pth file without executing anything in it.

    Raises:
        ValueError: if the file is missing or damaged, or holds anything but tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_weights(path)[1]
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a .safetensors, .ckpt, .pt or .pth file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as plain weights ({first_line}); a file that needs code to be executed is "
            "refused, convert it to safetensors where you trust it"
        ) from None
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path}: does not hold named tensors; give a state dict")
    return dict(found)


def import_karlo(
    state: Mapping[str, Tensor],
    kind: str,
    options: ImportOptions | None = None,
    *,
    statistics: tuple[Tensor, Tensor] | None = None,
    where: str = "checkpoint",
) -> nn.Module:
    """Build a model from weights in Karlo's or ADM's layout.

    Args:
        state: tensors by name.
        kind: ``prior``, ``decoder`` or ``upsampler``.
        options: what the weights cannot tell.
        statistics: mean and standard deviation of the image embeddings, two ``(D,)``, which Karlo keeps in a file of
            their own; needed for a prior.
        where: the source, for messages.

    Returns:
        The model, in eval mode; it does not know the empty caption yet (``ClipText.set_null_caption``).

    Raises:
        ValueError: if the weights are of another kind or architecture.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: choose from {', '.join(KINDS)}")
    options = options or ImportOptions()
    if options.head_channels < 1:
        raise ValueError(f"head_channels: {options.head_channels}; use 1 or more")
    try:
        config, own = _read_shapes(state, kind, options, statistics, where)
    except KeyError as error:
        raise ValueError(f"{where}: lacks {error}; it is not a {kind}, or of another architecture") from None
    with torch.device("meta"):
        model = build(config)
    tensors = to_ours(own, karlo_rules(model), where)
    return finish_loading(model, tensors, Path(where), may_lack=_not_in_karlo)


def _read_shapes(
    state: Mapping[str, Tensor],
    kind: str,
    options: ImportOptions,
    statistics: tuple[Tensor, Tensor] | None,
    where: str,
) -> tuple[Any, dict[str, Tensor]]:
    """Find the network's tensors, and the config that they show."""
    if kind == "prior":
        if statistics is None:
            raise ValueError(f"{where}: a prior needs the mean and standard deviation of its image embeddings")
        if not bool((statistics[1] > 0).all()):
            raise ValueError(f"{where}: a standard deviation of its image embeddings is not positive")
        own = _of_prefix(state, _PRIOR_PREFIXES, "clip_img_proj.weight", where)
        return infer_prior(own, options), {**own, "clip_mean": statistics[0], "clip_std": statistics[1]}
    own = _of_prefix(state, _UNET_PREFIXES, "input_blocks.0.0.weight", where)
    return (infer_decoder if kind == "decoder" else infer_upsampler)(own, options), own


def export_karlo(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model in Karlo's layout, without a prefix; what Karlo does not store is left out."""
    theirs, left = to_theirs(model.state_dict(), karlo_rules(model))
    assert all(_not_in_karlo(name) for name in left), sorted(left)
    return theirs


def karlo_rules(model: nn.Module) -> list[Rule]:
    """Map a model that reads CLIP's text (prior, decoder) or none (upsampler).

    Raises:
        ValueError: if Karlo has no layout for it.
    """
    if isinstance(model, DiffusionPrior):
        _require_clip_text(model.config.text.kind)
        return _prior_rules(model.config, model.text_scale)
    if isinstance(model, Decoder):
        _require_clip_text(model.config.text.kind)
        return _unet_rules(model) + _decoder_rules(model.config)
    if isinstance(model, Upsampler):
        return _unet_rules(model)
    raise ValueError(f"{type(model).__name__}: Karlo has no layout for it")


def _require_clip_text(kind: str) -> None:
    if kind != "clip":
        raise ValueError("text.kind is 'own'; Karlo's models read the frozen CLIP's text")


def _not_in_karlo(name: str) -> bool:
    return name == "gamma" or name.startswith("text_encoder.null_")


def _of_prefix(state: Mapping[str, Tensor], prefixes: tuple[str, ...], mark: str, where: str) -> dict[str, Tensor]:
    """Take the tensors of one network, without the prefix of their names."""
    for prefix in prefixes:
        if f"{prefix}{mark}" in state:
            return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    raise ValueError(f"{where}: has no {mark!r}; it is not of this kind, or of another project")


# ---- names ----------------------------------------------------------------------------------------------------------


def _unet_rules(model: nn.Module) -> list[Rule]:
    names = [name for name in model.state_dict() if name.startswith("unet.")]
    return [(pointwise if name.endswith(_ONE_PIXEL) else copy)(name, name.removeprefix("unet.")) for name in names]


def _decoder_rules(config: DecoderConfig) -> list[Rule]:
    rules = [rule for ours, theirs in _TEXT_PROJ.items() for rule in affine(copy, ours, theirs)]
    for ours, theirs in _IMAGE_PROJ.items():
        rules.append(scaled(f"{ours}.weight", f"{theirs}.weight", config.factor))
        rules.append(copy(f"{ours}.bias", f"{theirs}.bias"))
    if config.null_embedding == "learned":
        rules.append(scaled("null_image_embedding", "cf_param", 1 / config.factor))
    return rules


def _prior_rules(config: DiffusionPriorConfig, text_scale: float) -> list[Rule]:
    rules = affine(copy, "time_embed.0", "time_embed.0") + affine(copy, "time_embed.2", "time_embed.2")
    rules += affine(copy, "image_proj", "clip_img_proj") + affine(copy, "text_proj", "text_enc_proj")
    rules.append(scaled("text_embedding_proj.weight", "text_emb_proj.weight", text_scale))
    rules.append(copy("text_embedding_proj.bias", "text_emb_proj.bias"))
    positions = config.text.context_length + 4
    rules.append(reshaped("positional_embedding", "positional_embedding", (1, positions, config.width)))
    rules.append(reshaped("final_query", "prd_emb", (1, 1, config.width)))
    for layer in range(config.layers):
        ours, theirs = f"transformer.blocks.{layer}", f"transformer.resblocks.{layer}"
        rules += affine(interleaved, f"{ours}.attention.qkv", f"{theirs}.attn.c_qkv", config.heads)
        rules += affine(copy, f"{ours}.attention.proj", f"{theirs}.attn.c_proj")
        rules += affine(copy, f"{ours}.norm_1", f"{theirs}.ln_1") + affine(copy, f"{ours}.norm_2", f"{theirs}.ln_2")
        rules += affine(copy, f"{ours}.mlp.0", f"{theirs}.mlp.c_fc") + affine(
            copy, f"{ours}.mlp.2", f"{theirs}.mlp.c_proj"
        )
    rules += affine(copy, "final_norm", "final_ln") + affine(copy, "out_proj", "out_proj")
    return [*rules, copy("scaling.mean", "clip_mean"), copy("scaling.std", "clip_std")]


# ---- shapes ---------------------------------------------------------------------------------------------------------


def infer_prior(state: Mapping[str, Tensor], options: ImportOptions) -> DiffusionPriorConfig:
    """Read the shape of a prior off its weights."""
    width, dim = state["clip_img_proj.weight"].shape
    return DiffusionPriorConfig(
        embedding_dim=dim,
        text=ClipTextConfig(
            context_length=state["positional_embedding"].shape[-2] - 4, width=state["text_enc_proj.weight"].shape[1]
        ),
        width=width,
        layers=_count(state, "transformer.resblocks."),
        heads=width // options.head_channels,
        embedding_scaling="mean_std",
        raw_embeddings=True,
        diffusion=DiffusionConfig(schedule=cast(Any, options.schedule), prediction="x_start"),
    )


def infer_decoder(state: Mapping[str, Tensor], options: ImportOptions) -> DecoderConfig:
    """Read the shape of a decoder off its weights."""
    context_width, text_width = state["text_seq_proj.0.weight"].shape
    return DecoderConfig(
        image_size=options.image_size or 64,
        embedding_dim=state["clip_emb.weight"].shape[1],
        num_image_tokens=state["clip_tok_proj.weight"].shape[0] // context_width,
        unet=infer_unet(state, options, options.image_size or 64),
        text=ClipTextConfig(context_length=options.context_length, width=text_width),
        context_width=context_width,
        null_embedding="learned" if "cf_param" in state else "zero",
        embedding_scale=1.0,
        raw_embeddings=True,
        diffusion=_infer_diffusion(state, options),
    )


def infer_upsampler(state: Mapping[str, Tensor], options: ImportOptions) -> UpsamplerConfig:
    """Read the shape of an upsampler off its weights."""
    side = options.image_size or 256
    return UpsamplerConfig(
        image_size=side,
        input_size=options.input_size,
        enlarge_mode="bicubic",
        unet=infer_unet(state, options, side),
        diffusion=_infer_diffusion(state, options),
    )


def infer_unet(state: Mapping[str, Tensor], options: ImportOptions, image_size: int) -> UNetConfig:
    """Read the shape of a U-Net off its weights.

    Every level but the highest ends, on the way up, with a block that doubles the side: an inner layer more. Counting
    these gives the levels, and with them the residual blocks per level.
    """
    num_blocks = _count(state, "output_blocks.")
    has_residual = [_layers(state, block, "in_layers.0.weight") for block in range(num_blocks)]
    has_convolution = [_layers(state, block, "conv.weight") for block in range(num_blocks)]
    num_ups = sum(len(layers) - 1 for layers in has_residual) + sum(len(layers) for layers in has_convolution)
    num_levels = num_ups + 1
    num_res_blocks = num_blocks // num_levels - 1
    base = state["input_blocks.0.0.weight"].shape[0]
    firsts = [1 + level * (num_res_blocks + 1) for level in range(num_levels)]
    widths = [state[f"input_blocks.{first}.0.in_layers.2.weight"].shape[0] for first in firsts]
    attention = [f"input_blocks.{first}.1.qkv.weight" in state for first in firsts]
    embedding_rows = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    return UNetConfig(
        model_channels=state["time_embed.0.weight"].shape[1],
        channel_mult=tuple(width // base for width in widths),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(image_size // 2**level for level in range(num_levels) if attention[level]),
        head_channels=options.head_channels,
        use_scale_shift_norm=embedding_rows == 2 * widths[0],
        resblock_updown=not any(has_convolution),
        norm_group_min_channels=1,
    )


def _infer_diffusion(state: Mapping[str, Tensor], options: ImportOptions) -> DiffusionConfig:
    learned = state["out.2.weight"].shape[0] == 6
    return DiffusionConfig(
        schedule=cast(Any, options.schedule),
        prediction=cast(Any, options.prediction),
        variance="learned_range" if learned else "fixed_small",
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _layers(state: Mapping[str, Tensor], block: int, mark: str) -> list[int]:
    """Return which layers of an output block have a tensor of this name."""
    return [layer for layer in range(3) if f"output_blocks.{block}.{layer}.{mark}" in state]
