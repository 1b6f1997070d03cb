"""One rank of a DeepSpeed group: trains the tiny model with every ZeRO stage and writes down what happened.

Usage: python -m tests.cluster.deepspeed_rank RANK WORLD_SIZE FOLDER
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.deepspeed_engine import DeepSpeedEngine
from stages.checkpoints import CheckpointFolder
from stages.engine import Accept, Engine, TorchEngine, files_to_load, is_finite
from stages.engine_settings import EngineSettings
from stages.insight import Watch
from stages.metrics import read_metrics
from stages.state_file import rank_file
from stages.training import TrainingStoppedError, model_loss, train
from stages.training_config import TrainingConfig, engine_settings
from tests.cluster.deepspeed_models import MODELS, compute_twice
from tests.cluster.ranks import joined
from tests.stages.state_files import state_file
from tests.stages.training_data import Disturbed, TinyModel, VectorStream
from unclip_models.randomness import SampleRandom

ZERO_STAGES = (0, 1, 2, 3)
MICRO_BATCH_SIZE = 2
POISONED_STEP = 9
LAG_S = 0.3  # long beside a step
FLOP_PER_SAMPLE, PEAK_TFLOPS = 3e9, 0.5
CONFIG = TrainingConfig(
    num_steps=12,
    global_batch_size=8,
    num_streams=4,
    micro_batch_size=MICRO_BATCH_SIZE,
    learning_rate=1e-2,
    weight_decay=0.1,
    checkpoint_every_steps=4,
    log_every_steps=2,
    tensorboard=False,
)


def steps(engine: Engine, first: int, last: int, accepts: Accept = is_finite) -> list[list[Any]]:
    """Do optimizer steps; return loss, norm and whether it was applied, of each."""
    done = []
    stream = VectorStream(poisoned_steps=frozenset({POISONED_STEP}))
    for batch in stream.batches(first, engine.rank, engine.world_size):
        if batch.step == last:
            return done
        parts = []
        for i in range(0, len(batch.indices), MICRO_BATCH_SIZE):
            part = batch.part(i, i + MICRO_BATCH_SIZE, engine.device)
            parts.append((part, SampleRandom(1, batch.step, batch.indices[i : i + MICRO_BATCH_SIZE])))
        result = engine.step(parts, 1e-2, accepts)
        done.append([result.loss, result.grad_norm, result.applied])
    raise AssertionError


def settings(world_size: int, zero_stage: int) -> EngineSettings:
    return engine_settings(TrainingConfig(**{**vars(CONFIG), "zero_stage": zero_stage}), world_size)


def save(engine: Engine, folder: Path) -> None:
    """Save with all ranks."""
    folder.mkdir(exist_ok=True)
    snapshot = engine.snapshot()
    if snapshot is not None:
        snapshot.write(folder)
    engine.gather(None)


def load(engine: Engine, folder: Path, layout: str) -> None:
    names = files_to_load([path.name for path in folder.iterdir()], layout, engine)
    files = {name: state_file(folder / name) for name in names}
    if len(names) > 1:
        names = engine.needed({name: file.stretches() for name, file in files.items()})
    engine.load(files[name] for name in names)
    engine.publish()


def look(engine: Engine) -> dict[str, Any]:
    """Measure the loss of the averaged weights on fixed samples; tell whether that left the state as it was."""
    before = engine.snapshot()
    batch = next(VectorStream().batches(3, engine.rank, engine.world_size))
    with engine.evaluating(averaged=True):
        part = batch.part(0, len(batch.indices), engine.device)
        loss, _ = engine.loss_of((part, SampleRandom(1, 3, batch.indices)))
    after = engine.snapshot()
    same = before is None or after is None or all(torch.equal(x, after.tensors[n]) for n, x in before.tensors.items())
    mean = engine.total(loss.double().reshape(1).cpu()) / engine.world_size
    return {"loss": float(mean), "same": all(engine.gather(same))}


def weights_whole(engine: Engine) -> float:
    """Add up all weights on the first rank, as something that draws samples there sees them."""
    with engine.evaluating(averaged=True, whole=True) as model:
        return float(sum(param.double().square().sum() for param in model.parameters()))


def exercise(zero_stage: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Train, save, train on; go back to the checkpoint and repeat; meet a step that is not finite."""
    engine = DeepSpeedEngine(TinyModel(), model_loss, settings(world_size, zero_stage))
    found: dict[str, Any] = {"first": steps(engine, 0, 5)}
    save(engine, folder / f"zero{zero_stage}")
    load(engine, folder / f"zero{zero_stage}", engine.layout)
    found["looked"] = look(engine)
    found["whole"] = weights_whole(engine)
    found["on"] = steps(engine, 5, 8)
    load(engine, folder / f"zero{zero_stage}", engine.layout)
    found["again"] = steps(engine, 5, 8)
    found["poisoned"] = steps(engine, 8, 11)
    found["refused"] = steps(engine, 11, 12, lambda loss, norm: False) + steps(engine, 11, 12)
    engine.close()
    # A checkpoint of any stage goes on under any other, and under the plain-torch engine.
    other = DeepSpeedEngine(TinyModel(seed=9), model_loss, settings(world_size, (zero_stage + 1) % 4))
    load(other, folder / f"zero{zero_stage}", engine.layout)
    found["other_stage"] = steps(other, 5, 8)
    other.close()
    plain = TorchEngine(TinyModel(seed=9), model_loss, settings(world_size, 0))
    load(plain, folder / f"zero{zero_stage}", engine.layout)
    found["plain_looked"] = look(plain)
    found["plain_whole"] = weights_whole(plain)
    found["plain"] = steps(plain, 5, 8)
    return found


# Ways of DeepSpeed that must not change the numbers: settings of the training.
WAYS: dict[str, dict[str, Any]] = {
    "1, optimizer offloaded": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "2, optimizer offloaded": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "3, optimizer offloaded": {"zero_stage": 3, "offload_optimizer": "cpu"},
    "3, all offloaded": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    **{f"{stage}, optimizer on a disk": {"zero_stage": stage, "offload_optimizer": "nvme"} for stage in (1, 2, 3)},
    "2, small buckets": {
        "zero_stage": 2,
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 64, "allgather_bucket_size": 64}},
    },
    "3, small groups": {
        "zero_stage": 3,
        "deepspeed": {"zero_optimization": {"sub_group_size": 100, "stage3_param_persistence_threshold": 0}},
    },
}


def go_a_way(way: dict[str, Any], world_size: int, folder: Path) -> dict[str, Any]:
    """Train, save, train on, and let the plain-torch engine go on from the same checkpoint."""
    if way.get("offload_optimizer") == "nvme":
        way = {**way, "offload_dir": str(folder / "offload")}
    config = TrainingConfig(**{**vars(CONFIG), **way})
    engine = DeepSpeedEngine(TinyModel(), model_loss, engine_settings(config, world_size))
    found: dict[str, Any] = {"first": steps(engine, 0, 5)}
    save(engine, folder)
    found["looked"] = look(engine)
    found["on"] = steps(engine, 5, 8)
    load(engine, folder, engine.layout)
    found["again"] = steps(engine, 5, 8)
    found["mapped"] = num_mapped(folder)
    engine.close()
    plain = TorchEngine(TinyModel(seed=9), model_loss, settings(world_size, 0))
    load(plain, folder, engine.layout)
    found["plain"] = steps(plain, 5, 8)
    return found


def num_mapped(folder: Path) -> int:
    """Count the files of a folder that are part of this process's memory."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def steep_loss(model: Any, batch: Any, random: Any) -> Any:
    """A loss whose gradients overflow under the first loss scale of fp16."""
    loss, terms = model_loss(model, batch, random)
    return loss * 16, terms


def half(precision: str, zero_stage: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Train in half precision, fp16 with overflows at first; save, train on, go back and repeat; do the same in plain
    torch."""
    loss = steep_loss if precision == "fp16" else model_loss
    config = TrainingConfig(**{**vars(CONFIG), "precision": precision, "zero_stage": zero_stage})
    engine = DeepSpeedEngine(TinyModel(), loss, engine_settings(config, world_size))
    found: dict[str, Any] = {"first": steps(engine, 0, 5)}
    save(engine, folder)
    found["on"] = steps(engine, 5, 8)
    load(engine, folder, engine.layout)
    found["again"] = steps(engine, 5, 8)
    engine.close()
    plain = TorchEngine(TinyModel(), loss, engine_settings(config, world_size))
    found["plain"] = steps(plain, 0, 8)
    return found


def train_and_resume(folder: Path, world_size: int) -> dict[str, Any]:
    """Train straight, and with a stop and another engine object in between; compare the weights bit for bit."""

    def run(name: str, stop_after: int | None) -> Any:
        asked = iter([step == stop_after for step in range(1, CONFIG.num_steps + 1)])
        options: dict[str, Any] = {"make_engine": DeepSpeedEngine, "seed": 2, "folder": str(folder / name)}
        model = TinyModel(dropout=0.2)
        return train(model, VectorStream(), CONFIG, place="tiny", should_stop=lambda: next(asked), **options)

    straight = run("straight", None)
    message = ""
    try:
        run("stopped", 7)
    except Exception as error:
        message = str(error)
    resumed = run("stopped", None)
    same = dist.get_rank() > 0 or all(torch.equal(straight.weights[n], resumed.weights[n]) for n in straight.weights)
    return {"message": message, "same": same}


def lose_a_save(folder: Path, world_size: int) -> dict[str, Any]:
    """Train while the last rank's file of the first checkpoint cannot be written: no rank counts that checkpoint."""
    (folder / "lost" / "checkpoints" / "step-000004" / rank_file(world_size - 1)).mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"make_engine": DeepSpeedEngine, "seed": 2, "folder": str(folder / "lost")}
    return _watched_training(CONFIG, options)


def lose_a_snapshot(folder: Path) -> dict[str, Any]:
    """Train while the state of the first checkpoint cannot be copied, for want of the folder for such copies."""
    offload, aside = folder / "offload", folder / "aside"
    options: dict[str, Any] = {"make_engine": DeepSpeedEngine, "seed": 2, "folder": str(folder / "training")}

    def obstruct() -> None:
        if dist.get_rank() == 0:
            offload.rename(aside)
            offload.touch()

    def clear() -> None:
        if dist.get_rank() == 0:
            offload.unlink()

    config = replace(CONFIG, offload_optimizer="nvme", offload_dir=str(offload))
    return _watched_training(config, options, at_2=obstruct, at_7=clear)


def _watched_training(config: TrainingConfig, options: dict[str, Any], **calls: Any) -> dict[str, Any]:
    """Train, and tell which checkpoints count at step 8, behind the second one, and at the end."""
    checkpoints, seen = CheckpointFolder(options["folder"], 2), list[list[int]]()
    stream = Disturbed(at_8=lambda: seen.append(checkpoints.steps()), **calls)
    train(TinyModel(), stream, replace(config, checkpoint_in_background=False), place="tiny", **options)
    return {"at_step_8": seen, "at_the_end": checkpoints.steps()}


def roll_back(folder: Path, make_engine: Any) -> dict[str, Any]:
    """Meet a bad stretch on the first rank, straight and with stops before, within and behind it."""
    config = TrainingConfig(**{**vars(CONFIG), "max_nonfinite_steps": 2, "log_every_steps": 3})
    stream = VectorStream(poisoned_steps=frozenset({6, 7}))

    def run(name: str, stop_after: int) -> Any:
        asked = iter(range(1, 99))
        options: dict[str, Any] = {"make_engine": make_engine, "seed": 2, "folder": str(folder / name), "place": "tiny"}
        return train(TinyModel(dropout=0.2), stream, config, should_stop=lambda: next(asked) == stop_after, **options)

    straight = run("straight", 0)
    for stop_after in (3, 7, 10):
        with contextlib.suppress(TrainingStoppedError):
            run(
                "stopped", stop_after - CheckpointFolder(str(folder / "stopped"), 2).steps()[0] if stop_after > 3 else 3
            )
    resumed = run("stopped", 0)
    same = dist.get_rank() > 0 or all(torch.equal(straight.weights[n], resumed.weights[n]) for n in straight.weights)
    return {"num_rollbacks": straight.metrics.get("num_rollbacks"), "same": same}


def lag(folder: Path, world_size: int) -> dict[str, Any]:
    """Train while the last rank waits for every batch; return the lines and what was warned of."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("stages.stragglers").addHandler(handler)
    config = replace(CONFIG, num_steps=8, log_every_steps=1, peak_tflops=PEAK_TFLOPS)
    is_last = dist.get_rank() == world_size - 1
    stream = Disturbed(**{f"at_{step}": lambda: time.sleep(LAG_S * is_last) for step in range(config.num_steps)})
    options: dict[str, Any] = {"make_engine": DeepSpeedEngine, "seed": 2, "folder": str(folder), "place": "tiny"}
    started_at = time.monotonic()
    trained = train(TinyModel(), stream, config, watch=Watch(flops_per_sample=FLOP_PER_SAMPLE), **options)
    took_s = time.monotonic() - started_at
    return {"lines": read_metrics(trained.metrics_log), "heard": heard, "took_s": took_s, "world_size": world_size}


def main(rank: int, world_size: int, folder: Path) -> None:
    """Be one rank."""
    with joined(rank, world_size, folder / "meeting"):
        found: dict[str, Any] = {"resume": train_and_resume(folder, world_size)}
        found["lost"] = lose_a_save(folder, world_size)
        found["lost_snapshot"] = lose_a_snapshot(folder / "snapshots")
        for name, make_engine in (("deepspeed", DeepSpeedEngine), ("torch", TorchEngine)):
            found[f"rollback_{name}"] = roll_back(folder / f"rollback-{name}", make_engine)
        found["lag"] = lag(folder / "lag", world_size)
        found["compiler"] = "torch._dynamo" in sys.modules
        found |= {str(stage): exercise(stage, world_size, folder) for stage in ZERO_STAGES}
        found["ways"] = {name: go_a_way(way, world_size, folder / name) for name, way in WAYS.items()}
        for precision in ("fp16", "bf16"):
            found[precision] = {
                str(stage): half(precision, stage, world_size, folder / f"{precision}-{stage}") for stage in ZERO_STAGES
            }
        found["twice"] = {name: compute_twice(name, world_size) for name in MODELS}
        dist.barrier()
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
