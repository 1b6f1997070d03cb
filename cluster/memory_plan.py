"""What the ranks of a training take, from its config alone; and what to change where that does not fit a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from cluster.memory import RankMemory, memory_of
from stages.errors import ConfigError
from stages.example_batch import example_batch
from stages.generator_config import GeneratorTraining
from stages.training import model_loss
from stages.training_config import engine_settings
from stages.units import GIB
from stages.warm_start import frozen_names
from unclip_models.ar_prior import ARPrior
from unclip_models.checkpoint import build


def rank_memory(config: GeneratorTraining, world_size: int | None = None) -> RankMemory:
    """Estimate a training's ranks; rehearses one micro batch.

    Args:
        config: prior, decoder or upsampler.
        world_size: ranks; None: as configured.
    """
    with torch.device("meta"):
        model = build(config.model)  # type: ignore[attr-defined]
    if isinstance(model, ARPrior):
        model.assume_pca()
    frozen = set(frozen_names([name for name, _ in model.named_parameters()], config.frozen, "frozen"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    world_size = world_size or config.num_ranks
    return memory_of(
        model,
        model_loss,
        example_batch(config.model),  # type: ignore[attr-defined]
        engine_settings(config, world_size),
        world_size=world_size,
        plain=config.engine == "torch",
    )


def check_fits(config: GeneratorTraining, limit_gib: float, place: str) -> RankMemory:
    """Estimate a training's ranks, and refuse what does not fit.

    Args:
        config: the training.
        limit_gib: what torch can use of one GPU.
        place: the stage, for messages.

    Raises:
        ConfigError: with the smallest change that fits; none of them changes the result.
    """
    found = rank_memory(config)
    limit = limit_gib * GIB
    if found.on_device <= limit:
        return found
    changes: list[str] = []
    for said, changed in _changes(config):
        changes = [change for change in changes if change.partition("=")[0] != said.partition("=")[0]] + [said]
        smaller = rank_memory(changed)
        if smaller.on_device <= limit:
            options = " ".join(f"-s {place}.{change}" for change in changes)
            remedy = f"the smallest change that fits: {options} ({smaller.on_device / GIB:.1f} GiB)"
            break
    else:
        remedy = "nor does it in micro batches of 1 under ZeRO 3 with all offloaded; take more ranks or larger GPUs"
    raise ConfigError(
        f"{place}: a rank takes {found.on_device / GIB:.1f} GiB of GPU memory, more than the {limit_gib:g} GiB of "
        f"gpu_memory_gib; {remedy}"
    )


def _changes(config: GeneratorTraining) -> Iterator[tuple[str, GeneratorTraining]]:
    """Yield what to change further and further, the cheapest first, and the config with all changes so far."""
    num_local = config.global_batch_size // config.num_ranks
    size = config.micro_batch_size or num_local
    for smaller in (size // 2**power for power in range(1, size.bit_length())):
        if num_local % smaller == 0:
            config = dataclasses.replace(config, micro_batch_size=smaller)
            yield f"micro_batch_size={smaller}", config
    if config.engine == "torch":
        return
    for stage in range(config.zero_stage + 1, 4):
        config = dataclasses.replace(config, zero_stage=stage)  # type: ignore[arg-type]
        yield f"zero_stage={stage}", config
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(config, name) == "none":
            config = dataclasses.replace(config, **{name: "cpu"})  # type: ignore[arg-type]
            yield f"{name}=cpu", config
