"""Inpainting on Gaussian data, where the exact law of the unknown part given the known one is in closed form."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unclip_models.diffusion import Denoiser, GaussianDiffusion, spaced_timesteps
from unclip_models.inpainting import inpaint_sample
from unclip_models.sampling import ddpm_sample, draw_noise, seeded_generators
from unclip_models.settings import DiffusionConfig

torch.set_num_threads(1)
# Pairs (known, unknown): strongly correlated, so that a painted part that ignores the known one is far off.
MEAN = np.array([0.1, -0.2])
COVARIANCE = np.array([[0.5, 0.45], [0.45, 0.5]])
KNOWN = 0.9
EXACT_MEAN = MEAN[1] + COVARIANCE[1, 0] / COVARIANCE[0, 0] * (KNOWN - MEAN[0])
EXACT_VARIANCE = COVARIANCE[1, 1] - COVARIANCE[1, 0] ** 2 / COVARIANCE[0, 0]
NUM_PAIRS = 10_000


def _process(steps: int, variance: str = "fixed_large") -> tuple[Denoiser, GaussianDiffusion]:
    """Return the perfect denoiser of ``(B, ..., 2)`` and the process of so many steps."""
    whole = GaussianDiffusion(DiffusionConfig(prediction="x_start", variance=variance))  # type: ignore[arg-type]
    eigenvalues, axes = (torch.from_numpy(a).float() for a in np.linalg.eigh(COVARIANCE))
    mean = torch.from_numpy(MEAN).float()

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        signal = whole.gather("sqrt_alphas_cumprod", t, x_t)
        gain = signal * eigenvalues / (signal**2 * eigenvalues + 1 - signal**2)
        return mean + ((x_t - signal * mean) @ axes * gain) @ axes.T

    return denoiser, whole.respaced(spaced_timesteps(1000, steps))


def _paint(steps: int, num_resamples: int, variance: str = "fixed_large") -> Tensor:
    """Paint many independent unknown numbers, all with the same known one: ``(NUM_PAIRS,)``."""
    denoiser, diffusion = _process(steps, variance)
    generators = seeded_generators([0])
    known = torch.tensor([KNOWN, 0.0]).expand(1, NUM_PAIRS, 2)
    out = inpaint_sample(
        denoiser,
        draw_noise(generators, (NUM_PAIRS, 2)),
        diffusion,
        known=known,
        mask=torch.tensor([True, False]).expand(1, 1, 2),
        generators=generators,
        num_resamples=num_resamples,
    )
    assert torch.equal(out[..., 0], known[..., 0])
    return out[0, :, 1]


def _mean_error(steps: int, num_resamples: int) -> float:
    """Return the painted mean's distance from the exact one; its standard error is 0.003."""
    return abs(float(_paint(steps, num_resamples).mean()) - float(EXACT_MEAN))


def test_resampling_approaches_the_conditional_mean() -> None:
    """The painted mean misses it by 0.25, 0.09 and 0.03: many standard errors apart."""
    once, thrice, often = (_mean_error(25, num_resamples) for num_resamples in (1, 3, 10))
    assert thrice < once - 0.1
    assert often < thrice - 0.03
    assert often < 0.045


def test_finer_steps_approach_the_conditional_mean() -> None:
    assert _mean_error(40, 5) < _mean_error(8, 5) - 0.02


def test_the_conditional_variance_is_met_with_fixed_large_and_missed_with_fixed_small() -> None:
    large, small = (float(_paint(40, 10, variance).var()) for variance in ("fixed_large", "fixed_small"))
    assert large == pytest.approx(EXACT_VARIANCE, rel=0.2)
    assert small < 0.8 * EXACT_VARIANCE


def _paint_images(seeds: Sequence[int], mask: Tensor, known: Tensor, **options: Any) -> Tensor:
    """Paint ``(B, 3, 2, 2)`` images whose columns are the pairs."""
    denoiser, diffusion = _process(6)
    generators = seeded_generators(seeds)
    x_T = draw_noise(generators, tuple(known.shape[1:]))
    return inpaint_sample(denoiser, x_T, diffusion, known=known, mask=mask, generators=generators, **options)


def _images(num: int) -> tuple[Tensor, Tensor]:
    """Return known images and a mask that differs between them."""
    known = torch.linspace(-0.9, 0.9, num * 12).reshape(num, 3, 2, 2)
    mask = torch.arange(num * 4).reshape(num, 1, 2, 2) % 3 == 0
    return known, mask


def test_known_pixels_come_back_exactly_whatever_the_hidden_ones_hold() -> None:
    known, mask = _images(2)
    hidden = known.masked_fill(~mask, float("nan"))
    out = _paint_images([1, 2], mask, hidden)
    everywhere = mask.expand_as(known)
    assert torch.equal(out[everywhere], known[everywhere])
    assert bool(out.isfinite().all())
    assert torch.equal(out, _paint_images([1, 2], mask, known))


def test_a_painting_depends_on_its_own_row_and_generator_only() -> None:
    known, mask = _images(3)
    together = _paint_images([5, 6, 7], mask, known)
    assert torch.equal(together, _paint_images([5, 6, 7], mask, known))
    for i, seed in enumerate([5, 6, 7]):
        assert torch.allclose(together[i : i + 1], _paint_images([seed], mask[i : i + 1], known[i : i + 1]), atol=1e-6)
    assert not torch.allclose(together, _paint_images([8, 9, 10], mask, known), atol=1e-2)


def test_a_mask_may_differ_between_channels_and_a_full_one_returns_the_image() -> None:
    known, mask = _images(2)
    assert torch.equal(_paint_images([1, 2], mask, known), _paint_images([1, 2], mask.expand_as(known), known))
    assert torch.equal(_paint_images([1, 2], torch.ones_like(mask), known), known)


def test_with_nothing_known_it_is_ancestral_sampling() -> None:
    """The same law as ``ddpm_sample``; the numbers differ because noise for the known part is drawn in between."""
    denoiser, diffusion = _process(15)
    generators = seeded_generators([0])
    x_T = draw_noise(generators, (NUM_PAIRS, 2))
    nothing = torch.zeros(1, 1, 2, dtype=torch.bool)
    painted = inpaint_sample(
        denoiser, x_T, diffusion, known=torch.zeros_like(x_T), mask=nothing, generators=generators, num_resamples=1
    )
    sampled = ddpm_sample(denoiser, x_T, diffusion, generators=generators)
    assert torch.allclose(painted.mean(dim=1), sampled.mean(dim=1), atol=0.03)
    assert torch.allclose(painted[0].T.cov(), sampled[0].T.cov(), atol=0.03)


def test_clipping_bounds_the_painted_part_alone() -> None:
    known, mask = _images(2)
    out = _paint_images([1, 2], mask, known, clip=lambda x: x.clamp(-0.25, 0.25))
    assert float(out[~mask.expand_as(out)].abs().max()) == 0.25
    assert float(out.abs().max()) == pytest.approx(0.9)


def test_the_network_runs_num_resamples_times_but_once_at_the_end() -> None:
    known, mask = _images(1)
    seen: list[int] = []
    _, diffusion = _process(4)

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return x_t

    inpaint_sample(
        denoiser,
        torch.zeros_like(known),
        diffusion,
        known=known,
        mask=mask,
        generators=seeded_generators([0]),
        num_resamples=3,
    )
    assert seen == [999] * 3 + [666] * 3 + [333] * 3 + [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"known": torch.zeros(2, 3, 2, 1)}, "give equal shapes"),
        ({"known": torch.zeros(2, 3, 2, 2, dtype=torch.uint8)}, "known data are torch.uint8; give floats"),
        ({"mask": torch.ones(2, 1, 2, 2)}, "the mask is torch.float32; give booleans"),
        ({"mask": torch.ones(2, 2, 2, dtype=torch.bool)}, r"mask \(2, 2, 2\); give \(2, 3, 2, 2\) or \(2, 1, 2, 2\)"),
        ({"generators": seeded_generators([0])}, "1 generators for a batch of 2; give one per sample"),
        ({"num_resamples": 0}, "num_resamples is 0; use 1 or more"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    denoiser, diffusion = _process(3)
    known, mask = _images(2)
    arguments: dict[str, Any] = {"known": known, "mask": mask, "generators": seeded_generators([0, 1])} | changes
    with pytest.raises(ValueError, match=message):
        inpaint_sample(denoiser, torch.zeros(2, 3, 2, 2), diffusion, **arguments)
