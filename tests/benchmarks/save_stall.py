"""What a checkpoint costs the training that goes on meanwhile: windows of steps with a save in them, and without.

Every second window of a training has a save in its middle. It lasts longer than its neighbours by what the save took
from the steps: the copy of the state that they wait for, and the writing that goes on beside them.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from stages.checkpoints import RECORD_NAME, CheckpointFolder
from stages.dataset import Batch, TrainingStream
from stages.engine import TorchEngine
from stages.training import train
from tests.benchmarks.loop_worker import LossWithText, config_of, model_of, stream_of
from tests.benchmarks.model_sizes import Task

_NUM_WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Stall:
    """What the saves of one training took.

    Attributes:
        lost_s: seconds that each save took from the steps.
        waited_s: seconds of the longest step around each save beyond an ordinary one: what the loop waited at once.
        step_s: an ordinary step, seconds.
        state_bytes: of one checkpoint.
        in_background: whether files were written beside the training.
    """

    lost_s: list[float]
    waited_s: list[float]
    step_s: float
    state_bytes: int
    in_background: bool

    def fraction(self, every_s: float) -> float:
        """Return the share of the time that is lost with a save every so many seconds."""
        return statistics.median(self.lost_s) / every_s


class TimedStream:
    """A stream that notes when it gives each batch: the step before has ended by then."""

    def __init__(self, stream: TrainingStream) -> None:
        self.global_batch_size = stream.global_batch_size
        self.given_at: list[float] = []
        self._stream = stream

    def batches(self, first_step: int, rank: int, world_size: int) -> Generator[Batch, None, None]:
        """See ``stages.dataset.Stream``."""
        with contextlib.closing(self._stream.batches(first_step, rank, world_size)) as batches:
            for batch in batches:
                self.given_at.append(time.time())
                yield batch


def measure(task: Task, *, num_saves: int, window: int, in_background: bool) -> Stall:
    """Train, with a save in the middle of every second window.

    Args:
        task: model, sizes and threads.
        num_saves: to measure; a training's last save, which it waits for, is not among them.
        window: steps, even.
        in_background: the setting of the training.

    Raises:
        RuntimeError: if a save had not ended within its window; take longer windows.
    """
    torch.set_num_threads(task.num_threads)
    model = model_of(task)
    stream = TimedStream(stream_of(task, model))
    every = 2 * window
    config = config_of(
        task,
        num_steps=every * num_saves + every - 1,
        checkpoint_every_steps=every,
        checkpoint_in_background=in_background,
        keep_every_steps=every,
    )
    with tempfile.TemporaryDirectory(dir=task.folder) as folder:
        train(
            model,
            stream,
            config,
            make_engine=TorchEngine,
            seed=0,
            folder=folder,
            place=task.model,
            loss=LossWithText(task),
            num_timesteps=1000,
        )
        checkpoints = CheckpointFolder(folder, keep_last=1)
        records = [Path(checkpoints.uri_of(every * (i + 1)), RECORD_NAME) for i in range(num_saves)]
        ended_at = [record.stat().st_mtime for record in records]
        state_bytes = sum(path.stat().st_size for path in records[0].parent.iterdir())
    lost_s, waited_s, step_s = stalls_of(stream.given_at, ended_at, window)
    return Stall(lost_s=lost_s, waited_s=waited_s, step_s=step_s, state_bytes=state_bytes, in_background=in_background)


def stalls_of(
    given_at: Sequence[float], ended_at: Sequence[float], window: int
) -> tuple[list[float], list[float], float]:
    """Compare the windows with a save with those before and after them.

    Args:
        given_at: when the batch of every step was given, seconds.
        ended_at: when each save counted; save i (from 1) began after ``2 * window * i`` steps.
        window: steps, even.

    Returns:
        Per save, the seconds by which its window is longer than the mean of its neighbours, and by which its longest
        step is longer than a usual one; and the usual step, the median.

    Raises:
        RuntimeError: if a save ended later than its window.
    """
    step_s = statistics.median(late - early for early, late in pairwise(given_at[_NUM_WARM_UP_STEPS:]))
    lost_s, waited_s = [], []
    for number, ended in enumerate(ended_at, 1):
        first = 2 * window * number - window // 2
        before, begin, end, after = (given_at[first + offset * window] for offset in (-1, 0, 1, 2))
        if ended > end:
            raise RuntimeError(f"save {number} ended {ended - end:.1f} s after its window of {window} steps; widen it")
        lost_s.append((end - begin) - ((begin - before) + (after - end)) / 2)
        waited_s.append(max(late - early for early, late in pairwise(given_at[first : first + window + 1])) - step_s)
    return lost_s, waited_s, step_s


def main() -> None:
    """Measure a task given as an argument, and print what was found as JSON."""
    text, num_saves, window, in_background = sys.argv[1:]
    found = measure(
        Task.from_json(text), num_saves=int(num_saves), window=int(window), in_background=in_background == "background"
    )
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
