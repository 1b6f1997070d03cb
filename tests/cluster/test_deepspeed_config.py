"""What is said to DeepSpeed: written from our settings, read by its own classes, with the user's additions checked."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from cluster.deepspeed_config import deepspeed_config
from stages.deepspeed_keys import OWNED, REFUSED, TUNABLE, check_overrides
from stages.engine_settings import EngineSettings
from stages.training_config import TrainingConfig, engine_settings
from tests.stages.small_config import quickstart


def test_every_setting_reaches_deepspeed() -> None:
    config = TrainingConfig(
        global_batch_size=64,
        num_streams=8,
        num_ranks=2,
        micro_batch_size=4,
        gradient_clipping=0.5,
        zero_stage=3,
        offload_optimizer="cpu",
        offload_parameters="cpu",
        deepspeed={"zero_optimization": {"overlap_comm": True, "offload_param": {"pin_memory": True}}},
    )
    found = deepspeed_config(engine_settings(config, 2), 1001)
    zero = found["zero_optimization"]
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (4, 8)
    assert found["gradient_clipping"] == 0.5 and zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["overlap_comm"] is True and zero["reduce_bucket_size"] == 1002


def test_additions_leave_the_rest_alone() -> None:
    plain = deepspeed_config(EngineSettings(zero_stage=2), 100)
    added = deepspeed_config(EngineSettings(zero_stage=2, deepspeed={"zero_optimization": {"sub_group_size": 7}}), 100)
    assert added["zero_optimization"].pop("sub_group_size") == 7
    assert added == plain


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("zero_optimization.stage", 3, "deepspeed.zero_optimization.stage: 3 is decided by zero_stage; set that"),
        ("train_batch_size", 64, "deepspeed.train_batch_size: 64 is decided by global_batch_size"),
        ("optimizer.params.betas", [0.9, 0.95], "is decided by learning_rate, beta1, beta2, eps and weight_decay"),
        ("zero_optimization.offload_optimizer.device", "nvme", "is decided by offload_optimizer"),
        ("bf16.enabled", True, "deepspeed.bf16.enabled: True is decided by precision"),
        ("communication_data_type", "fp16", "rounds what the ranks exchange"),
        ("zero_optimization.zero_quantized_gradients", True, "rounds what the ranks exchange"),
        ("zero_optimization.reduce_bucket_sise", 5, "unknown to DeepSpeed; did you mean 'zero_optimization.reduce_buc"),
        ("reduce_bucket_size", 5, "did you mean 'zero_optimization.reduce_bucket_size'?"),
        ("zero_optimization.overlap_comm", 1, "deepspeed.zero_optimization.overlap_comm: 1 is not true or false"),
        ("zero_optimization.sub_group_size", -1, "-1 is not a whole number, 0 or more"),
        ("zero_optimization.sub_group_size", True, "True is not a whole number"),
    ],
)
def test_what_is_not_the_users_to_say_is_refused(key: str, value: Any, said: str) -> None:
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    with pytest.raises(ValueError, match=r"^deepspeed") as caught:
        check_overrides(nested)
    assert said in str(caught.value)


def test_the_door_names_the_training() -> None:
    with pytest.raises(Exception, match=r"decoder\.deepspeed\.zero_optimization\.stage: 2 is decided by zero_stage"):
        quickstart("decoder.deepspeed={zero_optimization: {stage: 2}}")
    assert quickstart("decoder.deepspeed={wall_clock_breakdown: true}").decoder.deepspeed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("decoder.offload_optimizer=cpu|decoder.zero_stage=0", "offload_optimizer: cpu needs engine: deepspeed and"),
        ("decoder.offload_parameters=cpu|decoder.zero_stage=2", "needs engine: deepspeed and zero_stage: 3 "),
        ("decoder.offload_optimizer=tape", "decoder.offload_optimizer"),
        ("decoder.offload_optimizer=nvme", "nvme needs a folder on a local disk, and nothing else reads it"),
        ("decoder.offload_dir=/scratch", "offload_dir: /scratch with offload_optimizer: none;"),
        (
            "decoder.offload_optimizer=nvme|decoder.offload_dir=/scratch|decoder.zero_stage=0",
            "offload_optimizer: nvme needs engine: deepspeed and zero_stage: 1 or above",
        ),
        ("decoder.engine=torch|decoder.deepspeed={dump_state: true}", "engine: torch does not read it"),
        ("decoder.resources_per_rank={GPU: 1}", "resources_per_rank.GPU: 1; write gpus_per_rank instead"),
        ("decoder.resources_per_rank={disk: 0}", "resources_per_rank.disk: 0 is not positive"),
        ("decoder.accelerator_type=H100", "accelerator_type: H100 needs gpus_per_rank: 1"),
        ("decoder.placement=scatter", "decoder.placement"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change: str, said: str) -> None:
    with pytest.raises(Exception, match="decoder") as caught:
        quickstart(*change.split("|"))
    assert said in str(caught.value)


def test_additions_do_not_change_what_a_training_is() -> None:
    from stages.base import identity_of

    plain, added = (
        quickstart(*changes).decoder
        for changes in ((), ("decoder.deepspeed={dump_state: true}", "decoder.placement=spread"))
    )
    assert identity_of(plain, ("shard", "stage")) == identity_of(added, ("shard", "stage"))


@pytest.mark.slow
def test_the_tables_are_those_of_the_installed_deepspeed() -> None:
    """Every setting of ZeRO is in exactly one table, and has the type that DeepSpeed gives it."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name, field in DeepSpeedZeroConfig.model_fields.items():
        key = f"zero_optimization.{field.alias or name}"
        places = [table for table in (TUNABLE, OWNED, REFUSED) if key in table]
        assert len(places) == 1 or key == "zero_optimization.leaf_module", key
        if key in TUNABLE:
            kinds = typing.get_args(field.annotation) or (field.annotation,)
            assert TUNABLE[key] in kinds, key
    known = {f"zero_optimization.{field.alias or name}" for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for key in (*TUNABLE, *OWNED, *REFUSED):
        if key.startswith("zero_optimization.") and key.count(".") == 1:
            assert key in known, f"{key} is gone from DeepSpeed"


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_own_classes_read_it(stage: int, device: str) -> None:
    from deepspeed import DeepSpeedConfig

    offload = "cpu" if stage else "none"
    settings = EngineSettings(
        zero_stage=stage,
        micro_batch_size=4,
        num_micro_batches=3,
        offload_optimizer=offload,
        offload_parameters="cpu" if stage == 3 else "none",
        device=device,
        deepspeed={"zero_optimization": {"sub_group_size": 1000}, "comms_logger": {"enabled": False}},
    )
    read = DeepSpeedConfig(deepspeed_config(settings, 10**9))
    assert (read.train_batch_size, read.gradient_accumulation_steps) == (12, 3)
    assert read.zero_config.stage == stage and read.zero_config.sub_group_size == 1000
    assert (read.zero_config.offload_optimizer is None) == (stage == 0)
    assert not read.float16_config.enabled and not read.bfloat16_config.enabled and read.optimizer_name is None
