"""Train the tiny model until its data never comes, with or without holding Python's lock.

Usage: python -m tests.stages.hang FOLDER HOLDS_PYTHON
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import time
from typing import Any

import torch

import stages.watchdog
from stages.engine import TorchEngine
from stages.training import train
from tests.stages.train_until_killed import CONFIG
from tests.stages.training_data import TinyModel, VectorStream


class Hanging(VectorStream):
    def __init__(self, holds_python: bool) -> None:
        super().__init__()
        self._holds_python = holds_python

    def batches(self, first_step: int, rank: int, world_size: int) -> Any:
        for batch in super().batches(first_step, rank, world_size):
            if batch.step == 7 and self._holds_python:
                ctypes.PyDLL(None).sleep(100)
            elif batch.step == 7:
                time.sleep(100)
            yield batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    holds_python = bool(int(sys.argv[2]))
    if holds_python:  # a process alone has no timer, for it may be suspended at a terminal
        watchdog = stages.watchdog.Watchdog(sys.argv[1], "tiny", rank=0, world_size=2, session="s", timeout_s=0.5)
        with watchdog:
            time.sleep(0.3)
            list(Hanging(True).batches(7, 0, 1))
    config = dataclasses.replace(CONFIG, hang_timeout_s=1.0)
    options: dict[str, Any] = {"make_engine": TorchEngine, "seed": 5, "folder": sys.argv[1], "place": "tiny"}
    train(TinyModel(), Hanging(False), config, **options)
