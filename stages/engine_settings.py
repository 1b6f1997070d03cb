"""What an engine has to know about a training, as plain values; the engines themselves need torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "cpu"]
OptimizerOffload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Everything an engine has to know about a training.

    Attributes:
        num_micro_batches: gradient accumulation: micro batches per optimizer step and rank.
        micro_batch_size: samples in each.
        beta1: Adam's decay of the first moment.
        beta2: Adam's decay of the second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled (AdamW).
        gradient_clipping: largest global gradient norm.
        precision: ``fp32``; ``bf16`` or ``fp16``: autocast over float32 weights, with a loss scale for ``fp16``.
        ema_decay: of the moving average of the weights, warmed up from the first step.
        zero_stage: which states DeepSpeed partitions over the ranks (0: none, 1: optimizer, 2: + gradients,
            3: + weights); ignored by the plain-torch engine.
        offload_optimizer: where master weights, moments and averages are kept: with the weights, or in the CPU's
            memory, where AdamW then runs; with ``nvme``, all of it but the masters in files.
        offload_dir: the folder of these files.
        offload_parameters: the same for the weights of stage 3.
        deepspeed: further settings of DeepSpeed (``stages/deepspeed_keys.py``).
        device: ``cpu`` or ``cuda``.
    """

    num_micro_batches: int = 1
    micro_batch_size: int = 1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0
    precision: Precision = "fp32"
    ema_decay: float = 0.9999
    zero_stage: int = 1
    offload_optimizer: OptimizerOffload = "none"
    offload_dir: str | None = None
    offload_parameters: Offload = "none"
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
