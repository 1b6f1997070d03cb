"""AdamW over flat tensors.

The update is torch's own (``torch.optim.adamw.adamw``, fused). Only the shell around it is ours: the constructor of
``torch.optim.AdamW`` imports torch's compiler, which costs every training process seconds before its first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
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
    """

    def __init__(
        self, params: Iterable[Tensor], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
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
            self.state[param] = state = fresh_state(param, 0)
        return state


def fresh_state(param: Tensor, num_steps: int) -> dict[str, Tensor]:
    """Make the state of a tensor: the count of steps, beside it on its device, and two moments of zero."""
    return {
        "step": torch.tensor(float(num_steps), device=param.device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }
