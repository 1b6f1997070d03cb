"""How long a rank computes, told apart from how long it waits for others; on GPUs by events, for kernels run later."""

from __future__ import annotations

import time
from typing import Any

import torch


class ComputeClock:
    """Measures stretches of computation on a device; running from the start.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stretches: list[tuple[Any, Any]] = []
        self._started: Any = None
        self.start()

    def start(self) -> None:
        """Begin a stretch."""
        self._started = self._now()

    def stop(self) -> None:
        """End the stretch."""
        self._stretches.append((self._started, self._now()))

    def elapsed_s(self) -> float:
        """Return the length of all stretches; asked after the step's numbers are there, it waits for nothing."""
        if self._on_gpu:
            return float(sum(first.elapsed_time(last) for first, last in self._stretches)) / 1000
        return float(sum(last - first for first, last in self._stretches))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
