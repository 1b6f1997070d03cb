"""Samplers: functions from (denoiser, noise, process) to data.

A denoiser is ``(x_t, t) -> model output`` with its conditioning bound and ``t`` in ORIGINAL timesteps; the process is a
``GaussianDiffusion``, usually respaced to the steps to visit. Noise comes from one ``torch.Generator`` per sample, so
that a result depends on its own seed and never on what else was in the batch.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from unclip_models.diffusion import Clip, Denoiser, GaussianDiffusion


def seeded_generators(seeds: Sequence[int], tag: str = "") -> list[torch.Generator]:
    """Return one CPU generator per seed; the tag keeps the streams of different models apart.

    PyTorch keeps 32 bits of a seed: of 30,000 images, two have the same noise in some model with a chance of a tenth.
    """
    generators = []
    for seed in seeds:
        digest = hashlib.blake2b(f"{int(seed)}/{tag}".encode(), digest_size=8).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))
    return generators


def draw_noise(
    generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """Draw standard normal noise, float32 ``(len(generators), *shape)``, row i from generator i.

    Each row is drawn on its generator's own device and then moved, so CPU generators give the same noise everywhere.
    """
    rows = [torch.randn(shape, generator=generator, device=generator.device) for generator in generators]
    return torch.stack(rows).to(device)


def combine_guidance(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    num_channels: int | None = None,
    *,
    rescale: float = 0.0,
) -> Tensor:
    """Extrapolate from the unconditional to the conditional output (Ho and Salimans 2021; GLIDE, Eq. 7).

    The output may be noise, x_start or v: at a fixed x_t they are affine in each other, so guidance agrees. Rescaling
    does not agree: like Lin et al., whose networks predict v, it treats whatever output it is given, so the same
    ``rescale`` means something else for noise than for x_start.

    Args:
        conditional: model output given the condition ``(B, C, ...)``.
        unconditional: model output without it, same shape.
        scale: 1 returns ``conditional`` and 0 ``unconditional``, exactly and never rescaled.
        num_channels: guide only the first so many channels and keep the conditional rest (learned variances).
        rescale: 0 to 1, how far the guided output takes back the standard deviation, over all but the batch, of the
            conditional one, which large scales blow up (Lin et al. 2023, Eqs. 15, 16; they use 0.7).

    Raises:
        ValueError: if ``rescale`` is not between 0 and 1.
    """
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance rescale: {rescale} is not between 0 and 1; write for example 0.7")
    if scale == 1.0:
        return conditional
    if num_channels is not None and num_channels < conditional.shape[1]:
        guided = combine_guidance(
            conditional[:, :num_channels], unconditional[:, :num_channels], scale, rescale=rescale
        )
        return torch.cat([guided, conditional[:, num_channels:]], dim=1)
    if scale == 0.0:
        return unconditional
    guided = unconditional + scale * (conditional - unconditional)
    return guided if rescale == 0.0 else torch.lerp(guided, guided * _spread_ratio(conditional, guided), rescale)


def _spread_ratio(wanted: Tensor, given: Tensor) -> Tensor:
    """Return the ratio of two standard deviations per sample, ``(B, 1, ...)``; 1 where there is nothing to rescale."""
    # In float32, because half precision would round the sums, and over the population, because one value has no sample.
    spread, own = (x.float().flatten(1).std(dim=1, correction=0) for x in (wanted, given))
    ratio = torch.where(own > 0, spread / own, torch.ones_like(own))
    return ratio.reshape(-1, *[1] * (wanted.dim() - 1)).to(given.dtype)


def guide(denoiser_cond: Denoiser, denoiser_uncond: Denoiser, scale: float, *, rescale: float = 0.0) -> Denoiser:
    """Return the classifier-free guided denoiser; for ``rescale`` see :func:`combine_guidance`.

    With scale 1 it is ``denoiser_cond`` itself, and the unconditional network is never run. Learned variance channels
    are taken from the conditional output.
    """
    if scale == 1.0:
        return denoiser_cond

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = denoiser_cond(x_t, t), denoiser_uncond(x_t, t)
        return combine_guidance(conditional, unconditional, scale, num_channels=x_t.shape[1], rescale=rescale)

    return guided


def dynamic_threshold(percentile: float) -> Clip:
    """Return dynamic thresholding (Imagen, section 2.3), in place of clipping to [-1, 1].

    Each sample's predicted x_start is bounded by the given quantile s of its own absolute values, at least 1, and
    divided by s, so that strong guidance does not saturate it.

    Args:
        percentile: in (0, 1]; Imagen's choice lies around 0.995.

    Raises:
        ValueError: if it is not in (0, 1].
    """
    if not 0.0 < percentile <= 1.0:
        raise ValueError(f"dynamic thresholding: percentile {percentile} is not in (0, 1]; write for example 0.995")

    def clip(x_start: Tensor) -> Tensor:
        values = x_start.flatten(1).abs()
        # The k-th value instead of torch.quantile, which in some versions refuses more than 16 million elements.
        rank = max(1, math.ceil(percentile * values.shape[1]))
        bound = values.kthvalue(rank, dim=1).values.clamp(min=1.0)
        bound = bound.reshape(-1, *[1] * (x_start.dim() - 1))
        return torch.minimum(torch.maximum(x_start, -bound), bound) / bound

    return clip


@torch.no_grad()
def ddpm_sample(
    denoiser: Denoiser,
    x_T: Tensor,  # noqa: N803 - the paper's letter
    diffusion: GaussianDiffusion,
    *,
    generators: Sequence[torch.Generator],
    clip: Clip | None = None,
) -> Tensor:
    """Sample ancestrally with the process's own variance, fixed or learned (DDPM, Algorithm 2).

    Args:
        denoiser: the network.
        x_T: standard normal ``(B, ...)``.
        diffusion: the process, respaced to the steps to take.
        generators: B generators, one per sample.
        clip: applied to every predicted x_start.

    Returns:
        x_0, float32 of the shape of ``x_T``.
    """
    _check_generators(generators, x_T)
    x = x_T.float()
    for index, t in _steps_down(diffusion, x):
        predicted = diffusion.p_mean_variance(denoiser(x, diffusion.original(t)), x, t, clip=clip)
        x = predicted.mean
        if index > 0:  # the last step returns the mean: noise after it would only be seen as grain
            x = x + (predicted.log_variance / 2).exp() * draw_noise(generators, tuple(x.shape[1:]), x.device)
    return x


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser,
    x_T: Tensor,  # noqa: N803
    diffusion: GaussianDiffusion,
    *,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    clip: Clip | None = None,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021, Eqs. 12, 16): eta 0 is deterministic, eta 1 has DDPM's posterior variance.

    Args:
        denoiser: the network.
        x_T: standard normal, or a latent of ``ddim_invert``, ``(B, ...)``.
        diffusion: the process, respaced to the steps to take.
        eta: noise level.
        generators: B generators, one per sample; needed when ``eta`` > 0.
        clip: applied to every predicted x_start.

    Returns:
        x_0, float32 of the shape of ``x_T``.

    Raises:
        ValueError: if ``eta`` > 0 comes without generators.
    """
    if eta > 0 and generators is None:
        raise ValueError(f"ddim_sample: eta is {eta} but no generators are given; pass one per sample, or eta=0")
    if generators is not None:
        _check_generators(generators, x_T)
    x = x_T.float()
    for index, t in _steps_down(diffusion, x):
        model_output = denoiser(x, diffusion.original(t))
        x_start = diffusion.predict_x_start(model_output, x, t, clip=clip)
        noise = diffusion.noise_from_x_start(x_start, x, t)
        # Float64 scalars: near the clean end, float32 would leave three digits of 1 - alpha_bar.
        alpha_bar_prev = float(diffusion.alphas_cumprod_prev[index])
        variance = eta**2 * float(diffusion.posterior_variance[index])
        x = math.sqrt(alpha_bar_prev) * x_start + math.sqrt(max(0.0, 1 - alpha_bar_prev - variance)) * noise
        if eta > 0 and generators is not None and index > 0:
            x = x + math.sqrt(variance) * draw_noise(generators, tuple(x.shape[1:]), x.device)
    return x


@torch.no_grad()
def ddim_invert(
    denoiser: Denoiser, x_start: Tensor, diffusion: GaussianDiffusion, *, num_refinements: int = 3
) -> Tensor:
    """Find the x_T from which ``ddim_sample(eta=0)`` on the same process returns ``x_start`` (unCLIP, section 3).

    Each level is first guessed from the one below (ADM, Appendix F), then refined as the fixed point of the
    sampler's own step, so that even a coarse process is inverted closely. Use the conditioning and guidance of the
    sampler, and no clipping: a clipped step has no inverse.

    What decoding the result misses of ``x_start`` falls with the number of steps N as N^-(1 + num_refinements), down to
    float32's rounding, unless the network predicts noise. On Gaussian data with the perfect denoiser the root mean
    square is 0.16, 0.034 and 0.007 at 10, 50 and 250 steps without refinement, and 4e-3, 3e-6 and 1e-6 with three. One
    that predicts noise and is 1% off, decoded by a sampler that clips to the range of images: 0.018 and 0.013 at 50
    steps. A network whose output changes fast with x_t, as under strong guidance, contracts less: refine more, or take
    more steps.

    Args:
        denoiser: the network.
        x_start: clean data ``(B, ...)``.
        diffusion: the process, respaced as the sampler's.
        num_refinements: fixed-point iterations per step, each one more run of the network; 0 is ADM's inversion.

    Returns:
        x_T, float32 of the shape of ``x_start``.
    """
    x = x_start.float()
    for index, t in reversed(list(_steps_down(diffusion, x))):
        # The level below is known: ask for its noise there. The clean level has no timestep of its own; t stands in.
        below = (t - 1).clamp(min=0)
        noise = diffusion.predict_noise(denoiser(x, diffusion.original(below)), x, below)
        (keep_noise, add_noise), (keep_x_start, add_x_start) = _inverse_steps(diffusion, index)
        guess = keep_noise * x + add_noise * noise
        signal, sigma = diffusion.sqrt_alphas_cumprod[index], diffusion.sqrt_one_minus_alphas_cumprod[index]
        for _ in range(num_refinements):
            output = denoiser(guess, diffusion.original(t))
            # Either form has the same fixed point; take the one that contracts more on data of unit variance. But a
            # network that predicts noise tells x_start by dividing by the signal, its errors too, which near T is none.
            if diffusion.config.prediction == "epsilon" or abs(add_noise) * sigma < abs(add_x_start) * signal:
                guess = keep_noise * x + add_noise * diffusion.predict_noise(output, guess, t)
            else:
                guess = keep_x_start * x + add_x_start * diffusion.predict_x_start(output, guess, t)
        x = guess
    return x


def _inverse_steps(diffusion: GaussianDiffusion, index: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Solve DDIM's step for x_t in two ways: from (x_{t-1}, noise) and from (x_{t-1}, x_start), as coefficient pairs.

    The second divides by the noise level of x_{t-1}, so at the clean level it is infinite and never chosen.
    """
    signal, sigma = diffusion.sqrt_alphas_cumprod[index], diffusion.sqrt_one_minus_alphas_cumprod[index]
    alpha_bar_prev = diffusion.alphas_cumprod_prev[index]
    signal_prev, sigma_prev = math.sqrt(alpha_bar_prev), math.sqrt(1 - alpha_bar_prev)
    scale = float(signal / signal_prev)
    from_noise = (scale, float(sigma - scale * sigma_prev))
    if sigma_prev == 0:
        return from_noise, (math.inf, math.inf)
    ratio = float(sigma / sigma_prev)
    return from_noise, (ratio, float(signal - ratio * signal_prev))


@torch.no_grad()
def analytic_sample(
    denoiser: Denoiser,
    x_T: Tensor,  # noqa: N803
    diffusion: GaussianDiffusion,
    *,
    gamma: Tensor,
    generators: Sequence[torch.Generator],
    clip: Clip | None = None,
) -> Tensor:
    """Sample ancestrally with the optimal variance (Analytic-DPM, Bao et al. 2022, Eqs. 8, 13); the prior's sampler.

    Args:
        denoiser: the network.
        x_T: standard normal ``(B, ...)``.
        diffusion: the process, respaced to the steps to take.
        gamma: Gamma_t = E ||noise prediction||^2 / dim of every ORIGINAL timestep ``(T,)``, from ``measure_gamma``.
        generators: B generators, one per sample.
        clip: applied to every predicted x_start.

    Returns:
        x_0, float32 of the shape of ``x_T``.

    Raises:
        ValueError: if ``gamma`` was not measured.
    """
    _check_generators(generators, x_T)
    variances = analytic_variance(diffusion, gamma)
    x = x_T.float()
    for index, t in _steps_down(diffusion, x):
        x_start = diffusion.predict_x_start(denoiser(x, diffusion.original(t)), x, t, clip=clip)
        x, _, _ = diffusion.q_posterior(x_start, x, t)
        if index > 0:
            x = x + float(variances[index]) ** 0.5 * draw_noise(generators, tuple(x.shape[1:]), x.device)
    return x


def analytic_variance(diffusion: GaussianDiffusion, gamma: Tensor) -> np.ndarray:
    """Return the optimal reverse variances of a process, float64 ``(num_timesteps,)``.

    It is the posterior variance plus what is unknown about x_start: posterior-mean coefficient squared times
    Cov[x_start | x_t] = (1 - ab) / ab * (1 - Gamma), bounded by 1, the variance of data within [-1, 1].

    Raises:
        ValueError: if ``gamma`` has another length than T or holds a negative (unmeasured) entry.
    """
    if gamma.shape != (diffusion.config.num_timesteps,) or not bool((gamma >= 0).all()):
        raise ValueError(
            f"analytic sampling: gamma {tuple(gamma.shape)} must hold a measured value for each of "
            f"{diffusion.config.num_timesteps} timesteps; run measure_gamma first, or use another sampler"
        )
    kept = gamma.detach().double().cpu().numpy()[list(diffusion.timesteps)]
    alpha_bar = diffusion.alphas_cumprod
    covariance = np.clip((1 - alpha_bar) / alpha_bar * (1 - kept), 0.0, 1.0)
    variance: np.ndarray = diffusion.posterior_variance + diffusion.posterior_mean_x_start**2 * covariance
    return variance


@torch.no_grad()
def measure_gamma(
    denoiser: Denoiser,
    x_start: Tensor,
    diffusion: GaussianDiffusion,
    *,
    noise_like: Callable[[int], Tensor],
    num_points: int = 64,
) -> Tensor:
    """Measure Gamma_t = E ||noise prediction||^2 / dim of a trained network (Analytic-DPM, Eq. 9).

    Gamma is smooth in t, so it is measured at evenly spread timesteps and interpolated between them.

    Args:
        denoiser: the network, bound to the conditioning of ``x_start``.
        x_start: clean data ``(B, ...)``; a few hundred samples do.
        diffusion: the whole process.
        noise_like: timestep -> standard normal of the shape of ``x_start``.
        num_points: timesteps measured.

    Returns:
        float32 ``(T,)`` on the CPU.
    """
    total = diffusion.num_timesteps
    points = np.unique(np.linspace(0, total - 1, min(num_points, total)).round().astype(int))
    measured = []
    for point in points:
        t = torch.full((x_start.shape[0],), int(point), dtype=torch.int64, device=x_start.device)
        x_t = diffusion.q_sample(x_start.float(), t, noise_like(int(point)))
        noise = diffusion.predict_noise(denoiser(x_t, diffusion.original(t)), x_t, t)
        measured.append(float((noise**2).mean()))
    return torch.from_numpy(np.interp(np.arange(total), points, measured)).float()


@torch.no_grad()
def dpm_solver_2m(
    denoiser: Denoiser,
    x_T: Tensor,  # noqa: N803
    diffusion: GaussianDiffusion,
    *,
    clip: Clip | None = None,
) -> Tensor:
    """Sample with DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): deterministic, second order, for few steps.

    Args:
        denoiser: the network.
        x_T: standard normal ``(B, ...)``.
        diffusion: the process, respaced to the steps to take.
        clip: applied to every predicted x_start.

    Returns:
        x_0, float32 of the shape of ``x_T``.
    """
    signal = np.sqrt(diffusion.alphas_cumprod)
    sigma = np.sqrt(1 - diffusion.alphas_cumprod)
    log_snr = np.log(signal / sigma)
    x = x_T.float()
    previous: Tensor | None = None
    for index, t in _steps_down(diffusion, x):
        x_start = diffusion.predict_x_start(denoiser(x, diffusion.original(t)), x, t, clip=clip)
        if index == 0:
            return x_start  # the log-SNR of clean data is infinite, where the first-order step is x_start itself
        step = log_snr[index - 1] - log_snr[index]
        direction = x_start
        # The stride of log-SNR jumps at both ends of the process, where extrapolating would amplify errors: the first
        # step has no history, and the step to the last timestep is first order too.
        if previous is not None and index > 1:
            ratio = float((log_snr[index] - log_snr[index + 1]) / step)
            direction = x_start + (x_start - previous) / (2 * ratio)
        x = float(sigma[index - 1] / sigma[index]) * x - float(signal[index - 1] * np.expm1(-step)) * direction
        previous = x_start
    return x


def _steps_down(diffusion: GaussianDiffusion, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the process's indices from the noisiest to 0: as a number, and as a tensor int64 ``(B,)``."""
    for index in reversed(range(diffusion.num_timesteps)):
        yield index, torch.full((x.shape[0],), index, dtype=torch.int64, device=x.device)


def _check_generators(generators: Sequence[torch.Generator], x: Tensor) -> None:
    if len(generators) != x.shape[0]:
        raise ValueError(f"sampling: {len(generators)} generators for a batch of {x.shape[0]}; give one per sample")
