"""What a batch holds in memory while it is trained on or drawn, found by a rehearsal in which no tensor has content.

Forward and backward pass run on fake tensors (torch's ``FakeTensorMode``): every operation happens, in its order, with
activation checkpointing and autocast, and only the storages are counted as they come and go. That takes seconds for
models of any size.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.engine import autocast
from stages.engine_settings import EngineSettings, Precision
from stages.flops import LossOfModel
from unclip_models.randomness import SampleRandom

Draw = Callable[[nn.Module, Mapping[str, Tensor]], object]


@dataclass(frozen=True)
class ActivationMemory:
    """Activations, gradients of activations and the gradient of the weight at work, over a micro batch.

    Attributes:
        stretches: one from each gradient of a weight that is done to the next, in the order of the pass, the first
            from its beginning: bytes of the gradients done so far; bytes of all else at its start; their peak in it.
        forward_peak: the peak until the forward pass comes to the last module with weights, in bytes.
    """

    stretches: Sequence[tuple[int, int, int]]
    forward_peak: int

    @property
    def peak(self) -> int:
        """Bytes at the worst moment; gradients that are done are not counted."""
        return self.peak_beside(lambda done: 0)

    def peak_beside(self, during: Callable[[int], int], at_gradients: Callable[[int], int] = lambda done: 0) -> int:
        """Return the bytes at the worst moment of all this and what is held beside it.

        Args:
            during: bytes of gradients done -> bytes held until the next one is.
            at_gradients: the same -> further bytes, held for the moment in which a gradient is done.
        """
        return max(
            max(peak + during(done), start + during(done) + (at_gradients(done) if done else 0))
            for done, start, peak in self.stretches
        )


def activation_memory(
    model: nn.Module, loss: LossOfModel, batch: Mapping[str, Tensor], *, num_samples: int, precision: Precision
) -> ActivationMemory:
    """Rehearse one micro batch.

    Args:
        model: on the meta device, or anywhere; nothing of it is used but shapes.
        loss: the loss function.
        batch: of one sample; only shapes and types matter.
        num_samples: in the micro batch.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    def train(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        random = SampleRandom(0, 0, range(num_samples), "cpu")
        with autocast(EngineSettings(precision=precision)):
            value, _ = loss(model, batch, random)
        value.backward()

    return _rehearse(train, model, batch, num_samples, training=True)


def drawing_memory(draw: Draw, model: nn.Module, batch: Mapping[str, Tensor], *, num: int, precision: Precision) -> int:
    """Rehearse a drawing; returns the bytes of its worst moment, beside the weights.

    Args:
        draw: what is rehearsed.
        model: see ``activation_memory``.
        batch: likewise.
        num: samples to draw at once.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    def look(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        with torch.no_grad(), autocast(EngineSettings(precision=precision)):
            draw(model, batch)

    return _rehearse(look, model, batch, num, training=False).peak


def _rehearse(
    act: Callable[[nn.Module, Mapping[str, Tensor]], None],
    model: nn.Module,
    batch: Mapping[str, Tensor],
    num_samples: int,
    *,
    training: bool,
) -> ActivationMemory:
    state: dict[str, Any] = {}
    with (
        contextlib.ExitStack() as undo,
        FakeTensorMode(),
        torch.random.fork_rng(devices=()),
        _Storages() as storages,
    ):
        undo.callback(model.train, model.training)
        model.train(training)
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                undo.callback(module.register_forward_pre_hook(storages.use_weights).remove)
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
        storages.begin()
        functional_call(_Act(act, model), state, (inputs,))
    stretches = [(done, start - before, peak - before) for done, start, peak in storages.stretches]
    return ActivationMemory(stretches, storages.forward_peak - before)


class _Act(nn.Module):
    """What is rehearsed as one call: a backward pass that recomputes activations needs the fake weights too."""

    def __init__(self, act: Callable[[nn.Module, Mapping[str, Tensor]], None], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._act = act

    def forward(self, batch: Mapping[str, Tensor]) -> None:
        self._act(self.model, batch)


class _Storages(TorchDispatchMode):
    """Adds up the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.forward_peak = 0
        self.stretches: list[tuple[int, int, int]] = []  # see ActivationMemory
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
        done = self.stretches[-1][0] + parameter.grad.nbytes
        parameter.grad = None
        self.stretches.append((done, self.live, self.live))

    def begin(self) -> None:
        """Begin from what is alive."""
        self.stretches = [(0, self.live, self.live)]
        self.forward_peak = self.live

    def use_weights(self, *unused: Any) -> None:
        """Note that a module begins which has weights; see ``register_forward_pre_hook``."""
        if len(self.stretches) == 1:  # not when a backward pass recomputes
            self.forward_peak = self.stretches[-1][2]

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes()
        self.live += num_bytes
        if self.stretches:
            done, start, peak = self.stretches[-1]
            self.stretches[-1] = done, start, max(peak, self.live)
        weakref.finalize(storage, self._drop, key, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes
