"""Dropout that meets a sample with the same mask wherever it is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unclip_models.randomness import SampleRandom


class SampleDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask belongs to the sample, not to the batch it happens to be in.

    ``torch.nn.Dropout`` draws from a generator of the process, so its masks change with the number of ranks and with
    the size of micro batches. Here they are keyed like all randomness of a step (:class:`SampleRandom`); a layer that
    is computed once more by activation checkpointing meets the same mask without any state being put back.

    Args:
        p: probability of zeroing a number; the others are divided by 1 - p.

    Attributes:
        tag: names this layer among those of the network, whose masks are independent; the network sets it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.tag = "dropout"

    def extra_repr(self) -> str:
        """Show the probability where the module is printed."""
        return f"p={self.p}"

    def forward(self, x: Tensor, random: SampleRandom | None) -> Tensor:
        """Drop numbers of ``(B, ...)`` in training mode; otherwise return ``x`` as it is.

        Args:
            x: one row per sample.
            random: the step's randomness, of the same B samples.

        Raises:
            ValueError: in training mode without ``random``, unless p is 0.
        """
        if not self.training or self.p == 0.0:
            return x
        if random is None:
            raise ValueError(f"{self.tag}: in training mode it needs the step's SampleRandom; pass it, or call eval()")
        kept = random.mask(self.tag, 1.0 - self.p, tuple(x.shape[1:]))
        return torch.where(kept, x, 0.0).mul_(1.0 / (1.0 - self.p))


def name_dropouts(network: nn.Module) -> None:
    """Give every dropout of a network a tag of its own: its place in the network."""
    for name, module in network.named_modules():
        if isinstance(module, SampleDropout):
            module.tag = f"dropout/{name}"
