"""The dynamic loss scale of fp16: losses are multiplied before the backward pass, so that small gradients survive it.

Where a scaled gradient overflows, the step is skipped and the scale halved; after a while without that it is doubled
(Micikevicius et al. 2018, section 3.2). What is decided by is equal on every rank, so the scale is too. All scales are
powers of two: to multiply and divide by one rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

_FIRST = 2.0**16
_LOWEST = 1.0
_HIGHEST = 2.0**24
_GROWS_AFTER = 2000  # steps without an overflow


class LossScale:
    """The scale of one training.

    Attributes:
        value: what the loss of the next step is multiplied with.
    """

    def __init__(self) -> None:
        self.value = _FIRST
        self._num_good = 0

    def take(self, loss: float, grad_norm: float) -> bool:
        """Take in a step.

        Args:
            loss: mean over the global batch, not scaled.
            grad_norm: of its gradient.

        Returns:
            Whether the gradient overflowed for its scale: a smaller one may help. That is not so where the loss itself
            is not finite, nor at the lowest scale.
        """
        if math.isfinite(grad_norm):
            self._num_good += 1
            if self._num_good >= _GROWS_AFTER:
                self.value, self._num_good = min(2 * self.value, _HIGHEST), 0
            return False
        if not math.isfinite(loss) or self.value <= _LOWEST:
            return False
        self.value, self._num_good = self.value / 2, 0
        return True

    def to_metadata(self) -> dict[str, str]:
        """Return the state as a file of tensors keeps it."""
        return {"loss_scale": repr(self.value), "loss_scale_good_steps": str(self._num_good)}

    def load(self, metadata: Mapping[str, str]) -> None:
        """Take up a state; that of a training in another precision has none, so the scale starts anew."""
        self.value = float(metadata.get("loss_scale", _FIRST))
        self._num_good = int(metadata.get("loss_scale_good_steps", 0))
