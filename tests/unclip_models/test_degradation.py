"""Blur in closed form; BSR by its laws: seeded per sample, right side, right range, light is lighter."""

import numpy as np
import pytest
import torch

from unclip_models.degradation import (
    BSR_FULL,
    BSR_LIGHT,
    bsr_degrade,
    degrade,
    downsample,
    gaussian_blur,
    gaussian_kernel,
)
from unclip_models.randomness import SampleRandom


def smooth_images(count: int, side: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 3, side), indexing="ij")
    phases = torch.arange(count, dtype=torch.float32)[:, None, None, None]
    waves = torch.stack([torch.sin(x), torch.cos(y), torch.sin(x + y)])[None]
    return 0.8 * torch.sin(waves * 2 + phases)


def test_blur_is_the_gaussian_of_the_paper() -> None:
    impulse = torch.zeros(1, 3, 7, 7)
    impulse[0, 1, 3, 3] = 1
    out = gaussian_blur(impulse)
    side = np.exp(-0.5 / 0.6**2)
    row = np.array([side, 1, side]) / (1 + 2 * side)
    np.testing.assert_allclose(out[0, 1, 2:5, 2:5].numpy(), np.outer(row, row), rtol=1e-5)
    assert not out[0, 0].any() and out.sum() == pytest.approx(1, rel=1e-5)


def test_blur_keeps_constants() -> None:
    torch.testing.assert_close(gaussian_blur(torch.full((2, 3, 4, 4), 0.3)), torch.full((2, 3, 4, 4), 0.3))


def test_gaussian_kernel_is_normalised_and_has_the_covariance() -> None:
    covariance = np.array([[2.0, 0.7], [0.7, 1.0]])
    kernel = gaussian_kernel(25, covariance)
    axis = np.arange(25) - 12
    x, y = np.meshgrid(axis, axis)
    assert kernel.sum() == pytest.approx(1)
    measured = [[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)]
    np.testing.assert_allclose(measured, covariance, rtol=1e-3)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("kind", ["none", "blur", "bsr_light", "bsr"])
def test_side_range_and_dtype(kind: str, factor: int) -> None:
    images = smooth_images(3, 32)
    out = degrade(kind, images, 32 // factor, SampleRandom(0, 0, [0, 1, 2]).generator("d"))
    assert out.shape == (3, 3, 32 // factor, 32 // factor)
    assert out.dtype == torch.float32 and out.abs().max() <= 1 and out.isfinite().all()


@pytest.mark.parametrize("kind", ["bsr_light", "bsr"])
def test_bsr_depends_on_the_sample_not_on_its_batch(kind: str) -> None:
    images = smooth_images(4, 32)
    whole = degrade(kind, images, 8, SampleRandom(7, 3, [10, 11, 12, 13]).generator("d"))
    half = degrade(kind, images[2:], 8, SampleRandom(7, 3, [12, 13]).generator("d"))
    assert torch.equal(whole[2:], half)
    other_step = degrade(kind, images, 8, SampleRandom(7, 4, [10, 11, 12, 13]).generator("d"))
    assert not torch.equal(whole, other_step)


def test_bsr_damages_and_light_bsr_damages_less() -> None:
    images = smooth_images(40, 64)
    clean = downsample(images, 16)

    def error(kind: str) -> float:
        out = degrade(kind, images, 16, SampleRandom(1, 0, range(40)).generator("d"))
        return float((out - clean).square().mean())

    assert 1e-5 < error("bsr_light") < error("bsr") < 0.1


def test_bsr_does_not_shift_the_image() -> None:
    ramp = np.repeat(np.linspace(0.1, 0.9, 64, dtype=np.float32)[None, :, None], 64, axis=0).repeat(3, axis=2)
    expected = ramp.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    outputs = [bsr_degrade(ramp, 4, BSR_LIGHT, np.random.default_rng(seed)) for seed in range(60)]
    drift = np.mean(outputs, axis=0)[4:12, 4:12] - expected[4:12, 4:12]
    assert np.abs(drift).max() < 0.02  # one low-resolution pixel is 0.05


def test_channels_are_not_swapped() -> None:
    red = np.zeros((32, 32, 3), dtype=np.float32)
    red[..., 0] = 0.8
    for seed in range(8):
        out = bsr_degrade(red, 4, BSR_FULL, np.random.default_rng(seed)).mean(axis=(0, 1))
        assert out[0] > 0.6 and out[1:].max() < 0.3


@pytest.mark.parametrize(
    ("kind", "size", "generators", "match"),
    [
        ("fog", 8, [], "choose from"),
        ("bsr", 8, [], "one per image"),
        ("bsr", 7, [np.random.default_rng(0)] * 2, "must divide"),
    ],
)
def test_bad_requests_are_refused(kind: str, size: int, generators: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        degrade(kind, smooth_images(2, 32), size, generators)


def test_bad_blur_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        gaussian_blur(smooth_images(1, 8), kernel_size=4)
