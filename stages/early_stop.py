"""When to end a training early: a function of its metric lines alone, so that a resumed training ends where it would.

A validation is an improvement if its loss is lower than the best so far by more than ``min_delta``. Its step gets a
checkpoint, which is kept, and whose averaged weights are exported in the end. Where that checkpoint cannot be written,
the best step is another one that has a checkpoint; a line tells so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

# In a line: a step that was the best when it was validated, and whose checkpoint could not be written.
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
        num_since: validations after it, without those of lost steps.
        seen: all validations: step and loss.
        improved: steps that have been the best.
        lost: steps without a checkpoint; they cannot be the best.
    """

    patience: int | None
    min_delta: float
    name: str
    best_step: int | None = None
    best_loss: float = math.inf
    num_since: int = 0
    seen: list[tuple[int, float | None]] = field(default_factory=list)
    improved: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)

    def replay(self, lines: Iterable[Mapping[str, float | None]]) -> EarlyStop:
        """Start anew from the lines of a checkpoint."""
        self.seen.clear()
        self.improved.clear()
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
            self.lose(int(lost), step)
        if self.name in numbers:
            self.seen.append((step, numbers[self.name]))
            self._judge(*self.seen[-1])

    def lose(self, step: int, now: int) -> bool:
        """Take in, at a later step, that a step's checkpoint could not be written; return whether it has been the best.

        No other checkpoint was written meanwhile, so the validations in between have none to export either.
        """
        self.lost.update(seen for seen, _ in self.seen if step <= seen < now)
        self._judge_all()
        return step in self.improved

    def choose_among(self, steps: Collection[int]) -> None:
        """Take in which checkpoints there are: that of the best step may have gone without a line telling so."""
        while self.best_step is not None and self.best_step not in steps:
            self.lost.add(self.best_step)
            self._judge_all()

    def _judge_all(self) -> None:
        self.best_step, self.best_loss, self.num_since = None, math.inf, 0
        for step, loss in self.seen:
            self._judge(step, loss)

    def _judge(self, step: int, loss: float | None) -> None:
        if step in self.lost:
            return  # a failed save says nothing against going on
        if loss is not None and loss < self.best_loss - self.min_delta:
            self.best_step, self.best_loss, self.num_since = step, loss, 0
            self.improved.add(step)
        else:
            self.num_since += 1

    @property
    def has_ended(self) -> bool:
        """Whether the training is over."""
        return self.patience is not None and self.num_since >= self.patience
