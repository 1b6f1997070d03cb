"""What a training notices about its data: samples that cannot be read, and steps that wait for the loader."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import torch

from stages.data_parts import PARTS, REMEDIES
from stages.dataset import Batch
from stages.engine import Engine
from stages.errors import StageError

logger = logging.getLogger(__name__)

_STARVING_FRACTION = 0.2
_WARN_EVERY_S = 600.0
_FEW_SAMPLES = 1000  # a fraction of fewer says nothing yet


class DataWatch:
    """Counts bad samples and looks for the bottleneck, from one logged line to the next.

    Args:
        settings: of the training, by name.
        place: the stage, for messages.
        num_bad: bad samples before, of the training that is resumed.
    """

    def __init__(self, settings: Mapping[str, Any], place: str, num_bad: int = 0) -> None:
        self._settings = settings
        self._place = place
        self._num_bad_before = num_bad
        self._warned_at: float | None = None
        self._is_first = True
        self._restart()

    def _restart(self) -> None:
        self._num_bad, self._num_steps, self._waited_s = 0, 0, 0.0
        self._work_s = dict.fromkeys(PARTS, 0.0)
        self._started_at = time.monotonic()

    def took(self, batch: Batch, waited_s: float) -> None:
        """Take in one batch, and how long the step waited for it."""
        self._num_bad += batch.num_bad
        self._num_steps += 1
        self._waited_s += waited_s
        for part, seconds in batch.work_s.items():
            self._work_s[part] += seconds

    def close(self, engine: Engine, done: int) -> dict[str, float]:
        """Sum up over all ranks (collective) and start anew.

        Args:
            engine: joins the ranks.
            done: optimizer steps since the first.

        Returns:
            ``num_bad_samples`` of the whole training, and ``data_<part>_s``: seconds a rank spent on a part of the
            loader's work for a step.

        Raises:
            StageError: if more than ``max_bad_fraction`` of the samples were bad.
        """
        elapsed_s = max(time.monotonic() - self._started_at, 1e-9)
        own = torch.tensor([self._num_bad, self._waited_s, *self._work_s.values()], dtype=torch.float64)
        num_bad, waited_s, *work_s = engine.total(own).tolist()
        self._num_bad_before += round(num_bad)
        self._check_bad(done)
        per_step = {
            part: seconds / engine.world_size / max(1, self._num_steps)
            for part, seconds in zip(PARTS, work_s, strict=True)
            if seconds > 0
        }
        starving = waited_s / engine.world_size / elapsed_s
        # The first batches are awaited by every training; they say nothing of the rest.
        if engine.rank == 0 and per_step and starving > _STARVING_FRACTION and not self._is_first:
            self._warn(starving, per_step)
        self._is_first = False
        self._restart()
        return {
            "num_bad_samples": float(self._num_bad_before),
            **{f"data_{part}_s": seconds for part, seconds in per_step.items()},
        }

    def _check_bad(self, done: int) -> None:
        limit = float(self._settings["max_bad_fraction"])
        num_drawn = done * int(self._settings["global_batch_size"])
        if self._num_bad_before > limit * max(num_drawn, _FEW_SAMPLES):
            raise StageError(
                f"{self._place}: {self._num_bad_before} of {num_drawn} samples could not be decoded, more than "
                f"{self._place}.max_bad_fraction: {limit:g} allows; the log names them. Run `unclip repair`, or raise "
                "max_bad_fraction to train without them"
            )

    def _warn(self, starving: float, per_step: Mapping[str, float]) -> None:
        if self._warned_at is not None and time.monotonic() - self._warned_at < _WARN_EVERY_S:
            return
        self._warned_at = time.monotonic()
        worst = max(per_step, key=lambda part: per_step[part])
        parts = ", ".join(f"{part} {seconds:.3g} s" for part, seconds in per_step.items())
        remedy = REMEDIES[worst].format(place=self._place, num_cores=len(os.sched_getaffinity(0)), **self._settings)
        logger.warning(
            "%s: %.0f%% of the time is spent waiting for data. A batch takes %s; the bottleneck is %s: %s",
            *(self._place, 100 * starving, parts, worst, remedy),
        )
