"""The planner's memory against the tensors of real engines: every model under every ZeRO stage, within a tenth."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.memory import RankMemory, TrainingShape, states_and_passing
from cluster.memory_plan import RankMemories, rank_memory
from cluster.memory_ways import OFFLOADS, check_fits, ways
from stages.activation_memory import ActivationMemory
from stages.errors import ConfigError
from stages.training_config import engine_settings
from stages.units import GIB
from stages.validation_config import SamplesConfig, ValidationConfig
from tests.stages.small_config import quickstart

WORLD_SIZE = 8
TEXT = "{kind: own, context_length: 16, width: 16, layers: 0}"
UNET = "{model_channels: 32, channel_mult: [1, 2, 3], num_res_blocks: 1, head_channels: 32}"
# Two to four million parameters, none of which is most of the model, as in the paper's.
MODELS = {
    "prior": f"prior.model={{kind: diffusion, embedding_dim: 64, text: {TEXT}, width: 192, layers: 6, heads: 6}}",
    "autoregressive prior": f"prior.model={{kind: autoregressive, embedding_dim: 64, num_codes: 24, num_buckets: 64,"
    f" num_dot_buckets: 16, text: {TEXT}, text_prefix: pooled, width: 192, layers: 6, heads: 6}}",
    "decoder": f"decoder.model={{image_size: 16, embedding_dim: 64, text: {TEXT}, unet: {UNET}}}",
    "upsampler_256": f"upsampler_256.model.unet={UNET}",
    "upsampler_1024": f"upsampler_1024.model.unet={UNET}",
}
PLAIN: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    **{f"zero {stage}": {"zero_stage": stage} for stage in range(4)},
}
# Of a model as much larger than its buckets as the paper's are.
SMALL = {
    "reduce_bucket_size": 800_000,
    "allgather_bucket_size": 800_000,
    "stage3_prefetch_bucket_size": 150_000,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 500_000,
}


def drawing(precision: str) -> dict[str, Any]:
    """Return the settings of a training that looks at more samples than it trains on at once."""
    return {
        "precision": precision,
        "micro_batch_size": 1,
        "validation": ValidationConfig(num_samples=192),
        "samples": SamplesConfig(every_steps=1, num_samples=192, steps=2, guidance_scale=3.0),
    }


WAYS: dict[str, dict[str, Any]] = {
    **{f"zero {stage}, accumulating": {"zero_stage": stage, "micro_batch_size": 2} for stage in range(4)},
    **{f"zero {stage}, small buckets": {"zero_stage": stage, "deepspeed": SMALL} for stage in (1, 2, 3)},
    **{
        f"zero {stage}, small buckets, accumulating": {"zero_stage": stage, "deepspeed": SMALL, "micro_batch_size": 2}
        for stage in (1, 2, 3)
    },
    **{f"zero {stage}, offloaded": {"zero_stage": stage, "offload_optimizer": "cpu"} for stage in (1, 2, 3)},
    "zero 3, all offloaded": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "zero 2, bf16": {"zero_stage": 2, "precision": "bf16"},
    **{
        f"{name}, drawing{', bf16' if precision == 'bf16' else ''}": {**PLAIN[name], **drawing(precision)}
        for name in ("torch", "zero 3")
        for precision in ("fp32", "bf16")
    },
}


def jobs() -> dict[str, Any]:
    """Every way of every model, or of the prior, in a batch of four samples a rank."""
    found = {}
    for name, change in MODELS.items():
        config = getattr(quickstart(change), change.partition(".")[0])
        for way, settings in (PLAIN | WAYS if name == "prior" else PLAIN).items():
            common = {"global_batch_size": 4 * WORLD_SIZE, "num_streams": WORLD_SIZE, "num_ranks": WORLD_SIZE}
            more = {"deepspeed": {"zero_optimization": settings["deepspeed"]}} if "deepspeed" in settings else {}
            found[f"{name}, {way}"] = dataclasses.replace(config, **{**common, **settings, **more})
    return found


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_the_estimate_is_within_a_tenth_of_what_is_held(tmp_path: Path) -> None:
    (tmp_path / "jobs.pickle").write_bytes(pickle.dumps(jobs()))
    command = [sys.executable, "-m", "tests.cluster.memory_rank", str(WORLD_SIZE), str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    lines, wrong = [], []
    for name, config in jobs().items():
        guess: RankMemory = rank_memory(config)
        held, peak = found[name]["held"], found[name]["peak"]
        ratios = ((guess.total - guess.passing) / held, guess.total / peak)
        lines.append(
            f"{name:45} held {held / 2**20:6.1f} MiB, planned {ratios[0]:.3f}; at the worst moment "
            f"{peak / 2**20:6.1f} MiB, planned {ratios[1]:.3f}"
        )
        if not (0.99 <= ratios[0] <= 1.01 and 0.9 <= ratios[1] <= 1.1):
            wrong.append(name)
    print("\n".join(lines))
    assert not wrong, "\n".join(lines)


@pytest.fixture(scope="module")
def rehearsed() -> tuple[Any, RankMemories]:
    """A prior on two GPUs, whose micro batches are rehearsed once for all tests."""
    config = quickstart(MODELS["prior"]).prior
    return dataclasses.replace(config, gpus_per_rank=1, num_ranks=2, zero_stage=1, global_batch_size=64), RankMemories()


def named(config: Any, limit_bytes: float, memories: RankMemories) -> dict[str, Any]:
    """Return what the refusal says to change, as values; nothing if there is nothing that fits."""
    with pytest.raises(ConfigError, match=r"^prior: a rank takes .* of GPU memory, more than the ") as caught:
        check_fits(config, limit_bytes / GIB, "prior", memories)
    words = str(caught.value).partition("smallest change that fits: ")[2].replace("-s prior.", "").split()
    pairs = (word.split("=") for word in words if "=" in word)
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def test_what_does_not_fit_is_refused_with_the_smallest_change(rehearsed: tuple[Any, RankMemories]) -> None:
    config, memories = rehearsed
    needed = memories.of(config).on_device
    assert check_fits(config, needed / GIB, "prior", memories).on_device == needed
    assert named(config, needed - 1, memories) == {"micro_batch_size": 16}
    with pytest.raises(
        ConfigError, match="nor does it fit in micro batches of 1 under ZeRO 3 with all offloaded; take"
    ):
        check_fits(config, 1e-6, "prior", memories)


@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
def test_what_is_named_fits_and_nothing_smaller_does(rehearsed: tuple[Any, RankMemories], engine: str) -> None:
    """At every limit between what is needed now and what nothing can do without."""
    config, memories = rehearsed
    config = dataclasses.replace(config, engine=engine)
    needed, found = memories.of(config).on_device, []
    for limit in (needed * percent / 100 for percent in range(98, 0, -4)):
        if not (changes := named(config, limit, memories)):
            break
        assert memories.of(dataclasses.replace(config, **changes)).on_device <= limit
        for name in changes:  # without any one of them it does not fit, or cannot be
            fewer = {other: value for other, value in changes.items() if other != name}
            with contextlib.suppress(ValueError):
                assert memories.of(dataclasses.replace(config, **fewer)).on_device > limit
        found.append(changes)
    sizes = [len(changes) for changes in found]
    assert sizes[0] == 1 and sizes == sorted(sizes)
    most = {"zero_stage", "offload_optimizer", "offload_parameters", "micro_batch_size"}
    assert set(found[-1]) == (most if engine == "deepspeed" else {"micro_batch_size"})


def test_every_way_is_estimated_as_if_it_were_configured(rehearsed: tuple[Any, RankMemories]) -> None:
    config, memories = rehearsed
    found = ways(config, memories)
    assert [way.zero_stage for way in found] == [0, *(1,) * 3, *(2,) * 3, *(3,) * len(OFFLOADS)]
    for way in found:
        settings = {"zero_stage": way.zero_stage, "offload_optimizer": way.offload_optimizer}
        if way.offload_optimizer == "nvme":
            settings["offload_dir"] = "/scratch"
        chosen = dataclasses.replace(config, **settings, offload_parameters=way.offload_parameters)
        assert memories.of(chosen) == way.memory
    assert found[1].memory == rank_memory(config)
    assert ways(dataclasses.replace(config, engine="torch"), memories) == found


def test_partitioning_and_offload_take_less_on_the_device() -> None:
    config = quickstart(MODELS["prior"]).prior
    config = dataclasses.replace(config, num_streams=8, num_ranks=8, micro_batch_size=1, global_batch_size=8)
    sizes = [50_000] * 200
    activations = ActivationMemory([(0, 0, 1 << 20), (4 * 200 * 50_000, 0, 0)], 1 << 20)
    shape = TrainingShape(sizes=sizes, fixed=0, activations=activations)

    def rank(**changes: Any) -> RankMemory:
        changed = dataclasses.replace(config, **changes)
        return states_and_passing(engine_settings(changed, 8), 8, shape, plain=changed.engine == "torch")

    def device(**changes: Any) -> int:
        return rank(**changes).on_device

    by_stage = [device(zero_stage=stage) for stage in range(3)]
    assert by_stage == sorted(by_stage, reverse=True) and device(engine="torch") >= by_stage[1]
    assert device(zero_stage=2, offload_optimizer="cpu") < by_stage[2]
    on_cpu = rank(zero_stage=2, offload_optimizer="cpu")
    on_disk = rank(zero_stage=2, offload_optimizer="nvme", offload_dir="/scratch")
    assert on_disk.on_device == on_cpu.on_device
    # Moments and averages, 12 bytes of a parameter: its eighth on this rank.
    assert on_disk.on_disk == on_cpu.offloaded - on_disk.offloaded == 12 * sum(sizes) / 8
    # Of stage 3 with all offloaded the CPU has seven copies of a rank's part: masters, moments, average and weights,
    # the gradients of a micro batch and their sum. The device keeps the small parameters whole, and what passes.
    last = rank(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    assert last.offloaded == 7 * 4 * sum(sizes) / 8
    assert last.on_device == 4 * sum(sizes) + last.passing + (last.gradients - 2 * 4 * sum(sizes) // 8)
