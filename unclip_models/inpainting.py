"""Inpainting with any diffusion model that was not trained for it (RePaint, Lugmayr et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unclip_models.diffusion import Clip, Denoiser, GaussianDiffusion
from unclip_models.sampling import draw_noise


@torch.no_grad()
def inpaint_sample(
    denoiser: Denoiser,
    x_T: Tensor,  # noqa: N803 - the paper's letter
    diffusion: GaussianDiffusion,
    *,
    known: Tensor,
    mask: Tensor,
    generators: Sequence[torch.Generator],
    num_resamples: int = 5,
    clip: Clip | None = None,
) -> Tensor:
    """Sample the unknown part of data given the known part (RePaint, Algorithm 1, jump length 1).

    At every step the known part is drawn from q(x_{t-1} | known) and the unknown part from the model's ancestral step,
    whose noise lets the two meet; a deterministic step would carry the first, blind guess to the end. Repeating a step,
    with one step of noise in between, brings them into harmony.

    On Gaussian data the painted part's mean nears that of p(unknown | known) with every round and with finer steps. Its
    variance does too if the process's is ``fixed_large``; ``fixed_small`` is a little too small, which the rounds add
    up to less variety. A learned variance lies in between.

    Args:
        denoiser: the network.
        x_T: standard normal ``(B, C, ...)``.
        diffusion: the process, respaced to the steps to take.
        known: clean data ``(B, C, ...)``, floating point; where the mask is False it may hold anything.
        mask: bool, True where the data are known; of the shape of ``known``, or with one channel.
        generators: B generators, one per sample.
        num_resamples: rounds of every step, 1 or more; the network runs that many times as often. RePaint uses 10.
        clip: applied to every predicted x_start.

    Returns:
        float32 of the shape of ``x_T``, equal to ``known`` where it is known.

    Raises:
        ValueError: if shapes or dtypes do not fit, or ``num_resamples`` is below 1.
    """
    _check(x_T, known, mask, generators, num_resamples)
    known, x = known.to(x_T.device).float(), x_T.float()
    mask = mask.to(x_T.device)
    shape = tuple(x.shape[1:])
    for index in reversed(range(diffusion.num_timesteps)):
        t = torch.full((x.shape[0],), index, dtype=torch.int64, device=x.device)
        # The last step returns to clean data: nothing is left to harmonise there.
        rounds = num_resamples if index > 0 else 1
        for round_ in range(rounds):
            predicted = diffusion.p_mean_variance(denoiser(x, diffusion.original(t)), x, t, clip=clip)
            below, known_below = predicted.mean, known
            if index > 0:
                below = below + (predicted.log_variance / 2).exp() * draw_noise(generators, shape, x.device)
                known_below = diffusion.q_sample(known, t - 1, draw_noise(generators, shape, x.device))
            x_below = torch.where(mask, known_below, below)
            if round_ + 1 < rounds:  # one step of q back up (DDPM, Eq. 2)
                beta = float(diffusion.betas[index])
                x = (1 - beta) ** 0.5 * x_below + beta**0.5 * draw_noise(generators, shape, x.device)
        x = x_below
    return x


def _check(
    x_T: Tensor,  # noqa: N803
    known: Tensor,
    mask: Tensor,
    generators: Sequence[torch.Generator],
    num_resamples: int,
) -> None:
    if known.shape != x_T.shape:
        raise ValueError(f"inpainting: known data {tuple(known.shape)} for noise {tuple(x_T.shape)}; give equal shapes")
    if not known.is_floating_point():
        raise ValueError(f"inpainting: known data are {known.dtype}; give floats in the model's range, such as [-1, 1]")
    if mask.dtype != torch.bool:
        raise ValueError(f"inpainting: the mask is {mask.dtype}; give booleans, True where the data are known")
    one_channel = (known.shape[0], 1, *known.shape[2:])
    if tuple(mask.shape) not in (tuple(known.shape), one_channel):
        raise ValueError(f"inpainting: mask {tuple(mask.shape)}; give {tuple(known.shape)} or {one_channel}")
    if len(generators) != x_T.shape[0]:
        raise ValueError(f"inpainting: {len(generators)} generators for a batch of {x_T.shape[0]}; give one per sample")
    if num_resamples < 1:
        raise ValueError(f"inpainting: num_resamples is {num_resamples}; use 1 or more")
