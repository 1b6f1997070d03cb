"""The first rank of a group measures what trainings hold in memory; the others exist in name only.

Usage: python -m tests.cluster.memory_rank WORLD_SIZE FOLDER

Collectives are torch's own fake ones, which do nothing: so there is no other thread, no buffer of a backend, and the
numbers are the same in every run. ``FOLDER/jobs.pickle`` holds configs by name; ``found.json`` gets what was measured
of each, bytes: ``held`` between two steps, by the storages of all tensors alive, and the ``peak`` within steps, by all
allocations and releases that torch's profiler saw since the engine was built.
"""

from __future__ import annotations

import gc
import json
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.deepspeed_engine import DeepSpeedEngine
from stages.dataset import Batch
from stages.engine import MicroBatch, TorchEngine
from stages.example_batch import example_batch
from stages.sample_grids import Painter
from stages.training import model_loss
from stages.training_config import engine_settings
from unclip_models.ar_prior import ARPrior
from unclip_models.checkpoint import build
from unclip_models.randomness import SampleRandom

WATCHED = "watched steps"


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
    for _ in range(num):
        yield filled(example_batch(config.model), size), SampleRandom(0, 0, range(size), "cpu")


def filled(examples: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Make a batch of numbers of any kind."""
    found = {}
    for name, example in examples.items():
        shape = (size, *example.shape[1:])
        is_float = example.dtype.is_floating_point
        found[name] = torch.rand(shape) if is_float else torch.zeros(shape, dtype=example.dtype)
    return found


class AnySamples:
    """Held-out samples of any kind."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __len__(self) -> int:
        return int(self._config.validation.num_samples)

    def load(self, first: int, last: int, *, whole: bool = False) -> Batch:
        """See ``HeldOut``."""
        return Batch(0, range(first, last), filled(example_batch(self._config.model, whole=whole), last - first))


def measure(config: Any, world_size: int) -> dict[str, float]:
    """Build an engine, take four steps and draw samples if asked to; all allocations count, from the first on."""
    before = live_bytes()
    settings = engine_settings(config, world_size)
    make: Any = TorchEngine if config.engine == "torch" else DeepSpeedEngine
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        model = build(config.model)
        if isinstance(model, ARPrior):
            model.assume_pca()  # codes of any kind will do
        engine = make(model, model_loss, settings)

        def step() -> bool:
            batches = micro_batches(config, settings.num_micro_batches, settings.micro_batch_size)
            return bool(engine.step(batches, 1e-4).applied)

        draw = Painter(config.samples, AnySamples(config), 0)
        applied = [step(), step()]  # the first allocates the moments
        held = live_bytes() - before
        with record_function(WATCHED):
            applied += [step(), step()]
            if config.samples.every_steps:
                with engine.evaluating(averaged=True, whole=True) as lent:
                    draw(lent, engine.device)
        engine.close()
    assert all(applied), "a step that is skipped takes less"
    events = watched.profiler.kineto_results.events()
    began, ended = next((e.start_ns(), e.end_ns()) for e in events if e.name() == WATCHED)
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        if began <= event.start_ns() <= ended:
            peak = max(peak, live)
    return {"held": held, "peak": peak}


def main(world_size: int, folder: Path) -> None:
    """Be the first rank."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    jobs = pickle.loads((folder / "jobs.pickle").read_bytes())
    found = {name: measure(config, world_size) for name, config in jobs.items()}
    (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
