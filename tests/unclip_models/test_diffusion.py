"""The diffusion process against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip_models.diffusion import (
    GaussianDiffusion,
    beta_schedule,
    discretized_log_likelihood,
    gaussian_kl,
    spaced_timesteps,
    timestep_embedding,
)
from unclip_models.settings import DiffusionConfig

FAST27 = [
    997, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266,
    244, 222, 200, 199, 177, 155, 133, 111, 88, 66, 44, 22, 0,
]  # fmt: skip


STRIDED = {
    7: [0, 166, 333, 500, 666, 832, 999],
    15: [0, 71, 143, 214, 285, 357, 428, 500, 571, 642, 714, 785, 856, 928, 999],
    25: [
        0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749, 791, 832,
        874, 916, 957, 999,
    ],
    27: [
        0, 38, 77, 115, 154, 192, 231, 269, 307, 346, 384, 423, 461, 499, 538, 576, 615, 653, 692, 730, 768,
        807, 845, 884, 922, 961, 999,
    ],
    50: [
        0, 20, 41, 61, 82, 102, 122, 143, 163, 183, 204, 224, 245, 265, 285, 306, 326, 347, 367, 387, 408,
        428, 449, 469, 489, 510, 530, 550, 571, 591, 612, 632, 652, 673, 693, 714, 734, 754, 775, 795, 816,
        836, 856, 877, 897, 917, 938, 958, 979, 999,
    ],
    64: [
        0, 16, 32, 48, 63, 79, 95, 111, 127, 143, 159, 174, 190, 206, 222, 238, 254, 270, 285, 301, 317, 333,
        349, 365, 381, 396, 412, 428, 444, 460, 476, 492, 507, 523, 539, 555, 571, 587, 603, 618, 634, 650,
        666, 682, 698, 714, 729, 745, 761, 777, 793, 809, 825, 840, 856, 872, 888, 904, 920, 936, 951, 967,
        983, 999,
    ],
}  # fmt: skip


def test_linear_schedule_table() -> None:
    betas = beta_schedule("linear", 1000)
    assert betas[0] == 1e-4 and betas[-1] == pytest.approx(2e-2)
    assert np.allclose(np.diff(betas), (2e-2 - 1e-4) / 999)
    assert np.allclose(beta_schedule("linear", 100)[[0, -1]], [1e-3, 0.2])


def test_cosine_schedule_follows_its_definition_until_the_clip() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    for t in (0, 1, 250, 500, 998):
        assert diffusion.alphas_cumprod[t] == pytest.approx(f(t + 1) / f(0), rel=1e-6)
    assert diffusion.betas[-1] == 0.999 and diffusion.betas[-2] < 0.999


def test_fast27_and_strided_timesteps() -> None:
    assert spaced_timesteps(1000, "fast27")[::-1] == FAST27
    assert spaced_timesteps(1000, 27) == spaced_timesteps(1000, "27")
    assert spaced_timesteps(1000, 5) == [0, 250, 500, 749, 999]
    assert spaced_timesteps(10, 10) == list(range(10))
    assert spaced_timesteps(10, 1) == [9]
    with pytest.raises(ValueError, match="use 1 to 10"):
        spaced_timesteps(10, 11)
    with pytest.raises(ValueError, match="neither a count"):
        spaced_timesteps(1000, "fast")
    with pytest.raises(ValueError, match="num_timesteps = 1000"):
        spaced_timesteps(500, "fast27")


@pytest.mark.parametrize("count", STRIDED)
def test_strided_timesteps_are_the_golden_lists(count: int) -> None:
    """The step counts of the paper's Table 3 and of Karlo; ADM's and diffusers' code give the same lists."""
    assert spaced_timesteps(1000, count) == STRIDED[count]


def test_two_hundred_and_fifty_strided_timesteps() -> None:
    timesteps = spaced_timesteps(1000, 250)
    assert timesteps[:4] == [0, 4, 8, 12] and timesteps[-4:] == [987, 991, 995, 999]
    assert sum(timesteps) == 124_875 and set(np.diff(timesteps)) == {4, 5}


@settings(deadline=None, max_examples=50)
@given(total=st.integers(2, 2000), data=st.data())
def test_strided_timesteps_increase_and_reach_both_ends(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, total))
    timesteps = spaced_timesteps(total, count)
    assert len(timesteps) == count == len(set(timesteps))
    assert timesteps == sorted(timesteps) and timesteps[0] == 0 and timesteps[-1] == total - 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_posterior_is_bayes_rule(schedule: str) -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): a product of two Gaussians."""
    diffusion = GaussianDiffusion(DiffusionConfig(schedule=schedule, num_timesteps=100))
    x_start, x_t = torch.tensor([[0.7]]), torch.tensor([[-0.4]])
    for i in (1, 30, 99):
        prior_mean = math.sqrt(diffusion.alphas_cumprod[i - 1]) * 0.7
        prior_variance = 1 - diffusion.alphas_cumprod[i - 1]
        alpha, beta = 1 - diffusion.betas[i], diffusion.betas[i]
        precision = 1 / prior_variance + alpha / beta
        mean, variance, log_variance = diffusion.q_posterior(x_start, x_t, torch.tensor([i]))
        expected = (prior_mean / prior_variance + math.sqrt(alpha) * -0.4 / beta) / precision
        assert float(mean) == pytest.approx(expected, rel=1e-5)
        assert float(variance) == pytest.approx(1 / precision, rel=1e-5)
        assert float(log_variance) == pytest.approx(-math.log(precision), rel=1e-4)


@pytest.mark.parametrize("spec", ["4", "27", "fast27"])
def test_the_posterior_of_a_respaced_process_by_numerical_integration(spec: str) -> None:
    """Bayes' rule on a grid: q(x_t | x_s) q(x_s | x_0), normalised, for neighbouring kept timesteps s < t."""
    whole = GaussianDiffusion(DiffusionConfig())
    spaced = whole.respaced(spaced_timesteps(1000, spec))
    x_0, x_t = 0.7, -0.4
    for i in (1, 2, spaced.num_timesteps - 1):
        # From the whole process's table alone: the respaced one derives its betas from it.
        s_bar, t_bar = whole.alphas_cumprod[list(spaced.timesteps[i - 1 : i + 1])]
        mean, variance, _ = spaced.q_posterior(torch.tensor([[x_0]]), torch.tensor([[x_t]]), torch.tensor([i]))
        x_s = float(mean) + np.linspace(-12, 12, 20_001) * math.sqrt(float(variance))
        log_density = -((x_t - math.sqrt(t_bar / s_bar) * x_s) ** 2) / (2 * (1 - t_bar / s_bar))
        log_density -= (x_s - math.sqrt(s_bar) * x_0) ** 2 / (2 * (1 - s_bar))
        weights = np.exp(log_density - log_density.max())
        weights /= weights.sum()
        expected = float(weights @ x_s)
        assert float(mean) == pytest.approx(expected, abs=1e-4)
        assert float(variance) == pytest.approx(float(weights @ (x_s - expected) ** 2), rel=1e-3)


def test_q_sample_has_the_marginal_of_repeated_noising() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=20))
    mean, variance = 1.0, 0.0
    for i in range(20):
        mean *= math.sqrt(1 - diffusion.betas[i])
        variance = (1 - diffusion.betas[i]) * variance + diffusion.betas[i]
        t = torch.tensor([i])
        one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        assert float(diffusion.q_sample(one, t, zero)) == pytest.approx(mean, abs=1e-6)
        assert float(diffusion.q_sample(zero, t, one)) == pytest.approx(math.sqrt(variance), abs=1e-6)
    with pytest.raises(ValueError, match="equal shapes"):
        diffusion.q_sample(one, t, torch.zeros(1, 2))


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "v"])
def test_every_prediction_type_recovers_x_start_and_noise(prediction: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction=prediction))
    x_start, noise = torch.randn(4, 3, 2, 2, generator=_rng()), torch.randn(4, 3, 2, 2, generator=_rng(1))
    t = torch.tensor([0, 100, 500, 900])
    x_t = diffusion.q_sample(x_start, t, noise)
    truth = diffusion._target(x_start, t, noise)
    assert torch.allclose(diffusion.predict_x_start(truth, x_t, t), x_start, atol=1e-4)
    assert torch.allclose(diffusion.predict_noise(truth, x_t, t), noise, atol=2e-3)
    loss, _ = diffusion.training_loss(lambda x, s: truth, x_start, t, noise)
    assert torch.equal(loss, torch.zeros(4))


def test_respacing_keeps_the_marginals_and_the_numbering() -> None:
    whole = GaussianDiffusion(DiffusionConfig())
    timesteps = spaced_timesteps(1000, 27)
    spaced = whole.respaced(timesteps)
    assert np.allclose(spaced.alphas_cumprod, whole.alphas_cumprod[timesteps])
    t = torch.tensor([0, 13, 26])
    assert spaced.original(t).tolist() == [timesteps[0], timesteps[13], timesteps[26]]
    assert whole.original(t) is t
    assert np.allclose(whole.respaced(range(1000)).betas, whole.betas)
    for wrong in ([], [3, 2], [5, 5], [0, 1000]):
        with pytest.raises(ValueError, match="increase within"):
            whole.respaced(wrong)


def test_learned_range_interpolates_between_the_two_bounds() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(variance="learned_range"))
    x_t, t = torch.zeros(2, 1, 1, 1), torch.tensor([10, 800])
    for value, table in ((-1.0, diffusion.posterior_log_variance), (1.0, np.log(diffusion.betas))):
        output = torch.cat([torch.zeros_like(x_t), torch.full_like(x_t, value)], dim=1)
        got = diffusion.p_mean_variance(output, x_t, t).log_variance.flatten()
        assert torch.allclose(got, torch.from_numpy(table[[10, 800]]).float(), rtol=1e-5)


def test_fixed_variances() -> None:
    x_t, t = torch.zeros(1, 1), torch.tensor([500])
    small = GaussianDiffusion(DiffusionConfig(variance="fixed_small"))
    large = GaussianDiffusion(DiffusionConfig(variance="fixed_large"))
    assert float(small.p_mean_variance(x_t, x_t, t).variance) == pytest.approx(small.posterior_variance[500], rel=1e-5)
    assert float(large.p_mean_variance(x_t, x_t, t).variance) == pytest.approx(large.betas[500], rel=1e-5)


def test_clip_reaches_the_mean() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction="x_start"))
    x_t, t = torch.zeros(1, 4), torch.tensor([100])
    predicted = diffusion.p_mean_variance(torch.full((1, 4), 9.0), x_t, t, clip=lambda x: x.clamp(-1, 1))
    mean, _, _ = diffusion.q_posterior(torch.ones(1, 4), x_t, t)
    assert torch.equal(predicted.x_start, torch.ones(1, 4)) and torch.allclose(predicted.mean, mean)


def test_the_variational_term_trains_the_variance_alone() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(variance="learned_range", num_timesteps=500))
    prediction = torch.zeros(2, 3, 4, 4, requires_grad=True)
    variance = torch.zeros(2, 3, 4, 4, requires_grad=True)
    x_start = torch.rand(2, 3, 4, 4, generator=_rng()) * 2 - 1
    noise = torch.randn(2, 3, 4, 4, generator=_rng(1))
    t = torch.tensor([0, 300])
    output = torch.cat([prediction, variance], dim=1)
    loss, terms = diffusion.training_loss(lambda x, s: output, x_start, t, noise)
    assert torch.allclose(loss, terms["mse"] + terms["vb"])
    from_mse, from_vb = torch.autograd.grad(loss.sum(), (prediction, variance))
    assert torch.allclose(from_mse, -2 * noise / noise[0].numel(), atol=1e-6)  # of the mean of (0 - noise)^2
    assert float(from_vb.abs().sum()) > 0
    # The weight: T / 1000 times bits per dimension (ADM).
    x_t = diffusion.q_sample(x_start, t, noise)
    bits = diffusion.variational_bound(output.detach(), x_start, x_t, t)
    assert torch.allclose(terms["vb"], bits * 0.5, rtol=1e-5)


def test_variational_term_is_zero_for_the_true_posterior() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(variance="learned_range"))
    x_start, noise = torch.randn(1, 1, 3, 3, generator=_rng()), torch.randn(1, 1, 3, 3, generator=_rng(1))
    t = torch.tensor([400])
    x_t = diffusion.q_sample(x_start, t, noise)
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    assert float(diffusion.variational_bound(output, x_start, x_t, t)) == pytest.approx(0, abs=1e-4)


def test_the_loss_is_float32_under_a_bfloat16_network() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(variance="learned_range"))
    x_start = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)
    output = torch.zeros(1, 6, 4, 4, dtype=torch.bfloat16)
    loss, _ = diffusion.training_loss(lambda x, s: output, x_start, torch.tensor([5]), torch.randn(1, 3, 4, 4))
    assert loss.dtype == torch.float32


def test_gaussian_kl_matches_torch() -> None:
    a, b = torch.distributions.Normal(0.3, 0.5), torch.distributions.Normal(-0.2, 1.5)
    got = gaussian_kl(
        torch.tensor(0.3), torch.tensor(2 * math.log(0.5)), torch.tensor(-0.2), torch.tensor(2 * math.log(1.5))
    )
    assert float(got) == pytest.approx(float(torch.distributions.kl_divergence(a, b)), rel=1e-5)


def test_discretized_likelihood_sums_to_one() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_probability = discretized_log_likelihood(levels, torch.tensor(0.9), torch.tensor(-2.0))
    assert float(log_probability.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_timestep_embedding_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([0, 3]), 8)
    assert embedding[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    frequencies = 10000.0 ** (-torch.arange(4) / 4)
    assert torch.allclose(embedding[1], torch.cat([(3 * frequencies).cos(), (3 * frequencies).sin()]), atol=1e-6)
    assert timestep_embedding(torch.tensor([1]), 7).shape == (1, 7)


def test_wrong_settings_and_outputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.schedule is 'cosin'"):
        DiffusionConfig(schedule="cosin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs 21 or more"):
        DiffusionConfig(schedule="linear", num_timesteps=20)
    diffusion = GaussianDiffusion(DiffusionConfig(variance="learned_range"))
    with pytest.raises(ValueError, match="output channels"):
        diffusion.predict_x_start(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.tensor([0]))


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
