"""Which steps a training takes: not those whose loss or gradient is not finite, nor those that stand out far above.

A spike is judged against the steps before it, by median and median absolute deviation, which single steps cannot shift.
All that is judged by is equal on every rank, so all ranks come to the same verdict without asking each other; it is
kept with every checkpoint, so a resumed training comes to the same verdicts.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from stages.engine import StepResult, is_finite

GUARD_NAME = "guard.json"
_DEVIATIONS = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
_LEAST_SPREAD = 0.01  # of the median: numbers that hardly move are no reason to call the next one a spike


class StepGuard:
    """Judges the steps of one training.

    Args:
        spike_threshold: robust standard deviations above the median from which a step is a spike; None: none is.
        spike_window: steps taken that a step is compared with; before there are so many, no step is a spike.
        state: of an earlier guard, as ``to_json`` gave it; none for a new training.

    Attributes:
        num_spikes: finite steps refused so far.
        bad_steps: what is known of the steps refused since the last one taken, oldest first.
    """

    def __init__(self, spike_threshold: float | None, spike_window: int, state: bytes = b"") -> None:
        kept: dict[str, Any] = json.loads(state) if state else {}
        self.num_spikes: int = kept.get("num_spikes", 0)
        self.bad_steps: list[str] = kept.get("bad_steps", [])
        self._threshold = spike_threshold
        self._window = spike_window
        self._losses = deque[float](kept.get("losses", ()), spike_window)
        self._grad_norms = deque[float](kept.get("grad_norms", ()), spike_window)

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Tell whether to take a step; see ``Engine.step``."""
        if not is_finite(loss, grad_norm):
            return False
        if self._threshold is None or len(self._losses) < self._window:
            return True
        return not (
            is_spike(loss, self._losses, self._threshold) or is_spike(grad_norm, self._grad_norms, self._threshold)
        )

    def add(self, step: int, result: StepResult) -> None:
        """Take in what became of a step."""
        if result.overflowed:
            return  # says something of the loss scale, nothing of the training
        if not result.applied:
            kind = "spike" if result.finite else "not finite"
            self.num_spikes += result.finite
            self.bad_steps.append(f"step {step}: {kind}, loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}")
            return
        self.bad_steps.clear()
        if self._threshold is not None:
            self._losses.append(result.loss)
            self._grad_norms.append(result.grad_norm)

    def to_json(self) -> bytes:
        """Return the state; floats come back exactly as they were."""
        return json.dumps(
            {
                "num_spikes": self.num_spikes,
                "bad_steps": self.bad_steps,
                "losses": list(self._losses),
                "grad_norms": list(self._grad_norms),
            },
            allow_nan=False,
        ).encode()


def is_spike(value: float, before: Sequence[float], threshold: float) -> bool:
    """Tell whether a value lies more than ``threshold`` robust standard deviations above the median of others."""
    middle = median(before)
    spread = _DEVIATIONS * median(abs(other - middle) for other in before)
    return value > middle + threshold * max(spread, _LEAST_SPREAD * abs(middle))
