"""The samplers on Gaussian data, where the perfect denoiser and every marginal are known in closed form."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from unclip_models.diffusion import Denoiser, GaussianDiffusion, spaced_timesteps
from unclip_models.sampling import (
    analytic_sample,
    analytic_variance,
    combine_guidance,
    ddim_invert,
    ddim_sample,
    ddpm_sample,
    dpm_solver_2m,
    draw_noise,
    dynamic_threshold,
    guide,
    measure_gamma,
    seeded_generators,
)
from unclip_models.settings import DiffusionConfig

MEAN, STD = 0.4, 0.5


def _gaussian_denoiser(diffusion: GaussianDiffusion) -> Denoiser:
    """Predict E[x_0 | x_t] exactly for data N(MEAN, STD^2), in whatever the process wants predicted."""

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        signal = diffusion.gather("sqrt_alphas_cumprod", t, x_t)
        variance = signal**2 * STD**2 + 1 - signal**2
        x_start = MEAN + signal * STD**2 / variance * (x_t - signal * MEAN)
        if diffusion.config.prediction == "x_start":
            return x_start
        noise = (x_t - signal * x_start) / (1 - signal**2).sqrt()
        if diffusion.config.prediction == "epsilon":
            return noise
        return signal * noise - (1 - signal**2).sqrt() * x_start

    return denoiser


def _process(prediction: str = "x_start", steps: int | None = None) -> tuple[Denoiser, GaussianDiffusion]:
    whole = GaussianDiffusion(DiffusionConfig(prediction=prediction))  # type: ignore[arg-type]
    diffusion = whole if steps is None else whole.respaced(spaced_timesteps(1000, steps))
    return _gaussian_denoiser(whole), diffusion


def _flow_end(x_T: Tensor, diffusion: GaussianDiffusion) -> Tensor:
    """Where the probability-flow ODE carries x_T: it keeps a Gaussian's standard score."""
    alpha_bar = diffusion.alphas_cumprod[-1]
    score = (x_T - math.sqrt(alpha_bar) * MEAN) / math.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    return MEAN + STD * score


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_ddim_follows_the_probability_flow(prediction: str) -> None:
    denoiser, diffusion = _process(prediction)
    x_T = torch.linspace(-2.5, 2.5, 11)[None]
    assert torch.allclose(ddim_sample(denoiser, x_T, diffusion), _flow_end(x_T, diffusion), atol=5e-3)


def test_dpm_solver_beats_ddim_at_few_steps() -> None:
    denoiser, diffusion = _process(steps=20)
    x_T = torch.linspace(-2.5, 2.5, 11)[None]
    errors = [
        float((sample(denoiser, x_T, diffusion) - _flow_end(x_T, diffusion)).abs().max())
        for sample in (dpm_solver_2m, ddim_sample)
    ]
    assert errors[0] < errors[1] / 10


def test_ddim_at_eta_one_is_ddpm() -> None:
    """Same mean and same variance: with the same noise they agree number by number."""
    denoiser, diffusion = _process(steps=30)
    x_T = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    ddim = ddim_sample(denoiser, x_T, diffusion, eta=1.0, generators=seeded_generators([1, 2]))
    ddpm = ddpm_sample(denoiser, x_T, diffusion, generators=seeded_generators([1, 2]))
    assert torch.allclose(ddim, ddpm, atol=1e-5)
    with pytest.raises(ValueError, match="no generators"):
        ddim_sample(denoiser, x_T, diffusion, eta=0.5)


def test_ddpm_samples_the_data_distribution() -> None:
    denoiser, diffusion = _process("epsilon", steps=250)
    generators = seeded_generators([0])
    samples = ddpm_sample(denoiser, draw_noise(generators, (20_000,)), diffusion, generators=generators)
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(samples.std()) == pytest.approx(STD, abs=0.02)


def test_learned_variance_channels_drive_ddpm() -> None:
    """With fraction 0 everywhere (channel -1), learned_range is fixed_small."""
    fixed = GaussianDiffusion(DiffusionConfig(num_timesteps=50))
    learned = GaussianDiffusion(DiffusionConfig(num_timesteps=50, variance="learned_range"))
    denoiser = _gaussian_denoiser(fixed)
    x_T = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = ddpm_sample(denoiser, x_T, fixed, generators=seeded_generators([1]))
    got = ddpm_sample(
        lambda x, t: torch.cat([denoiser(x, t), -torch.ones_like(x)], dim=1),
        x_T,
        learned,
        generators=seeded_generators([1]),
    )
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_inversion_reconstructs(prediction: str, steps: int) -> None:
    """Without refinement (ADM's inversion), by default, and with many refinements; test_convergence has the orders."""
    denoiser, diffusion = _process(prediction, steps)
    x_start = torch.linspace(-1, 1.5, 11)[None]
    plain = ddim_sample(denoiser, ddim_invert(denoiser, x_start, diffusion, num_refinements=0), diffusion)
    default = ddim_sample(denoiser, ddim_invert(denoiser, x_start, diffusion), diffusion)
    refined = ddim_sample(denoiser, ddim_invert(denoiser, x_start, diffusion, num_refinements=8), diffusion)
    # Of a network that predicts noise, the first step down holds on to its first guess.
    least = {10: 2e-2, 50: 1e-3}[steps] if prediction == "epsilon" else 1e-4
    assert float((refined - x_start).abs().max()) < least
    assert float((default - x_start).abs().max()) < float((plain - x_start).abs().max()) / 10
    assert float((refined - x_start).abs().max()) < float((plain - x_start).abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
@pytest.mark.parametrize("steps", [50, 250])
def test_inversion_bears_a_network_that_is_not_perfect(prediction: str, steps: int) -> None:
    """Decoded as images are, every step clipped to their range."""
    perfect, diffusion = _process(prediction, steps)

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        return 0.99 * perfect(x_t, t) + 0.003 * torch.sin(2 * x_t)

    x_start = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).mul(STD).add(MEAN).clamp(-1, 1)
    x_T = ddim_invert(denoiser, x_start, diffusion)
    decoded = ddim_sample(denoiser, x_T, diffusion, clip=lambda x: x.clamp(-1, 1))
    assert float((decoded - x_start).square().mean().sqrt()) < 0.03
    assert 0.7 < float(x_T.std()) < 1.3


def test_inversion_of_a_fine_process_is_the_inverse_flow() -> None:
    denoiser, diffusion = _process()
    x_T = torch.linspace(-2, 2, 5)[None]
    inverted = ddim_invert(denoiser, _flow_end(x_T, diffusion), diffusion, num_refinements=0)
    assert torch.allclose(inverted, x_T, atol=0.05)


def _exact_gamma(diffusion: GaussianDiffusion) -> np.ndarray:
    """E ||noise prediction||^2 of the perfect denoiser: (1 - ab) / (ab s^2 + 1 - ab)."""
    alpha_bar = diffusion.alphas_cumprod
    return (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)


def test_gamma_is_measured() -> None:
    denoiser, diffusion = _process("epsilon")
    rng = torch.Generator().manual_seed(0)
    data = MEAN + STD * torch.randn(64, 256, generator=rng)
    measured = measure_gamma(
        denoiser, data, diffusion, noise_like=lambda t: torch.randn(64, 256, generator=rng), num_points=60
    )
    assert measured.shape == (1000,)
    assert np.allclose(measured.numpy(), _exact_gamma(diffusion), atol=0.03)


def test_analytic_variance_is_exact_on_gaussian_data() -> None:
    """The optimal reverse variance is Var[x_s | x_t], which Gaussian data has in closed form."""
    whole = GaussianDiffusion(DiffusionConfig(prediction="x_start"))
    spaced = whole.respaced(spaced_timesteps(1000, 6))
    variances = analytic_variance(spaced, torch.from_numpy(_exact_gamma(whole)))
    for i in range(1, 6):
        # The bound of 1 on Cov[x_0 | x_t] never binds here: STD^2 is 0.25.
        ab, ab_prev = spaced.alphas_cumprod[i], spaced.alphas_cumprod[i - 1]
        before = ab_prev * STD**2 + 1 - ab_prev
        transition = 1 - ab / ab_prev
        expected = 1 / (1 / before + (1 - transition) / transition)
        assert variances[i] == pytest.approx(expected, rel=1e-4)


def test_analytic_sampling_keeps_the_marginals_with_five_steps() -> None:
    denoiser, diffusion = _process(steps=5)
    whole = GaussianDiffusion(diffusion.config)
    gamma = torch.from_numpy(_exact_gamma(whole))

    def run(sample: Callable[..., Tensor], **kwargs: object) -> Tensor:
        generators = seeded_generators([0])
        return sample(denoiser, draw_noise(generators, (20_000,)), diffusion, generators=generators, **kwargs)

    analytic = run(analytic_sample, gamma=gamma)
    assert float(analytic.mean()) == pytest.approx(MEAN, abs=0.02)
    # The last step returns E[x_0 | x_{t_0}], where t_0 = 0 hides almost nothing.
    assert float(analytic.std()) == pytest.approx(STD, abs=0.01)
    # The posterior variance alone is too small when steps are this long.
    assert float(run(ddpm_sample).std()) < STD - 0.05


def test_analytic_sampling_refuses_an_unmeasured_gamma() -> None:
    denoiser, diffusion = _process(steps=5)
    with pytest.raises(ValueError, match="run measure_gamma first"):
        analytic_sample(
            denoiser, torch.zeros(1, 2), diffusion, gamma=torch.full((1000,), -1.0), generators=seeded_generators([0])
        )


def test_guidance_scale_one_is_the_conditional_model_itself() -> None:
    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return x

    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the unconditional model must not run")

    assert guide(conditional, unconditional, 1.0) is conditional


def test_guidance_extrapolates_and_leaves_the_variance_alone() -> None:
    x, t = torch.zeros(1, 2, 2, 2), torch.zeros(1, dtype=torch.int64)
    cond, uncond = torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 1.0)
    guided = guide(lambda *_: cond, lambda *_: uncond, 2.5)(x, t)
    assert torch.equal(guided[:, :2], torch.full((1, 2, 2, 2), 1 + 2.5 * 2))
    assert torch.equal(guided[:, 2:], cond[:, 2:])
    assert torch.equal(combine_guidance(cond, uncond, 0.0), uncond)


def test_guidance_agrees_between_prediction_types() -> None:
    """Noise and x_start are affine in each other at a fixed x_t, so guiding either gives the same sample."""
    results = []
    for prediction in ("epsilon", "x_start", "v"):
        denoiser, diffusion = _process(prediction, 20)
        shifted_t = lambda x, t, d=denoiser: d(x * 0.9, t)  # noqa: E731 - any second model of the same type
        whole = GaussianDiffusion(diffusion.config)
        model_x_start = lambda x, t, d=shifted_t, w=whole: w.predict_x_start(d(x, t), x, t)  # noqa: E731
        x_t, t = torch.linspace(-1, 1, 5)[None], torch.tensor([500])
        guided = guide(denoiser, shifted_t, 3.0)(x_t, t)
        expected = combine_guidance(whole.predict_x_start(denoiser(x_t, t), x_t, t), model_x_start(x_t, t), 3.0)
        results.append(torch.allclose(whole.predict_x_start(guided, x_t, t), expected, atol=1e-5))
    assert all(results)


def _outputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return a conditional and an unconditional output whose samples have very different spreads."""
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 1.0, 7.0])[:, None, None, None]
    outputs = (spread * torch.randn(3, 4, 5, 5, generator=rng) for _ in range(2))
    conditional, unconditional = (output.to(dtype) for output in outputs)
    return conditional, unconditional


def test_rescaled_guidance_has_the_spread_of_the_conditional_output() -> None:
    cond, uncond = _outputs()
    spread = lambda x: x.flatten(1).std(dim=1)  # noqa: E731
    plain = combine_guidance(cond, uncond, 6.0)
    whole = combine_guidance(cond, uncond, 6.0, rescale=1.0)
    assert bool((spread(plain) > 5 * spread(cond)).all())
    assert torch.allclose(spread(whole), spread(cond), rtol=1e-5)
    ratio = spread(cond) / spread(plain)
    assert torch.allclose(whole, plain * ratio[:, None, None, None], rtol=1e-5)  # Eq. 15: a factor, no shift
    partly = combine_guidance(cond, uncond, 6.0, rescale=0.7)
    assert torch.allclose(partly, 0.7 * whole + 0.3 * plain, rtol=1e-4, atol=1e-6)  # Eq. 16
    assert torch.equal(combine_guidance(cond, uncond, 6.0, rescale=0.0), plain)


def test_rescaling_leaves_scale_one_and_the_variance_alone_and_samples_apart() -> None:
    cond, uncond = _outputs()
    assert combine_guidance(cond, uncond, 1.0, rescale=0.7) is cond
    guided = combine_guidance(cond, uncond, 6.0, num_channels=2, rescale=1.0)
    assert torch.equal(guided[:, 2:], cond[:, 2:])
    expected = combine_guidance(cond[:, :2], uncond[:, :2], 6.0, rescale=1.0)
    assert torch.equal(guided[:, :2], expected)
    x, t = torch.zeros(3, 2, 5, 5), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(guide(lambda *_: cond, lambda *_: uncond, 6.0, rescale=1.0)(x, t), guided)
    alone = combine_guidance(cond[1:2], uncond[1:2], 6.0, rescale=0.7)
    assert torch.allclose(combine_guidance(cond, uncond, 6.0, rescale=0.7)[1:2], alone, rtol=1e-6)
    with pytest.raises(ValueError, match=r"guidance rescale: 1\.5 is not between 0 and 1"):
        combine_guidance(cond, uncond, 6.0, rescale=1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rescaling_keeps_half_precision_and_survives_outputs_without_spread(dtype: torch.dtype) -> None:
    cond, uncond = _outputs(dtype)
    guided = combine_guidance(cond, uncond, 4.0, rescale=0.7)
    expected = combine_guidance(cond.float(), uncond.float(), 4.0, rescale=0.7)
    assert guided.dtype == dtype and torch.allclose(guided.float(), expected, rtol=0.03, atol=0.1)
    flat = torch.full((2, 3, 4), 0.5, dtype=dtype)
    assert torch.equal(combine_guidance(flat, torch.zeros_like(flat), 4.0, rescale=1.0), 4 * flat)
    single = torch.ones(2, 1, dtype=dtype)  # one value has no spread to take back
    assert torch.equal(combine_guidance(single, torch.zeros_like(single), 4.0, rescale=1.0), 4 * single)


@pytest.mark.parametrize("percentile", [0.1, 0.5, 0.95, 1.0])
def test_dynamic_thresholding_divides_by_each_samples_own_percentile(percentile: float) -> None:
    x = torch.randn(3, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([0.2, 2.0, 9.0])[:, None, None, None]
    out = dynamic_threshold(percentile)(x)
    for row, got in zip(x, out, strict=True):
        ordered = row.abs().flatten().sort().values
        s = max(1.0, float(ordered[math.ceil(percentile * len(ordered)) - 1]))
        assert torch.allclose(got, row.clamp(-s, s) / s)
    assert float(out.abs().max()) <= 1.0
    assert torch.equal(dynamic_threshold(0.9)(x[:1]), x[:1].clamp(-1, 1))  # s is never below 1
    for wrong in (0.0, 1.5, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"is not in \(0, 1\]; write for example 0.995"):
            dynamic_threshold(wrong)


def test_dynamic_thresholding_takes_images_of_more_than_sixteen_million_values() -> None:
    """As many as some versions of ``torch.quantile`` refuse."""
    x = torch.linspace(0, 4, 2**24 + 100)[None]
    assert float(dynamic_threshold(0.75)(x)[0, 2**22]) == pytest.approx(1 / 3, abs=1e-5)  # 1 of s = 3


def test_samplers_threshold_every_prediction() -> None:
    """A denoiser that overshoots: clipping saturates everything, thresholding keeps the ratios."""
    _, diffusion = _process(steps=5)
    wanted = torch.tensor([[3.0, -1.5, 0.6, -3.0]])
    for sample in (ddim_sample, dpm_solver_2m):
        out = sample(lambda x, t: wanted, torch.zeros(1, 4), diffusion, clip=dynamic_threshold(1.0))
        assert torch.allclose(out, wanted / 3, atol=1e-6)


def test_a_sample_depends_on_its_own_generator_only() -> None:
    denoiser, diffusion = _process("epsilon", steps=10)

    def run(seeds: list[int]) -> Tensor:
        generators = seeded_generators(seeds, "decoder")
        return ddpm_sample(denoiser, draw_noise(generators, (2, 3)), diffusion, generators=generators)

    assert torch.equal(run([5, 6, 7])[1:], run([6, 7]))
    assert not torch.equal(run([5]), run([6]))
    first, second = seeded_generators([5], "decoder"), seeded_generators([5], "prior")
    assert not torch.equal(draw_noise(first, (4,)), draw_noise(second, (4,)))


def test_the_number_of_generators_is_checked() -> None:
    denoiser, diffusion = _process("epsilon", steps=10)
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        ddpm_sample(denoiser, torch.zeros(2, 3), diffusion, generators=seeded_generators([0]))


def test_denoisers_meet_original_timesteps() -> None:
    seen: list[int] = []
    _, diffusion = _process("epsilon", steps=4)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return torch.zeros_like(x)

    ddim_sample(denoiser, torch.zeros(1, 2), diffusion)
    assert seen == [999, 666, 333, 0]
