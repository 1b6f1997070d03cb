"""When to end a training early: a function of its metric lines alone, so that a resumed training ends where it would.

A validation is an improvement if its loss is lower than the best so far by more than ``min_delta``. Its step gets a
checkpoint, which is kept, and whose averaged weights are exported in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass
class EarlyStop:
    """Watches the validations of a training.

    Attributes:
        patience: validations without improvement after which the training ends; None: it never does.
        min_delta: see the module.
        name: of the loss to watch.
        best_step: of the last improvement; None before the first validation that was finite.
        best_loss: there.
        num_since: validations after it.
    """

    patience: int | None
    min_delta: float
    name: str
    best_step: int | None = None
    best_loss: float = math.inf
    num_since: int = 0

    def replay(self, lines: Iterable[Mapping[str, float | None]]) -> EarlyStop:
        """Start anew from the lines of a checkpoint."""
        self.best_step, self.best_loss, self.num_since = None, math.inf, 0
        for line in lines:
            self.see(int(line["step"] or 0), line)
        return self

    def see(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Take in the numbers of a step, if there is a validation among them; null is a loss that was not finite."""
        if self.patience is None or self.name not in numbers:
            return
        loss = numbers[self.name]
        if loss is not None and loss < self.best_loss - self.min_delta:
            self.best_step, self.best_loss, self.num_since = step, loss, 0
        else:
            self.num_since += 1

    @property
    def has_ended(self) -> bool:
        """Whether the training is over."""
        return self.patience is not None and self.num_since >= self.patience
