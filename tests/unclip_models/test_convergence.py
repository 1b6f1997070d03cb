"""The law and the order of every sampler on Gaussian data, without Monte Carlo error.

On data N(mean, covariance) the perfect denoiser is affine in x_t, so a sampler is an affine map of all the noise it
consumes. That noise can be drawn again from equally seeded generators; with more samples than the map has coefficients,
least squares reads the map off exactly, and the sampler's mean and covariance follow from its coefficients.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from unclip_models.diffusion import Denoiser, GaussianDiffusion, spaced_timesteps
from unclip_models.sampling import (
    analytic_sample,
    analytic_variance,
    ddim_invert,
    ddim_sample,
    ddpm_sample,
    dpm_solver_2m,
    draw_noise,
    seeded_generators,
)
from unclip_models.settings import DiffusionConfig

torch.set_num_threads(1)
# A correlated target: eigenvalues of very different size in a rotated basis. All are below 1, as for data in [-1, 1].
MEAN = np.array([0.4, -0.2, 0.1])
EIGENVALUES = np.array([0.05, 0.3, 0.9])
AXES, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
COVARIANCE = AXES * EIGENVALUES @ AXES.T
DIM = len(MEAN)
Run = Callable[[Denoiser, Tensor, GaussianDiffusion, Sequence[torch.Generator]], Tensor]


def _whole(num_timesteps: int = 1000, **settings: str) -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionConfig(prediction="x_start", num_timesteps=num_timesteps, **settings))  # type: ignore[arg-type]


def _x_start_gain(alpha_bar: np.ndarray) -> np.ndarray:
    """Return d E[x_0 | x_t] / d x_t along each axis, ``(..., 3)``."""
    alpha_bar = np.asarray(alpha_bar)[..., None]
    gain: np.ndarray = np.sqrt(alpha_bar) * EIGENVALUES / (alpha_bar * EIGENVALUES + 1 - alpha_bar)
    return gain


def _denoiser(whole: GaussianDiffusion) -> Denoiser:
    """Return E[x_0 | x_t], computed in float64."""
    signal = torch.from_numpy(whole.sqrt_alphas_cumprod)
    gain = torch.from_numpy(_x_start_gain(whole.alphas_cumprod))
    mean, axes = torch.from_numpy(MEAN), torch.from_numpy(AXES)

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        along_axes = (x_t.double() - signal[t][:, None] * mean) @ axes  # (B, 3)
        return (mean + (along_axes * gain[t]) @ axes.T).float()

    return denoiser


def _exact_gamma(diffusion: GaussianDiffusion) -> np.ndarray:
    """E ||noise prediction||^2 / dim of the perfect denoiser, ``(num_timesteps,)``."""
    alpha_bar = diffusion.alphas_cumprod[:, None]
    gamma: np.ndarray = ((1 - alpha_bar) / (alpha_bar * EIGENVALUES + 1 - alpha_bar)).mean(axis=1)
    return gamma


class Law(NamedTuple):
    """Mean, covariance and the largest deviation from being affine."""

    mean: np.ndarray
    covariance: np.ndarray
    residual: float

    def error(self) -> float:
        """Distance of both moments from those of the data."""
        return float(np.linalg.norm(self.mean - MEAN) + np.linalg.norm(self.covariance - COVARIANCE))


def _law(run: Run, whole: GaussianDiffusion, num_steps: int, *, num_draws: int) -> Law:
    """Read off the affine map from x_T and ``num_draws`` further draws to the sample."""
    diffusion = whole.respaced(spaced_timesteps(whole.num_timesteps, num_steps))
    num_coefficients = DIM * (1 + num_draws) + 1
    seeds = range(2 * num_coefficients)
    generators = seeded_generators(seeds)
    x_T = draw_noise(generators, (DIM,))
    samples = run(_denoiser(whole), x_T, diffusion, generators).double().numpy()
    again = seeded_generators(seeds)
    consumed = [draw_noise(again, (DIM,)).double().numpy() for _ in range(1 + num_draws)]
    inputs = np.concatenate([*consumed, np.ones((len(seeds), 1))], axis=1)
    coefficients = np.linalg.lstsq(inputs, samples, rcond=None)[0]
    noise_part = coefficients[:-1]
    return Law(coefficients[-1], noise_part.T @ noise_part, float(np.abs(inputs @ coefficients - samples).max()))


def _ddim(eta: float) -> Run:
    return lambda denoiser, x, diffusion, g: ddim_sample(denoiser, x, diffusion, eta=eta, generators=g)


def _ddpm(denoiser: Denoiser, x: Tensor, diffusion: GaussianDiffusion, g: Sequence[torch.Generator]) -> Tensor:
    return ddpm_sample(denoiser, x, diffusion, generators=g)


def _analytic(denoiser: Denoiser, x: Tensor, diffusion: GaussianDiffusion, g: Sequence[torch.Generator]) -> Tensor:
    gamma = torch.from_numpy(_exact_gamma(GaussianDiffusion(diffusion.config)))
    return analytic_sample(denoiser, x, diffusion, gamma=gamma, generators=g)


def _dpm_solver(denoiser: Denoiser, x: Tensor, diffusion: GaussianDiffusion, g: Sequence[torch.Generator]) -> Tensor:
    return dpm_solver_2m(denoiser, x, diffusion)


SAMPLERS: dict[str, tuple[Run, str]] = {
    "ddpm_fixed_small": (_ddpm, "fixed_small"),
    "ddpm_fixed_large": (_ddpm, "fixed_large"),
    "ddim_eta_0": (_ddim(0.0), "fixed_small"),
    "ddim_eta_0.5": (_ddim(0.5), "fixed_small"),
    "ddim_eta_1": (_ddim(1.0), "fixed_small"),
    "analytic": (_analytic, "fixed_small"),
    "dpm_solver_2m": (_dpm_solver, "fixed_small"),
}
DETERMINISTIC = ("ddim_eta_0", "dpm_solver_2m")


def _law_of(name: str, num_steps: int, **settings: str) -> Law:
    run, variance = SAMPLERS[name]
    whole = _whole(variance=variance, **settings)
    return _law(run, whole, num_steps, num_draws=0 if name in DETERMINISTIC else num_steps - 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_converges_to_the_law_of_the_data(name: str) -> None:
    """Both moments: the error falls with every doubling, and its leading term extrapolates to the exact law."""
    coarse, middle, fine = (_law_of(name, num_steps) for num_steps in (16, 32, 64))
    assert max(law.residual for law in (coarse, middle, fine)) < 1e-5  # the map is affine, and read off whole
    assert middle.error() < coarse.error() / 1.7 and fine.error() < middle.error() / 1.7
    assert fine.error() < 0.08
    order = 2 if name == "dpm_solver_2m" else 1
    weight = 2**order / (2**order - 1)
    limit = Law(*(weight * b + (1 - weight) * a for a, b in zip(middle, fine, strict=True)))
    assert limit.error() < (2e-3 if name == "dpm_solver_2m" else 0.012)


def test_ddim_at_eta_one_has_the_law_of_ddpm() -> None:
    ddim, ddpm = _law_of("ddim_eta_1", 20), _law_of("ddpm_fixed_small", 20)
    assert np.allclose(ddim.mean, ddpm.mean, atol=1e-6)
    assert np.allclose(ddim.covariance, ddpm.covariance, atol=2e-6)


@pytest.mark.parametrize("num_steps", [5, 10, 40])
def test_fixed_variances_bracket_the_data_and_the_analytic_one_beats_the_small(num_steps: int) -> None:
    """The two bounds of DDPM, section 3.2, hold in every direction; Analytic-DPM's optimum lies between them."""
    small, large, analytic = (_law_of(name, num_steps) for name in ("ddpm_fixed_small", "ddpm_fixed_large", "analytic"))
    assert np.linalg.eigvalsh(COVARIANCE - small.covariance).min() > 0
    assert np.linalg.eigvalsh(large.covariance - COVARIANCE).min() > 0
    assert analytic.error() < small.error() / 2


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [2, 7, 64])
def test_analytic_variance_is_the_mean_reverse_variance(schedule: str, num_steps: int) -> None:
    """The best isotropic variance is the mean over the axes of Var[x_{t-1} | x_t], known in closed form here."""
    whole = _whole(schedule=schedule)
    spaced = whole.respaced(spaced_timesteps(1000, num_steps))
    got = analytic_variance(spaced, torch.from_numpy(_exact_gamma(whole)))
    before = spaced.alphas_cumprod_prev[:, None] * EIGENVALUES + 1 - spaced.alphas_cumprod_prev[:, None]  # of x_{t-1}
    after = spaced.alphas_cumprod[:, None] * EIGENVALUES + 1 - spaced.alphas_cumprod[:, None]  # of x_t
    expected = (before * spaced.betas[:, None] / after).mean(axis=1)
    # The bound of 1 on Cov[x_0 | x_t] never binds: no eigenvalue of the data's covariance reaches it.
    assert np.allclose(got, expected, rtol=1e-6)


def _flow_errors(sample: Callable[[Denoiser, Tensor, GaussianDiffusion], Tensor], schedule: str) -> list[float]:
    """Compare with the probability-flow ODE, which keeps a Gaussian's standard scores, down to t = 0 and E[x_0 | x]."""
    whole = _whole(4097, schedule=schedule)
    x_T = torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))
    noisiest, cleanest = whole.alphas_cumprod[-1], whole.alphas_cumprod[0]
    deviation = np.sqrt(
        np.array([[noisiest], [cleanest]]) * (EIGENVALUES - 1) + 1
    )  # of x_T and of x_0, along each axis
    scores = (x_T.double().numpy() - math.sqrt(noisiest) * MEAN) @ AXES / deviation[0]
    exact = MEAN + (scores * deviation[1] * _x_start_gain(cleanest)) @ AXES.T
    errors = []
    for num_steps in FLOW_STEPS:
        got = sample(_denoiser(whole), x_T, whole.respaced(spaced_timesteps(4097, num_steps)))
        errors.append(float(np.sqrt(((got.double().numpy() - exact) ** 2).mean())))
    return errors


# Strides of 256, 128, ... timesteps, exactly even: uneven ones would hide the order.
FLOW_STEPS = (17, 33, 65, 129, 257)


def _order(errors: Sequence[float]) -> float:
    """Return the slope of log error against log stride, which FLOW_STEPS halves."""
    return float(-np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ddim_is_of_first_and_dpm_solver_of_second_order(schedule: str) -> None:
    ddim = _flow_errors(ddim_sample, schedule)
    solver = _flow_errors(dpm_solver_2m, schedule)
    assert _order(ddim) == pytest.approx(1, abs=0.08)
    # The first and the last step are of first order, but so short that their errors are of second order too.
    assert 1.85 < _order(solver) < 2.5
    assert all(two < one / 1.5 for one, two in zip(ddim, solver, strict=True))
    assert solver[-1] < ddim[-1] / 20


@pytest.mark.parametrize("num_refinements", [0, 1, 2])
def test_each_refinement_raises_the_order_of_the_inversion(num_refinements: int) -> None:
    errors = [_reconstruction_error(num_steps, num_refinements) for num_steps in FLOW_STEPS[:4]]
    assert all(b < a / 1.7 for a, b in itertools.pairwise(errors))
    assert _order(errors) == pytest.approx(num_refinements + 1, abs=0.25)


def test_default_inversion_reconstructs_with_few_steps() -> None:
    """The numbers that ``ddim_invert`` promises."""
    whole = _whole()
    for num_steps, plain, refined in ((10, 0.2, 6e-3), (50, 0.05, 1e-5), (250, 0.01, 3e-6)):
        assert refined < plain / 20
        assert _reconstruction_error(num_steps, 0, whole) < plain
        assert _reconstruction_error(num_steps, None, whole) < refined


def _reconstruction_error(num_steps: int, num_refinements: int | None, whole: GaussianDiffusion | None = None) -> float:
    """Invert samples of the data, decode them again, and return the root mean square difference."""
    whole = _whole(4097) if whole is None else whole
    rng = np.random.default_rng(1)
    x_start = torch.from_numpy(rng.multivariate_normal(MEAN, COVARIANCE, size=256)).float()
    diffusion = whole.respaced(spaced_timesteps(whole.num_timesteps, num_steps))
    options = {} if num_refinements is None else {"num_refinements": num_refinements}
    x_T = ddim_invert(_denoiser(whole), x_start, diffusion, **options)
    return float((ddim_sample(_denoiser(whole), x_T, diffusion) - x_start).square().mean().sqrt())
