"""Train the tiny model in a process of its own, which dies by SIGKILL or SIGTERM at a given step.

Usage: python -m tests.stages.train_until_killed FOLDER STEP SIGNAL
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stages.dataset import Batch
from stages.engine import TorchEngine
from stages.training import Trained, train
from stages.training_config import TrainingConfig
from tests.stages.training_data import TinyModel, VectorStream

CONFIG = TrainingConfig(
    num_steps=20,
    global_batch_size=8,
    num_streams=4,
    micro_batch_size=4,
    learning_rate=1e-2,
    warmup_steps=5,
    checkpoint_every_steps=6,
    checkpoint_in_background=False,  # which checkpoint there is must not depend on the speed of the disk
    log_every_steps=4,
    ema_decay=0.9,
    tensorboard=False,
)


class DeadlyStream(VectorStream):
    """A stream that sends its process a signal before it gives the batch of a step."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__()
        self._deadly = step, signal_number

    def batches(self, first_step: int, rank: int, world_size: int) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().batches(first_step, rank, world_size):
            if batch.step == self._deadly[0]:
                os.kill(os.getpid(), self._deadly[1])
            yield batch


def run(
    folder: str,
    stream: Any,
    config: TrainingConfig = CONFIG,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train with dropout, whose masks must be those of before."""
    where: dict[str, Any] = {"folder": folder, "place": "tiny", "num_timesteps": 100, "should_stop": should_stop}
    return train(TinyModel(dropout=0.2), stream, config, make_engine=TorchEngine, seed=5, **where)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], DeadlyStream(int(sys.argv[2]), int(sys.argv[3])))
