"""The diffusion prior: caption and CLIP text embedding -> CLIP image embedding (unCLIP, section 2.2).

A causal transformer reads [encoded caption | CLIP text embedding | timestep | noised image embedding | final query] and
predicts the clean image embedding at the last position. It is trained with a plain squared error.

Because attention is causal, the caption's part of the sequence depends on neither timestep nor noise: sampling reads it
once into a KV cache and then runs three positions per step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_models.clip_text import ClipText, ClipTextFeatures, build_text, encode_captions
from unclip_models.diffusion import Clip, Denoiser, GaussianDiffusion, spaced_timesteps, timestep_embedding
from unclip_models.embedding_scaling import EmbeddingScaler
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
from unclip_models.sampling_settings import PriorSampler
from unclip_models.settings import DiffusionPriorConfig
from unclip_models.transformer import KVCache, Transformer

_NUM_EXTRA_POSITIONS = 4  # text embedding, timestep, noised image embedding, final query
_UNMEASURED = -1.0
_SAMPLES_AT_ONCE = 16


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
        width, dim = config.width, config.embedding_dim
        self.scaling = EmbeddingScaler(config.embedding_scaling, dim, config.embedding_scale)
        # Like the image embeddings, text embeddings enter at a standard deviation near 1; raw ones are there already.
        self.text_scale = 1.0 if config.raw_embeddings else dim**0.5
        self.text_encoder = build_text(config.text, dim)
        self.text_proj = nn.Linear(config.text.width, width)
        self.text_embedding_proj = nn.Linear(dim, width)
        if config.text.kind == "own":
            self.null_text_embedding = nn.Parameter(torch.empty(width))
            nn.init.normal_(self.null_text_embedding, std=0.01)
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
        for parameter in (self.final_query, self.positional_embedding):
            nn.init.normal_(parameter, std=0.01)
        self.register_buffer("gamma", torch.full((config.diffusion.num_timesteps,), _UNMEASURED))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        tokens: Tensor,
        text_embedding: Tensor,
        drop: Tensor,
        text_sequence: Tensor | None = None,
    ) -> Tensor:
        """Predict the clean, scaled image embedding.

        Args:
            x_t: noised, scaled image embedding ``(B, D)``.
            t: original timesteps ``(B,)``, int64.
            tokens: caption ``(B, context_length)``, int64, 0 after its end.
            text_embedding: CLIP's ``(B, D)``, unit norm unless ``raw_embeddings``.
            drop: bool ``(B,)``, True where caption and text embedding are withheld.
            text_sequence: with ``text.kind: clip``, the text tower's last hidden states ``(B, context_length, W)``.

        Returns:
            ``(B, D)`` in the network's dtype: x_start, unless ``diffusion.prediction`` says otherwise.
        """
        prefix, visible = self._prefix(tokens, text_embedding, drop, text_sequence)
        hidden = self.transformer(  # (B, ctx + 4, width)
            torch.cat([prefix, self._suffix(x_t, t)], dim=1), visible=_with_suffix(visible)
        )
        prediction: Tensor = self.out_proj(self.final_norm(hidden[:, -1]))
        return prediction

    def _prefix(
        self, tokens: Tensor, text_embedding: Tensor, drop: Tensor, text_sequence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embed what does not change while sampling: caption and text embedding.

        Returns:
            ``(B, ctx + 1, width)``, and which of these positions may be attended to, bool of the same shape, or None.
        """
        dtype = self.text_embedding_proj.weight.dtype
        features = None if text_sequence is None else ClipTextFeatures(text_sequence, text_embedding)
        caption = encode_captions(self.text_encoder, tokens, drop, features)
        if isinstance(self.text_encoder, ClipText):  # the empty caption has an embedding of its own
            pooled = self.text_embedding_proj((caption.pooled * self.text_scale).to(dtype))
        else:
            pooled = self.text_embedding_proj((text_embedding * self.text_scale).to(dtype))
            pooled = torch.where(drop[:, None], self.null_text_embedding.to(pooled.dtype), pooled)
        prefix = torch.cat([self.text_proj(caption.sequence.to(dtype)), pooled[:, None]], dim=1)
        visible = None if caption.visible is None else F.pad(caption.visible, (0, 1), value=True)
        return prefix + self.positional_embedding[: prefix.shape[1]], visible

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
            batch: ``tokens`` int64 ``(B, ctx)``; ``text_embedding`` and ``image_embedding``, unit norm ``(B, D)``; with
                ``text.kind: clip`` also ``text_sequence`` ``(B, ctx, W)``.
            random: the step's randomness.

        Returns:
            The mean loss, and detached per-sample terms ``(B,)``: ``loss``, ``mse``, and the timesteps ``t``.
        """
        x_start = self.scaling.scale(batch["image_embedding"])
        t = random.integers("timestep", 0, self.config.diffusion.num_timesteps)
        noise = random.normal("noise", (self.config.embedding_dim,))
        drop = random.bernoulli("caption_dropout", self.config.caption_dropout)

        def denoiser(x_t: Tensor, timesteps: Tensor) -> Tensor:
            prediction: Tensor = self(
                x_t, timesteps, batch["tokens"], batch["text_embedding"], drop, batch.get("text_sequence")
            )
            return prediction

        losses, terms = self.diffusion.training_loss(denoiser, x_start, t, noise)
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
        sampler: PriorSampler = "ddim",
        clip_range: float | None = None,
        text_sequence: Tensor | None = None,
    ) -> Tensor:
        """Draw image embeddings, the best of ``num_candidates`` by dot product with the text embedding (section 2.2).

        Args:
            tokens: captions ``(B, ctx)``, int64.
            text_embedding: CLIP's ``(B, D)``, unit norm unless ``raw_embeddings``.
            steps: sampling steps, or any spec of ``spaced_timesteps`` (paper: 64).
            guidance_scale: 1 samples the conditional model alone (the paper found that guiding the prior hurts).
            generators: B generators, one per sample.
            num_candidates: embeddings drawn per caption (paper: 2).
            sampler: ``ddim``, ``ddpm``, ``analytic`` (paper; needs ``measure_gamma``) or ``dpm_solver_2m``.
            clip_range: the scaled embedding is predicted within [-clip_range, clip_range] (Karlo: 5 or 10); None leaves
                it free.
            text_sequence: with ``text.kind: clip``, the text tower's last hidden states ``(B, ctx, W)``.

        Returns:
            Image embeddings, float32 ``(B, D)``, unit norm unless ``raw_embeddings``.

        Raises:
            ValueError: for an unknown sampler, no candidates, or a wrong number of generators.
        """
        if num_candidates < 1:
            raise ValueError(f"prior sampling: num_candidates is {num_candidates}; use 1 or more")
        if len(generators) != tokens.shape[0]:
            raise ValueError(f"prior sampling: {len(generators)} generators for {tokens.shape[0]} captions; give equal")
        keep = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

        def bind(drop: Tensor) -> Denoiser:
            return self.bind(tokens, text_embedding, drop, text_sequence=text_sequence, num_candidates=num_candidates)

        denoiser = bind(keep)
        if guidance_scale != 1.0:
            denoiser = guide(denoiser, bind(~keep), guidance_scale)
        diffusion = self.diffusion.respaced(spaced_timesteps(self.config.diffusion.num_timesteps, steps))
        x_T = draw_noise(generators, (num_candidates, self.config.embedding_dim), tokens.device)  # noqa: N806
        x_start = self._run_sampler(sampler, denoiser, x_T, diffusion, generators, clip_range)  # (B, N, D)
        candidates = self.scaling.unscale(x_start)
        if not self.config.raw_embeddings:
            candidates = F.normalize(candidates, dim=-1)
        return best_candidate(candidates, text_embedding)

    def _run_sampler(
        self,
        sampler: str,
        denoiser: Denoiser,
        x_T: Tensor,  # noqa: N803
        diffusion: GaussianDiffusion,
        generators: Sequence[torch.Generator],
        clip_range: float | None,
    ) -> Tensor:
        clip: Clip | None = None if clip_range is None else lambda x: x.clamp(-clip_range, clip_range)
        runs: dict[str, Callable[[], Tensor]] = {
            "ddim": lambda: ddim_sample(denoiser, x_T, diffusion, clip=clip),
            "ddpm": lambda: ddpm_sample(denoiser, x_T, diffusion, generators=generators, clip=clip),
            "analytic": lambda: analytic_sample(
                denoiser, x_T, diffusion, gamma=self.gamma, generators=generators, clip=clip
            ),
            "dpm_solver_2m": lambda: dpm_solver_2m(denoiser, x_T, diffusion, clip=clip),
        }
        assert runs.keys() == set(get_args(PriorSampler))
        if sampler not in runs:
            raise ValueError(f"prior sampling: sampler is {sampler!r}; use one of {', '.join(runs)}")
        return runs[sampler]()

    def bind(
        self,
        tokens: Tensor,
        text_embedding: Tensor,
        drop: Tensor,
        *,
        text_sequence: Tensor | None = None,
        num_candidates: int = 1,
    ) -> Denoiser:
        """Read the condition into a KV cache; return the denoiser of N candidates per caption, ``(B, N, D)``.

        For the arguments see :meth:`forward` and :meth:`sample`.
        """
        prefix, visible = self._prefix(tokens, text_embedding, drop, text_sequence)
        prefix_cache: KVCache = self.transformer.new_cache()
        self.transformer(prefix, prefix_cache, visible)
        prefix_cache = prefix_cache.repeated(num_candidates)
        seen = _with_suffix(visible)
        seen = None if seen is None else seen.repeat_interleave(num_candidates, dim=0)

        def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
            suffix = self._suffix(x_t.flatten(0, 1), t.repeat_interleave(num_candidates))  # (B * N, 3, width)
            hidden = self.transformer(suffix, prefix_cache.fork(), seen)
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
        num_samples = len(batch["image_embedding"])
        total = torch.zeros(self.gamma.shape, dtype=torch.float64)
        # A few at a time: the cache of the paper's prior takes 150 MiB a sample.
        for start in range(0, num_samples, _SAMPLES_AT_ONCE):
            rows = slice(start, start + _SAMPLES_AT_ONCE)
            part = {name: tensor[rows] for name, tensor in batch.items()}
            own = SampleRandom(random.seed, random.step, random.indices[rows], random.device)
            total += len(own) * self._gamma_of(part, own, num_points).double()
        self.gamma.copy_(total / num_samples)
        return self.gamma

    def _gamma_of(self, batch: Mapping[str, Tensor], random: SampleRandom, num_points: int) -> Tensor:
        x_start = self.scaling.scale(batch["image_embedding"])[:, None]  # (B, 1, D)
        keep = torch.zeros(x_start.shape[0], dtype=torch.bool, device=x_start.device)
        return measure_gamma(
            self.bind(batch["tokens"], batch["text_embedding"], keep, text_sequence=batch.get("text_sequence")),
            x_start,
            self.diffusion,
            noise_like=lambda t: random.normal(f"gamma/{t}", tuple(x_start.shape[1:])),
            num_points=num_points,
        )


def _with_suffix(visible: Tensor | None) -> Tensor | None:
    """Add timestep, noised embedding and query, which all may be attended to, behind the prefix."""
    return None if visible is None else F.pad(visible, (0, 3), value=True)


def best_candidate(candidates: Tensor, text_embedding: Tensor) -> Tensor:
    """Choose each row's candidate with the largest dot product, of unit vectors, with its text embedding.

    Args:
        candidates: ``(B, N, D)``; of any norm, which the choice ignores.
        text_embedding: ``(B, D)``.

    Returns:
        float32 ``(B, D)``: the chosen candidates as they were given.
    """
    directions = F.normalize(candidates, dim=-1)
    # No product of matrices: autocast would compute it in half precision.
    scores = (directions * text_embedding.to(candidates.dtype)[:, None]).sum(dim=-1)
    best = scores.argmax(dim=1)
    return candidates[torch.arange(candidates.shape[0], device=candidates.device), best]
