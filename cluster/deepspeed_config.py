"""DeepSpeed's configuration, written from ours; DeepSpeed itself is not needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.engine_settings import EngineSettings

_NEVER = 1 << 30  # steps between DeepSpeed's own progress lines
# Elements sent at once. On GPUs 1 GB of float32, as many bytes as DeepSpeed's default takes of half-precision numbers.
_BUCKET = {"cpu": 50_000_000, "cuda": 250_000_000}


def deepspeed_config(settings: EngineSettings, num_parameters: int) -> dict[str, Any]:
    """Write DeepSpeed's configuration, with the user's additions.

    Args:
        settings: of the engine.
        num_parameters: trainable ones; no buffer is larger than they all.
    """
    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.num_micro_batches,
        # Stage 0 leaves no norm behind, so its gradients are clipped by the optimizer.
        "gradient_clipping": settings.gradient_clipping if settings.zero_stage else 0.0,
        "zero_optimization": _zero(settings, num_parameters),
        # The optimizer is ours: torch's fused AdamW, which has a kernel for CPUs too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
    }
    return _merged(config, settings.deepspeed)


def _zero(settings: EngineSettings, num_parameters: int) -> dict[str, Any]:
    bucket = min(_BUCKET[settings.device], num_parameters + num_parameters % 2)
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if settings.device == "cpu":
        zero["overlap_comm"] = False
        if settings.zero_stage == 3:
            zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": bucket}
    pinned = settings.device != "cpu"
    if settings.offload_optimizer != "none":
        # For DeepSpeed the CPU in any case: what lies in files is ours, and a tensor of the CPU to everybody.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if settings.offload_parameters != "none":
        zero["offload_param"] = {"device": settings.offload_parameters, "pin_memory": pinned}
    return zero


def _merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in changes.items():
        merged[key] = _merged(merged.get(key) or {}, value) if isinstance(value, Mapping) else value
    return merged
