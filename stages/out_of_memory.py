"""Out of memory: which settings to change, with their numbers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stages.errors import StageError

# What is no ``OutOfMemoryError`` of torch: the machine's memory, pinned memory, and libraries that allocate themselves.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_CHECKPOINTING = "checkpoint_activations"
_LAST_ZERO_STAGE = 3


@contextlib.contextmanager
def out_of_memory_explained(config: Any, world_size: int, place: str) -> Iterator[None]:
    """Turn running out of memory, on a GPU or not, into an error that says what to change.

    Args:
        config: a ``TrainingConfig``.
        world_size: ranks of the training.
        place: the stage, for messages.

    Raises:
        StageError: what to change, the cheapest first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = "; or ".join(what_to_change(config, world_size, place))
        raise StageError(f"{place}: out of memory ({reason}). {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory, of the GPU or of the machine, is used up."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _SAID)


def what_to_change(config: Any, world_size: int, place: str) -> Sequence[str]:
    """List the settings that lower a training's memory, the cheapest first; results stay what they are.

    Args:
        config: a ``TrainingConfig``.
        world_size: ranks of the training.
        place: the stage.
    """
    num_local = config.global_batch_size // world_size
    size = config.micro_batch_size or num_local
    advice = []
    if size > 1:
        smaller = next(n for n in range(size - 1, 0, -1) if num_local % n == 0)
        advice.append(
            f"Set {place}.micro_batch_size: {smaller} (now {size}); the {num_local} samples of a rank's batch are then "
            f"done in {num_local // smaller} passes"
        )
    advice += [f"set {place}.{path}: true" for path in _checkpointing_off(getattr(config, "model", None), "model")]
    if config.engine == "deepspeed" and world_size > 1 and config.zero_stage < _LAST_ZERO_STAGE:
        advice.append(
            f"set {place}.zero_stage: {config.zero_stage + 1} (now {config.zero_stage}), which parts more over the "
            f"{world_size} ranks"
        )
    if config.engine == "deepspeed" and config.zero_stage:
        if config.gpus_per_rank and config.offload_optimizer == "none":
            advice.append(f"set {place}.offload_optimizer: cpu, which takes masters, moments and averages off the GPU")
        elif config.offload_optimizer != "nvme":
            advice.append(
                f"set {place}.offload_optimizer: nvme and {place}.offload_dir, which takes moments and averages out of "
                "the machine's memory"
            )
    if config.gpus_per_rank and config.precision == "fp32":
        advice.append(f"set {place}.precision: bf16 (this one changes the result)")
    if not config.gpus_per_rank:
        advice.append(
            f"lower {place}.cache_gib (now {config.cache_gib:g}) or {place}.prefetch_batches "
            f"(now {config.prefetch_batches})"
        )
    return advice or [f"Use more ranks ({place}.num_ranks: {config.num_ranks}), or a machine with more memory"]


def _checkpointing_off(model: Any, path: str) -> Iterator[str]:
    """Yield the settings of a model, however deep, that turn activation checkpointing on, where it is off."""
    if not dataclasses.is_dataclass(model):
        return
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name == _CHECKPOINTING and not value:
            yield f"{path}.{field.name}"
        yield from _checkpointing_off(value, f"{path}.{field.name}")
