"""How every model is sampled, as plain values; apart from the models for the reason of ``settings.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PriorSampler = Literal["ddim", "ddpm", "analytic", "dpm_solver_2m"]
ImageSampler = Literal["ddpm", "ddim", "dpm_solver_2m"]


@dataclass(frozen=True, kw_only=True)
class PriorSampling:
    """How the prior is sampled; the paper: 64 analytic steps, best of two, no guidance (section 5.2).

    Attributes:
        steps: steps of the sampler, or a spacing of timesteps as text.
        guidance_scale: classifier-free guidance; 1 is none.
        sampler: which one.
        num_candidates: embeddings drawn per caption, of which the one nearest to the text embedding is kept.
        clip_range: bound of the predicted embedding's entries; None for no bound.
    """

    steps: int | str = 64
    guidance_scale: float = 1.0
    sampler: PriorSampler = "ddim"
    num_candidates: int = 2
    clip_range: float | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderSampling:
    """How the decoder is sampled; the paper: 250 steps with learned variance, guidance 1.25 for its COCO FID.

    Attributes:
        steps: steps of the sampler, or a spacing of timesteps as text.
        guidance_scale: classifier-free guidance; 1 is none.
        guidance_rescale: share of the guided prediction that is scaled back to the unguided one's deviation, 0 to 1.
        sampler: which one.
        eta: noise of DDIM; 0 is deterministic.
        dynamic_percentile: of dynamic thresholding, such as 0.995; None for clipping to [-1, 1].
    """

    steps: int | str = 250
    guidance_scale: float = 1.25
    guidance_rescale: float = 0.0
    sampler: ImageSampler = "ddpm"
    eta: float = 0.0
    dynamic_percentile: float | None = None


@dataclass(frozen=True, kw_only=True)
class UpsamplerSampling:
    """How an upsampler is sampled; the paper: 27 (64 -> 256) and 15 (256 -> 1024) DDIM steps, no guidance.

    Attributes:
        steps: steps of the sampler, or a spacing of timesteps as text.
        sampler: which one.
        eta: noise of DDIM; 0 is deterministic.
        noise_temperature: deviation of the starting noise; below 1 is smoother.
        noise_level: noise added to the small image, for upsamplers conditioned on it.
        tile_px: side of the tiles that a large image is made in; None for one piece.
    """

    steps: int | str = 27
    sampler: ImageSampler = "ddim"
    eta: float = 0.0
    noise_temperature: float = 1.0
    noise_level: float = 0.0
    tile_px: int | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a whole stack is sampled; ``upsamplers`` holds one entry per upsampler, in order."""

    prior: PriorSampling = field(default_factory=PriorSampling)
    decoder: DecoderSampling = field(default_factory=DecoderSampling)
    upsamplers: tuple[UpsamplerSampling, ...] = (UpsamplerSampling(steps=27), UpsamplerSampling(steps=15))
