"""Blur in closed form; BSR by its laws: seeded per sample, right side, right range, light is lighter.

Then each of its operations: what it keeps (brightness, place), the statistics of what it draws, and the plain OpenCV
call that it must equal.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from unclip_models import degradation
from unclip_models.degradation import (
    BSR_FULL,
    BSR_LIGHT,
    bsr_degrade,
    degrade,
    downsample,
    gaussian_blur,
    gaussian_kernel,
    gaussian_taps,
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
        ("bsr", 7, [np.random.default_rng(0)] * 2, "32 px to 7 px; the side must divide"),
    ],
)
def test_bad_requests_are_refused(kind: str, size: int, generators: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        degrade(kind, smooth_images(2, 32), size, generators)


def test_bad_blur_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        gaussian_blur(smooth_images(1, 8), kernel_size=4)


@pytest.mark.parametrize("kind", ["none", "blur", "bsr_light", "bsr"])
def test_images_that_are_not_square_are_refused(kind: str) -> None:
    generators = [np.random.default_rng(0)] * 2
    with pytest.raises(ValueError, match=r"shape \(2, 3, 32, 24\); it takes square ones"):
        degrade(kind, smooth_images(2, 32)[..., :24], 8, generators)
    with pytest.raises(ValueError, match="square"):
        degrade(kind, smooth_images(2, 32)[0], 8, generators)


def test_one_image_need_not_be_square_and_its_axes_are_not_swapped() -> None:
    """Brightness grows to the right, over 32 x 48 px; Rombach et al. cut such an image with its axes swapped."""
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, 48, dtype=np.float32)[None, :, None], (32, 48, 3)).copy()
    for seed in range(24):
        out = bsr_degrade(ramp, 4, BSR_LIGHT, np.random.default_rng(seed))
        assert out.shape == (8, 12, 3)
        columns, rows = out.mean(axis=(0, 2)), out.mean(axis=(1, 2))
        assert np.diff(columns).min() > 0 and np.ptp(rows) < 0.06 < np.ptp(columns)
    with pytest.raises(ValueError, match="32 x 46 px by 4; both sides must be multiples"):
        bsr_degrade(ramp[:, :46], 4, BSR_LIGHT, np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["bsr_light", "bsr"])
def test_threads_change_nothing_and_the_images_are_left_alone(kind: str) -> None:
    images = smooth_images(12, 64)
    before = images.clone()
    generators = SampleRandom(0, 0, range(12)).generator
    with ThreadPoolExecutor(4) as pool:
        rows = pool.map(lambda i: degrade(kind, images[i : i + 1], 16, generators("d")[i : i + 1]), range(12))
        threaded = torch.cat(list(rows))
    assert torch.equal(threaded, degrade(kind, images, 16, generators("d")))
    assert torch.equal(images, before)


def test_a_blurred_image_is_the_same_alone_and_in_a_batch() -> None:
    images = smooth_images(5, 33)
    alone = torch.cat([degrade("blur", image[None], 11, []) for image in images])
    assert torch.equal(degrade("blur", images, 11, []), alone)


@pytest.mark.parametrize("strength", [BSR_FULL, BSR_LIGHT], ids=["full", "light"])
def test_the_order_of_operations(strength: degradation.BSRStrength, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving comes first (25%, half by MATLAB's bicubic), the final resize after the random one, JPEG last."""
    log: list[str] = []
    running: list[str] = []  # an operation within another one is not logged
    for name in ("_halve", "_resize", "_blur", "_intermediate_downsample", "_noise", "_jpeg"):
        original = getattr(degradation, name)

        def record(*args: object, name: str = name, original: object = original) -> object:
            if not running:
                log.append(name)
            running.append(name)
            result = original(*args)  # type: ignore[operator]
            running.pop()
            return result

        monkeypatch.setattr(degradation, name, record)
    image, firsts, halved = np.full((16, 16, 3), 0.5, np.float32), Counter[str](), Counter[str]()
    for seed in range(600):
        log.clear()
        assert bsr_degrade(image, 4, strength, np.random.default_rng(seed)).shape == (4, 4, 3)
        if log[0] == "_halve" or log.count("_resize") == 2:
            assert log[0] in ("_halve", "_resize")
            halved[log.pop(0)] += 1
        counts = Counter(log)
        assert log.index("_resize") > log.index("_intermediate_downsample") and log[-1] == "_jpeg"
        assert counts["_resize"] == counts["_noise"] == counts["_intermediate_downsample"] == 1
        assert counts["_blur"] == strength.num_blurs and counts["_jpeg"] in (1, 2)
        firsts[log[0]] += 1
        firsts["two jpegs"] += counts["_jpeg"] == 2
    assert firsts["two jpegs"] == pytest.approx(540, abs=25)
    assert halved["_halve"] == pytest.approx(75, abs=25) and halved["_resize"] == pytest.approx(75, abs=25)
    # Of the operations in random order, the two downsamplings share their places and the earlier is the random one.
    each = 600 / (strength.num_blurs + 4)
    assert firsts["_noise"] == pytest.approx(each, abs=35) and firsts["_blur"] == pytest.approx(
        strength.num_blurs * each, abs=45
    )
    assert firsts["_intermediate_downsample"] == pytest.approx(2 * each, abs=45) and firsts["_resize"] == 0


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_blurs_and_downsamplings_keep_a_flat_image_flat(value: float) -> None:
    flat = np.full((24, 36, 3), value, np.float32)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        strength = (BSR_FULL, BSR_LIGHT)[seed % 2]
        for out in (
            degradation._blur(flat, 4, strength, rng),
            degradation._intermediate_downsample(flat, 4, strength, rng),
            degradation._resize(flat, (6, 9), rng),
            degradation._halve(flat),
        ):
            assert out.dtype == np.float32 and np.abs(out - value).max() < 1e-5


def test_blur_keeps_the_mean_brightness() -> None:
    """Of what lies inside: a spot on black spreads, and its light stays."""
    image = np.zeros((61, 61, 3), np.float32)
    image[28:33, 28:33] = np.random.default_rng(0).random((5, 5, 3))
    for seed in range(30):
        out = degradation._blur(image, 4, BSR_FULL, np.random.default_rng(seed))
        np.testing.assert_allclose(out.sum(axis=(0, 1)), image.sum(axis=(0, 1)), rtol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (40, 71), (13, 9), (2, 30), (1, 1)])
@pytest.mark.parametrize("size", [5, 11, 13, 25])
def test_fast_convolutions_are_those_of_opencv(shape: tuple[int, int], size: int) -> None:
    image = np.random.default_rng(0).random((*shape, 3)).astype(np.float32)
    covariance = np.array([[3.0, 1.2], [1.2, 2.0]])
    for kernel, out in (
        (gaussian_kernel(size, covariance), degradation._convolve(image, gaussian_kernel(size, covariance))),
        (
            gaussian_kernel(size, 4.0 * np.eye(2), center=size // 2 + 1.5),
            degradation._convolve_separable(image, gaussian_taps(size, 2.0, size // 2 + 1.5)),
        ),
    ):
        expected = cv2.filter2D(image.astype(np.float64), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_halving_is_the_antialiased_bicubic() -> None:
    """MATLAB's and torch's differ at the border only: mirrored against renormalised."""
    image = np.random.default_rng(0).random((24, 36, 3)).astype(np.float32) * 0.6 + 0.2
    out = degradation._halve(image)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], size=(12, 18), mode="bicubic", antialias=True
    )[0].permute(1, 2, 0)
    assert out.shape == (12, 18, 3)
    np.testing.assert_allclose(out[2:-2, 2:-2], expected[2:-2, 2:-2].numpy(), atol=1e-6)
    assert out.mean() == pytest.approx(image.mean(), abs=0.01)


@pytest.mark.parametrize("strength", [BSR_FULL, BSR_LIGHT], ids=["full", "light"])
def test_noise_has_the_levels_and_the_kinds_of_bsr(strength: degradation.BSRStrength) -> None:
    flat, kinds = np.full((48, 48, 3), 0.5, np.float32), Counter[str]()
    low, high = strength.noise_levels
    levels = []
    for seed in range(400):
        noise = degradation._noise(flat, strength, np.random.default_rng(seed)) - 0.5
        assert noise.dtype == np.float32
        assert np.abs(noise.mean(axis=(0, 1))).max() < 5 * high / 255 / 48  # five standard errors
        stds = noise.std(axis=(0, 1)) * 255
        correlation = np.corrcoef(noise.reshape(-1, 3).T)[np.triu_indices(3, 1)]
        if np.ptp(noise, axis=2).max() < 1e-6:
            kinds["gray"] += 1
        elif np.abs(correlation).max() < 0.08 and np.ptp(stds) < 0.08 * stds.mean():
            kinds["color"] += 1
        else:
            kinds["correlated"] += 1
            assert stds.max() < 1.1 * high
            continue
        levels.append(stds.mean())
    assert 0.94 * low < min(levels) < 1.06 * low and 0.94 * high < max(levels) < 1.06 * high
    assert np.mean(levels) == pytest.approx((low + high) / 2, rel=0.1)
    assert (kinds["gray"], kinds["color"]) == (pytest.approx(160, abs=32), pytest.approx(160, abs=32))


def test_jpeg_is_eight_bit_and_its_error_falls_with_the_quality() -> None:
    image = smooth_images(1, 64)[0].permute(1, 2, 0).numpy() * 0.5 + 0.5
    image = np.clip(image + 0.05 * np.random.default_rng(0).standard_normal(image.shape), 0, 1).astype(np.float32)

    def errors(strength: degradation.BSRStrength) -> float:
        outs = [degradation._jpeg(image, strength, np.random.default_rng(seed)) for seed in range(40)]
        assert all(np.abs(out * 255 - np.round(out * 255)).max() < 1e-4 for out in outs)
        assert np.abs(np.mean(outs, axis=0).mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 0.01
        return float(np.mean([(out - image) ** 2 for out in outs]))

    assert 0 < errors(BSR_LIGHT) < errors(BSR_FULL) < 0.05**2
