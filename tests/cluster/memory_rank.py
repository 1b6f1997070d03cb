"""One rank of a group that measures what trainings hold in memory.

Usage: python -m tests.cluster.memory_rank RANK WORLD_SIZE FOLDER

``FOLDER/jobs.pickle`` is a list of configs; the first rank writes what it measured of each to ``found.json``, bytes:
``held`` between two steps, by the storages of all tensors alive, and ``passing``, by the allocations that torch's
profiler saw in three steps. ``found.json`` has the estimates too.
"""

from __future__ import annotations

import gc
import json
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cluster.deepspeed_engine import DeepSpeedEngine
from stages.engine import MicroBatch, TorchEngine
from stages.example_batch import example_batch
from stages.training import model_loss
from stages.training_config import engine_settings
from tests.cluster.ranks import joined
from unclip_models.checkpoint import build
from unclip_models.randomness import SampleRandom


def live_bytes() -> int:
    """Add up the storages of all tensors that Python knows."""
    gc.collect()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
                found[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return sum(found.values())


def micro_batches(config: Any, num: int, size: int) -> Iterator[MicroBatch]:
    rng = torch.Generator().manual_seed(0)
    for _ in range(num):
        batch = {}
        for name, example in example_batch(config.model).items():
            shape = (size, *example.shape[1:])
            is_float = example.dtype.is_floating_point
            batch[name] = torch.rand(shape, generator=rng) if is_float else torch.zeros(shape, dtype=example.dtype)
        yield batch, SampleRandom(0, 0, range(size), "cpu")


def measure(config: Any, world_size: int) -> dict[str, float]:
    """Take five steps, the last three watched."""
    before = live_bytes()
    settings = engine_settings(config, world_size)
    make: Any = TorchEngine if config.engine == "torch" else DeepSpeedEngine
    torch.manual_seed(0)
    engine = make(build(config.model), model_loss, settings)

    def step() -> float:
        batches = micro_batches(config, settings.num_micro_batches, settings.micro_batch_size)
        return float(engine.step(batches, 1e-4).loss)

    step()
    loss = step()
    held = live_bytes() - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        for _ in range(3):
            step()
    live = passing = 0
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        passing = max(passing, live)
    engine.close()
    return {"held": held, "passing": passing, "loss": loss}


def main(rank: int, world_size: int, folder: Path) -> None:
    """Be one rank."""
    with joined(rank, world_size, folder / "meeting"):
        jobs = pickle.loads((folder / "jobs.pickle").read_bytes())
        found = {name: measure(config, world_size) for name, config in jobs.items()}
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
