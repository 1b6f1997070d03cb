"""AdamW over flat tensors.

The update is torch's own (``torch.optim.adamw.adamw``, fused). Only the shell around it is ours: the constructor of
``torch.optim.AdamW`` imports torch's compiler, which costs every training process seconds before its first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# The methods behind the wrappers that would import the compiler.
_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class FlatAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019).

    Args:
        params: float32 tensors, few and large.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, scaled by the learning rate.
        zeros_like: makes the moments.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        zeros_like: Callable[[Tensor], Tensor] = torch.zeros_like,
    ) -> None:
        self._zeros_like = zeros_like
        # The learning rate is set at every step; 0 until then.
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer``."""
        _add_param_group(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See ``torch.optim.Optimizer``."""
        _zero_grad(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "FlatAdamW takes no closure"
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            states = [self._state_of(param) for param in params]
            if not params:
                continue
            adamw(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state.update({name: self._zeros_like(param) for name in ("exp_avg", "exp_avg_sq")})
            state["step"] = torch.zeros((), device=param.device)
        return state

    @torch.no_grad()
    def reset(self, param: Tensor) -> None:
        """Set moments and count of steps of a tensor to zero, where they lie."""
        for values in self._state_of(param).values():
            values.zero_()
