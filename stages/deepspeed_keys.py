"""Which settings of DeepSpeed a config may add to ours (``deepspeed:`` of a training), checked at the door.

Allowed are those that move memory and speed alone. The others are refused with the reason: most say again what a
setting of ours says, some would make the result depend on how it was computed. The tables are of DeepSpeed 0.19 and
need no import of it; a test holds them against its own classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

# Dotted key -> what its value has to be.
TUNABLE: Mapping[str, type[bool] | type[int]] = {
    "steps_per_print": int,
    "dump_state": bool,
    "disable_python_gc": bool,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    **{f"comms_logger.{key}": bool for key in ("enabled", "verbose", "prof_all", "debug")},
    **{f"flops_profiler.{key}": bool for key in ("enabled", "detailed")},
    **{f"flops_profiler.{key}": int for key in ("profile_step", "module_depth", "top_modules")},
    **{
        f"zero_optimization.{key}": bool
        for key in (
            *("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions"),
            *("overlap_comm", "ignore_unused_parameters", "memory_efficient_linear"),
            *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "log_trace_cache_warnings"),
            "enable_sanity_checks",
        )
    },
    **{
        f"zero_optimization.{key}": int
        for key in (
            *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size"),
            *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
            *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold"),
        )
    },
    "zero_optimization.offload_optimizer.pin_memory": bool,
    "zero_optimization.offload_param.pin_memory": bool,
}
# Prefix of dotted keys -> the settings of a training that decide about them.
OWNED: Mapping[str, str] = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size, num_ranks and micro_batch_size",
    "managed_gradient_accumulation": "global_batch_size, num_ranks and micro_batch_size",
    "gradient_clipping": "gradient_clipping",
    "optimizer": "learning_rate, beta1, beta2, eps and weight_decay",
    "zero_allow_untested_optimizer": "offload_optimizer",
    "zero_force_ds_cpu_optimizer": "offload_optimizer",
    "scheduler": "learning_rate_schedule and warmup_steps",
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "torch_autocast", "data_types"), "precision"),
    "activation_checkpointing": "checkpoint_activations of the model",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "zero_optimization.offload_param": "offload_parameters",
    **dict.fromkeys((f"zero_optimization.cpu_offload{end}" for end in ("", "_use_pin_memory")), "offload_optimizer"),
    "zero_optimization.cpu_offload_param": "offload_parameters",
    **dict.fromkeys(("checkpoint", "datastates"), "checkpoint_every_steps and its like"),
    **dict.fromkeys(("tensorboard", "csv_monitor", "comet"), "tensorboard"),
    "wandb": "wandb",
    "compile": "compile",
    **dict.fromkeys(("data_efficiency", "dataloader_drop_last"), "the data stream"),
}
# Prefix of dotted keys -> why not.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("communication_data_type", "seq_parallel_communication_data_type", "weight_quantization"),
            *(f"zero_optimization.zero_quantized_{what}" for what in ("weights", "nontrainable_weights", "gradients")),
        ),
        "rounds what the ranks exchange, so that the result would depend on their number",
    ),
    **dict.fromkeys(
        ("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
        "changes how gradients are averaged; the engines agree on the mean",
    ),
    "zero_optimization.compute_grad_norm": "every step needs the norm, to skip what is not finite",
    **dict.fromkeys(
        (
            *("disable_allgather", "autotuning", "hybrid_engine", "pipeline", "aio", "log_level", "timers"),
            *("tensor_parallel", "expert_parallel", "use_data_before_expert_parallel"),
            *(
                f"zero_optimization.{key}"
                for key in (
                    *("parameter_alignment", "zero_hpz_partition_size", "zenflow", "leaf_module", "legacy_stage1"),
                    *("elastic_checkpoint", "load_from_fp32_weights", "override_module_apply", "round_robin_gradients"),
                    *("pipeline_loading_checkpoint", "save_muon_momentum_buffer_in_memory"),
                    *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
                )
            ),
        ),
        "the engine and its checkpoints do not use it",
    ),
}


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Refuse settings of DeepSpeed that do not exist, or about which this pipeline decides.

    Args:
        overrides: nested, as in a file of DeepSpeed's.

    Raises:
        ValueError: names key, value and what to do; begins with the setting, as the config's door wants it.
    """
    for key, value in _leaves(overrides):
        place = f"deepspeed.{key}: {value!r}"
        if key in TUNABLE:
            _check_value(place, value, TUNABLE[key])
        elif owner := _longest_prefix(key, OWNED):
            raise ValueError(f"{place} is decided by {OWNED[owner]}; set that instead, and leave this out")
        elif reason := _longest_prefix(key, REFUSED):
            raise ValueError(f"{place}: {REFUSED[reason]}; leave it out")
        else:
            raise ValueError(f"{place}: unknown to DeepSpeed{_did_you_mean(key)}")


def _check_value(place: str, value: Any, kind: type[bool] | type[int]) -> None:
    if type(value) is not kind or value < 0:
        wanted = "true or false" if kind is bool else "a whole number, 0 or more"
        raise ValueError(f"{place} is not {wanted}")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _longest_prefix(key: str, table: Mapping[str, str]) -> str | None:
    parts = key.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in table), None)


def _did_you_mean(key: str) -> str:
    """Suggest the nearest key that may be set, in the same section if there is one."""
    known = list(TUNABLE)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not close:  # the right name in the wrong section
        close = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"; did you mean '{close[0]}'?" if close else "; see docs/training.md for what may be set"
