"""How much arithmetic one training sample takes, counted on the model itself.

The loss and its gradients are computed once on the meta device, where tensors have shapes and no numbers, and torch's
counter adds up the matrix products, convolutions and attentions (two operations per multiply-add). What activation
checkpointing repeats is not counted, nor is a frozen CLIP that encodes captions: model FLOPs, as in PaLM (Chowdhery et
al. 2022, appendix B).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from unclip_models.randomness import SampleRandom

LossOfModel = Callable[[nn.Module, Mapping[str, Tensor], SampleRandom], tuple[Tensor, Mapping[str, Tensor]]]


def flops_per_sample(model: nn.Module, loss: LossOfModel, batch: Mapping[str, Tensor]) -> float:
    """Count the operations of forward and backward pass, per sample.

    Args:
        model: not compiled yet; nothing of it is changed. Frozen parameters get no gradient, and cost none.
        loss: the loss function.
        batch: its tensors; only their shapes matter.
    """
    num_samples = len(next(iter(batch.values())))
    meta = {name: tensor.to("meta") for name, tensor in batch.items()}
    random = SampleRandom(0, 0, range(num_samples), "meta")
    state: dict[str, Any] = {name: _on_meta(tensor) for name, tensor in _tensors(model)}
    with torch.random.fork_rng(devices=()), _without_recomputation(model), FlopCounterMode(display=False) as counter:
        value, _ = functional_call(_LossOf(model, loss), state, (meta, random))
        value.backward()
    return float(counter.get_total_flops()) / num_samples


class _LossOf(nn.Module):
    """The loss as a module's forward pass, for ``functional_call``."""

    def __init__(self, model: nn.Module, loss: LossOfModel) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self._loss(self.model, batch, random)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield f"model.{name}", tensor


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _without_recomputation(model: nn.Module) -> Iterator[None]:
    recomputing: list[Any] = [module for module in model.modules() if getattr(module, "checkpoint_activations", False)]
    for module in recomputing:
        module.checkpoint_activations = False
    try:
        yield
    finally:
        for module in recomputing:
            module.checkpoint_activations = True
