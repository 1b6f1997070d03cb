"""The ADM U-Net that the decoder and both upsamplers share (Dhariwal & Nichol 2021; unCLIP Appendix C, Table 3).

Module names and row orders are those of ADM checkpoints (``input_blocks``, ``middle_block``, ``output_blocks``,
``in_layers`` ...; attention rows interleaved per head), so weights of ADM, GLIDE, Karlo and diffusers can be mapped
onto this network exactly. One thing differs: attention projections are linear layers, so a 1x1 convolution's weight
``(out, in, 1)`` loses its last axis on the way in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclip_models.diffusion import timestep_embedding
from unclip_models.dropout import SampleDropout, number_dropouts
from unclip_models.settings import UNetConfig


def num_norm_groups(channels: int, max_groups: int = 32, min_channels: int = 4) -> int:
    """Choose the number of groups of a group norm.

    It is the largest divisor of ``channels``, at most ``max_groups``, that leaves ``min_channels`` or more in a group:
    ADM's 32 at every width that is a multiple of 32 from 128 on. Narrower networks get fewer groups, because a group of
    one channel would erase that channel's mean, that is, its colour.
    """
    limit = max(1, min(max_groups, channels // min_channels))
    return next(groups for groups in range(limit, 0, -1) if channels % groups == 0)


class GroupNorm(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the dtype of its input, which it returns (eps 1e-5)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)``; the output has the dtype of ``x``."""
        if x.dtype == torch.float32 and self.weight.dtype == torch.float32:
            return super().forward(x)
        out = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return out.to(x.dtype)


def _group_norm(channels: int, config: UNetConfig) -> GroupNorm:
    groups = num_norm_groups(channels, config.norm_groups, config.norm_group_min_channels)
    return GroupNorm(groups, channels)


def _zeroed(module: nn.Module) -> nn.Module:
    """Zero all parameters, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Resample(nn.Module):
    """Halve the side by 2x2 averages (``"down"``), double it by repetition (``"up"``), or keep it (``"none"``)."""

    def __init__(self, direction: str) -> None:
        super().__init__()
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        """Resample ``(B, C, H, W)``."""
        if self.direction == "down":
            return F.avg_pool2d(x, 2)
        if self.direction == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x


class Downsample(nn.Module):
    """Halve the side with a strided 3x3 convolution (used when ``resblock_updown`` is off)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C, H/2, W/2)``."""
        return cast(Tensor, self.op(x))


class Upsample(nn.Module):
    """Double the side by repetition, then a 3x3 convolution (used when ``resblock_updown`` is off)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2, mode="nearest")))


class ResBlock(nn.Module):
    """ADM residual block: norm, SiLU, (resample,) conv; the timestep embedding enters at the second norm."""

    def __init__(self, channels: int, out_channels: int, config: UNetConfig, *, resample: str = "none") -> None:
        super().__init__()
        self.use_scale_shift_norm = config.use_scale_shift_norm
        self.checkpoint_activations = config.checkpoint_activations
        self.resample = Resample(resample)
        self.in_layers = nn.Sequential(
            _group_norm(channels, config), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        embedding_out = 2 * out_channels if config.use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.embedding_channels, embedding_out))
        self.out_layers = nn.Sequential(
            _group_norm(out_channels, config),
            nn.SiLU(),
            SampleDropout(config.dropout),
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: ``(B, C, H, W)``.
            emb: timestep embedding ``(B, 4 * model_channels)``.
            dropout_seeds: of the samples, int64 ``(B,)``; needed in training mode if there is dropout.

        Returns:
            ``(B, C_out, H', W')``, resampled if the block resamples.
        """
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, dropout_seeds, use_reentrant=False)
        return self._forward(x, emb, dropout_seeds)

    def _forward(self, x: Tensor, emb: Tensor, dropout_seeds: Tensor | None) -> Tensor:
        norm, silu, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))  # (B, C_out, H', W')
        shift = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        norm, silu, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)  # (B, C_out, 1, 1) each
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + shift)
        h = conv(dropout(silu(h), dropout_seeds))
        return cast(Tensor, self.skip_connection(self.resample(x)) + h)


class AttentionBlock(nn.Module):
    """Self-attention over pixels, joined by context tokens in front of the keys and values (GLIDE's ``encoder_kv``).

    Rows of ``qkv`` are ``[q, k, v]`` of head 0, then of head 1, ... (the "legacy" order of ADM); those of
    ``encoder_kv`` are ``[k, v]`` of each head in turn.
    """

    def __init__(self, channels: int, config: UNetConfig, context_dim: int | None) -> None:
        super().__init__()
        if channels > config.head_channels and channels % config.head_channels:
            raise ValueError(
                f"unet.head_channels: {config.head_channels} does not divide the {channels} channels of a level with "
                "attention; choose a divisor"
            )
        self.num_heads = max(1, channels // config.head_channels)
        self.checkpoint_activations = config.checkpoint_activations
        self.norm = _group_norm(channels, config)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.encoder_kv = nn.Linear(context_dim, 2 * channels) if context_dim is not None else None
        self.proj_out = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: ``(B, C, H, W)``.
            context: tokens ``(B, L, context_dim)``; None attends to the pixels only.
            mask: bool ``(B, L)``, True where a context token may be seen; None shows all.

        Returns:
            ``(B, C, H, W)``.
        """
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self._forward, x, context, mask, use_reentrant=False)
        return self._forward(x, context, mask)

    def _forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        num_images, channels, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self._heads(self.qkv(pixels), 3)  # (B, heads, HW, C / heads)
        visible = None
        if context is not None:
            if self.encoder_kv is None:
                raise ValueError("UNet got context tokens but was built with context_dim=None")
            context_k, context_v = self._heads(self.encoder_kv(context), 2)  # (B, heads, L, C / heads)
            k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)  # (B, heads, L + HW, .)
            if mask is not None:
                visible = F.pad(mask, (0, height * width), value=True)[:, None, None]  # (B, 1, 1, L + HW)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        h = self.proj_out(h.transpose(1, 2).reshape(num_images, height * width, channels))
        residual: Tensor = h.transpose(1, 2).reshape(x.shape).to(x.dtype)
        return x + residual

    def _heads(self, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split ``(B, L, heads * parts * d)`` into ``parts`` tensors ``(B, heads, L, d)``."""
        split = rows.unflatten(-1, (self.num_heads, parts, -1))
        return tuple(part.transpose(1, 2) for part in split.unbind(dim=3))


class Block(nn.Sequential):
    """Layers of one U-Net step; each gets the inputs that its kind takes."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None, dropout_seeds: Tensor | None
    ) -> Tensor:
        """Run the layers in order on ``(B, C, H, W)``."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, dropout_seeds)
            elif isinstance(layer, AttentionBlock):
                x = layer(x, context, mask)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """The ADM U-Net: predicts noise (and, with twice the output channels, a variance) from a noised image.

    The attribute ``channels_last`` chooses the memory format of the activations (see ``efficiency.py``), and no result.

    Args:
        config: shape of the network.
        image_size: training side in px; it fixes which levels carry attention.
        in_channels: channels of ``x`` (6 in an upsampler: noised image and low-resolution image).
        out_channels: 3, or 6 with learned variance.
        context_dim: width of context tokens, or None for a network without them.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        image_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(config, image_size)
        self.config = config
        self.channels_last = False
        self.context_dim = context_dim
        width = config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(width, config.embedding_channels),
            nn.SiLU(),
            nn.Linear(config.embedding_channels, config.embedding_channels),
        )
        sides = [image_size // 2**level for level in range(len(config.channel_mult))]
        self.input_blocks, skips = self._build_input(in_channels, sides)
        self.middle_block = self._build_middle()
        self.output_blocks = self._build_output(sides, skips)
        self.out = nn.Sequential(
            _group_norm(width * config.channel_mult[0], config),
            nn.SiLU(),
            _zeroed(nn.Conv2d(width * config.channel_mult[0], out_channels, 3, padding=1)),
        )
        number_dropouts(self)

    @property
    def drops(self) -> bool:
        """Whether its forward pass needs seeds of dropout now: in training mode, if there is dropout at all."""
        return self.training and self.config.dropout > 0.0

    def _step(self, channels: int, out_channels: int, side: int) -> list[nn.Module]:
        layers: list[nn.Module] = [ResBlock(channels, out_channels, self.config)]
        if side in self.config.attention_resolutions:
            layers.append(AttentionBlock(out_channels, self.config, self.context_dim))
        return layers

    def _resample(self, channels: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return ResBlock(channels, channels, self.config, resample=direction)
        return Downsample(channels) if direction == "down" else Upsample(channels)

    def _build_input(self, in_channels: int, sides: Sequence[int]) -> tuple[nn.ModuleList, list[int]]:
        """Build the way down; also return the channels of every output, which the way up consumes in reverse."""
        config = self.config
        channels = config.model_channels * config.channel_mult[0]
        blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                blocks.append(Block(*self._step(channels, config.model_channels * mult, sides[level])))
                channels = config.model_channels * mult
                skips.append(channels)
            if level + 1 < len(config.channel_mult):
                blocks.append(Block(self._resample(channels, "down")))
                skips.append(channels)
        return blocks, skips

    def _build_middle(self) -> Block:
        channels = self.config.model_channels * self.config.channel_mult[-1]
        first, last = (ResBlock(channels, channels, self.config) for _ in range(2))
        if not self.config.attention_resolutions:
            return Block(first, last)
        return Block(first, AttentionBlock(channels, self.config, self.context_dim), last)

    def _build_output(self, sides: Sequence[int], skips: Sequence[int]) -> nn.ModuleList:
        config = self.config
        channels, remaining = skips[-1], list(skips)
        blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for index in range(config.num_res_blocks + 1):
                layers = self._step(channels + remaining.pop(), config.model_channels * mult, sides[level])
                channels = config.model_channels * mult
                if level and index == config.num_res_blocks:
                    layers.append(self._resample(channels, "up"))
                blocks.append(Block(*layers))
        return blocks

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the weights, in which the network computes outside autocast."""
        return cast(Tensor, self.time_embed[0].weight).dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        embedding: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Predict from a noised image.

        Args:
            x: ``(B, in_channels, H, W)``, floating point; H and W multiples of ``config.min_multiple_px``.
            t: original timesteps ``(B,)``.
            embedding: ``(B, 4 * model_channels)``, added to the timestep embedding.
            context: tokens ``(B, L, context_dim)`` that every attention sees before its own keys and values.
            context_mask: bool ``(B, L)``, True where a token may be seen.
            dropout_seeds: of the samples, int64 ``(B,)``, on the CPU; a network with dropout needs them in training
                mode.

        Returns:
            ``(B, out_channels, H, W)`` in the dtype of ``x``.

        Raises:
            ValueError: if H or W does not fit the number of levels, or context is given to a network without it.
        """
        multiple = self.config.min_multiple_px
        if x.shape[-1] % multiple or x.shape[-2] % multiple:
            raise ValueError(f"UNet: image of {tuple(x.shape[-2:])} px; both sides must be multiples of {multiple}")
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(self.dtype))  # (B, 4ch)
        if embedding is not None:
            emb = emb + embedding.to(emb.dtype)
        context = context.to(self.dtype) if context is not None else None
        h, skips = x.to(self.dtype), []
        if self.channels_last:
            h = h.contiguous(memory_format=torch.channels_last)
        for block in self.input_blocks:
            h = block(h, emb, context, context_mask, dropout_seeds)
            skips.append(h)
        h = self.middle_block(h, emb, context, context_mask, dropout_seeds)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context, context_mask, dropout_seeds)
        return cast(Tensor, self.out(h)).to(x.dtype)


def _check_sizes(config: UNetConfig, image_size: int) -> None:
    if image_size < 1 or image_size % config.min_multiple_px:
        raise ValueError(
            f"image_size: {image_size} px is not a multiple of {config.min_multiple_px}, which {config.channel_mult} "
            "as unet.channel_mult needs; change one of them"
        )
    sides = {image_size // 2**level for level in range(len(config.channel_mult))}
    if unknown := set(config.attention_resolutions) - sides:
        raise ValueError(
            f"unet.attention_resolutions: {sorted(unknown)} px never occur at image_size {image_size}; "
            f"choose from {sorted(sides, reverse=True)}"
        )
