"""Keep a module's measured tables in float32 when its weights are cast to half precision."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose buffers named in ``float32_buffers`` move between devices but never lose precision.

    Mixed-precision training casts a whole module (``module.bfloat16()``), buffers included. Weights survive that;
    bucket edges and variances do not: eight bits of mantissa would merge neighbouring buckets.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Buffers":
        """Apply ``fn``, then give the named buffers their old values back, on the new device."""
        before = {name: self.get_buffer(name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != torch.float32:
                setattr(self, name, old.to(new.device))
        return self
