"""The Gaussian diffusion process: schedules, q, p, and the training loss.

The process is pure mathematics: it holds float64 tables, no parameters, and knows no network. A network's output is
turned into p(x_{t-1} | x_t) here, and the samplers of ``sampling.py`` walk the process. Letters follow Ho et al. 2020
("DDPM") and Nichol and Dhariwal 2021 ("improved DDPM").
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unclip_models.settings import DiffusionConfig

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""A network with its conditioning bound: (x_t, t) -> model output, where t ``(B,)`` are ORIGINAL timesteps."""

Clip = Callable[[Tensor], Tensor]
"""Moves a predicted x_start back into the data's range, e.g. ``lambda x: x.clamp(-1, 1)`` for images."""

_MAX_BETA = 0.999
# A learned log variance may leave its two bounds by this much before its growth is slowed; see _slow_outside.
_FREE_LOG_VARIANCE = 10.0
# GLIDE's hand-tuned 27 steps: strided as "10,10,3,2,2", then 999 replaced by 997.
_FAST27_SECTIONS = (10, 10, 3, 2, 2)


class Prediction(NamedTuple):
    """The Gaussian p(x_{t-1} | x_t) and the x_start it rests on, all float32 of the shape of x_t."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_start: Tensor


def beta_schedule(schedule: str, num_timesteps: int) -> np.ndarray:
    """Return beta_0 .. beta_{T-1}, float64 ``(T,)``.

    ``linear`` runs from 1e-4 to 2e-2 at T = 1000 and is scaled by 1000 / T elsewhere (DDPM, section 4). ``cosine`` is
    improved DDPM's squared cosine with s = 0.008, beta clipped at 0.999.
    """
    if schedule == "linear":
        scale = 1000 / num_timesteps
        return np.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=np.float64)
    edges = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: np.ndarray = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], _MAX_BETA)
    return betas


def spaced_timesteps(num_timesteps: int, spec: str | int) -> list[int]:
    """Choose the timesteps a strided sampler visits, in increasing order.

    Args:
        num_timesteps: T of the trained process.
        spec: a count (``27`` or ``"27"``), evenly spread from 0 to T-1; counts per equal section of the process from
            the clean end (``"10,10,3,2,2"``); or ``"fast27"``, GLIDE's hand-tuned list for T = 1000.

    Raises:
        ValueError: if the spec cannot be read or asks for more steps than there are.
    """
    if spec == "fast27":
        if num_timesteps != 1000:
            raise ValueError(f"steps 'fast27' is a list for num_timesteps = 1000, not {num_timesteps}; use 27 instead")
        strided = _sectioned_timesteps(num_timesteps, _FAST27_SECTIONS)
        return [997 if t == 999 else t for t in strided]
    try:
        counts = tuple(int(part) for part in str(spec).split(","))
    except ValueError:
        raise ValueError(f"steps {spec!r} is neither a count, nor counts like '10,10,3,2,2', nor 'fast27'") from None
    return _sectioned_timesteps(num_timesteps, counts)


def _sectioned_timesteps(num_timesteps: int, counts: Sequence[int]) -> list[int]:
    """Spread ``counts[i]`` timesteps evenly over the i-th of ``len(counts)`` equal sections, both ends included."""
    base, extra = divmod(num_timesteps, len(counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = base + (section < extra)
        if not 1 <= count <= size:
            raise ValueError(
                f"sampling steps: {count} in a section of {size} timesteps (T = {num_timesteps}); use 1 to {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        # A single step has to start from pure noise, so one section with one step takes its noisy end.
        first = size - 1 if count == 1 and len(counts) == 1 else 0
        timesteps += [start + first + round(stride * i) for i in range(count)]
        start += size
    return timesteps


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Embed timesteps as sinusoids, cosines first (the order of ADM and GLIDE).

    Args:
        t: timesteps ``(B,)``, original numbering, integer or floating point.
        dim: width; an odd width is padded with one zero.
        max_period: longest wavelength over 2 pi, in timesteps.

    Returns:
        float32 ``(B, dim)``.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (B, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 2 * half)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


class GaussianDiffusion:
    """A diffusion process of ``num_timesteps`` steps, whole or respaced.

    All methods take ``t`` as indices into this process, int64 ``(B,)`` in [0, num_timesteps); ``original(t)`` gives the
    timesteps the network was trained with. The two numberings are the same unless the process was respaced. Tensors
    may have any shape ``(B, ...)``; arithmetic is float32 whatever the dtype of the network.

    Args:
        config: the trained process.
        timesteps: increasing original timesteps to keep (improved DDPM, section 4); None keeps all.
    """

    def __init__(self, config: DiffusionConfig, timesteps: Sequence[int] | None = None) -> None:
        self.config = config
        total = config.num_timesteps
        self.timesteps = tuple(range(total)) if timesteps is None else tuple(int(t) for t in timesteps)
        self._check_timesteps(total)
        betas = beta_schedule(config.schedule, total)
        if timesteps is not None:
            kept = np.cumprod(1 - betas)[list(self.timesteps)]
            betas = 1 - kept / np.append(1.0, kept[:-1])
        self.num_timesteps = len(self.timesteps)
        self._set_tables(betas)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _check_timesteps(self, total: int) -> None:
        kept = self.timesteps
        increasing = all(a < b for a, b in itertools.pairwise(kept))
        if not kept or not increasing or kept[0] < 0 or kept[-1] >= total:
            raise ValueError(f"diffusion timesteps {list(kept)[:8]}... must increase within [0, {total})")

    def _set_tables(self, betas: np.ndarray) -> None:
        """Fill the float64 tables, each ``(num_timesteps,)``, from beta (DDPM, Eqs. 4, 7)."""
        alphas = 1 - betas
        self.betas = betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        noise_ratio = (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_variance = betas * noise_ratio
        self.posterior_mean_x_start = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_x_t = np.sqrt(alphas) * noise_ratio
        # The posterior variance is 0 at index 0; its logarithm borrows the next entry (improved DDPM's code does too).
        floor = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance = np.log(np.append(floor, self.posterior_variance[1:]))
        self.log_betas = np.log(betas)
        # fixed_large borrows the same first entry: beta_0 would put visible noise into the final image.
        self.fixed_large_log_variance = np.log(np.append(floor, betas[1:]))

    def respaced(self, timesteps: Sequence[int]) -> "GaussianDiffusion":
        """Return the process that visits only these ORIGINAL timesteps, with the same marginals there."""
        return GaussianDiffusion(self.config, timesteps)

    def original(self, t: Tensor) -> Tensor:
        """Map indices of this process to the timesteps the network knows, int64 ``(B,)``."""
        if self.num_timesteps == self.config.num_timesteps:
            return t
        key = ("timesteps", t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self.timesteps, dtype=torch.int64, device=t.device)
        return self._on_device[key][t]

    def gather(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Read a table at ``t``, float32 ``(B, 1, ...)``, ready to multiply ``like`` ``(B, ...)``."""
        key = (table, t.device)
        if key not in self._on_device:
            values = torch.from_numpy(getattr(self, table)).to(torch.float32)
            self._on_device[key] = values.to(t.device)
        return self._on_device[key][t].reshape(-1, *[1] * (like.dim() - 1))

    # q: the process that adds noise

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw ``x_t`` from q(x_t | x_start) in closed form (DDPM, Eq. 4).

        Args:
            x_start: clean data ``(B, ...)``, floating point.
            t: timesteps ``(B,)``, int64.
            noise: standard normal, shape of ``x_start``; passed in, so that a step can be repeated exactly.

        Raises:
            ValueError: if ``noise`` and ``x_start`` differ in shape.
        """
        if noise.shape != x_start.shape:
            raise ValueError(
                f"q_sample: noise is {tuple(noise.shape)} and x_start {tuple(x_start.shape)}; give equal shapes"
            )
        signal = self.gather("sqrt_alphas_cumprod", t, x_start)
        sigma = self.gather("sqrt_one_minus_alphas_cumprod", t, x_start)
        return signal * x_start + sigma * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log variance of q(x_{t-1} | x_t, x_start) (DDPM, Eqs. 6, 7).

        The mean has the shape of ``x_t``; the two variances are ``(B, 1, ...)``.
        """
        mean = self.gather("posterior_mean_x_start", t, x_t) * x_start + self.gather("posterior_mean_x_t", t, x_t) * x_t
        return mean, self.gather("posterior_variance", t, x_t), self.gather("posterior_log_variance", t, x_t)

    # p: the process that removes it

    def split_output(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a network's output into its prediction and, with ``learned_range``, its variance channels.

        Args:
            model_output: ``(B, C, ...)``, or ``(B, 2C, ...)`` with ``learned_range``.
            x_t: ``(B, C, ...)``.

        Raises:
            ValueError: if the output has another shape.
        """
        learned = self.config.variance == "learned_range"
        expected = (x_t.shape[0], x_t.shape[1] * (2 if learned else 1), *x_t.shape[2:])
        if tuple(model_output.shape) != expected:
            raise ValueError(
                f"the network returned {tuple(model_output.shape)} where variance = {self.config.variance!r} "
                f"needs {expected}; set its output channels accordingly"
            )
        output = model_output.float()
        if not learned:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def x_start_from_noise(self, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Solve DDPM's Eq. 4 for x_start, given the noise."""
        sigma = self.gather("sqrt_one_minus_alphas_cumprod", t, x_t)
        return (x_t.float() - sigma * noise) / self.gather("sqrt_alphas_cumprod", t, x_t)

    def noise_from_x_start(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Solve DDPM's Eq. 4 for the noise, given x_start."""
        signal = self.gather("sqrt_alphas_cumprod", t, x_t)
        return (x_t.float() - signal * x_start) / self.gather("sqrt_one_minus_alphas_cumprod", t, x_t)

    def predict_x_start(self, model_output: Tensor, x_t: Tensor, t: Tensor, *, clip: Clip | None = None) -> Tensor:
        """Turn a network's output into x_start, float32 of the shape of ``x_t``, clipped when ``clip`` is given."""
        prediction, _ = self.split_output(model_output, x_t)
        if self.config.prediction == "x_start":
            x_start = prediction
        elif self.config.prediction == "epsilon":
            x_start = self.x_start_from_noise(prediction, x_t, t)
        else:  # v = sqrt(ab) * noise - sqrt(1 - ab) * x_start, so x_start is the same rotation backwards
            signal = self.gather("sqrt_alphas_cumprod", t, x_t)
            x_start = signal * x_t.float() - self.gather("sqrt_one_minus_alphas_cumprod", t, x_t) * prediction
        return x_start if clip is None else clip(x_start)

    def predict_noise(self, model_output: Tensor, x_t: Tensor, t: Tensor, *, clip: Clip | None = None) -> Tensor:
        """Turn a network's output into the noise; with ``clip``, the noise that goes with the clipped x_start."""
        if clip is None and self.config.prediction == "epsilon":
            return self.split_output(model_output, x_t)[0]
        return self.noise_from_x_start(self.predict_x_start(model_output, x_t, t, clip=clip), x_t, t)

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, t: Tensor, *, clip: Clip | None = None) -> Prediction:
        """Return p(x_{t-1} | x_t) as the network's output describes it (DDPM, Eq. 1; improved DDPM, Eq. 15).

        Args:
            model_output: the network's answer at ``original(t)``; see ``split_output`` for its shape.
            x_t: ``(B, C, ...)``.
            t: indices into this process ``(B,)``, int64.
            clip: applied to the predicted x_start.
        """
        x_start = self.predict_x_start(model_output, x_t, t, clip=clip)
        mean, _, _ = self.q_posterior(x_start, x_t, t)
        log_variance = self._log_variance(self.split_output(model_output, x_t)[1], x_t, t)
        return Prediction(mean, log_variance.exp(), log_variance, x_start)

    def _log_variance(self, learned: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Return log variance of p, shape of ``x_t``; learned channels in [-1, 1] interpolate between both bounds.

        Beyond they extrapolate, as in ADM, but far beyond no faster than a logarithm: any finite channel gives a finite
        variance, loss and gradient, and a gradient that leads back.
        """
        if learned is None:
            table = "posterior_log_variance" if self.config.variance == "fixed_small" else "fixed_large_log_variance"
            return self.gather(table, t, x_t).expand(x_t.shape)
        fraction = (learned + 1) / 2
        upper, lower = self.gather("log_betas", t, x_t), self.gather("posterior_log_variance", t, x_t)
        log_variance = fraction * upper + (1 - fraction) * lower
        return _slow_outside(log_variance, lower - _FREE_LOG_VARIANCE, upper + _FREE_LOG_VARIANCE)

    # the loss

    def training_loss(
        self, denoiser: Denoiser, x_start: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each sample.

        L_simple (DDPM, Eq. 14) is the mean squared error of what the network predicts. With ``learned_range`` the
        variational term is added (improved DDPM, Eq. 16, as ADM weighs it: bits per dimension times T / 1000), in
        float32 and with the mean detached, so that it trains the variance alone. It assumes data in [-1, 1] with 8-bit
        levels at t = 0, i.e. images.

        Args:
            denoiser: the network with its conditioning bound.
            x_start: clean data ``(B, C, ...)``.
            t: timesteps ``(B,)``, int64.
            noise: standard normal, shape of ``x_start``.

        Returns:
            The loss, float32 ``(B,)``, and its detached terms ``(B,)``: ``mse`` and, with ``learned_range``, ``vb``.
        """
        x_start = x_start.float()
        x_t = self.q_sample(x_start, t, noise)
        model_output = denoiser(x_t, self.original(t))
        prediction, learned = self.split_output(model_output, x_t)
        mse = _mean_flat((prediction - self._target(x_start, t, noise)) ** 2)
        if learned is None:
            return mse, {"mse": mse.detach()}
        frozen = torch.cat([prediction.detach(), learned], dim=1)
        vb = self.variational_bound(frozen, x_start, x_t, t) * (self.config.num_timesteps / 1000)
        return mse + vb, {"mse": mse.detach(), "vb": vb.detach()}

    def _target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return what the network should have predicted."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x_start":
            return x_start
        signal = self.gather("sqrt_alphas_cumprod", t, x_start)
        return signal * noise - self.gather("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start

    def variational_bound(self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return one term of the variational bound in bits per dimension, float32 ``(B,)`` (improved DDPM, Eqs. 4-6).

        It is KL(q(x_{t-1} | x_t, x_start) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) of 8-bit data at t = 0.
        """
        true_mean, _, true_log_variance = self.q_posterior(x_start, x_t, t)
        predicted = self.p_mean_variance(model_output, x_t, t)
        kl = _mean_flat(gaussian_kl(true_mean, true_log_variance, predicted.mean, predicted.log_variance))
        nll = -_mean_flat(discretized_log_likelihood(x_start, predicted.mean, predicted.log_variance / 2))
        return torch.where(t == 0, nll, kl) / math.log(2)


def gaussian_kl(mean_a: Tensor, log_variance_a: Tensor, mean_b: Tensor, log_variance_b: Tensor) -> Tensor:
    """Return KL(N(a) || N(b)) of diagonal Gaussians in nats, elementwise."""
    ratio = torch.exp(log_variance_a - log_variance_b)
    distance = (mean_a - mean_b) ** 2 * torch.exp(-log_variance_b)
    return 0.5 * (log_variance_b - log_variance_a + ratio + distance - 1)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return log P(x) in nats of 8-bit data in [-1, 1] under a Gaussian binned to its 256 levels (DDPM, Eq. 13)."""
    inverse = torch.exp(-log_scale)
    distance = x - mean
    # Both edges of the bin are taken to the lower tail, where small probabilities keep their digits: as a difference of
    # numbers near 1, float32 would call everything beyond five standard deviations impossible, without a gradient.
    upper = _normal_cdf((1 / 255 - distance.abs()) * inverse)
    lower = _normal_cdf((-1 / 255 - distance.abs()) * inverse)
    # The outermost levels own the tails, so that the 256 probabilities sum to one.
    probability = torch.where(x > 0.999, _normal_cdf((1 / 255 - distance) * inverse), upper - lower)
    probability = torch.where(x < -0.999, _normal_cdf((1 / 255 + distance) * inverse), probability)
    return probability.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """Return the standard normal's distribution function; unlike ``torch.special.ndtr``, exact in the lower tail."""
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)


def _slow_outside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return values within [low, high] as they are, and let those outside grow by the logarithm of their excess.

    The exponential of the result then grows linearly in the values instead of overflowing, and its gradient stays
    bounded without ever vanishing, as that of a clamp would.
    """
    above, below = (values - high).clamp(min=0), (low - values).clamp(min=0)
    return torch.minimum(torch.maximum(values, low), high) + torch.log1p(above) - torch.log1p(below)


def _mean_flat(values: Tensor) -> Tensor:
    """Average everything but the batch dimension."""
    return values.flatten(1).mean(dim=1)
