"""How the upsamplers' low-resolution conditioning is corrupted in training (unCLIP, section 2.2 and Appendix C).

The 64 -> 256 stage sees a Gaussian-blurred image (kernel 3, sigma 0.6), the 256 -> 1024 stage a BSR-degraded one: a
random order of blurs, downsamplings, noise and JPEG (Zhang et al. 2021, as used by Rombach et al. 2022). The paper does
not say whether it used the full or the light parameters of BSR (UNVERIFIED); both are here, light is what Rombach et
al. trained their super-resolution model with. Every draw comes from the sample's own generator, so the result does not
depend on the batch, the thread or the rank; OpenCV and numpy let go of the interpreter while they work, so the threads
of a data loader run BSR side by side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unclip_models.settings import Degradation

Image = NDArray[np.float32]  # (H, W, 3) in [0, 1]

BLUR_KERNEL_SIZE = 3
BLUR_SIGMA = 0.6
JPEG_PROBABILITY = 0.9
HALVE_FIRST_PROBABILITY = 0.25

# OpenCV's filter2D turns to a slow Fourier transform at 130 taps; up to here it convolves directly.
_MAX_DIRECT_TAPS = 129
_STRIDE_KERNEL_SIZE = 25


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
    """Blur ``(B, C, H, W)`` with a separable Gaussian, mirroring the border; mean brightness is kept.

    Sums of shifted images, not convolutions, whose rounding may change with the batch size: an image blurred alone in
    a data loader must be that of the whole batch, bit for bit.
    """
    if kernel_size % 2 == 0 or kernel_size < 1 or sigma <= 0:
        raise ValueError(f"gaussian_blur: kernel_size {kernel_size}, sigma {sigma}; need an odd size and sigma > 0")
    taps, pad = gaussian_taps(kernel_size, sigma).tolist(), kernel_size // 2
    height, width = images.shape[-2:]
    x = F.pad(images, (pad, pad, pad, pad), mode="reflect")
    x = _sum([tap * x[..., shift : shift + width] for shift, tap in enumerate(taps)])
    return _sum([tap * x[..., shift : shift + height, :] for shift, tap in enumerate(taps)])


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def degrade(kind: Degradation, images: Tensor, size_px: int, generators: Sequence[np.random.Generator]) -> Tensor:
    """Make the corrupted low-resolution version of every image.

    Args:
        kind: ``"none"`` only shrinks, ``"blur"`` shrinks then blurs, ``"bsr_light"`` and ``"bsr"`` run BSR on the CPU.
        images: square, ``(B, 3, S, S)`` in [-1, 1].
        size_px: side of the result; for BSR it must divide S.
        generators: one per image, the source of all its draws (BSR only; may be empty otherwise).

    Returns:
        float32 ``(B, 3, size_px, size_px)`` in [-1, 1] on the device of ``images``.

    Raises:
        ValueError: for an unknown kind, images that are not square, a side that does not divide, or a wrong number of
            generators.
    """
    if images.dim() != 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(f"degrade: images of shape {tuple(images.shape)}; it takes square ones, (B, 3, S, S)")
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
    if side % size_px:
        raise ValueError(f"degrade: {kind} of {side} px to {size_px} px; the side must divide")
    factor, strength = side // size_px, strengths[kind]
    small = [
        bsr_degrade(_to_rows(image), factor, strength, rng)
        for image, rng in zip(images.float().cpu(), generators, strict=True)
    ]
    out = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()  # (B, 3, size_px, size_px)
    return (out * 2 - 1).to(images.device)


def _to_rows(image: Tensor) -> Image:
    """Turn ``(3, H, W)`` in [-1, 1] into an array ``(H, W, 3)`` in [0, 1]."""
    planes = image.clamp(-1, 1).add_(1).div_(2).numpy()
    return cast(Image, _opencv().merge(list(planes)))


@functools.cache
def _opencv() -> Any:
    """Import OpenCV, set to one thread for the whole process.

    Images are small and many: the threads of the data loader and the ranks keep the cores busy, and OpenCV's own
    threads would only get in their way. The results do not depend on it.
    """
    import cv2

    cv2.setNumThreads(1)
    return cv2


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

    Raises:
        ValueError: if a side is no multiple of ``factor``.
    """
    height, width = image.shape[:2]
    if height % factor or width % factor:
        raise ValueError(f"bsr_degrade: {height} x {width} px by {factor}; both sides must be multiples of the factor")
    final = (height // factor, width // factor)
    remaining = factor
    if factor >= 4 and factor % 2 == 0 and (coin := rng.random()) < HALVE_FIRST_PROBABILITY:
        # Half of the halvings are MATLAB's bicubic.
        by_matlab = coin < HALVE_FIRST_PROBABILITY / 2
        image = _halve(image) if by_matlab else _resize(image, (height // 2, width // 2), rng)
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


def _clip(image: Image) -> Image:
    """Bring a fresh array into [0, 1], in place."""
    return np.clip(image, 0.0, 1.0, out=image)


def _resize(image: Image, size: tuple[int, int], rng: np.random.Generator) -> Image:
    """Resize to ``(H, W)`` by a random one of linear, cubic and area interpolation."""
    cv2 = _opencv()
    method = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)[int(rng.integers(3))]
    return _clip(cv2.resize(image, (size[1], size[0]), interpolation=method))


def _halve(image: Image) -> Image:
    """Halve both sides as MATLAB's ``imresize`` does: bicubic (a = -1/2) of twice the width, border mirrored."""
    cv2 = _opencv()
    distance = np.abs(np.arange(8) - 3.5) / 2  # of 8 source pixels from the middle of the new one, in new pixels
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    taps = (np.where(distance <= 1, near, far) / 2).astype(np.float32)
    filtered = cv2.sepFilter2D(image, -1, taps, taps, anchor=(3, 3), borderType=cv2.BORDER_REFLECT)
    return _clip(np.ascontiguousarray(filtered[::2, ::2]))


def gaussian_taps(size: int, sigma: float, center: float | None = None) -> NDArray[np.float64]:
    """Sample a normalised 1-D Gaussian at 0 .. ``size`` - 1 around ``center`` (default: the middle)."""
    exponent = -0.5 * ((np.arange(size) - ((size - 1) / 2 if center is None else center)) / sigma) ** 2
    taps = np.exp(exponent - exponent.max())  # so that a narrow one between two samples does not vanish
    return cast(NDArray[np.float64], taps / taps.sum())


def gaussian_kernel(size: int, covariance: NDArray[np.float64], center: float | None = None) -> NDArray[np.float64]:
    """Sample a normalised 2-D Gaussian on a ``size`` x ``size`` grid around ``center`` (default: the middle)."""
    x = np.arange(size) - ((size - 1) / 2 if center is None else center)
    y = x[:, None]
    inverse = np.linalg.inv(covariance)
    exponent = -0.5 * (inverse[0, 0] * x**2 + (inverse[0, 1] + inverse[1, 0]) * x * y + inverse[1, 1] * y**2)
    kernel = np.exp(exponent - exponent.max())
    return cast(NDArray[np.float64], kernel / kernel.sum())


def _convolve(image: Image, kernel: NDArray[np.float64]) -> Image:
    """Correlate with a kernel of odd sides, mirroring the border."""
    cv2 = _opencv()
    taps = kernel.astype(np.float32)
    if taps.size > _MAX_DIRECT_TAPS:
        return _clip(_correlate_by_fourier(image, taps))
    return _clip(cv2.filter2D(image, -1, taps, borderType=cv2.BORDER_REFLECT_101))


def _convolve_separable(image: Image, taps: NDArray[np.float64]) -> Image:
    """Correlate rows and columns with the same odd number of taps, mirroring the border."""
    cv2, row = _opencv(), taps.astype(np.float32)
    return _clip(cv2.sepFilter2D(image, -1, row, row, borderType=cv2.BORDER_REFLECT_101))


def _correlate_by_fourier(image: Image, kernel: NDArray[np.float32]) -> Image:
    """Do what ``filter2D`` does for large kernels, three times as fast: one transform per channel, not one per tile."""
    cv2 = _opencv()
    (height, width), (pad_y, pad_x) = image.shape[:2], (kernel.shape[0] // 2, kernel.shape[1] // 2)
    rows, columns = (cv2.getOptimalDFTSize(n) for n in (height + 2 * pad_y, width + 2 * pad_x))
    bottom, right = rows - height - pad_y, columns - width - pad_x
    padded = cv2.copyMakeBorder(image, pad_y, bottom, pad_x, right, cv2.BORDER_REFLECT_101)
    spectrum = np.zeros((rows, columns), dtype=np.float32)
    spectrum[: kernel.shape[0], : kernel.shape[1]] = kernel
    spectrum = cv2.dft(spectrum)
    planes = []
    for plane in cv2.split(padded):
        product = cv2.mulSpectrums(cv2.dft(plane), spectrum, 0, conjB=True)
        planes.append(cv2.dft(product, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE)[:height, :width])
    return cast(Image, cv2.merge(planes))


def _blur(image: Image, factor: int, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Blur with a random anisotropic (half of the time) or isotropic Gaussian."""
    smallest = 1e-3  # a width of zero has no inverse; this is a delta on the pixel grid
    if rng.random() < 0.5:
        width = (4.0 + factor) * strength.blur_width_scale
        variances = np.maximum(width * rng.random(2), smallest)
        theta = rng.random() * math.pi
        rotation = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
        covariance = rotation @ np.diag(variances) @ rotation.T
        size = _kernel_size(strength.anisotropic_half_sizes, strength, rng)
        return _convolve(image, gaussian_kernel(size, covariance))
    sigma = max((2.0 + 0.2 * factor) * strength.blur_width_scale * rng.random(), smallest)
    size = _kernel_size(strength.isotropic_half_sizes, strength, rng)
    return _convolve_separable(image, gaussian_taps(size, sigma))


def _kernel_size(half_sizes: tuple[int, int], strength: BSRStrength, rng: np.random.Generator) -> int:
    """Draw an odd size; an even one, which light BSR may draw, would shift the image by half a pixel: round it up."""
    low, high = half_sizes
    return (strength.kernel_step * int(rng.integers(low, high + 1)) + 3) | 1


def _intermediate_downsample(image: Image, factor: int, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Shrink by a random factor, or by blur and striding; the later resize sets the final side."""
    height, width = image.shape[:2]
    if rng.random() < strength.resize_probability:
        scale = rng.uniform(1.0, 2.0 * factor)
        return _resize(image, (max(1, int(height / scale)), max(1, int(width / scale))), rng)
    sigma = rng.uniform(0.1, 0.6 * factor)
    # Keeping every factor-th pixel moves the image by half a step: the kernel's centre moves the other way.
    middle = (_STRIDE_KERNEL_SIZE - 1) / 2 + (factor - 1) / 2
    blurred = _convolve_separable(image, gaussian_taps(_STRIDE_KERNEL_SIZE, sigma, middle))
    return np.ascontiguousarray(blurred[::factor, ::factor])


def _noise(image: Image, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Add Gaussian noise: the same in all channels (40%), per channel (40%), or correlated between them (20%).

    Zhang et al. take absolute values of the drawn covariance, entry by entry, which need not leave one; this does not.
    """
    cv2 = _opencv()
    low, high = strength.noise_levels
    level = int(rng.integers(low, high + 1)) / 255.0
    kind = rng.random()
    if kind < 0.4:
        return _clip(cv2.scaleAdd(cv2.merge([_normal(image.shape[:2], rng)] * 3), level, image))
    if kind < 0.8:
        return _clip(cv2.scaleAdd(_normal(image.shape, rng), level, image))
    basis, _ = np.linalg.qr(rng.random((3, 3)))
    scales = high / 255.0 * np.sqrt(rng.random(3))
    return _clip(image + cv2.transform(_normal(image.shape, rng), basis * scales))


def _normal(shape: tuple[int, ...], rng: np.random.Generator) -> Image:
    return rng.standard_normal(shape).astype(np.float32)


def _jpeg(image: Image, strength: BSRStrength, rng: np.random.Generator) -> Image:
    """Compress to JPEG and back at a random quality."""
    cv2 = _opencv()
    low, high = strength.jpeg_qualities
    pixels = cv2.cvtColor(cv2.convertScaleAbs(image, alpha=255.0), cv2.COLOR_RGB2BGR)  # OpenCV encodes BGR
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(low, high + 1))])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR) if done else None
    assert decoded is not None, "OpenCV could not encode a JPEG"
    rgb: NDArray[np.uint8] = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    return np.divide(rgb, np.float32(255.0), dtype=np.float32)
