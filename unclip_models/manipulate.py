"""What unCLIP can do to images beyond drawing captions (unCLIP, section 3): functions over a whole stack.

An image is held as two latents (section 3): its CLIP embedding z_i, and the noise x_T from which DDIM decodes it back.
Keeping one and changing the other gives variations, interpolations and text diffs; rebuilding z_i from fewer principal
components shows what each of them means. Inverted noise is decoded without guidance, as it was found: guided, the
steps of DDIM no longer contract, and no noise leads back to the image (measured on the quickstart's decoder: an error
of 0.007 at scale 1, of 0.6 at scale 3). All functions take images as uint8 ``(B, 3, H, W)``, or floating point in
[-1, 1]; they are cut to a square around their centre and shrunk to the decoder's side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip_models.degradation import downsample
from unclip_models.generate import GeneratedImages, UnCLIP
from unclip_models.sampling import seeded_generators
from unclip_models.sampling_settings import SamplingConfig

MIN_SLERP_ANGLE = 1e-4
Noise = Literal["inverted", "seeded"]


@dataclass(frozen=True)
class Inversion:
    """An image as its two latents.

    Attributes:
        image_embedding: z_i, float32 ``(B, D)``.
        noise: x_T, float32 ``(B, 3, S, S)``.
        image: what was inverted, at the decoder's side, float32 ``(B, 3, S, S)`` in [-1, 1].
    """

    image_embedding: Tensor
    noise: Tensor
    image: Tensor


@dataclass(frozen=True)
class PrincipalAxes:
    """The principal axes of CLIP's image embeddings: ``mean`` ``(D,)`` and ``axes`` ``(k, D)``, orthonormal rows."""

    mean: Tensor
    axes: Tensor


def slerp(a: Tensor, b: Tensor, theta: float | Tensor) -> Tensor:
    """Interpolate on the sphere, from ``a`` (theta 0) to ``b`` (theta 1) (section 3.2).

    The direction turns by the fraction of the angle between both; the norm changes linearly from one to the other, so
    vectors of equal norm keep it.

    Args:
        a: ``(B, ...)``; everything but the first dimension is one vector.
        b: of the same shape.
        theta: fraction of the angle, a number or ``(B,)``.

    Returns:
        float32, of the shape of ``a``. Parallel vectors are interpolated linearly, where the sphere's formula is 0 / 0.
    """
    shape = a.shape
    a, b = a.float().flatten(1), b.float().flatten(1)
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    a, b = a / norm_a, b / norm_b
    fraction = torch.as_tensor(theta, dtype=torch.float32, device=a.device).reshape(-1, 1)
    # From the chord lengths: acos of the dot product loses all precision near parallel vectors.
    angle = 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
    sine = angle.sin()
    weight_a = torch.where(angle > MIN_SLERP_ANGLE, ((1 - fraction) * angle).sin() / sine, 1 - fraction)
    weight_b = torch.where(angle > MIN_SLERP_ANGLE, (fraction * angle).sin() / sine, fraction.expand_as(sine))
    direction = F.normalize(weight_a * a + weight_b * b, dim=1)
    return (direction * torch.lerp(norm_a, norm_b, fraction)).reshape(shape)


def to_decoder_side(model: UnCLIP, images: Tensor) -> Tensor:
    """Cut images to a centred square and shrink them to the decoder's side: float32 ``(B, 3, S, S)`` in [-1, 1].

    Raises:
        ValueError: if they are not RGB.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)}; give RGB images (B, 3, H, W)")
    x = images.to(model.device).float()
    if images.dtype == torch.uint8:
        x = x / 127.5 - 1
    return downsample(_centre(x), model.decoder.config.image_size)


def _centre(x: Tensor) -> Tensor:
    """Cut the centred square out."""
    height, width = x.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return x[:, :, top : top + side, left : left + side]


def _known_at_decoder_side(model: UnCLIP, mask: Tensor) -> Tensor:
    """Tell which of the decoder's pixels are made of known pixels alone, bool ``(B, 1, S, S)``.

    To shrink an image, ``downsample`` weighs two pixels of the result to each side, the outer ones negatively.
    """
    unknown = _centre((mask == 0).to(model.device).float())
    side = model.decoder.config.image_size
    reach = math.ceil(1.5 * max(unknown.shape[-1] / side, 1.0)) if unknown.shape[-1] != side else 0
    across, down = F.max_pool2d(unknown, (1, 2 * reach + 1), stride=1, padding=(0, reach)), (2 * reach + 1, 1)
    touched = F.max_pool2d(across, down, stride=1, padding=(reach, 0))
    return F.adaptive_max_pool2d(touched, side) == 0


def vary(
    model: UnCLIP, images: Tensor, seeds: Sequence[int], sampling: SamplingConfig | None = None
) -> GeneratedImages:
    """Render variations of images: the same z_i, new noise (section 3.1).

    Args:
        model: the stack.
        images: one per seed.
        seeds: B seeds.
        sampling: a stochastic sampler of the decoder (``ddpm``, or ``ddim`` with ``eta`` up to 1) varies most; with
            ``ddim`` and ``eta`` 0 the starting noise alone varies.
    """
    return model.decode(model.embed_images(images), seeds, sampling)


@torch.no_grad()
def invert(model: UnCLIP, images: Tensor, sampling: SamplingConfig | None = None) -> Inversion:
    """Find the latents of images: z_i by CLIP, x_T by DDIM inversion under it (section 3).

    Args:
        model: the stack.
        images: ``(B, 3, H, W)``.
        sampling: steps of the decoder; :func:`reconstruct` must use the same.
    """
    options = inverse(sampling).decoder
    small, z = to_decoder_side(model, images), model.embed_images(images)
    noise = model.decoder.invert(small, z, steps=options.steps, guidance_scale=options.guidance_scale)
    return Inversion(z, noise, small)


def reconstruct(model: UnCLIP, inversion: Inversion, sampling: SamplingConfig | None = None) -> GeneratedImages:
    """Decode latents back to the images they came from; they differ by the error of the inversion alone."""
    return decode_latents(model, inversion.image_embedding, inversion.noise, sampling)


def reconstruction_error(model: UnCLIP, inversion: Inversion, sampling: SamplingConfig | None = None) -> Tensor:
    """Return the root mean squared error of the reconstruction at the decoder's side, float32 ``(B,)``.

    Pixels count from -1 to 1, so that 2 / 255 is one level of 8 bits.
    """
    options = inverse(sampling).decoder
    decoded = model.decoder.sample(
        inversion.image_embedding,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        sampler="ddim",
        generators=seeded_generators([0] * len(inversion.noise)),
        x_T=inversion.noise,
    )
    return (decoded - inversion.image).square().flatten(1).mean(dim=1).sqrt().cpu()


def decode_latents(
    model: UnCLIP, image_embeddings: Tensor, noise: Tensor, sampling: SamplingConfig | None = None, seed: int = 0
) -> GeneratedImages:
    """Decode pairs of z_i ``(B, D)`` and inverted x_T ``(B, 3, S, S)``; the seed is the upsamplers'."""
    return model.decode(image_embeddings, [seed] * len(noise), inverse(sampling), x_T=noise)


def interpolate(
    model: UnCLIP,
    first: Tensor,
    second: Tensor,
    fractions: Sequence[float],
    sampling: SamplingConfig | None = None,
    *,
    noise: Noise = "inverted",
    seed: int = 0,
) -> GeneratedImages:
    """Blend two images along the sphere of embeddings (section 3.2).

    Args:
        model: the stack.
        first: ``(1, 3, H, W)``.
        second: ``(1, 3, H, W)``.
        fractions: F positions from 0 (first) to 1 (second).
        sampling: steps of the decoder, and with ``seeded`` noise its guidance.
        noise: ``inverted`` also interpolates the two images' own x_T, so that the ends reconstruct them; ``seeded``
            decodes every frame from one random x_T (Figure 4's variant).
        seed: of that noise, and of the upsamplers'.

    Returns:
        F frames.
    """
    _check_single(first, second)
    theta = torch.tensor(fractions, dtype=torch.float32, device=model.device)
    count = len(fractions)

    def between(a: Tensor, b: Tensor) -> Tensor:
        return slerp(a.expand(count, *a.shape[1:]), b.expand(count, *b.shape[1:]), theta)

    if noise == "seeded":
        z = between(model.embed_images(first), model.embed_images(second))
        return model.decode(z, [seed] * count, deterministic(sampling))
    ends = [invert(model, image, sampling) for image in (first, second)]
    z = between(ends[0].image_embedding, ends[1].image_embedding)
    return decode_latents(model, z, between(ends[0].noise, ends[1].noise), sampling, seed)


def text_diff(model: UnCLIP, image_embedding: Tensor, caption: str, baseline: str, theta: float | Tensor) -> Tensor:
    """Move embeddings along a difference of captions (section 3.3).

    Args:
        model: the stack.
        image_embedding: z_i ``(B, D)``.
        caption: what the image should become.
        baseline: what it is, e.g. "a photo"; its embedding is subtracted. The empty string subtracts that of the
            empty caption.
        theta: fraction of the way, a number or ``(B,)``; the paper goes up to 0.25 to 0.5.

    Returns:
        ``slerp(z_i, z_d, theta)`` with z_d = norm(z_t - z_t0) of the norm of z_i, float32 ``(B, D)``.

    Raises:
        ValueError: if both captions mean the same to CLIP, so that there is no direction.
    """
    z_t, z_t0 = model.embed_captions([caption, baseline])
    difference = z_t - z_t0
    if float(difference.norm()) < MIN_SLERP_ANGLE * float(z_t.norm()):
        raise ValueError(f"text diff: {caption!r} and {baseline!r} have the same embedding; choose other captions")
    norm = image_embedding.norm(dim=1, keepdim=True)
    return slerp(image_embedding, F.normalize(difference, dim=0) * norm, theta)


def edit(
    model: UnCLIP,
    image: Tensor,
    caption: str,
    baseline: str,
    thetas: Sequence[float],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
) -> GeneratedImages:
    """Change an image step by step towards a caption, from its own inverted noise (section 3.3).

    Args:
        model: the stack.
        image: ``(1, 3, H, W)``.
        caption: see :func:`text_diff`.
        baseline: see :func:`text_diff`.
        thetas: F fractions of the way; 0 reconstructs the image.
        sampling: steps of the decoder.
        seed: of the upsamplers' noise.

    Returns:
        F frames.
    """
    _check_single(image)
    start = invert(model, image, sampling)
    z = start.image_embedding.expand(len(thetas), -1)
    theta = torch.tensor(thetas, dtype=torch.float32, device=model.device)
    moved = text_diff(model, z, caption, baseline, theta)
    return decode_latents(model, moved, start.noise.expand(len(thetas), -1, -1, -1), sampling, seed)


def probe(
    model: UnCLIP,
    image: Tensor,
    axes: PrincipalAxes,
    num_components: Sequence[int],
    sampling: SamplingConfig | None = None,
    *,
    seed: int = 0,
) -> GeneratedImages:
    """Decode an image's embedding rebuilt from its first principal components (section 3.4, Figure 7).

    Args:
        model: the stack.
        image: ``(1, 3, H, W)``.
        axes: from the pca stage.
        num_components: F counts, each from 1 to the number of axes; 0 shows the mean embedding.
        sampling: steps and guidance of the decoder.
        seed: of the noise that all frames share.

    Returns:
        F frames.

    Raises:
        ValueError: if there are not that many axes.
    """
    _check_single(image)
    z = model.embed_images(image)
    rebuilt = torch.cat([keep_components(z, axes, count) for count in num_components])
    return model.decode(rebuilt, [seed] * len(num_components), deterministic(sampling))


def keep_components(image_embedding: Tensor, axes: PrincipalAxes, num_components: int) -> Tensor:
    """Rebuild embeddings ``(B, D)`` from their first components, with their old norm; float32.

    Raises:
        ValueError: if there are not that many axes, or they have another dimension.
    """
    if not 0 <= num_components <= len(axes.axes):
        raise ValueError(f"{num_components} components: the pca stage kept {len(axes.axes)}; ask for 0 to that many")
    if axes.mean.shape != image_embedding.shape[1:]:
        raise ValueError(
            f"the principal axes have {axes.mean.shape[0]} dimensions, the embedding {image_embedding.shape[1]}; use "
            "those of the same CLIP"
        )
    z = image_embedding.float()
    mean, kept = axes.mean.to(z), axes.axes[:num_components].to(z)
    rebuilt = F.normalize(mean + (z - mean) @ kept.T @ kept, dim=1)
    return torch.mul(rebuilt, z.norm(dim=1, keepdim=True))


@torch.no_grad()
def inpaint(
    model: UnCLIP,
    images: Tensor,
    mask: Tensor,
    seeds: Sequence[int],
    sampling: SamplingConfig | None = None,
    *,
    captions: Sequence[str] | None = None,
    num_resamples: int = 5,
) -> GeneratedImages:
    """Paint the unknown part of images, conditioned through the decoder.

    With captions, z_i of the whole comes from the prior and the decoder reads the caption; without, it is that of the
    image itself, unknown part included.

    Args:
        model: the stack.
        images: ``(B, 3, H, W)``.
        mask: ``(B, 1, H, W)``, bool, True where a pixel is known; a pixel of the decoder is known if all that goes into
            it is.
        seeds: B seeds.
        sampling: steps and guidance of prior, decoder and upsamplers.
        captions: B captions of the wanted whole, or None.
        num_resamples: see ``Decoder.inpaint``.

    Raises:
        ValueError: if the mask has another size than the images, or leaves nothing to paint.
    """
    if mask.shape != (images.shape[0], 1, *images.shape[2:]):
        raise ValueError(f"mask of shape {tuple(mask.shape)}; images {tuple(images.shape)} need (B, 1, H, W)")
    sampling = sampling or SamplingConfig()
    small = to_decoder_side(model, images)
    known = _known_at_decoder_side(model, mask)
    if bool(known.flatten(1).all(dim=1).any()):
        raise ValueError("mask: an image has no unknown pixel; mark what is to be painted")
    z = model.embed_images(images) if captions is None else model.imagine(captions, seeds, sampling.prior)
    tokens, clip_text = model.caption_inputs(captions)
    options = sampling.decoder
    painted = model.decoder.inpaint(
        small,
        known,
        z,
        tokens,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
        num_resamples=num_resamples,
        generators=seeded_generators(seeds, "decoder"),
        clip_text=clip_text,
    )
    return GeneratedImages(model.enlarge(painted, seeds, sampling), z.float().cpu())


def outpaint_canvas(images: Tensor, zoom: float) -> tuple[Tensor, Tensor]:
    """Shrink images into the middle of a canvas of their own size, whose border is then to be painted.

    Args:
        images: uint8, or floating point in [-1, 1], ``(B, 3, H, W)``.
        zoom: side of the canvas over that of the picture in it, above 1.

    Returns:
        The canvas, float32 ``(B, 3, H, W)`` in [-1, 1], and its mask for :func:`inpaint`.

    Raises:
        ValueError: if the zoom leaves no border or no picture.
    """
    height, width = images.shape[-2:]
    inner = (round(height / zoom), round(width / zoom)) if zoom > 0 else (0, 0)
    if zoom <= 1 or min(inner) < 1 or inner[0] >= height or inner[1] >= width:
        raise ValueError(f"outpainting: zoom {zoom} leaves no border to paint, or no picture; use for example 1.5")
    x = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    shrunk = F.interpolate(x, size=inner, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    # The border repeats the picture's edge: CLIP sees no frame that the painting should not have.
    pads = (left, width - inner[1] - left, top, height - inner[0] - top)
    canvas = F.pad(shrunk, pads, mode="replicate")
    mask = torch.zeros(len(images), 1, height, width, dtype=torch.bool, device=images.device)
    mask[:, :, top : top + inner[0], left : left + inner[1]] = True
    return canvas, mask


def deterministic(sampling: SamplingConfig | None) -> SamplingConfig:
    """Return the settings with DDIM without noise as the decoder's sampler: those of probes and seeded blends."""
    sampling = sampling or SamplingConfig()
    return replace(sampling, decoder=replace(sampling.decoder, sampler="ddim", eta=0.0))


def inverse(sampling: SamplingConfig | None) -> SamplingConfig:
    """Return the settings of an inversion and of every decoding of inverted noise: DDIM, unguided."""
    sampling = deterministic(sampling)
    return replace(sampling, decoder=replace(sampling.decoder, guidance_scale=1.0, guidance_rescale=0.0))


def _check_single(*images: Tensor) -> None:
    for image in images:
        if image.dim() != 4 or len(image) != 1:
            raise ValueError(f"one image (1, 3, H, W) is needed, not {tuple(image.shape)}")
