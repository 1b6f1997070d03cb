"""The diffusion prior: caption and CLIP text embedding -> CLIP image embedding (unCLIP, section 2.2).

A causal transformer reads [encoded caption | CLIP text embedding | timestep | noised image embedding | final query] and
predicts the clean image embedding at the last position. It is trained with a plain squared error.

Because attention is causal, the caption's part of the sequence depends on neither timestep nor noise: sampling reads it
once into a KV cache and then runs three positions per step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_models.diffusion import Denoiser, DiffusionConfig, GaussianDiffusion, spaced_timesteps, timestep_embedding
from unclip_models.float32_buffers import Float32Buffers
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import (
    analytic_sample,
    ddim_sample,
    ddpm_sample,
    dpm_solver_2m,
    draw_noise,
    guide,
    measure_gamma,
)
from unclip_models.text_encoder import TextEncoder, TextEncoderConfig
from unclip_models.transformer import KVCache, Transformer

_PAPER_SCALE = 17.2
_PAPER_EMBEDDING_DIM = 1024
_NUM_EXTRA_POSITIONS = 4  # text embedding, timestep, noised image embedding, final query
_UNMEASURED = -1.0
PRIOR_SAMPLERS = ("ddim", "ddpm", "analytic", "dpm_solver")


@dataclass(frozen=True, kw_only=True)
class DiffusionPriorConfig:
    """Settings of a diffusion prior.

    The paper's 1B prior is one 24 x 2048 transformer over a 256-token caption: ``text.layers`` 0, ``width`` 2048,
    ``layers`` 24, ``heads`` 32. A caption transformer of its own (``text.layers`` > 0) is useful for small models.

    Attributes:
        kind: always ``diffusion``; tells it from the autoregressive prior in a config file.
        embedding_dim: D of the CLIP.
        text: the caption's embedding and, with layers, its encoder.
        width: channels of the causal transformer.
        layers: its blocks.
        heads: its attention heads.
        caption_dropout: probability of withholding caption and text embedding together (paper: 0.1).
        embedding_scale: factor on unit-norm embeddings inside the model. None takes the paper's 17.2 at D = 1024 and
            17.2 * sqrt(D / 1024) elsewhere: the same standard deviation, 0.54, per dimension.
        diffusion: the process; the variance must be fixed.
        checkpoint_activations: trade compute for memory in the backward pass.
    """

    kind: Literal["diffusion"] = "diffusion"
    embedding_dim: int = 768
    text: TextEncoderConfig = field(default_factory=lambda: TextEncoderConfig(layers=0))
    width: int = 512
    layers: int = 6
    heads: int = 8
    caption_dropout: float = 0.1
    embedding_scale: float | None = None
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(prediction="x_start"))
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"prior.{name} is {getattr(self, name)}; use 1 or more")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"prior.caption_dropout is {self.caption_dropout}; use a probability in [0, 1)")
        if self.embedding_scale is not None and self.embedding_scale <= 0:
            raise ValueError(f"prior.embedding_scale is {self.embedding_scale}; use a positive number, or leave it out")
        if self.diffusion.variance == "learned_range":
            raise ValueError("prior.diffusion.variance is 'learned_range'; embeddings need a fixed variance")

    @property
    def resolved_embedding_scale(self) -> float:
        """The scale in use, ``embedding_scale`` or its default for this ``embedding_dim``."""
        if self.embedding_scale is not None:
            return self.embedding_scale
        return _PAPER_SCALE * math.sqrt(self.embedding_dim / _PAPER_EMBEDDING_DIM)


class DiffusionPrior(Float32Buffers):
    """Generate CLIP image embeddings from captions by diffusion.

    The buffer ``gamma`` ``(T,)`` serves the analytic sampler; it is -1 until ``measure_gamma`` fills it.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("gamma",)
    gamma: Tensor

    def __init__(self, config: DiffusionPriorConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        self.scale = config.resolved_embedding_scale
        width, dim = config.width, config.embedding_dim
        self.text_encoder = TextEncoder(config.text)
        self.text_proj = nn.Linear(config.text.width, width)
        self.text_embedding_proj = nn.Linear(dim, width)
        self.null_text_embedding = nn.Parameter(torch.empty(width))
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.image_proj = nn.Linear(dim, width)
        self.final_query = nn.Parameter(torch.empty(width))
        num_positions = config.text.context_length + _NUM_EXTRA_POSITIONS
        self.positional_embedding = nn.Parameter(torch.empty(num_positions, width))
        self.transformer = Transformer(
            width, config.layers, config.heads, causal=True, checkpoint_activations=config.checkpoint_activations
        )
        self.final_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, dim)
        for parameter in (self.null_text_embedding, self.final_query, self.positional_embedding):
            nn.init.normal_(parameter, std=0.01)
        self.register_buffer("gamma", torch.full((config.diffusion.num_timesteps,), _UNMEASURED))

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor, text_embedding: Tensor, drop: Tensor) -> Tensor:
        """Predict the clean, scaled image embedding.

        Args:
            x_t: noised, scaled image embedding ``(B, D)``.
            t: original timesteps ``(B,)``, int64.
            tokens: caption ``(B, context_length)``, int64, 0 after its end.
            text_embedding: CLIP's, unit norm ``(B, D)``.
            drop: bool ``(B,)``, True where caption and text embedding are withheld.

        Returns:
            ``(B, D)`` in the network's dtype: x_start, unless ``diffusion.prediction`` says otherwise.
        """
        sequence = torch.cat([self._prefix(tokens, text_embedding, drop), self._suffix(x_t, t)], dim=1)
        hidden = self.transformer(sequence)  # (B, ctx + 4, width)
        prediction: Tensor = self.out_proj(self.final_norm(hidden[:, -1]))
        return prediction

    def _prefix(self, tokens: Tensor, text_embedding: Tensor, drop: Tensor) -> Tensor:
        """Embed what does not change while sampling: caption and text embedding, ``(B, ctx + 1, width)``."""
        sequence, _ = self.text_encoder(tokens, drop)
        scaled = (text_embedding * self.scale).to(self.text_embedding_proj.weight.dtype)
        pooled = self.text_embedding_proj(scaled)
        pooled = torch.where(drop[:, None], self.null_text_embedding.to(pooled.dtype), pooled)
        prefix = torch.cat([self.text_proj(sequence), pooled[:, None]], dim=1)
        return prefix + self.positional_embedding[: prefix.shape[1]]

    def _suffix(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Embed timestep, noised image embedding and final query, ``(B, 3, width)``."""
        dtype = self.image_proj.weight.dtype
        time = self.time_embed(timestep_embedding(t, self.config.width).to(dtype))
        image = self.image_proj(x_t.to(dtype))
        query = self.final_query.to(image.dtype).expand_as(image)
        return torch.stack([time, image, query], dim=1) + self.positional_embedding[-3:]

    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss: the squared error of the predicted image embedding (unCLIP, Eq. 2).

        Args:
            batch: ``tokens`` int64 ``(B, ctx)``; ``text_embedding`` and ``image_embedding``, unit norm ``(B, D)``.
            random: the step's randomness.

        Returns:
            The mean loss, and detached per-sample terms ``(B,)``: ``loss``, ``mse``, and the timesteps ``t``.
        """
        image_embedding = batch["image_embedding"].float()
        t = random.integers("timestep", 0, self.config.diffusion.num_timesteps)
        noise = random.normal("noise", (self.config.embedding_dim,))
        drop = random.bernoulli("caption_dropout", self.config.caption_dropout)

        def denoiser(x_t: Tensor, timesteps: Tensor) -> Tensor:
            prediction: Tensor = self(x_t, timesteps, batch["tokens"], batch["text_embedding"], drop)
            return prediction

        losses, terms = self.diffusion.training_loss(denoiser, image_embedding * self.scale, t, noise)
        return losses.mean(), {"loss": losses.detach(), **terms, "t": t}

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor,
        text_embedding: Tensor,
        *,
        steps: int | str,
        guidance_scale: float,
        generators: Sequence[torch.Generator],
        num_candidates: int = 2,
        sampler: str = "ddim",
    ) -> Tensor:
        """Draw image embeddings, the best of ``num_candidates`` by dot product with the text embedding (section 2.2).

        Args:
            tokens: captions ``(B, ctx)``, int64.
            text_embedding: CLIP's, unit norm ``(B, D)``.
            steps: sampling steps, or any spec of ``spaced_timesteps`` (paper: 64).
            guidance_scale: 1 samples the conditional model alone (the paper found that guiding the prior hurts).
            generators: B generators, one per sample.
            num_candidates: embeddings drawn per caption (paper: 2).
            sampler: ``ddim``, ``ddpm``, ``analytic`` (paper; needs ``measure_gamma``) or ``dpm_solver``.

        Returns:
            Unit-norm image embeddings, float32 ``(B, D)``.

        Raises:
            ValueError: for an unknown sampler, no candidates, or a wrong number of generators.
        """
        if num_candidates < 1:
            raise ValueError(f"prior sampling: num_candidates is {num_candidates}; use 1 or more")
        if len(generators) != tokens.shape[0]:
            raise ValueError(f"prior sampling: {len(generators)} generators for {tokens.shape[0]} captions; give equal")
        keep = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        denoiser = self._bind(tokens, text_embedding, keep, num_candidates)
        if guidance_scale != 1.0:
            denoiser = guide(denoiser, self._bind(tokens, text_embedding, ~keep, num_candidates), guidance_scale)
        diffusion = self.diffusion.respaced(spaced_timesteps(self.config.diffusion.num_timesteps, steps))
        x_T = draw_noise(generators, (num_candidates, self.config.embedding_dim), tokens.device)  # noqa: N806
        x_start = self._run_sampler(sampler, denoiser, x_T, diffusion, generators)  # (B, N, D)
        return best_candidate(F.normalize(x_start, dim=-1), text_embedding)

    def _run_sampler(
        self,
        sampler: str,
        denoiser: Denoiser,
        x_T: Tensor,  # noqa: N803
        diffusion: GaussianDiffusion,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        runs: dict[str, Callable[[], Tensor]] = {
            "ddim": lambda: ddim_sample(denoiser, x_T, diffusion),
            "ddpm": lambda: ddpm_sample(denoiser, x_T, diffusion, generators=generators),
            "analytic": lambda: analytic_sample(denoiser, x_T, diffusion, gamma=self.gamma, generators=generators),
            "dpm_solver": lambda: dpm_solver_2m(denoiser, x_T, diffusion),
        }
        if sampler not in runs:
            raise ValueError(f"prior sampling: sampler is {sampler!r}; use one of {', '.join(PRIOR_SAMPLERS)}")
        return runs[sampler]()

    def _bind(self, tokens: Tensor, text_embedding: Tensor, drop: Tensor, num_candidates: int = 1) -> Denoiser:
        """Read the condition into a cache; return the denoiser of N candidates per caption, ``(B, N, D)``."""
        prefix_cache: KVCache = self.transformer.new_cache()
        self.transformer(self._prefix(tokens, text_embedding, drop), prefix_cache)
        prefix_cache = prefix_cache.repeated(num_candidates)

        def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
            suffix = self._suffix(x_t.flatten(0, 1), t.repeat_interleave(num_candidates))  # (B * N, 3, width)
            hidden = self.transformer(suffix, prefix_cache.fork())
            prediction: Tensor = self.out_proj(self.final_norm(hidden[:, -1]))
            return prediction.reshape(-1, num_candidates, prediction.shape[-1])

        return denoiser

    @torch.no_grad()
    def measure_gamma(self, batch: Mapping[str, Tensor], random: SampleRandom, *, num_points: int = 64) -> Tensor:
        """Measure what the analytic sampler needs and keep it in the buffer ``gamma``; do so after training.

        Args:
            batch: a few hundred training samples, as for ``loss``.
            random: noise for the measurement.
            num_points: timesteps measured; the rest is interpolated.

        Returns:
            Gamma ``(T,)``, float32.
        """
        x_start = batch["image_embedding"].float()[:, None] * self.scale  # (B, 1, D)
        keep = torch.zeros(x_start.shape[0], dtype=torch.bool, device=x_start.device)
        measured = measure_gamma(
            self._bind(batch["tokens"], batch["text_embedding"], keep),
            x_start,
            self.diffusion,
            noise_like=lambda t: random.normal(f"gamma/{t}", tuple(x_start.shape[1:])),
            num_points=num_points,
        )
        self.gamma.copy_(measured)
        return self.gamma


def best_candidate(candidates: Tensor, text_embedding: Tensor) -> Tensor:
    """Choose each row's candidate with the largest dot product with its text embedding.

    Args:
        candidates: unit norm ``(B, N, D)``.
        text_embedding: unit norm ``(B, D)``.

    Returns:
        float32 ``(B, D)``.
    """
    scores = torch.einsum("bnd,bd->bn", candidates, text_embedding.to(candidates.dtype))
    best = scores.argmax(dim=1)
    return candidates[torch.arange(candidates.shape[0], device=candidates.device), best]
