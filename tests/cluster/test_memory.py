"""The planner's memory against the tensors of real engines: two ranks of every ZeRO stage, within a tenth."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from cluster.memory import RankMemory, check_fits, rank_memory, states_and_passing
from stages.activation_memory import ActivationMemory
from stages.errors import ConfigError
from tests.cluster.ranks import run_ranks
from tests.stages.small_config import quickstart

WORLD_SIZE = 2
UNET = {"model_channels": 32, "channel_mult": [1, 2, 3], "num_res_blocks": 1, "head_channels": 32}
MODELS = {
    # A few million parameters, none of which is most of the model, as in the paper's.
    "prior": (
        "prior.model={kind: diffusion, embedding_dim: 64, text: {kind: own, context_length: 16, width: 16, layers: 0},"
        " width: 192, layers: 6, heads: 6}"
    ),
    "upsampler_256": f"upsampler_256.model.unet={json.dumps(UNET)}",
}
WAYS: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch"},
    **{f"zero {stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"zero {stage}, accumulating": {"zero_stage": stage, "micro_batch_size": 2} for stage in range(4)},
    **{f"zero {stage}, offloaded": {"zero_stage": stage, "offload_optimizer": "cpu"} for stage in (1, 2, 3)},
    "zero 3, all offloaded": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "zero 2, small buckets": {
        "zero_stage": 2,
        "micro_batch_size": 2,
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 300_000, "allgather_bucket_size": 300_000}},
    },
    "zero 2, bf16": {"zero_stage": 2, "precision": "bf16"},
}


PLAIN = ("torch", *(f"zero {stage}" for stage in range(4)), "zero 2, bf16")


def jobs() -> dict[str, Any]:
    """Every way of every model, in a batch of four samples a rank."""
    found = {}
    for name, change in MODELS.items():
        config = getattr(quickstart(change), name)
        for way, settings in WAYS.items():
            if name != "prior" and way not in PLAIN:
                continue
            common = {"global_batch_size": 8, "num_streams": 2, "num_ranks": WORLD_SIZE, "micro_batch_size": None}
            found[f"{name}, {way}"] = dataclasses.replace(config, **{**common, **settings})
    return found


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_the_estimate_is_within_a_tenth_of_what_is_held(tmp_path: Path) -> None:
    (tmp_path / "jobs.pickle").write_bytes(pickle.dumps(jobs()))
    codes, said = run_ranks("tests.cluster.memory_rank", WORLD_SIZE, tmp_path, timeout_s=380)
    assert codes == [0] * WORLD_SIZE, said
    found = json.loads((tmp_path / "found.json").read_text())
    lines, wrong = [], []
    for name, config in jobs().items():
        guess: RankMemory = rank_memory(config)
        held = guess.total - guess.passing
        measured = found[name]["held"] + found[name]["passing"]
        ratio = guess.total / measured
        lines.append(
            f"{name:40} held {held / 2**20:6.1f} of {found[name]['held'] / 2**20:6.1f}, passing "
            f"{guess.passing / 2**20:6.1f} of {found[name]['passing'] / 2**20:6.1f} MiB: {ratio:.3f}"
        )
        if not 0.9 <= ratio <= 1.1:
            wrong.append(name)
    print("\n".join(lines))
    assert not wrong, "\n".join(lines)


def test_what_does_not_fit_is_refused_with_the_smallest_change() -> None:
    config = quickstart(MODELS["prior"]).prior
    config = dataclasses.replace(config, gpus_per_rank=1, num_ranks=2, zero_stage=1, global_batch_size=64)
    needed = rank_memory(config).on_device / 2**30
    assert check_fits(config, needed * 1.01, "prior").on_device / 2**30 == needed
    with pytest.raises(ConfigError, match=r"^prior: a rank takes .* the smallest change that fits: -s prior\.micro"):
        check_fits(config, needed * 0.99, "prior")
    with pytest.raises(ConfigError, match="take more ranks or larger GPUs"):
        check_fits(config, needed * 0.01, "prior")


def test_partitioning_and_offload_take_less_on_the_device() -> None:
    config = quickstart(MODELS["prior"]).prior
    config = dataclasses.replace(config, num_streams=8, num_ranks=8, micro_batch_size=1, global_batch_size=8)
    sizes, fixed, activations = [50_000] * 200, 0, ActivationMemory(peak=1 << 20, peak_with_gradients=1 << 22)

    def device(**changes: Any) -> int:
        return states_and_passing(dataclasses.replace(config, **changes), 8, sizes, fixed, activations).on_device

    by_stage = [device(zero_stage=stage) for stage in range(3)]
    assert by_stage == sorted(by_stage, reverse=True) and device(engine="torch") >= by_stage[1]
    assert device(zero_stage=2, offload_optimizer="cpu") < by_stage[2]
