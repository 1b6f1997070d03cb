"""Exponential moving averages of weights, on whole models or on the shard of them that one rank owns.

Everything works on lists of tensors, so a rank of a sharded optimizer averages only its own flat partitions and no GPU
holds a second copy of the model. Averages are float32 whatever the dtype of the weights: at a decay of 0.9999 a
bfloat16 average would round every update away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def ema_update(ema: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """Move every average towards its weight in place: ``ema <- decay * ema + (1 - decay) * param``.

    Args:
        ema: averages, floating point, any shapes.
        params: weights in the same order and shapes; other floating dtypes are converted.
        decay: in [0, 1]; 0 copies the weights, 1 keeps the averages.

    Raises:
        ValueError: if the lists differ in length or a shape differs, or decay is outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"ema_update: decay {decay}; it must be in [0, 1]")
    if len(ema) != len(params):
        raise ValueError(f"ema_update: {len(ema)} averages for {len(params)} weights; they must pair up")
    for index, (average, param) in enumerate(zip(ema, params, strict=True)):
        if average.shape != param.shape:
            raise ValueError(f"ema_update: tensor {index} is {tuple(average.shape)}, its weight {tuple(param.shape)}")
    if not ema:
        return
    with torch.no_grad():
        sources = [
            param.detach().to(device=average.device, dtype=average.dtype)
            for average, param in zip(ema, params, strict=True)
        ]
        torch._foreach_lerp_(list(ema), sources, 1.0 - decay)


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """Return the decay of update ``num_updates`` (0 first): ``min(decay, (1 + n) / (10 + n))``.

    Early averages then forget the random initial weights, and short runs get a useful average.
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


class EMA:
    """The average of a model's trainable parameters, or of any list of tensors, with its update count.

    Args:
        source: a module (its parameters, by name), named tensors, or a plain list (named by position).
        decay: 0.9999 for the paper's generators, 0.999 for its AR prior.
        warm_up: start with a small decay; see :func:`warmed_up_decay`.
        device: where the averages live; None keeps each beside its weight.
    """

    def __init__(
        self,
        source: nn.Module | Mapping[str, Tensor] | Iterable[Tensor],
        decay: float,
        *,
        warm_up: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"EMA: decay {decay}; it must be in [0, 1]")
        self.decay = decay
        self.warm_up = warm_up
        self.num_updates = 0
        # copy=True: a float32 weight on the same device must not be averaged with itself.
        self.shadow = {
            name: tensor.detach().to(device=device or tensor.device, dtype=torch.float32, copy=True)
            for name, tensor in _named(source).items()
        }

    def update(self, source: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]) -> float:
        """Average the current weights in, after an optimizer step; return the decay that was used.

        Raises:
            ValueError: if the names are not those the average was made from.
        """
        params = _named(source)
        if params.keys() != self.shadow.keys():
            raise ValueError(f"EMA.update: tensors differ from the averaged ones: {_difference(params, self.shadow)}")
        decay = warmed_up_decay(self.decay, self.num_updates) if self.warm_up else self.decay
        ema_update([*self.shadow.values()], [params[name] for name in self.shadow], decay)
        self.num_updates += 1
        return decay

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into the parameters of ``model``, in their dtype."""
        params = _named(model)
        if params.keys() != self.shadow.keys():
            raise ValueError(f"EMA.copy_to: the model has other parameters: {_difference(params, self.shadow)}")
        for name, param in params.items():
            param.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name, and ``num_updates`` as an int64 scalar; tensors are not copied."""
        return {**self.shadow, "num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the averages and the update count that :meth:`state_dict` gave.

        Raises:
            ValueError: if a tensor is missing, unexpected or of another shape.
        """
        tensors = {name: tensor for name, tensor in state.items() if name != "num_updates"}
        if tensors.keys() != self.shadow.keys() or "num_updates" not in state:
            raise ValueError(f"EMA.load_state_dict: other tensors: {_difference(tensors, self.shadow)}")
        for name, tensor in tensors.items():
            if tensor.shape != self.shadow[name].shape:
                raise ValueError(
                    f"EMA.load_state_dict: {name} is {tuple(tensor.shape)}, needed {tuple(self.shadow[name].shape)}"
                )
            self.shadow[name].copy_(tensor)
        self.num_updates = int(state["num_updates"])


def _named(source: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        return {name: param for name, param in source.named_parameters() if param.requires_grad}
    if isinstance(source, Mapping):
        return dict(source)
    return {str(index): tensor for index, tensor in enumerate(source)}


def _difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    return f"missing {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)})"
