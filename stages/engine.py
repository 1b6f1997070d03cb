"""What drives the optimizer: the protocol of an engine, and the plain-torch one.

An engine owns a model, its optimizer and the moving average of its weights; the training loop (``stages/training.py``)
knows only the few methods of ``Engine``. ``cluster/deepspeed_engine.py`` is the other implementation; a test holds
their losses equal.

Every engine keeps its state (``stages/sharded_state.py``) in the same format, so a checkpoint of one is read by all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.adamw import FlatAdamW
from stages.compute_clock import ComputeClock
from stages.engine_settings import EngineSettings
from stages.errors import ConfigError
from stages.loss_scale import LossScale
from stages.sharded_state import Fragment, ShardedState, Snapshot
from stages.state_file import RANK_FILE, StateFile, Stretch, rank_file
from unclip_models.randomness import SampleRandom

T = TypeVar("T")
# What is computed in half precision, by the setting.
AUTOCAST: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
MicroBatch = tuple[Mapping[str, Tensor], SampleRandom]
# (loss, gradient norm), which are the same on every rank -> whether to take the step
Accept = Callable[[float, float], bool]


class LossFunction(Protocol):
    """The one thing in which trainings differ."""

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], random: SampleRandom
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute the mean loss of a micro batch, and detached per-sample terms ``(B,)`` for the metrics."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: mean over the global batch, the same on every rank.
        grad_norm: global norm before clipping; nan or inf when it was not finite.
        applied: False when loss or gradient was not finite on some rank, or not accepted, so that all ranks left the
            weights alone.
        terms: per-sample terms of this rank's samples, detached.
        compute_s: what this rank computed before it waited for another one, seconds.
        overflowed: the gradient was too large for its loss scale, which is smaller now; True only with fp16.
        loss_scale: what the loss was multiplied with.
    """

    loss: float
    grad_norm: float
    applied: bool
    terms: Mapping[str, Tensor]
    compute_s: float = 0.0
    overflowed: bool = False
    loss_scale: float = 1.0

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were finite."""
        return is_finite(self.loss, self.grad_norm)


def is_finite(loss: float, grad_norm: float) -> bool:
    """Tell whether both numbers of a step are finite; the least that is asked of every step."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


class Engine(Protocol):
    """A model with its optimizer, on one rank of a training."""

    rank: int
    world_size: int
    device: torch.device
    layout: str  # how the state is spread over files; equal layouts read only their own rank's file
    partitioned: bool  # whether a forward pass needs all ranks, because each holds a part of the weights

    def step(
        self, micro_batches: Iterable[MicroBatch], learning_rate: float, accepts: Accept = is_finite
    ) -> StepResult:
        """Accumulate the gradients of the micro batches, clip, step, and update the moving average.

        Args:
            micro_batches: this rank's part of the global batch.
            learning_rate: of this step.
            accepts: asked between gradient and optimizer step, for finite numbers only; if it says no, the weights are
                left alone. A pure function of its arguments, the same on every rank, or the ranks would part.
        """
        ...

    def evaluating(self, *, averaged: bool, whole: bool = False) -> AbstractContextManager[nn.Module]:
        """Lend the model for measurements (collective): in evaluation mode, without gradients, in its precision.

        On leaving, weights and averages are what they were, to the last bit. After an error they are not: the training
        is over then, and to put them back would wait for ranks that have gone on.

        Args:
            averaged: whether the weights are the averaged ones meanwhile.
            whole: whether every rank needs all of the weights, to call other methods of the model than its loss.
        """
        ...

    def loss_of(self, micro_batch: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute loss and terms of a micro batch, inside ``evaluating`` (collective if ``partitioned``)."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a float64 CPU tensor over all ranks (collective)."""
        ...

    def gather(self, value: T) -> list[T]:
        """Return the plain values of all ranks, in rank order, on every rank (collective; also a barrier)."""
        ...

    def snapshot(self) -> Snapshot | None:
        """Copy this rank's part of the state; None where another rank holds the same and writes it."""
        ...

    def needed(self, files: Mapping[str, Sequence[Stretch]]) -> list[str]:
        """Choose the state files that hold something of this rank.

        Args:
            files: of a checkpoint: name -> what it holds.

        Returns:
            Their names in the same order, one at least; all of them, if together they lack something.
        """
        ...

    def load(self, files: Iterable[StateFile]) -> None:
        """Take up a saved state, which is in force after ``publish``.

        If it fails, what the engine holds is good for nothing but to load another one.

        Args:
            files: those named by ``files_to_load``, or of these the ``needed`` ones.

        Raises:
            IntegrityError: if a file is damaged, or they do not hold the whole state of this model.
            StorageError: if a file cannot be read.
        """
        ...

    def publish(self) -> None:
        """Bring a state that all ranks have loaded to where the forward pass reads it (collective)."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...


class EngineFactory(Protocol):
    """Makes an engine of a model, on the rank where it is called."""

    def __call__(self, model: nn.Module, loss: LossFunction, settings: EngineSettings) -> Engine:
        """Build the engine; ``model`` belongs to it from then on."""
        ...


def files_to_load(names: Iterable[str], saved_layout: str, engine: Engine) -> list[str]:
    """Choose the files of a checkpoint that this rank may have to read.

    A rank of the same layout needs its own file alone; after a change of world size, ZeRO stage or engine its fragments
    are spread over files, and ``Engine.needed`` tells which.
    """
    files = sorted(name for name in names if RANK_FILE.fullmatch(name))
    own = rank_file(engine.rank)
    return [own] if saved_layout == engine.layout and own in files else files


# ---- the plain-torch engine ---------------------------------------------------------------------------------------


class TorchEngine:
    """The reference engine: plain torch, every rank holds everything.

    All weights live in one flat tensor and all gradients in another, so that clipping, AdamW and the moving average
    cost a few calls a step however many layers there are. If ``torch.distributed`` is up, gradients are averaged over
    its ranks.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, settings: EngineSettings) -> None:
        self.rank, self.world_size = position()
        self.device = device_of(settings)
        self.layout = "replicated"
        self.partitioned = False
        self._settings = settings
        self._loss = loss
        self._model = model.to(self.device).train()
        self._params = trainable(self._model)
        self._weights, self._gradients = _flatten(self._params, self.device)
        optimizer = make_optimizer([self._weights], settings)
        fragments = _whole_fragments(self._params)
        self._scale = loss_scale(settings)
        self._state = ShardedState([self._weights], fragments, optimizer, settings.ema_decay, self._scale)
        self.publish()

    def step(
        self, micro_batches: Iterable[MicroBatch], learning_rate: float, accepts: Accept = is_finite
    ) -> StepResult:
        """See ``Engine.step``."""
        self._gradients.zero_()
        losses, terms = [], []
        scale = self._scale.value if self._scale else 1.0
        clock = ComputeClock(self.device)
        for batch, random in micro_batches:
            with autocast(self._settings):
                loss, per_sample = self._loss(self._model, batch, random)
            (loss / self._settings.num_micro_batches * scale).backward()
            losses.append(loss.detach())
            terms.append(per_sample)
        clock.stop()
        if self.world_size > 1:
            dist.all_reduce(self._gradients)
            self._gradients /= self.world_size
        if self._scale:
            self._gradients /= scale
        loss_value = mean_over_ranks(losses, self.world_size)
        norm = float(torch.linalg.vector_norm(self._gradients))
        applied = is_finite(loss_value, norm) and accepts(loss_value, norm)
        if applied:
            if norm > self._settings.gradient_clipping:
                self._gradients *= self._settings.gradient_clipping / (norm + 1e-6)
            set_learning_rate(self._state.optimizer, learning_rate)
            self._state.optimizer.step()
            self._state.update_average()
        overflowed = self._scale is not None and self._scale.take(loss_value, norm)
        return StepResult(loss_value, norm, applied, concatenate(terms), clock.elapsed_s(), overflowed, scale)

    @contextlib.contextmanager
    def evaluating(self, *, averaged: bool, whole: bool = False) -> Iterator[nn.Module]:
        """See ``Engine.evaluating``."""
        if averaged:
            self._state.exchange()
        self._model.eval()
        with torch.no_grad(), autocast(self._settings):
            yield self._model
        self._model.train()
        if averaged:
            self._state.exchange()

    def loss_of(self, micro_batch: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See ``Engine.loss_of``."""
        return self._loss(self._model, *micro_batch)

    def total(self, values: Tensor) -> Tensor:
        """See ``Engine.total``."""
        return sum_over_ranks(values, self.device, self.world_size)

    def gather(self, value: T) -> list[T]:
        """See ``Engine.gather``."""
        return gather_from_ranks(value, self.world_size)

    def snapshot(self) -> Snapshot | None:
        """See ``Engine.snapshot``; all ranks hold the same, so the first one's counts."""
        return self._state.snapshot(0) if self.rank == 0 else None

    def needed(self, files: Mapping[str, Sequence[Stretch]]) -> list[str]:
        """See ``Engine.needed``."""
        return self._state.needed(files)

    def load(self, files: Iterable[StateFile]) -> None:
        """See ``Engine.load``."""
        self._state.load(files)

    def publish(self) -> None:
        """Let all ranks have the first one's weights: what they begin with, and after a ``load`` no news to anyone."""
        if self.world_size > 1:
            dist.broadcast(self._weights.detach(), src=0)

    def close(self) -> None:
        """Nothing to release."""


def _flatten(params: Mapping[str, nn.Parameter], device: torch.device) -> tuple[nn.Parameter, Tensor]:
    """Move parameters and gradients into two flat tensors of which they become views."""
    num_elements = sum(param.numel() for param in params.values())
    weights = nn.Parameter(torch.empty(num_elements, device=device))
    gradients = torch.zeros(num_elements, device=device)
    offset = 0
    for param in params.values():
        stretch = slice(offset, offset + param.numel())
        weights.data[stretch] = param.data.reshape(-1)
        param.data = weights.data[stretch].view(param.shape)
        param.grad = gradients[stretch].view(param.shape)
        offset += param.numel()
    weights.grad = gradients
    return weights, gradients


def _whole_fragments(params: Mapping[str, nn.Parameter]) -> list[Fragment]:
    fragments, offset = [], 0
    for name, param in params.items():
        fragments.append(Fragment(name, 0, 0, offset, param.numel()))
        offset += param.numel()
    return fragments


# ---- shared by engines --------------------------------------------------------------------------------------------


def position() -> tuple[int, int]:
    """Return (rank, world size) of this process; (0, 1) outside a training group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def device_of(settings: EngineSettings) -> torch.device:
    """Return the device to train on.

    Raises:
        ConfigError: if a GPU is asked for where there is none.
    """
    if settings.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("gpus_per_rank: a GPU is asked for, but torch sees none here; set it to 0 for the CPU")
    return torch.device("cuda", torch.cuda.current_device())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters to train, by name.

    Raises:
        ConfigError: if there are none, or one is not float32 (half precision is done by autocast over float32 weights).
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not params:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter")
    for name, param in params.items():
        if param.dtype != torch.float32:
            raise ConfigError(f"{type(model).__name__}: {name} is {param.dtype}; engines train float32 weights")
    return params


def make_optimizer(params: Sequence[Tensor], settings: EngineSettings) -> FlatAdamW:
    """Build AdamW; the learning rate is set at every step."""
    return FlatAdamW(
        params, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=settings.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def autocast(settings: EngineSettings) -> torch.autocast:
    """Return the context in which losses are computed: half precision where it is safe, or nothing.

    Weights in half precision are kept for a backward pass only; else half the model would lie beside the whole one.
    """
    dtype = AUTOCAST.get(settings.precision)
    kept = torch.is_grad_enabled()
    return torch.autocast(settings.device, dtype=dtype, enabled=dtype is not None, cache_enabled=kept)


def loss_scale(settings: EngineSettings) -> LossScale | None:
    """Return the loss scale that the precision needs: the range of fp16 is too small for gradients as they are."""
    return LossScale() if settings.precision == "fp16" else None


def sum_over_ranks(values: Tensor, device: torch.device, world_size: int) -> Tensor:
    """Sum a float64 CPU tensor over all ranks."""
    if world_size == 1:
        return values
    moved = values.to(device, copy=True)
    dist.all_reduce(moved)
    return moved.cpu()


def gather_from_ranks(value: T, world_size: int) -> list[T]:
    """Collect the plain values of all ranks, in rank order."""
    if world_size == 1:
        return [value]
    values: list[T] = [value] * world_size
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(losses: Sequence[Tensor], world_size: int) -> float:
    """Average micro-batch losses over this rank's micro batches and over all ranks."""
    mean = torch.stack(list(losses)).double().mean()
    if world_size > 1:
        dist.all_reduce(mean)
        mean /= world_size
    return float(mean)


def concatenate(terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the per-sample terms of micro batches."""
    if len(terms) == 1:
        return dict(terms[0])
    return {name: torch.cat([torch.atleast_1d(term[name]) for term in terms]) for name in terms[0]}
