"""Generate images with a whole unCLIP stack: CLIP, prior, decoder and upsamplers (unCLIP, sections 2 and 3).

Every image is a function of its caption (or embedding), its seed and the weights: all noise comes from generators
seeded per image and per model, so neither batch size nor neighbours matter (up to the rounding of batched arithmetic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip_models.ar_prior import ARPrior
from unclip_models.clip import ClipModel, tokenize
from unclip_models.decoder import Decoder, ImageSampler
from unclip_models.prior import DiffusionPrior
from unclip_models.sampling import seeded_generators
from unclip_models.upsampler import Upsampler

MIN_SLERP_ANGLE = 1e-4


@dataclass(frozen=True, kw_only=True)
class PriorSampling:
    """How the prior is sampled; the paper: 64 analytic steps, best of two, no guidance (section 5.2)."""

    steps: int | str = 64
    guidance_scale: float = 1.0
    sampler: Literal["ddim", "ddpm", "analytic", "dpm_solver_2m"] = "ddim"
    num_candidates: int = 2


@dataclass(frozen=True, kw_only=True)
class DecoderSampling:
    """How the decoder is sampled; the paper: 250 steps with learned variance, guidance 1.25 for its COCO FID."""

    steps: int | str = 250
    guidance_scale: float = 1.25
    sampler: ImageSampler = "ddpm"
    eta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class UpsamplerSampling:
    """How an upsampler is sampled; the paper: 27 (64 -> 256) and 15 (256 -> 1024) DDIM steps, no guidance."""

    steps: int | str = 27
    sampler: ImageSampler = "ddim"
    eta: float = 0.0
    noise_temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a whole stack is sampled; ``upsamplers`` holds one entry per upsampler, in order."""

    prior: PriorSampling = field(default_factory=PriorSampling)
    decoder: DecoderSampling = field(default_factory=DecoderSampling)
    upsamplers: tuple[UpsamplerSampling, ...] = (UpsamplerSampling(steps=27), UpsamplerSampling(steps=15))


@dataclass(frozen=True)
class GeneratedImages:
    """Images of every resolution, and the embeddings they were decoded from.

    Attributes:
        images: side in px -> uint8 ``(B, side, side, 3)`` on the CPU, smallest first.
        image_embeddings: unit-norm z_i, float32 ``(B, D)`` on the CPU.
    """

    images: dict[int, Tensor]
    image_embeddings: Tensor

    @property
    def final(self) -> Tensor:
        """The largest images, uint8 ``(B, S, S, 3)``."""
        return self.images[max(self.images)]


def to_uint8(images: Tensor) -> Tensor:
    """Turn ``(B, 3, H, W)`` in [-1, 1] into uint8 ``(B, H, W, 3)`` on the CPU."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def slerp(a: Tensor, b: Tensor, theta: float | Tensor) -> Tensor:
    """Interpolate on the sphere, from ``a`` (theta 0) to ``b`` (theta 1) (section 3.2).

    Args:
        a: unit-norm ``(B, D)``.
        b: unit-norm ``(B, D)``.
        theta: fraction of the angle, a number or ``(B,)``.

    Returns:
        Unit-norm float32 ``(B, D)``. Parallel vectors are interpolated linearly, where the sphere's formula is 0 / 0.
    """
    a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    fraction = torch.as_tensor(theta, dtype=torch.float32, device=a.device).reshape(-1, 1)
    # From the chord lengths: acos of the dot product loses all precision near parallel vectors.
    angle = 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    weight_a = torch.where(angle > MIN_SLERP_ANGLE, ((1 - fraction) * angle).sin() / sine, 1 - fraction)
    weight_b = torch.where(angle > MIN_SLERP_ANGLE, (fraction * angle).sin() / sine, fraction.expand_as(sine))
    return F.normalize(weight_a * a + weight_b * b, dim=-1)


class UnCLIP:
    """A whole stack, ready to generate; all models are put into eval mode.

    Args:
        clip: the CLIP the others were trained with.
        prior: diffusion or autoregressive; None decodes the text embedding as if it were an image embedding (the
            paper's "no prior" baseline).
        decoder: renders the smallest image.
        upsamplers: in order, each taking the side its predecessor returns.

    Raises:
        ValueError: if dimensions or sides do not fit together.
    """

    def __init__(
        self,
        clip: ClipModel,
        prior: DiffusionPrior | ARPrior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
    ) -> None:
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, tuple(upsamplers)
        for name, model in (("prior", prior), ("decoder", decoder)):
            if model is not None and model.config.embedding_dim != clip.embedding_dim:
                raise ValueError(
                    f"UnCLIP: the {name} takes embeddings of {model.config.embedding_dim} dimensions, the CLIP "
                    f"({clip.origin}) has {clip.embedding_dim}; use the CLIP it was trained with"
                )
        side = decoder.config.image_size
        for index, upsampler in enumerate(self.upsamplers):
            if upsampler.config.input_size != side:
                raise ValueError(
                    f"UnCLIP: upsampler {index} takes {upsampler.config.input_size} px but is given {side} px"
                )
            side = upsampler.config.image_size
        for module in (clip, prior, decoder, *self.upsamplers):
            if module is not None:
                module.eval()

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are; all models must be there."""
        return next(self.decoder.parameters()).device

    def text_to_image(
        self, captions: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig | None = None
    ) -> GeneratedImages:
        """Generate one image per caption.

        Args:
            captions: B captions.
            seeds: B seeds; the same caption and seed give the same image.
            sampling: steps, samplers and guidance; None is the paper's.

        Raises:
            ValueError: if captions and seeds, or upsamplers and their settings, differ in number.
        """
        sampling = sampling or SamplingConfig()
        embeddings = self.imagine(captions, seeds, sampling.prior)
        return self.decode(embeddings, seeds, sampling, captions=captions)

    @torch.no_grad()
    def imagine(self, captions: Sequence[str], seeds: Sequence[int], sampling: PriorSampling | None = None) -> Tensor:
        """Draw an image embedding for every caption from the prior: unit-norm float32 ``(B, D)``."""
        _check_count("captions", len(captions), seeds)
        sampling = sampling or PriorSampling()
        text_embedding = self.clip.encode_text(self.clip.tokenize(captions)).to(self.device)
        if self.prior is None:
            return text_embedding
        return self.prior.sample(
            tokenize(captions, self.prior.config.text.context_length).to(self.device),
            text_embedding,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            generators=seeded_generators(seeds, "prior"),
            num_candidates=sampling.num_candidates,
            sampler=sampling.sampler,
        )

    @torch.no_grad()
    def decode(
        self,
        image_embeddings: Tensor,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        captions: Sequence[str] | None = None,
        x_T: Tensor | None = None,  # noqa: N803 - the paper's letter
    ) -> GeneratedImages:
        """Render embeddings at every resolution.

        Args:
            image_embeddings: unit-norm z_i ``(B, D)``.
            seeds: B seeds.
            sampling: as in :meth:`text_to_image`; ``prior`` is not used.
            captions: B captions for the decoder; None withholds them.
            x_T: the decoder's starting noise, e.g. from ``Decoder.invert``; None draws it from the seeds.
        """
        sampling = sampling or SamplingConfig(upsamplers=SamplingConfig().upsamplers[: len(self.upsamplers)])
        _check_count("image embeddings", len(image_embeddings), seeds)
        if captions is not None:
            _check_count("captions", len(captions), seeds)
        if len(sampling.upsamplers) < len(self.upsamplers):
            raise ValueError(
                f"UnCLIP: sampling.upsamplers has {len(sampling.upsamplers)} entries for {len(self.upsamplers)} "
                "upsamplers; give one each"
            )
        z = image_embeddings.to(self.device)
        context_length = self.decoder.config.text.context_length
        tokens = None if captions is None else tokenize(captions, context_length).to(self.device)
        options = sampling.decoder
        x = self.decoder.sample(
            z,
            tokens,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            sampler=options.sampler,
            eta=options.eta,
            generators=seeded_generators(seeds, "decoder"),
            x_T=x_T,
        )
        images = {self.decoder.config.image_size: to_uint8(x)}
        for index, upsampler in enumerate(self.upsamplers):
            up = sampling.upsamplers[index]
            x = upsampler.sample(
                x,
                steps=up.steps,
                sampler=up.sampler,
                eta=up.eta,
                generators=seeded_generators(seeds, f"upsampler_{index}"),
                noise_temperature=up.noise_temperature,
            )
            images[upsampler.config.image_size] = to_uint8(x)
        return GeneratedImages(images, z.float().cpu())

    def vary(self, images: Tensor, seeds: Sequence[int], sampling: SamplingConfig | None = None) -> GeneratedImages:
        """Render variations of images: the same z_i, new noise (section 3.1).

        Args:
            images: uint8, or floating point in [-1, 1], ``(B, 3, H, W)``.
            seeds: one per image.
            sampling: as in :meth:`text_to_image`; a stochastic decoder sampler varies most.
        """
        return self.decode(self.clip.encode_image(images), seeds, sampling)

    def text_diff(self, images: Tensor, caption: str, baseline: str, theta: float) -> Tensor:
        """Move images' embeddings along a difference of captions (section 3.3).

        Args:
            images: as in :meth:`vary`.
            caption: what the image should become.
            baseline: what it is, e.g. "a photo"; its embedding is subtracted.
            theta: fraction of the way; the paper uses up to 0.25 to 0.5.

        Returns:
            ``slerp(z_i, norm(z_t - z_t0), theta)``, float32 ``(B, D)``; decode it from the inverted noise.

        Raises:
            ValueError: if both captions mean the same to CLIP, so that there is no direction.
        """
        z_t, z_t0 = self.clip.encode_text(self.clip.tokenize([caption, baseline]))
        difference = z_t - z_t0
        if float(difference.norm()) < MIN_SLERP_ANGLE:
            raise ValueError(f"text_diff: {caption!r} and {baseline!r} have the same embedding; choose other captions")
        z_i = self.clip.encode_image(images)
        return slerp(z_i, difference.expand_as(z_i), theta)


def _check_count(what: str, count: int, seeds: Sequence[int]) -> None:
    if count != len(seeds):
        raise ValueError(f"UnCLIP: {count} {what} but {len(seeds)} seeds; give one seed per image")
