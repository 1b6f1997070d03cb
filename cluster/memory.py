"""What a rank of a training holds in memory at its worst moment, by ZeRO stage; before anything is allocated.

The sums follow what DeepSpeed 0.19 allocates: flat float32 buffers, and buckets through which gradients are reduced.
``tests/cluster/test_memory.py`` holds them against the tensors of real engines.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cluster.deepspeed_config import deepspeed_config
from stages.activation_memory import ActivationMemory, activation_memory
from stages.engine_settings import EngineSettings
from stages.flops import LossOfModel

_F32 = 4  # bytes
_PERSISTENT = 100_000  # elements: smaller parameters stay whole in stage 3 (DeepSpeed's default)
_LIVE = 1_000_000_000  # elements of weights that stage 3 gathers ahead, and between two uses of one (likewise)
_PREFETCH = 50_000_000  # elements of weights that stage 3 gathers ahead of their use (likewise)
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
        on_disk: and what lies in files of ``offload_dir``; a save takes as much again and the masters' part beside it.
    """

    weights: int
    optimizer: int
    averages: int
    gradients: int
    passing: int
    offloaded: int = 0
    on_disk: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.averages + self.gradients + self.passing

    @property
    def on_device(self) -> int:
        """What lies where the forward pass runs."""
        return self.total - self.offloaded - self.on_disk


@dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """What a rank's memory follows from, beside the settings.

    Attributes:
        sizes: elements of every trainable parameter.
        fixed: bytes of frozen parameters and buffers, those of a frozen CLIP beside the model too.
        activations: of a micro batch.
        drawing: bytes beside the weights while samples are drawn during the training; 0: none are.
    """

    sizes: Sequence[int]
    fixed: int
    activations: ActivationMemory
    drawing: int = 0


def shape_of(
    model: nn.Module, loss: LossOfModel, batch: Mapping[str, Tensor], settings: EngineSettings
) -> TrainingShape:
    """Measure a model and rehearse one micro batch.

    Args:
        model: on the meta device, or anywhere; nothing of it is used but shapes, and what is frozen.
        loss: the loss function.
        batch: of one sample; only shapes and types matter.
        settings: of the engine; what counts is the size of a micro batch, and the precision.
    """
    still = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return TrainingShape(
        sizes=[parameter.numel() for parameter in model.parameters() if parameter.requires_grad],
        fixed=sum(tensor.nbytes for tensor in (*still, *model.buffers())),
        activations=activation_memory(
            model, loss, batch, num_samples=settings.micro_batch_size, precision=settings.precision
        ),
    )


def states_and_passing(
    settings: EngineSettings, world_size: int, shape: TrainingShape, *, plain: bool = False
) -> RankMemory:
    """Add up what an engine holds.

    Args:
        settings: of the engine.
        world_size: ranks.
        shape: of the model, and of a micro batch of these settings.
        plain: whether the engine is the plain-torch one.
    """
    sizes, fixed, activations = shape.sizes, shape.fixed, shape.activations
    whole = _F32 * sum(sizes)
    part = -(-whole // world_size)
    accumulates = settings.num_micro_batches > 1
    if plain:
        passing = max(activations.peak, shape.drawing)
        return RankMemory(weights=whole + fixed, optimizer=2 * whole, averages=whole, gradients=whole, passing=passing)
    zero = deepspeed_config(settings, sum(sizes))["zero_optimization"]
    if settings.zero_stage == 0:
        kept = activations.peak_beside(lambda done: whole if accumulates else done)
        passing = max(kept, whole + min(whole, _F32 * _DENSE_BUCKET), shape.drawing)
        return RankMemory(weights=whole + fixed, optimizer=2 * whole, averages=whole, gradients=0, passing=passing)
    bucket = _F32 * zero["reduce_bucket_size"]
    buffers = bucket * (2 if zero.get("overlap_comm") else 1)
    offloaded = {"none": 0, "cpu": 4 * part, "nvme": part}[settings.offload_optimizer]
    on_disk = 3 * part if settings.offload_optimizer == "nvme" else 0
    if settings.offload_parameters != "none":
        offloaded += part
    gradients, weights = 0, whole
    if settings.zero_stage == 1:
        passing = _passing_of_stage_1(sizes, world_size, activations, buffers, accumulates)
    elif settings.zero_stage == 2:
        passing = _passing_of_stage_2(sizes, world_size, activations, bucket, buffers, accumulates)
    else:
        threshold = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
        small = _F32 * sum(size for size in sizes if size < threshold)
        gradients, weights = part + bucket, part + small
        passing = _passing_of_stage_3(sizes, whole - small, activations, bucket, zero)
        if shape.drawing:  # on every rank; the weights gathered for it go one by one, once they were used
            passing = max(passing, whole - small + shape.drawing)
    passing = max(passing, shape.drawing)
    if settings.offload_optimizer != "none":
        # The gradient's part, a staging copy of the weights (stages 1 and 2), and a parameter's gradient on its way.
        staging = part + 2 * _F32 * max(sizes) if settings.zero_stage < 3 else 0
        gradients += part + staging
        # Stage 3 keeps the sum of its gradients beside the optimizer, too.
        offloaded += part + (staging if settings.zero_stage < 3 else part)
    return RankMemory(
        weights=weights + fixed,
        optimizer=3 * part,
        averages=part,
        gradients=gradients,
        passing=passing,
        offloaded=offloaded,
        on_disk=on_disk,
    )


def _passing_of_stage_1(
    sizes: Sequence[int], world_size: int, activations: ActivationMemory, buffers: int, accumulates: bool
) -> int:
    """Gradients stay whole until all are there; then they move into the bucket, of which a copy is reduced."""
    whole = _F32 * sum(sizes)
    kept = activations.peak_beside(lambda done: (whole if accumulates else done) + (buffers if done else 0))
    return max(kept, whole + 2 * -(-whole // world_size))


def _passing_of_stage_2(
    sizes: Sequence[int], world_size: int, activations: ActivationMemory, bucket: int, buffers: int, accumulates: bool
) -> int:
    """A full bucket is reduced in the midst of the backward pass; of the result a rank keeps its part."""
    own = _F32 * _most_of_a_part(sizes, world_size)
    earlier = own if accumulates else 0  # the sum of the micro batches before
    reductions = _reductions(activations, bucket)
    first = min(reductions)

    def during(done: int) -> int:
        return (buffers if done else 0) + (own if done > first else 0)

    return earlier + max(activations.peak_beside(during, lambda done: reductions.get(done, 0)), 2 * own)


def _passing_of_stage_3(
    sizes: Sequence[int], large: int, activations: ActivationMemory, bucket: int, zero: Mapping[str, Any]
) -> int:
    """Weights are gathered ahead of their use, and stay until the backward pass has used them, as far as they may."""
    largest = min(large, _F32 * max(sizes))
    live: int = zero.get("stage3_max_live_parameters", _LIVE)
    # Of what stays, those of which the next use is near do so beside the others: all weights behind lie between, twice.
    reuse: int = zero.get("stage3_max_reuse_distance", _LIVE)
    most = min(large, _F32 * (live + reuse // 2))
    # What is gathered at once comes as one, is copied from there, and goes when all of it was needed.
    prefetch: int = zero.get("stage3_prefetch_bucket_size", _PREFETCH)
    ahead = min(large, _F32 * prefetch)
    reductions = _reductions(activations, bucket)

    def during(done: int) -> int:
        return most if done == 0 else max(largest, min(most, large - done))

    return max(
        activations.forward_peak + most + ahead,
        activations.peak_beside(during, lambda done: reductions.get(done, 0)),
    )


def _reductions(activations: ActivationMemory, bucket: int) -> dict[int, int]:
    """Find when full buckets are reduced: bytes of gradients done -> those of a copy, and of a gradient that waits."""
    found: dict[int, int] = {}
    filled = before = 0
    for done, _, _ in activations.stretches[1:]:
        size, before = done - before, done
        if filled and filled + size > bucket:
            found[done] = filled + size
            filled = 0
        filled += size
    found[before] = max(filled, found.get(before, 0))
    return found


def _most_of_a_part(sizes: Sequence[int], world_size: int) -> int:
    """Return the elements of the parameters of which the rank that has most of them keeps some."""
    part = -(-sum(sizes) // world_size)
    most = 0
    starts = [0, *itertools.accumulate(sizes)]
    for rank in range(world_size):
        low, high = bisect.bisect_right(starts, rank * part) - 1, bisect.bisect_left(starts, (rank + 1) * part)
        most = max(most, starts[high] - starts[low] if high < len(starts) else starts[-1] - starts[low])
    return most
