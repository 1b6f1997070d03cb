"""When to end a training early: a function of its metric lines alone, so that a resumed training ends where it would.

A validation is an improvement if its loss is lower than the best so far by more than ``min_delta``. Its step gets a
checkpoint, which is kept, and whose averaged weights are exported in the end. Where that checkpoint cannot be written,
the best step is another one; a line tells so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# In a line: the step that was the best until its checkpoint could not be written.
LOST = "lost_best_step"


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
        seen: all validations: step and loss.
        lost: steps whose checkpoint could not be written; they cannot be the best.
    """

    patience: int | None
    min_delta: float
    name: str
    best_step: int | None = None
    best_loss: float = math.inf
    num_since: int = 0
    seen: list[tuple[int, float | None]] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)

    def replay(self, lines: Iterable[Mapping[str, float | None]]) -> EarlyStop:
        """Start anew from the lines of a checkpoint."""
        self.seen.clear()
        self.lost.clear()
        self._judge_all()
        for line in lines:
            self.see(int(line["step"] or 0), line)
        return self

    def see(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Take in the numbers of a step, if there is a validation among them; null is a loss that was not finite."""
        if self.patience is None:
            return
        if (lost := numbers.get(LOST)) is not None:
            self.lose(int(lost))
        if self.name in numbers:
            self.seen.append((step, numbers[self.name]))
            self._judge(*self.seen[-1])

    def lose(self, step: int) -> bool:
        """Take in that a step's checkpoint could not be written; return whether it was the best one."""
        if step != self.best_step:
            return False
        self.lost.add(step)
        self._judge_all()
        return True

    def _judge_all(self) -> None:
        self.best_step, self.best_loss, self.num_since = None, math.inf, 0
        for step, loss in self.seen:
            self._judge(step, loss)

    def _judge(self, step: int, loss: float | None) -> None:
        if loss is not None and loss < self.best_loss - self.min_delta and step not in self.lost:
            self.best_step, self.best_loss, self.num_since = step, loss, 0
        else:
            self.num_since += 1

    @property
    def has_ended(self) -> bool:
        """Whether the training is over."""
        return self.patience is not None and self.num_since >= self.patience
