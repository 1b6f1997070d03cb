"""Dropout that meets a sample with the same mask wherever it is trained."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from unclip_models.randomness import SampleRandom

# An operator of torch's own kind, so that compilers take it as a whole. (``torch.library.custom_op`` would import
# torch's compiler into every training process.)
_LIBRARY = torch.library.Library("unclip", "DEF")
_LIBRARY.define("sample_mask(Tensor x, Tensor seeds, int layer, float p) -> Tensor")


def _sample_mask(x: Tensor, seeds: Tensor, layer: int, p: float) -> Tensor:
    """Draw coins of the shape of ``x``, bool, True with probability ``p``; row i depends on its seed and the layer."""
    coins = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    generator = torch.Generator(x.device)
    for row, seed in zip(coins, seeds.tolist(), strict=True):
        digest = hashlib.blake2b(f"{seed}/{layer}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little"))
        row.bernoulli_(p, generator=generator)
    return coins


def _shape_of_mask(x: Tensor, seeds: Tensor, layer: int, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


_LIBRARY.impl("sample_mask", _sample_mask, "CompositeExplicitAutograd")
_LIBRARY.impl("sample_mask", _shape_of_mask, "Meta")


def dropout_seeds(random: SampleRandom) -> Tensor:
    """Draw what a network's dropouts are seeded with, int64 ``(B,)``, on the CPU."""
    generators = random.generator("dropout")
    return torch.tensor([int(generator.integers(1 << 62)) for generator in generators], dtype=torch.int64)


class SampleDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask belongs to the sample, not to the batch it happens to be in.

    ``torch.nn.Dropout`` draws from a generator of the process, so its masks change with the number of ranks and with
    the size of micro batches. Here they are a function of the sample's seed and the layer; a layer that is computed
    once more by activation checkpointing meets the same mask without any state being put back. Masks are drawn on the
    device, for they are many: GPUs meet other ones than CPUs do.

    Args:
        p: probability of zeroing a number; the others are divided by 1 - p.

    Attributes:
        layer: number of this dropout in its network, whose masks are independent; see :func:`number_dropouts`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.layer = 0

    def extra_repr(self) -> str:
        """Show the probability where the module is printed."""
        return f"p={self.p}"

    def forward(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        """Drop numbers of ``(B, ...)`` in training mode; otherwise return ``x`` as it is.

        Args:
            x: one row per sample.
            seeds: of :func:`dropout_seeds`, of the same B samples.

        Raises:
            ValueError: in training mode without seeds, unless p is 0.
        """
        if not self.training or self.p == 0.0:
            return x
        if seeds is None:
            raise ValueError("dropout: in training mode it needs dropout_seeds(random); pass them, or call eval()")
        kept = torch.ops.unclip.sample_mask(x, seeds, self.layer, 1.0 - self.p)
        return torch.where(kept, x, 0.0).mul_(1.0 / (1.0 - self.p))


def number_dropouts(network: nn.Module) -> None:
    """Give every dropout of a network a number of its own."""
    for number, module in enumerate(module for module in network.modules() if isinstance(module, SampleDropout)):
        module.layer = number
