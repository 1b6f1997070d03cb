"""What ``gpu_step.py`` is asked to measure, and what it finds; how micro batches grow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODEL_WORK = ("matrix product", "convolution", "attention")  # what the count of FLOPs consists of
_WORTHWHILE = 1.02  # a larger micro batch that is not faster by so much is the last one


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure.

    Attributes:
        config: file with the sizes; its section ``model`` is read.
        model: a stage's name.
        engine: ``torch``, ``zero 1`` to ``zero 3``, or one of these with ``, offloaded``: the optimizer on the CPU, or
            ``, all offloaded``: the weights of stage 3, too.
        options: of ``channels_last`` and ``compile``, with spaces between.
        micro_batch: samples of a step, with which to begin.
        largest: micro batches grow up to this one, as long as there is memory and they get faster.
        device: ``cuda`` or ``cpu``.
        min_seconds: steps of a micro batch are repeated for so long, three times at least.
        limit_s: no larger micro batch is begun after half of it, and no job takes longer.
    """

    config: str
    model: str
    engine: str = "torch"
    options: str = ""
    micro_batch: int = 1
    largest: int = 1
    device: str = "cuda"
    min_seconds: float = 2.0
    limit_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What one operation of torch took of a step: its name, what kind of work it is, and its share of the step."""

    name: str
    kind: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Steps of one micro batch.

    Attributes:
        micro_batch: samples of each.
        step_s: seconds of every step.
        peak_gib: the most memory that was in use; allocated on a GPU, resident on a CPU.
        reserved_gib: what torch had taken of the GPU.
    """

    micro_batch: int
    step_s: Sequence[float]
    peak_gib: float
    reserved_gib: float

    @property
    def samples_per_s(self) -> float:
        """Return the median speed."""
        return self.micro_batch / statistics.median(self.step_s)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured.

    Attributes:
        num_parameters: of the model.
        flop_per_sample: counted on the model, forward and backward, nothing twice.
        trials: of every micro batch, the smallest first.
        end: why there are no larger ones; empty while there may be.
        planned_gib: what the planner expects the fastest one to take of the device; None until all are tried.
        shares: of a step of the fastest one by kind of work, the largest first; ``idle`` is when the device waited.
        operations: the largest.
    """

    num_parameters: int
    flop_per_sample: float
    trials: Sequence[Trial] = ()
    end: str = ""
    planned_gib: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    operations: Sequence[Operation] = ()

    @property
    def best(self) -> Trial:
        """The fastest micro batch."""
        return max(self.trials, key=lambda trial: trial.samples_per_s)

    @property
    def bottleneck(self) -> str:
        """Name the largest kind of work that is not the model's own arithmetic: what to make faster next."""
        kind = next(kind for kind in self.shares if kind not in MODEL_WORK)
        worst = next((operation.name for operation in self.operations if operation.kind == kind), None)
        return f"{kind} {self.shares[kind]:.0%}" + (f" ({worst})" if worst else "")


def next_size(trials: Sequence[Trial], largest: int) -> tuple[int | None, str]:
    """Choose the next micro batch, or none, and say why none."""
    *before, last = trials
    if before and last.samples_per_s < _WORTHWHILE * max(trial.samples_per_s for trial in before):
        return None, "no faster"
    size = last.micro_batch * (4 if last.micro_batch < 4 else 2)
    return (size, "") if size <= largest else (None, "the largest")


def found_from_json(values: Mapping[str, Any]) -> Found:
    """Read a line that ``main`` printed."""
    operations = [Operation(**operation) for operation in values["operations"]]
    return Found(**{**values, "trials": [Trial(**trial) for trial in values["trials"]], "operations": operations})
