"""What a rank of a training holds in memory at its worst moment, by ZeRO stage; before anything is allocated.

The sums follow what DeepSpeed 0.19 allocates: flat float32 buffers, and buckets through which gradients are reduced.
``tests/cluster/test_memory.py`` holds them against the tensors of real engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cluster.deepspeed_config import deepspeed_config
from stages.activation_memory import ActivationMemory, activation_memory
from stages.errors import ConfigError
from stages.example_batch import example_batch
from stages.generator_config import GeneratorTraining
from stages.training import model_loss
from stages.training_config import engine_settings
from stages.warm_start import frozen_names
from unclip_models.checkpoint import build

_GIB = float(1 << 30)
_F32 = 4  # bytes
_PERSISTENT = 100_000  # elements: smaller parameters stay whole in stage 3 (DeepSpeed's default)
_LIVE = 1_000_000_000  # elements of weights that stage 3 lets be whole at once (likewise)
_DENSE_BUCKET = 500_000_000  # elements that stage 0 reduces at once (likewise)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank, at its worst moment.

    Attributes:
        weights: what the forward pass reads, frozen parameters and buffers too.
        optimizer: float32 masters where there are any, two moments.
        averages: the moving average.
        gradients: kept from step to step.
        passing: activations, gradients and buckets, at the worst moment of a step.
        offloaded: of all these, what lies in the CPU's memory when training on a GPU.
    """

    weights: int
    optimizer: int
    averages: int
    gradients: int
    passing: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.averages + self.gradients + self.passing

    @property
    def on_device(self) -> int:
        """What lies where the forward pass runs."""
        return self.total - self.offloaded


def rank_memory(config: GeneratorTraining, world_size: int | None = None) -> RankMemory:
    """Estimate a training's ranks; rehearses one micro batch.

    Args:
        config: prior, decoder or upsampler.
        world_size: ranks; None: as configured.
    """
    with torch.device("meta"):
        model = build(config.model)  # type: ignore[attr-defined]
    frozen = set(frozen_names([name for name, _ in model.named_parameters()], config.frozen, "frozen"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    still = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    fixed = sum(tensor.numel() * tensor.element_size() for tensor in (*still, *model.buffers()))
    world_size = world_size or config.num_ranks
    settings = engine_settings(config, world_size)
    activations = activation_memory(
        model,
        model_loss,
        example_batch(config.model),  # type: ignore[attr-defined]
        num_samples=settings.micro_batch_size,
        precision=config.precision,
    )
    return states_and_passing(config, world_size, sizes, fixed, activations)


def states_and_passing(
    config: GeneratorTraining, world_size: int, sizes: Sequence[int], fixed: int, activations: ActivationMemory
) -> RankMemory:
    """Add up what an engine holds.

    Args:
        config: the training.
        world_size: ranks.
        sizes: elements of every trainable parameter.
        fixed: bytes of frozen parameters and buffers.
        activations: of a micro batch.
    """
    settings = engine_settings(config, world_size)
    whole = _F32 * sum(sizes)
    part = -(-whole // world_size)
    accumulates = settings.num_micro_batches > 1
    if config.engine == "torch":
        return RankMemory(
            weights=whole + fixed, optimizer=2 * whole, averages=whole, gradients=whole, passing=activations.peak
        )
    zero = deepspeed_config(settings, sum(sizes))["zero_optimization"]
    bucket = _F32 * zero["reduce_bucket_size"] * (2 if zero.get("overlap_comm") else 1)
    kept = whole + activations.peak if accumulates else activations.peak_with_gradients
    if settings.zero_stage == 0:
        passing = max(kept, whole + min(whole, _F32 * _DENSE_BUCKET))
        return RankMemory(weights=whole + fixed, optimizer=2 * whole, averages=whole, gradients=0, passing=passing)
    offloaded = 3 * part + part if settings.offload_optimizer == "cpu" else 0
    if settings.zero_stage == 1:
        passing = max(kept + bucket, whole + 2 * part)
    elif settings.zero_stage == 2:
        # A second micro batch meets the first one's part; a bucket's copy may outlive its reduction.
        sums = 2 * part + max(activations.peak, min(whole, bucket)) if accumulates else max(activations.peak, 2 * part)
        passing = bucket + sums
    gradients, weights = 0, whole
    if settings.zero_stage == 3:
        threshold = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
        small = _F32 * sum(size for size in sizes if size < threshold)
        gradients, weights = part + bucket, part + small
        gathered = min(whole, _F32 * zero.get("stage3_max_live_parameters", _LIVE))
        passing = gathered + max(activations.peak, min(whole, bucket) + _F32 * max(sizes))
    if settings.offload_optimizer == "cpu":
        # The gradient's part, a staging copy of the weights (stages 1 and 2), and a parameter's gradient on its way.
        staging = part + 2 * _F32 * max(sizes) if settings.zero_stage < 3 else 0
        gradients += part + staging
        offloaded += part + staging
    return RankMemory(
        weights=weights + fixed,
        optimizer=3 * part,
        averages=part,
        gradients=gradients,
        passing=passing,
        offloaded=offloaded,
    )


# ---- what does not fit -----------------------------------------------------------------------------------------------


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
    limit = limit_gib * _GIB
    if found.on_device <= limit:
        return found
    changes: list[str] = []
    for said, changed in _changes(config):
        changes = [change for change in changes if change.partition("=")[0] != said.partition("=")[0]] + [said]
        smaller = rank_memory(changed)
        if smaller.on_device <= limit:
            options = " ".join(f"-s {place}.{change}" for change in changes)
            remedy = f"the smallest change that fits: {options} ({smaller.on_device / _GIB:.1f} GiB)"
            break
    else:
        remedy = "nor does it in micro batches of 1 under ZeRO 3 with all offloaded; take more ranks or larger GPUs"
    raise ConfigError(
        f"{place}: a rank takes {found.on_device / _GIB:.1f} GiB of GPU memory, more than the {limit_gib:g} GiB of "
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
