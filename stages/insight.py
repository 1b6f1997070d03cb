"""What a training tells of itself beside its loss: validation, samples, arithmetic, memory; and when to end it.

Nothing here changes the training: weights, their averages and torch's generator are as they were afterwards. Early
stopping ends it, and says which step to export.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from stages.early_stop import LOST, EarlyStop
from stages.engine import Engine
from stages.errors import ConfigError
from stages.hardware import memory_gib, peak_tflops
from stages.held_out import HeldOut
from stages.pictures import Pixels
from stages.sample_grids import Drawn
from stages.validation import Validation
from stages.validation_config import SamplesConfig, ValidationConfig

_TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a stage gives, to look at its training with.

    Attributes:
        held_out: samples that are not trained on.
        draw: makes samples with the model on a device.
        flops_per_sample: operations of forward and backward pass (``stages/flops.py``).
    """

    held_out: HeldOut | None = None
    draw: Callable[[nn.Module, torch.device], Drawn] | None = None
    flops_per_sample: float | None = None


NOTHING_TO_WATCH = Watch()


class _Settings(Protocol):
    """The settings that are read here, of a ``TrainingConfig``."""

    @property
    def num_steps(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def peak_tflops(self) -> float | None: ...
    @property
    def validation(self) -> ValidationConfig: ...
    @property
    def samples(self) -> SamplesConfig: ...


@dataclass(frozen=True)
class Seen:
    """What was seen at a step.

    Attributes:
        numbers: for the line of the step; those of samples on the first rank only.
        picture: a grid of samples, likewise.
        seconds: that it took; None where nothing was due.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    picture: Pixels | None = None
    seconds: float | None = None


class Insight:
    """Looks at one training; every rank has one.

    Args:
        config: the training's.
        watch: what to look with.
        engine: the training's.
        micro_batch_size: samples per forward pass and rank.
        num_timesteps: of the diffusion; None for models without.
        lines: of the checkpoint that the training resumes from.

    Raises:
        ConfigError: if there are no samples to validate on or to draw.
    """

    def __init__(
        self,
        config: _Settings,
        watch: Watch,
        engine: Engine,
        *,
        micro_batch_size: int,
        num_timesteps: int | None,
        lines: Iterable[Mapping[str, float | None]] = (),
    ) -> None:
        self._config = config
        self._watch = watch
        self._engine = engine
        self._flops = watch.flops_per_sample
        self._peak = config.peak_tflops
        if self._peak is None and engine.device.type == "cuda":
            self._peak = peak_tflops(torch.cuda.get_device_name(engine.device), config.precision)
        settings = config.validation
        self._validation: Validation | None = None
        if settings.is_on:
            if watch.held_out is None:
                raise ConfigError("validation: this training holds no samples out; write validation.num_samples: 0")
            self._validation = Validation(settings, watch.held_out, num_timesteps, micro_batch_size)
        if config.samples.every_steps and watch.draw is None:
            raise ConfigError("samples.every_steps: samples are drawn of held-out ones; set validation.num_samples")
        self._early_stop = EarlyStop(
            settings.early_stop_patience, settings.early_stop_min_delta, settings.judged
        ).replay(lines)

    @property
    def has_ended(self) -> bool:
        """Whether the training has been stopped early."""
        return self._early_stop.has_ended

    @property
    def best_step(self) -> int | None:
        """The step to export, and whose checkpoint is to be kept; None: the last one."""
        return self._early_stop.best_step

    def lose(self, steps: Iterable[int], done: int) -> dict[str, float]:
        """Take in that the checkpoints of steps could not be written; return what the next line has to tell of it."""
        lost = [step for step in steps if self._early_stop.lose(step, done)]
        return {LOST: float(lost[-1])} if lost else {}

    def choose_among(self, steps: Collection[int]) -> None:
        """Let the best step be one of those whose checkpoints there are."""
        self._early_stop.choose_among(steps)

    def look(self, done: int) -> Seen:
        """Validate and draw what is due after a step (collective)."""
        validating = self._validation is not None and self._is_due(done, self._config.validation.every_steps)
        drawing = self._is_due(done, self._config.samples.every_steps)
        if not (validating or drawing):
            return Seen()
        started_at = time.monotonic()
        numbers: dict[str, float] = {}
        picture = None
        device = self._engine.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if self._validation is not None and validating:
                numbers |= self._validation(self._engine)
                self._early_stop.see(done, numbers)
            if drawing:
                drawn = self._draw()
                numbers |= drawn.numbers
                picture = drawn.picture
        return Seen(numbers, picture, time.monotonic() - started_at)

    def machine(self, samples_per_s: float) -> dict[str, float]:
        """Return memory, of the worst rank, and arithmetic (collective)."""
        numbers = {"memory_gib": max(self._engine.gather(memory_gib(self._engine.device)))}
        if self._flops is not None:
            numbers["tflops_per_s"] = self._flops * samples_per_s / self._engine.world_size / _TERA
            if self._peak is not None:
                numbers["mfu"] = numbers["tflops_per_s"] / self._peak
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def _is_due(self, done: int, every_steps: int) -> bool:
        return every_steps > 0 and (done % every_steps == 0 or done == self._config.num_steps)

    def _draw(self) -> Drawn:
        """Draw on the first rank; where weights are partitioned all ranks have to draw the same."""
        assert self._watch.draw is not None
        drawn = Drawn()
        with self._engine.evaluating(averaged=True, whole=True) as model:
            if self._engine.rank == 0 or self._engine.partitioned:
                drawn = self._watch.draw(model, self._engine.device)
        return drawn
