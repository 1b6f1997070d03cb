"""The autoregressive prior: caption -> PCA codes of the CLIP image embedding (unCLIP, section 2.2).

The image embedding is projected onto its first k principal components, each quantised into buckets, and a causal
transformer predicts the codes in order of decreasing eigenvalue. In front of them stands one token for the quantised
dot product of image and text embedding, which sampling draws from the top half of its distribution to ask for a
well-matched image. The sequence is

    [caption | CLIP text embedding | dot product | code 1 | ... | code k - 1]

and predicts the dot product, then code 1 .. code k. What the paper leaves open is decided here: the dot product is
itself predicted, so that "the top half" is meant given the caption; one table of bucket embeddings and one output
layer serve all k positions, told apart by the positional embedding; the caption enters as its whole encoded sequence
or, to fit the paper's context of 384, as one pooled vector.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unclip_models.float32_buffers import Float32Buffers
from unclip_models.prior import best_candidate
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import combine_guidance
from unclip_models.settings import ARPriorConfig
from unclip_models.text_encoder import TextEncoder
from unclip_models.transformer import KVCache, Transformer


class ARPrior(Float32Buffers):
    """Generate CLIP image embeddings from captions, code by code.

    The PCA lives in buffers filled by ``set_pca``: ``pca_mean`` ``(D,)``, ``pca_axes`` ``(k, D)``, ``code_edges``
    ``(k, num_buckets + 1)``, ``dot_edges`` ``(num_dot_buckets + 1,)``, all float32.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("pca_mean", "pca_axes", "code_edges", "dot_edges")
    pca_mean: Tensor
    pca_axes: Tensor
    code_edges: Tensor
    dot_edges: Tensor

    def __init__(self, config: ARPriorConfig) -> None:
        super().__init__()
        self.config = config
        width, dim, k = config.width, config.embedding_dim, config.num_codes
        self.text_encoder = TextEncoder(config.text)
        self.text_proj = nn.Linear(config.text.width, width)
        self.text_embedding_proj = nn.Linear(dim, width)
        self.null_text_embedding = nn.Parameter(torch.empty(width))
        self.dot_embedding = nn.Embedding(config.num_dot_buckets, width)
        self.code_embedding = nn.Embedding(config.num_buckets, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.num_prefix_positions + k, width))
        self.transformer = Transformer(
            width, config.layers, config.heads, causal=True, checkpoint_activations=config.checkpoint_activations
        )
        self.final_norm = nn.LayerNorm(width)
        self.dot_head = nn.Linear(width, config.num_dot_buckets)
        self.code_head = nn.Linear(width, config.num_buckets)
        for embedding in (self.dot_embedding.weight, self.code_embedding.weight):
            nn.init.normal_(embedding, std=0.02)
        for parameter in (self.null_text_embedding, self.positional_embedding):
            nn.init.normal_(parameter, std=0.01)
        self.register_buffer("pca_mean", torch.zeros(dim))
        self.register_buffer("pca_axes", torch.zeros(k, dim))
        self.register_buffer("code_edges", torch.zeros(k, config.num_buckets + 1))
        self.register_buffer("dot_edges", torch.zeros(config.num_dot_buckets + 1))
        self._has_pca = False

    # image embedding <-> codes

    def set_pca(self, *, mean: Tensor, axes: Tensor, edges: Tensor, dot_edges: Tensor) -> None:
        """Fill the quantiser; call it once before training.

        Args:
            mean: of the image embeddings ``(D,)``.
            axes: the first k principal axes, orthonormal rows in order of decreasing eigenvalue ``(k, D)``.
            edges: bucket edges per component, increasing ``(k, num_buckets + 1)``.
            dot_edges: bucket edges of the dot product of image and text embedding ``(num_dot_buckets + 1,)``.

        Raises:
            ValueError: if a shape is wrong, edges decrease, or axes are not orthonormal.
        """
        given = {"pca_mean": mean, "pca_axes": axes, "code_edges": edges, "dot_edges": dot_edges}
        for name, value in given.items():
            expected = tuple(self.get_buffer(name).shape)
            if tuple(value.shape) != expected or not bool(torch.isfinite(value).all()):
                raise ValueError(f"set_pca: {name} must be finite and {expected}, not {tuple(value.shape)}")
            if name.endswith("edges") and not bool((value.diff(dim=-1) >= 0).all() and (value.diff(dim=-1) > 0).any()):
                raise ValueError(f"set_pca: {name} must increase from left to right; solve the pca again")
        gram = axes.double() @ axes.double().T
        if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), atol=1e-3):
            raise ValueError(
                "set_pca: the axes are not orthonormal rows; give eigenvectors of unit length, one per row"
            )
        for name, value in given.items():
            self.get_buffer(name).copy_(value)
        self._has_pca = True

    def assume_pca(self) -> None:
        """Take the PCA's buffers for filled: for rehearsals in which tensors have shapes and no numbers."""
        self._has_pca = True

    def encode(self, image_embedding: Tensor) -> Tensor:
        """Quantise embeddings ``(B, D)`` to codes, int64 ``(B, k)`` in [0, num_buckets); outliers take the end buckets.

        Raises:
            ValueError: if ``set_pca`` was never called.
        """
        self._require_pca()
        # In float64, which autocast leaves alone: in half precision a third of the codes would be others.
        components = ((image_embedding.double() - self.pca_mean) @ self.pca_axes.double().T).float()  # (B, k)
        inner_edges = self.code_edges[:, 1:-1].contiguous()
        return torch.searchsorted(inner_edges, components.T.contiguous(), right=True).T  # (k, B) -> (B, k)

    def decode(self, codes: Tensor) -> Tensor:
        """Rebuild embeddings from codes ``(B, k)`` at the middle of their buckets; float32 ``(B, D)``, not normalised.

        Raises:
            ValueError: if ``set_pca`` was never called.
        """
        self._require_pca()
        centres = (self.code_edges[:, :-1] + self.code_edges[:, 1:]) / 2  # (k, num_buckets)
        components = centres.T.gather(0, codes)  # (B, k): row c of centres.T holds bucket c of every component
        return (components.double() @ self.pca_axes.double() + self.pca_mean).float()

    def encode_dot(self, image_embedding: Tensor, text_embedding: Tensor) -> Tensor:
        """Quantise the dot product of two batches of unit-norm embeddings ``(B, D)``, int64 ``(B,)``."""
        self._require_pca()
        dot = (image_embedding.float() * text_embedding.float()).sum(dim=-1)
        return torch.bucketize(dot, self.dot_edges[1:-1].contiguous(), right=True)

    def _require_pca(self) -> None:
        if self._has_pca:
            return
        # A loaded checkpoint fills the buffers without set_pca; look once, for looking waits for the GPU.
        if not bool(self.pca_axes.any()):
            raise ValueError("the autoregressive prior has no PCA yet; call set_pca with the output of the pca stage")
        self._has_pca = True

    # the transformer

    def forward(
        self, dot: Tensor, codes: Tensor, tokens: Tensor, text_embedding: Tensor, drop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict every token from those before it.

        Args:
            dot: quantised dot products ``(B,)``, int64.
            codes: ``(B, k)``, int64; the last one is only ever predicted.
            tokens: captions ``(B, context_length)``, int64, 0 after their end.
            text_embedding: CLIP's, unit norm ``(B, D)``.
            drop: bool ``(B,)``, True where caption and text embedding are withheld.

        Returns:
            Logits of the dot product ``(B, num_dot_buckets)`` and of the codes ``(B, k, num_buckets)``.
        """
        prefix = self._prefix(tokens, text_embedding, drop)
        image = torch.cat([self.dot_embedding(dot)[:, None], self.code_embedding(codes[:, :-1])], dim=1)
        image = image + self.positional_embedding[self.config.num_prefix_positions :]
        hidden = self.final_norm(self.transformer(torch.cat([prefix, image.to(prefix.dtype)], dim=1)))
        hidden = hidden[:, self.config.num_prefix_positions - 1 :]  # (B, k + 1, width)
        return self.dot_head(hidden[:, 0]), self.code_head(hidden[:, 1:])

    def _prefix(self, tokens: Tensor, text_embedding: Tensor, drop: Tensor) -> Tensor:
        """Embed caption and text embedding, ``(B, num_prefix_positions, width)``."""
        sequence, pooled = self.text_encoder(tokens, drop)
        caption = sequence if self.config.text_prefix == "sequence" else pooled[:, None]
        # Unit variance per dimension instead of unit norm, the scale the other inputs have.
        scaled = (text_embedding * self.config.embedding_dim**0.5).to(self.text_embedding_proj.weight.dtype)
        embedded = self.text_embedding_proj(scaled)
        embedded = torch.where(drop[:, None], self.null_text_embedding.to(embedded.dtype), embedded)
        prefix = torch.cat([self.text_proj(caption), embedded[:, None]], dim=1)
        return prefix + self.positional_embedding[: prefix.shape[1]]

    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the training loss: mean cross-entropy in nats over the k codes and the dot product.

        Args:
            batch: ``tokens`` int64 ``(B, ctx)``; ``text_embedding`` and ``image_embedding``, unit norm ``(B, D)``.
            random: the step's randomness.

        Returns:
            The mean loss, and detached per-sample terms ``(B,)``: ``loss``, ``code_cross_entropy`` (averaged over the
            k codes) and ``dot_cross_entropy``.
        """
        codes = self.encode(batch["image_embedding"])
        dot = self.encode_dot(batch["image_embedding"], batch["text_embedding"])
        drop = random.bernoulli("caption_dropout", self.config.caption_dropout)
        dot_logits, code_logits = self(dot, codes, batch["tokens"], batch["text_embedding"], drop)
        dot_loss = F.cross_entropy(dot_logits.float(), dot, reduction="none")  # (B,)
        code_losses = F.cross_entropy(code_logits.float().transpose(1, 2), codes, reduction="none")  # (B, k)
        losses = (dot_loss + code_losses.sum(dim=1)) / (self.config.num_codes + 1)
        terms = {"loss": losses, "code_cross_entropy": code_losses.mean(dim=1), "dot_cross_entropy": dot_loss}
        return losses.mean(), {name: term.detach() for name, term in terms.items()}

    # sampling

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor,
        text_embedding: Tensor,
        *,
        steps: int | str | None = None,
        guidance_scale: float,
        generators: Sequence[torch.Generator],
        num_candidates: int = 1,
        sampler: str = "",
        clip_range: float | None = None,
        text_sequence: Tensor | None = None,
    ) -> Tensor:
        """Draw image embeddings code by code, the best of ``num_candidates`` by dot product.

        Args:
            tokens: captions ``(B, ctx)``, int64.
            text_embedding: CLIP's, unit norm ``(B, D)``.
            steps: of the diffusion prior; an autoregressive prior always takes k + 1. Present so that both priors are
                called alike.
            guidance_scale: 1 samples the conditional model alone; else logits are extrapolated.
            generators: B generators, one per sample.
            num_candidates: embeddings drawn per caption.
            sampler: of the diffusion prior, as ``steps``.
            clip_range: likewise.
            text_sequence: likewise; an autoregressive prior encodes captions itself.

        Returns:
            Unit-norm image embeddings, float32 ``(B, D)``.

        Raises:
            ValueError: for no candidates, a wrong number of generators, or a missing PCA.
        """
        if num_candidates < 1:
            raise ValueError(f"prior sampling: num_candidates is {num_candidates}; use 1 or more")
        if len(generators) != tokens.shape[0]:
            raise ValueError(f"prior sampling: {len(generators)} generators for {tokens.shape[0]} captions; give equal")
        uniforms = torch.stack(
            [
                torch.rand(num_candidates, self.config.num_codes + 1, generator=g, device=g.device, dtype=torch.float64)
                for g in generators
            ]
        ).to(tokens.device)  # (B, N, k + 1): drawn up front, so a sample's numbers depend on its generator alone
        codes = self._sample_codes(tokens, text_embedding, guidance_scale, uniforms.flatten(0, 1))  # (B * N, k)
        candidates = F.normalize(self.decode(codes), dim=-1).unflatten(0, (-1, num_candidates))
        return best_candidate(candidates, text_embedding)

    def _sample_codes(self, tokens: Tensor, text_embedding: Tensor, guidance_scale: float, uniforms: Tensor) -> Tensor:
        """Turn uniforms ``(B * N, k + 1)`` into codes ``(B * N, k)`` by inverse transform, with a KV cache."""
        keep = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        drops = [keep] if guidance_scale == 1.0 else [keep, ~keep]
        times = uniforms.shape[0] // tokens.shape[0]
        caches: list[KVCache] = []
        hiddens: list[Tensor] = []
        for drop in drops:
            cache = self.transformer.new_cache()
            hidden = self.transformer(self._prefix(tokens, text_embedding, drop), cache)[:, -1:]
            caches.append(cache.repeated(times))
            hiddens.append(hidden.repeat_interleave(times, dim=0))  # (B * N, 1, width)
        dot_logits = self._guided(self.dot_head, hiddens, guidance_scale)
        percentile = self.config.dot_percentile
        token = inverse_transform(dot_logits, percentile + (1 - percentile) * uniforms[:, 0])
        embedded = self.dot_embedding(token)
        codes: list[Tensor] = []
        for position in range(self.config.num_codes):
            x = embedded[:, None] + self.positional_embedding[self.config.num_prefix_positions + position]
            hiddens = [self.transformer(x, cache) for cache in caches]
            logits = self._guided(self.code_head, hiddens, guidance_scale) / self.config.temperature
            codes.append(inverse_transform(logits, uniforms[:, position + 1]))
            embedded = self.code_embedding(codes[-1])
        return torch.stack(codes, dim=1)

    def _guided(self, head: nn.Linear, hiddens: list[Tensor], guidance_scale: float) -> Tensor:
        """Return guided logits ``(R, buckets)`` from the last hidden states, conditional first."""
        logits = [head(self.final_norm(hidden[:, -1])).float() for hidden in hiddens]
        return logits[0] if len(logits) == 1 else combine_guidance(logits[0], logits[1], guidance_scale)


def inverse_transform(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample categories by the inverse of their cumulative distribution.

    Mapping uniforms onto [p, 1) samples from the top 1 - p of the distribution, in the categories' order.

    Args:
        logits: ``(R, C)``.
        uniforms: float64 ``(R,)`` in [0, 1).

    Returns:
        Categories, int64 ``(R,)``.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
