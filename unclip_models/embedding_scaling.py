"""How a diffusion prior scales CLIP image embeddings before it adds noise to them.

Unit-norm embeddings of D dimensions have a standard deviation of about 1 / sqrt(D) per dimension, far below that of the
noise. Three remedies are in use and are not interchangeable, so the choice is part of the config and its numbers are
buffers of the model, stored in its checkpoint:

* ``paper``: one factor, 17.2 at D = 1024 (unCLIP, Appendix C), 17.2 * sqrt(D / 1024) elsewhere: the same standard
  deviation, 0.54, per dimension;
* ``sqrt_dim``: the factor sqrt(D), a standard deviation of 1 (DALLE2-pytorch);
* ``mean_std``: each dimension is centred and divided by its own standard deviation (Karlo).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from unclip_models.float32_buffers import Float32Buffers
from unclip_models.settings import EmbeddingScaling

_PAPER_SCALE = 17.2
_PAPER_EMBEDDING_DIM = 1024


def scale_factor(scaling: EmbeddingScaling, embedding_dim: int) -> float:
    """Return the factor of ``paper`` and ``sqrt_dim``; ``mean_std`` has none, its vectors are measured.

    Raises:
        ValueError: for ``mean_std``.
    """
    if scaling == "paper":
        return _PAPER_SCALE * math.sqrt(embedding_dim / _PAPER_EMBEDDING_DIM)
    if scaling == "sqrt_dim":
        return math.sqrt(embedding_dim)
    raise ValueError(f"embedding_scaling {scaling!r} has no single factor; measure mean and standard deviation")


class EmbeddingScaler(Float32Buffers):
    """Scale image embeddings to the range of the diffusion, and back.

    The buffers ``mean`` and ``std`` ``(D,)`` are what is subtracted, and then divided by. With ``mean_std`` they are
    unknown (a ``std`` of 0) until ``set_statistics``.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("mean", "std")
    mean: Tensor
    std: Tensor

    def __init__(self, scaling: EmbeddingScaling, embedding_dim: int, factor: float | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embedding_dim))
        std = 0.0 if scaling == "mean_std" else 1 / (factor or scale_factor(scaling, embedding_dim))
        self.register_buffer("std", torch.full((embedding_dim,), std))
        self._is_known = scaling != "mean_std"

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take the measured mean and standard deviation of every dimension, two ``(D,)``.

        Raises:
            ValueError: if a shape is wrong, or a standard deviation is not positive.
        """
        for name, value in (("mean", mean), ("std", std)):
            expected = tuple(self.get_buffer(name).shape)
            if tuple(value.shape) != expected or not bool(torch.isfinite(value).all()):
                raise ValueError(f"set_statistics: {name} must be finite and {expected}, not {tuple(value.shape)}")
        if not bool((std > 0).all()):
            raise ValueError("set_statistics: a dimension has no spread; its standard deviation must be positive")
        self.mean.copy_(mean)
        self.std.copy_(std)
        self._is_known = True

    def scale(self, embedding: Tensor) -> Tensor:
        """Map embeddings ``(..., D)`` to what the diffusion works on, float32."""
        self._require_statistics()
        return (embedding.float() - self.mean) / self.std

    def unscale(self, scaled: Tensor) -> Tensor:
        """Map back; float32 ``(..., D)``."""
        self._require_statistics()
        return scaled.float() * self.std + self.mean

    def _require_statistics(self) -> None:
        if self._is_known:
            return
        # A loaded checkpoint fills the buffers without set_statistics; look once, for looking waits for the GPU.
        if not bool(self.std.all()):
            raise ValueError("embedding_scaling is 'mean_std', but no statistics were given; call set_statistics first")
        self._is_known = True
