"""The engine that trains with DeepSpeed ZeRO: optimizer states, gradients and weights partitioned over the ranks.

The same code runs on CPUs (gloo) and GPUs (nccl). Weights are float32 and half precision is autocast over them, exactly
as in the plain-torch engine, so the two agree. Checkpoints are ours (``stages/sharded_state.py``), not DeepSpeed's: any
world size and ZeRO stage reads them, and they hold no pickle. So is the loss scale of fp16, which they keep.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.deepspeed_config import deepspeed_config
from stages.adamw import FlatAdamW
from stages.compute_clock import ComputeClock
from stages.engine import (
    Accept,
    LossFunction,
    MicroBatch,
    StepResult,
    autocast,
    concatenate,
    device_of,
    gather_from_ranks,
    is_finite,
    loss_scale,
    mean_over_ranks,
    position,
    set_learning_rate,
    sum_over_ranks,
    trainable,
)
from stages.engine_settings import EngineSettings
from stages.errors import ConfigError
from stages.mapped_memory import zeros_in_files
from stages.sharded_state import Fragment, ShardedState, Snapshot
from stages.state_file import StateFile, Stretch
from unclip_models.randomness import SampleRandom

T = TypeVar("T")

# Settings of DeepSpeed whose output goes through its logger.
_TALKING = {"steps_per_print", "dump_state", "wall_clock_breakdown", "memory_breakdown", "comms_logger"}


class DeepSpeedEngine:
    """See ``stages.engine.Engine``. ``torch.distributed`` must be up, if only with one rank.

    Args:
        model: the same weights on every rank.
        loss: the loss function.
        settings: ``zero_stage`` 0 to 3 says what is partitioned.

    Raises:
        ConfigError: if there is no process group, no GPU where one is asked for, or DeepSpeed refuses its settings.
        StorageError: if ``offload_dir`` has no room.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, settings: EngineSettings) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError("engine: deepspeed needs a process group; run on Ray, or set engine: torch")
        self.rank, self.world_size = position()
        self.device = device_of(settings)
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))  # DeepSpeed insists on it
        deepspeed = _import_deepspeed(settings.device, quiet=not _TALKING & set(settings.deepspeed))
        # Ranks of stage 0 hold the same, whatever their number, as those of the plain-torch engine do.
        self.layout = f"zero{settings.zero_stage}/{self.world_size}" if settings.zero_stage else "replicated"
        self.partitioned = settings.zero_stage == 3
        self._settings = settings
        self._model = model
        module = _LossModule(model.to(self.device).train(), loss, settings)
        names = {id(param): name for name, param in trainable(model).items()}
        config = deepspeed_config(settings, sum(param.numel() for param in trainable(model).values()))
        in_files = zeros_in_files(settings.offload_dir) if settings.offload_dir else None
        self._optimizer = _WatchedAdamW(
            trainable(model).values(), settings, self._gradient_norm, in_files or torch.zeros_like
        )
        self._linear = torch.nn.functional.linear
        with _no_compiler():
            _check_config(deepspeed, config)
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self._optimizer,
                config=config,
                dist_init_required=False,
            )
        masters, fragments = _layout_of(self._engine, names, settings.zero_stage, self.rank)
        self._scale = loss_scale(settings)
        self._state = ShardedState(masters, fragments, self._optimizer, settings.ema_decay, self._scale, in_files)

    def step(
        self, micro_batches: Iterable[MicroBatch], learning_rate: float, accepts: Accept = is_finite
    ) -> StepResult:
        """See ``Engine.step``.

        The ranks meet in the backward pass already, so ``compute_s`` is of the forward passes. In stage 3 these gather
        weights and thereby wait for others too.
        """
        set_learning_rate(self._optimizer, learning_rate)
        losses: list[Tensor] = []
        terms: list[Mapping[str, Tensor]] = []
        scale = self._set_scale()
        clock = ComputeClock(self.device)
        for batch, random in micro_batches:
            clock.start()
            loss, per_sample = self._engine(batch, random)
            clock.stop()
            self._engine.backward(loss if self._settings.zero_stage else loss * scale)
            losses.append(loss.detach())
            terms.append(per_sample)
            if len(losses) < self._settings.num_micro_batches:
                self._engine.step()  # only counts
        loss_value = mean_over_ranks(losses, self.world_size)
        # DeepSpeed knows the norm only inside its own step, so the optimizer it calls asks there.
        self._optimizer.accepts = lambda norm: is_finite(loss_value, norm) and accepts(loss_value, norm)
        self._engine.step()
        norm = self._gradient_norm()
        applied = self._optimizer.accepts(norm)
        if applied:
            self._state.update_average()
        overflowed = self._scale is not None and self._scale.take(loss_value, norm)
        return StepResult(loss_value, norm, applied, concatenate(terms), clock.elapsed_s(), overflowed, scale)

    def _set_scale(self) -> float:
        """Let the step's gradients be scaled, and scaled back before they are clipped."""
        if self._scale is None:
            return 1.0
        if self._settings.zero_stage:
            self._engine.optimizer.override_loss_scale(self._scale.value)
        else:
            self._optimizer.loss_scale = self._scale.value
        return self._scale.value

    @contextlib.contextmanager
    def evaluating(self, *, averaged: bool, whole: bool = False) -> Iterator[nn.Module]:
        """See ``Engine.evaluating``."""
        if averaged:
            self._exchange()
        self._engine.eval()
        with torch.no_grad(), autocast(self._settings), self._gathered(whole):
            yield self._model
        self._engine.train()
        if averaged:
            self._exchange()

    def loss_of(self, micro_batch: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See ``Engine.loss_of``."""
        loss: tuple[Tensor, Mapping[str, Tensor]] = self._engine(*micro_batch)
        return loss

    def total(self, values: Tensor) -> Tensor:
        """See ``Engine.total``."""
        return sum_over_ranks(values, self.device, self.world_size)

    def gather(self, value: T) -> list[T]:
        """See ``Engine.gather``."""
        return gather_from_ranks(value, self.world_size)

    def snapshot(self) -> Snapshot | None:
        """See ``Engine.snapshot``; in stage 0 all ranks hold the same, so the first one's counts."""
        return self._state.snapshot(self.rank) if self.rank == 0 or self._settings.zero_stage > 0 else None

    def needed(self, files: Mapping[str, Sequence[Stretch]]) -> list[str]:
        """See ``Engine.needed``."""
        return self._state.needed(files)

    def load(self, files: Iterable[StateFile]) -> None:
        """See ``Engine.load``."""
        self._state.load(files)

    def publish(self) -> None:
        """See ``Engine.publish``: of changed master weights, to the weights that DeepSpeed computes with."""
        optimizer = self._engine.optimizer
        if self._settings.zero_stage in (1, 2):
            optimizer.update_lp_params()
        elif self._settings.zero_stage == 3:
            _publish_stage_3(optimizer)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()
        # Stage 3 puts its own in its place, for the whole process, whose bias gradients round differently.
        torch.nn.functional.linear = self._linear

    def _exchange(self) -> None:
        self._state.exchange()
        self.publish()

    def _gathered(self, whole: bool) -> AbstractContextManager[Any]:
        """Hold all parameters on every rank, where that is asked for and they are partitioned."""
        if not (whole and self.partitioned):
            return contextlib.nullcontext()
        zero = importlib.import_module("deepspeed").zero
        return zero.GatheredParameters(list(self._model.parameters()))  # type: ignore[no-any-return]

    def _gradient_norm(self) -> float:
        """Return the norm of this step's gradient before clipping, known from the moment the optimizer is called."""
        norm = self._optimizer.norm if self._settings.zero_stage == 0 else self._engine.optimizer._global_grad_norm
        return math.nan if norm is None else float(norm)


class _LossModule(nn.Module):
    """The model as DeepSpeed wants it: calling it computes the loss."""

    def __init__(self, model: nn.Module, loss: LossFunction, settings: EngineSettings) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._settings = settings

    def forward(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute the mean loss and the per-sample terms."""
        with autocast(self._settings):
            return self._loss(self.model, batch, random)


class _WatchedAdamW(FlatAdamW):
    """AdamW that asks before it touches the weights, and that clips where DeepSpeed does not (stage 0)."""

    def __init__(
        self,
        params: Iterable[Tensor],
        settings: EngineSettings,
        gradient_norm: Callable[[], float],
        zeros_like: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(
            params,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            zeros_like=zeros_like,
        )
        self.accepts: Callable[[float], bool] = math.isfinite
        self.norm: float | None = None
        self.loss_scale = 1.0  # of gradients that DeepSpeed does not scale back (stage 0)
        self._gradient_norm = gradient_norm
        self._max_norm = settings.gradient_clipping if settings.zero_stage == 0 else None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update, unless loss or gradient norm are not accepted; called once per parameter group in stages 1 to 3."""
        gradients = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        if self._max_norm is not None:
            if self.loss_scale != 1.0:
                torch._foreach_div_(gradients, self.loss_scale)
            self.norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        norm = self._gradient_norm()
        if not self.accepts(norm):
            return
        if self._max_norm is not None and norm > self._max_norm:
            torch._foreach_mul_(gradients, self._max_norm / (norm + 1e-6))
        super().step(closure)


def _check_config(deepspeed: Any, config: dict[str, Any]) -> None:
    """Let DeepSpeed's own classes read the configuration before anything is built from it."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except Exception as error:  # of any class, pydantic's and bare assertions among them
        reason = " ".join(str(error).split())
        raise ConfigError(f"deepspeed: DeepSpeed refuses its settings ({reason}); change `deepspeed:`") from error


def _import_deepspeed(device: str, *, quiet: bool) -> Any:
    """Import DeepSpeed, for this kind of device, without its just-in-time compilation for CPUs."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    with _no_compiler():
        deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR if quiet else logging.INFO)
    if device == "cpu":
        # Compiling its shared-memory collectives takes a minute and a half; gloo does.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Make ``torch.compile`` do nothing for a moment.

    DeepSpeed decorates one function, of an optimizer not used here, with it when first imported. That alone would
    import torch's compiler, which takes longer than everything else on the way to the first step.
    """

    def unchanged(function: Any = None, **options: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    compile_function = torch.compile
    torch.compile = unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def _layout_of(
    engine: Any, names: Mapping[int, str], zero_stage: int, rank: int
) -> tuple[Sequence[Tensor], Sequence[Fragment]]:
    """Find this rank's master weights in DeepSpeed's optimizer, and what lies where in them."""
    optimizer = engine.optimizer
    if zero_stage == 0:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        return params, [Fragment(names[id(p)], 0, i, 0, p.numel()) for i, p in enumerate(params)]
    if zero_stage == 3:
        return optimizer.fp32_partitioned_groups_flat, list(_fragments_of_stage_3(optimizer, names, rank))
    return optimizer.single_partition_of_fp32_groups, list(_fragments_of_stage_1_2(optimizer, names))


def _fragments_of_stage_1_2(optimizer: Any, names: Mapping[int, str]) -> Iterator[Fragment]:
    """A group is flattened as one and cut evenly, wherever that falls inside a parameter."""
    for flat, group in enumerate(optimizer.bit16_groups):
        for param in group:
            mapping = param._hp_mapping
            if mapping is not None:  # some of it lies on this rank
                here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                yield Fragment(names[id(param)], here.start, flat, there.start, here.numel)


def _fragments_of_stage_3(optimizer: Any, names: Mapping[int, str], rank: int) -> Iterator[Fragment]:
    """Every parameter is cut evenly, the last part padded."""
    for flat, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for param in group:
            size = param.partition_numel()
            length = max(0, min(size, param.ds_numel - rank * size))
            if length:
                yield Fragment(names[id(param)], rank * size, flat, offset, length)
            offset += size


def _publish_stage_3(optimizer: Any) -> None:
    """Bring changed master weights into the partitions that the forward pass gathers."""
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:  # small ones that stay gathered
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
