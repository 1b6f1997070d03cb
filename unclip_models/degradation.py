"""How the upsamplers' low-resolution conditioning is corrupted in training (unCLIP, section 2.2 and Appendix C).

The 64 -> 256 stage sees a Gaussian-blurred image (kernel 3, sigma 0.6), the 256 -> 1024 stage a BSR-degraded one: a
random order of blurs, downsamplings, noise and JPEG (Zhang et al. 2021, as used by Rombach et al. 2022). The paper does
not say whether it used the full or the light parameters of BSR (UNVERIFIED); both are here, light is what Rombach et
al. trained their super-resolution model with. Every draw comes from the sample's own generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Degradation = Literal["none", "blur", "bsr_light", "bsr"]
Image = NDArray[np.float32]  # (H, W, 3) in [0, 1]

BLUR_KERNEL_SIZE = 3
BLUR_SIGMA = 0.6
JPEG_PROBABILITY = 0.9
HALVE_FIRST_PROBABILITY = 0.25


@dataclass(frozen=True)
class BSRStrength:
    """Numbers that differ between the full and the light BSR degradation (pixel values in [0, 1])."""

    num_blurs: int
    blur_width_scale: float
    anisotropic_half_sizes: tuple[int, int]
    isotropic_half_sizes: tuple[int, int]
    kernel_step: int
    resize_probability: float
    noise_levels: tuple[int, int]
    jpeg_qualities: tuple[int, int]


BSR_FULL = BSRStrength(
    num_blurs=2,
    blur_width_scale=1.0,
    anisotropic_half_sizes=(2, 11),
    isotropic_half_sizes=(2, 11),
    kernel_step=2,
    resize_probability=0.75,
    noise_levels=(2, 25),
    jpeg_qualities=(30, 95),
)
BSR_LIGHT = BSRStrength(
    num_blurs=1,
    blur_width_scale=0.25,
    anisotropic_half_sizes=(2, 11),
    isotropic_half_sizes=(2, 4),
    kernel_step=1,
    resize_probability=0.80,
    noise_levels=(1, 2),
    jpeg_qualities=(80, 95),
)


def downsample(images: Tensor, size_px: int) -> Tensor:
    """Shrink ``(B, C, H, W)`` to ``(B, C, size_px, size_px)`` without aliasing (bicubic, values kept in [-1, 1])."""
    small = F.interpolate(images.float(), size=(size_px, size_px), mode="bicubic", antialias=True, align_corners=False)
    return small.clamp(-1.0, 1.0)


def gaussian_blur(images: Tensor, kernel_size: int = BLUR_KERNEL_SIZE, sigma: float = BLUR_SIGMA) -> Tensor:
    """Blur ``(B, C, H, W)`` with a separable Gaussian, mirroring the border; mean brightness is kept."""
    if kernel_size % 2 == 0 or kernel_size < 1 or sigma <= 0:
        raise ValueError(f"gaussian_blur: kernel_size {kernel_size}, sigma {sigma}; need an odd size and sigma > 0")
    offsets = torch.arange(kernel_size, device=images.device, dtype=torch.float32) - kernel_size // 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).to(images.dtype)
    channels, pad = images.shape[1], kernel_size // 2
    x = F.pad(images, (pad, pad, pad, pad), mode="reflect")
    x = F.conv2d(x, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def degrade(kind: Degradation, images: Tensor, size_px: int, generators: Sequence[np.random.Generator]) -> Tensor:
    """Make the corrupted low-resolution version of every image.

    Args:
        kind: ``"none"`` only shrinks, ``"blur"`` shrinks then blurs, ``"bsr_light"`` and ``"bsr"`` run BSR on the CPU.
        images: ``(B, 3, S, S)`` in [-1, 1].
        size_px: side of the result; for BSR it must divide S.
        generators: one per image, the source of all its draws (BSR only; may be empty otherwise).

    Returns:
        float32 ``(B, 3, size_px, size_px)`` in [-1, 1] on the device of ``images``.

    Raises:
        ValueError: for an unknown kind, a side that does not divide, or a wrong number of generators.
    """
    if kind == "none":
        return downsample(images, size_px)
    if kind == "blur":
        return gaussian_blur(downsample(images, size_px))
    strengths = {"bsr": BSR_FULL, "bsr_light": BSR_LIGHT}
    if kind not in strengths:
        raise ValueError(f"degradation: {kind!r}; choose from none, blur, bsr_light, bsr")
    if len(generators) != len(images):
        raise ValueError(f"degrade: {len(images)} images but {len(generators)} generators; give one per image")
    side = images.shape[-1]
    if images.shape[-2] != side or side % size_px:
        raise ValueError(f"degrade: {kind} of {tuple(images.shape[-2:])} px to {size_px} px; the side must divide")
    arrays = ((images.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()  # (B, S, S, 3) in [0, 1]
    small = [
        bsr_degrade(array, side // size_px, strengths[kind], rng) for array, rng in zip(arrays, generators, strict=True)
    ]
    out = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()
    return (out * 2 - 1).to(images.device)


def bsr_degrade(image: Image, factor: int, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Degrade one image by a random sequence of blur, downsampling, noise and JPEG, ending with JPEG.

    The downsampling to the final side always comes after the random intermediate one; all other operations are in
    random order.

    Args:
        image: float32 ``(H, W, 3)`` RGB in [0, 1]; both sides multiples of ``factor``.
        factor: how many times smaller the result is.
        strength: ``BSR_FULL`` or ``BSR_LIGHT``.
        rng: source of every draw.

    Returns:
        float32 ``(H / factor, W / factor, 3)`` in [0, 1].
    """
    final = (image.shape[0] // factor, image.shape[1] // factor)
    remaining = factor
    if factor >= 4 and factor % 2 == 0 and rng.random() < HALVE_FIRST_PROBABILITY:
        image = _resize(image, (image.shape[0] // 2, image.shape[1] // 2), rng)
        remaining = factor // 2
    operations: list[Callable[[Image], Image]] = [
        *[lambda x: _blur(x, remaining, strength, rng)] * strength.num_blurs,
        lambda x: _intermediate_downsample(x, remaining, strength, rng),
        lambda x: _resize(x, final, rng),
        lambda x: _noise(x, strength, rng),
        lambda x: _jpeg(x, strength, rng) if rng.random() < JPEG_PROBABILITY else x,
    ]
    order = [int(index) for index in rng.permutation(len(operations))]
    first, second = strength.num_blurs, strength.num_blurs + 1
    a, b = order.index(first), order.index(second)
    if a > b:
        order[a], order[b] = order[b], order[a]
    for index in order:
        image = operations[index](image)
    return _jpeg(image, strength, rng)


def _clipped(image: NDArray[Any]) -> Image:
    return cast(Image, np.clip(image, 0.0, 1.0).astype(np.float32))


def _resize(image: Image, size: tuple[int, int], rng: np.random.Generator) -> Image:
    """Resize to ``(H, W)`` by a random one of linear, cubic and area interpolation."""
    import cv2

    method = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)[int(rng.integers(3))]
    return _clipped(cv2.resize(image, (size[1], size[0]), interpolation=method))


def gaussian_kernel(size: int, covariance: NDArray[np.float64], center: float | None = None) -> NDArray[np.float64]:
    """Sample a normalised 2-D Gaussian on a ``size`` x ``size`` grid around ``center`` (default: the middle)."""
    middle = (size - 1) / 2 if center is None else center
    axis = np.arange(size) - middle
    points = np.stack(np.meshgrid(axis, axis), axis=-1)  # (size, size, 2) as (x, y)
    exponent = -0.5 * np.einsum("ijk,kl,ijl->ij", points, np.linalg.inv(covariance), points)
    kernel = np.exp(exponent - exponent.max())
    return cast(NDArray[np.float64], kernel / kernel.sum())


def _convolve(image: Image, kernel: NDArray[np.float64]) -> Image:
    import cv2

    return _clipped(cv2.filter2D(image, -1, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101))


def _blur(image: Image, factor: int, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Blur with a random anisotropic (half of the time) or isotropic Gaussian."""
    smallest = 1e-3  # a width of zero has no inverse; this is a delta on the pixel grid
    if rng.random() < 0.5:
        width = (4.0 + factor) * strength.blur_width_scale
        variances = np.maximum(width * rng.random(2), smallest)
        theta = rng.random() * math.pi
        rotation = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
        covariance = rotation @ np.diag(variances) @ rotation.T
        low, high = strength.anisotropic_half_sizes
    else:
        sigma = max((2.0 + 0.2 * factor) * strength.blur_width_scale * rng.random(), smallest)
        covariance = np.eye(2) * sigma**2
        low, high = strength.isotropic_half_sizes
    # An even kernel, which light BSR may draw, would shift the image by half a pixel: round it up to odd.
    size = (strength.kernel_step * int(rng.integers(low, high + 1)) + 3) | 1
    return _convolve(image, gaussian_kernel(size, covariance))


def _intermediate_downsample(image: Image, factor: int, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Shrink by a random factor, or by blur and striding; the later resize sets the final side."""
    height, width = image.shape[:2]
    if rng.random() < strength.resize_probability:
        scale = rng.uniform(1.0, 2.0 * factor)
        return _resize(image, (max(1, int(height / scale)), max(1, int(width / scale))), rng)
    sigma = rng.uniform(0.1, 0.6 * factor)
    # Keeping every factor-th pixel moves the image by half a step: the kernel's centre moves the other way.
    shifted = gaussian_kernel(25, np.eye(2) * sigma**2, center=12 + (factor - 1) / 2)
    blurred = _convolve(image, shifted)
    return np.ascontiguousarray(blurred[::factor, ::factor])


def _noise(image: Image, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Add Gaussian noise: per channel (40%), the same in all channels (40%), or correlated between them (20%)."""
    low, high = strength.noise_levels
    level = int(rng.integers(low, high + 1)) / 255.0
    kind = rng.random()
    if kind < 0.4:
        noise = level * rng.standard_normal((*image.shape[:2], 1))
    elif kind < 0.8:
        noise = level * rng.standard_normal(image.shape)
    else:
        basis, _ = np.linalg.qr(rng.random((3, 3)))
        scales = high / 255.0 * np.sqrt(rng.random(3))
        noise = (rng.standard_normal(image.shape) * scales) @ basis.T
    return _clipped(image + noise)


def _jpeg(image: Image, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Compress to JPEG and back at a random quality."""
    import cv2

    low, high = strength.jpeg_qualities
    pixels = np.round(image[:, :, ::-1] * 255.0).astype(np.uint8)  # OpenCV encodes BGR
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(low, high + 1))])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR) if done else None
    assert decoded is not None, "OpenCV could not encode a JPEG"
    return np.ascontiguousarray(decoded[:, :, ::-1]).astype(np.float32) / 255.0
