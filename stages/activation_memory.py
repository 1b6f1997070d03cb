"""What a micro batch holds in memory while it is trained on, found by a rehearsal in which no tensor has content.

Forward and backward pass run on fake tensors (torch's ``FakeTensorMode``): every operation happens, in its order, with
activation checkpointing and autocast, and only the storages are counted as they come and go. That takes seconds for
models of any size.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.flops import LossOfModel
from unclip_models.randomness import SampleRandom


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """Peaks beside the weights, bytes.

    Attributes:
        peak: activations, gradients of activations and the gradient of the weight at work; those that are done are
            not counted.
        peak_with_gradients: the same, with the gradients of all weights so far.
    """

    peak: int
    peak_with_gradients: int


def activation_memory(
    model: nn.Module, loss: LossOfModel, batch: Mapping[str, Tensor], *, num_samples: int, precision: str
) -> ActivationMemory:
    """Rehearse one micro batch.

    Args:
        model: on the meta device, or anywhere; nothing of it is used but shapes.
        loss: the loss function.
        batch: of one sample; only shapes and types matter.
        num_samples: in the micro batch.
        precision: ``fp32`` or ``bf16``.
    """
    was_training = model.training
    model.train()
    try:
        with FakeTensorMode(), torch.random.fork_rng(devices=()):
            return _rehearse(model, loss, batch, num_samples, precision)
    finally:
        model.train(was_training)


def _rehearse(
    model: nn.Module, loss: LossOfModel, batch: Mapping[str, Tensor], num_samples: int, precision: str
) -> ActivationMemory:
    state: dict[str, Any] = {}
    with _Storages() as storages:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            state[f"model.{name}"] = fake.requires_grad_(tensor.requires_grad)
            if tensor.requires_grad:
                fake.register_post_accumulate_grad_hook(storages.take_gradient)
        inputs = {
            name: torch.empty((num_samples, *tensor.shape[1:]), dtype=tensor.dtype, device="cpu")
            for name, tensor in batch.items()
        }
        before = storages.live
        storages.forget_peaks()
        random = SampleRandom(0, 0, range(num_samples), "cpu")
        functional_call(_Pass(model, loss, precision), state, (inputs, random))
    return ActivationMemory(peak=storages.peak - before, peak_with_gradients=storages.peak_with_gradients - before)


class _Pass(nn.Module):
    """Forward and backward pass as one call: a backward pass that recomputes activations needs the fake weights too."""

    def __init__(self, model: nn.Module, loss: LossOfModel, precision: str) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._precision = precision

    def forward(self, batch: Mapping[str, Tensor], random: SampleRandom) -> None:
        """Do both."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            value, _ = self._loss(self.model, batch, random)
        value.backward()


class _Storages(TorchDispatchMode):
    """Adds up the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.peak_with_gradients = self._gradients = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def take_gradient(self, parameter: Tensor) -> None:
        """Count a gradient that is done, and let it go."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.nbytes
        parameter.grad = None

    def forget_peaks(self) -> None:
        """Begin anew from what is alive."""
        self.peak = self.peak_with_gradients = self.live

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes()
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self._gradients)
        weakref.finalize(storage, self._drop, key, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes
