"""Names the rank that the others wait for: how long each computes and waits for data, compared once per logged line."""

from __future__ import annotations

import logging
import socket
from statistics import median

import torch

from stages.engine import Engine

logger = logging.getLogger(__name__)

_PATIENCE = 3  # logged lines in a row before the first warning; each further one takes twice as many
_CAUSES = ("computing", "waiting for data")


class StragglerWatch:
    """Compares the ranks of a training.

    Args:
        engine: of this rank.
        place: the stage, for messages.
        ratio: how many times slower than the median of the others a rank has to be for a warning.
    """

    def __init__(self, engine: Engine, place: str, ratio: float) -> None:
        self._engine = engine
        self._place = place
        self._ratio = ratio
        self._hosts = engine.gather(socket.gethostname())
        self._spent = [0.0, 0.0]
        self._num_steps = 0
        self._slow: tuple[int, int] = (-1, 0)  # the slowest rank, and for how many lines it has been too slow

    def add(self, compute_s: float, data_s: float) -> None:
        """Take in what this rank spent on one step, seconds: without what it waited for others."""
        self._spent[0] += compute_s
        self._spent[1] += data_s
        self._num_steps += 1

    def close(self) -> dict[str, float]:
        """Compare the ranks over the steps since the last call (collective); nothing to tell of a single one."""
        engine, num_steps = self._engine, max(1, self._num_steps)
        own, self._spent, self._num_steps = self._spent, [0.0, 0.0], 0
        if engine.world_size == 1:
            return {}
        slots = torch.zeros(engine.world_size, 2, dtype=torch.float64)
        slots[engine.rank] = torch.tensor(own, dtype=torch.float64) / num_steps
        spent: list[list[float]] = engine.total(slots).tolist()
        slowest, ratio = slowest_rank(spent)
        self._judge(slowest, ratio, spent)
        return {"slowest_rank": float(slowest), "slowest_rank_ratio": ratio}

    def _judge(self, slowest: int, ratio: float, spent: list[list[float]]) -> None:
        if ratio < self._ratio:
            self._slow = (-1, 0)
            return
        num_lines = self._slow[1] + 1 if slowest == self._slow[0] else 1
        self._slow = (slowest, num_lines)
        turns, rest = divmod(num_lines, _PATIENCE)
        if self._engine.rank == 0 and rest == 0 and turns & (turns - 1) == 0:
            usual = [median(column) for column in zip(*_others(spent, slowest), strict=True)]
            excess = [own - other for own, other in zip(spent[slowest], usual, strict=True)]
            cause = excess.index(max(excess))
            logger.warning(
                "%s: rank %d on %s takes %.1f times as long as the others, for %d logged lines now: %.3f s of each "
                "step go into %s, %.3f s elsewhere",
                *(self._place, slowest, self._hosts[slowest], ratio, num_lines),
                *(spent[slowest][cause], _CAUSES[cause], usual[cause]),
            )


def slowest_rank(spent: list[list[float]]) -> tuple[int, float]:
    """Return the rank that takes longest, and how many times as long as the median of the others.

    Args:
        spent: seconds per step, by rank and cause; two ranks or more.
    """
    totals = [sum(causes) for causes in spent]
    slowest = totals.index(max(totals))
    return slowest, totals[slowest] / max(median(_others(totals, slowest)), 1e-9)


def _others(values: list, rank: int) -> list:  # type: ignore[type-arg]
    return [*values[:rank], *values[rank + 1 :]]
