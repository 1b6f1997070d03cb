"""One rank of a group that trains real models with DeepSpeed, and may die on the way.

Usage: python -m tests.cluster.training_rank RANK WORLD_SIZE JOB

The job is a pickled ``Job``; its runs are done one after another, all ranks together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster.deepspeed_engine import DeepSpeedEngine
from stages.base import Stage
from stages.dataset import Batch, TrainingStream
from stages.manifest import Manifest
from tests.cluster.ranks import joined


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        stage: the training.
        output: folder of its shards; a run with the output of an earlier one goes on where that stopped.
        die_at: step after which it is over, whatever is in memory then; None trains to the end.
        kill: whether the whole process dies there, by SIGKILL.
    """

    stage: Stage[Any]
    output: str
    die_at: int | None = None
    kill: bool = False


@dataclass(frozen=True)
class Job:
    """What a group does.

    Attributes:
        inputs: manifests of the stages that the trainings read.
        runs: in order.
        meeting: file at which the ranks meet.
    """

    inputs: Mapping[str, Manifest]
    runs: Sequence[Run]
    meeting: str


class Died(Exception):
    """The end of a run that dies."""


def work(run: Run, inputs: Mapping[str, Manifest]) -> None:
    """Do one run on this rank; what every batch held, and what was read to resume, is written beside its shards."""
    num_steps = 0

    def count_steps() -> bool:
        nonlocal num_steps
        num_steps += 1
        if run.die_at is not None and _step == run.die_at - 1:
            if run.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Died
        return False

    _step = -1
    make_batches = TrainingStream.batches
    rows = Path(run.output) / f"rows-{dist.get_rank()}-of-{dist.get_world_size()}.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)

    def noted(stream: TrainingStream, first_step: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        nonlocal _step
        with rows.open("a") as file, contextlib.closing(make_batches(stream, first_step, rank, world_size)) as batches:
            for batch in batches:
                _step = batch.step
                print(json.dumps([batch.step, _digests(batch)]), file=file, flush=True)
                yield batch

    TrainingStream.batches = noted  # type: ignore[assignment, method-assign]
    told = logging.FileHandler(rows.with_name(f"told-{dist.get_rank()}-of-{dist.get_world_size()}.txt"))
    logging.getLogger("stages.checkpoints").addHandler(told)
    try:
        own = {name: inputs[name] for name in run.stage.upstream}
        shard = run.stage.plan(own)[0]
        process: Any = run.stage.process
        process(shard, run.output, make_engine=DeepSpeedEngine, should_stop=count_steps)
    except Died:
        pass
    finally:
        TrainingStream.batches = make_batches  # type: ignore[method-assign]
        logging.getLogger("stages.checkpoints").removeHandler(told)
        told.close()
    dist.barrier()


def _digests(batch: Batch) -> dict[int, str]:
    """Hash what the batch holds of every sample."""
    found = {}
    for row, index in enumerate(batch.indices):
        digest = hashlib.sha256()
        for name in sorted(batch.tensors):
            digest.update(batch.tensors[name][row].contiguous().numpy().tobytes())
        found[index] = digest.hexdigest()[:16]
    return found


def main(rank: int, world_size: int, job: Job) -> None:
    """Be one rank."""
    logging.getLogger("stages.checkpoints").setLevel(logging.DEBUG)
    with joined(rank, world_size, job.meeting):
        for run in job.runs:
            work(run, job.inputs)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pickle.loads(Path(sys.argv[3]).read_bytes()))
