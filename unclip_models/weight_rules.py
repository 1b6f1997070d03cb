"""Rules that carry tensors between our names and layouts and those of other projects, in both directions.

A rule names tensors on both sides and knows how to turn ours into theirs and back; a list of rules is a whole model's
map. One list serves import and export, so that the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How one tensor of ours is kept elsewhere.

    Attributes:
        ours: its name.
        theirs: the names it goes by; several if it is split.
        to_theirs: our tensor -> theirs, in order.
        to_ours: theirs -> our tensor.
    """

    ours: str
    theirs: tuple[str, ...]
    to_theirs: Callable[[Tensor], Sequence[Tensor]]
    to_ours: Callable[[Sequence[Tensor]], Tensor]


def copy(ours: str, theirs: str) -> Rule:
    """Keep a tensor as it is."""
    return Rule(ours, (theirs,), lambda x: (x,), lambda parts: parts[0])


def scaled(ours: str, theirs: str, factor: float) -> Rule:
    """Multiply a tensor on its way out: a factor that we apply to the input and they do not."""
    return Rule(ours, (theirs,), lambda x: (x * factor,), lambda parts: parts[0] / factor)


def reshaped(ours: str, theirs: str, shape: tuple[int, ...]) -> Rule:
    """Keep the elements in another shape ``shape``, e.g. with leading ones."""
    return Rule(ours, (theirs,), lambda x: (x.reshape(shape),), lambda parts: parts[0].reshape(shape).squeeze())


def pointwise(ours: str, theirs: str) -> Rule:
    """Give a linear weight ``(out, in)`` the last axis of a convolution of one pixel ``(out, in, 1)``."""
    return Rule(ours, (theirs,), lambda x: (x[..., None],), lambda parts: parts[0].flatten(1))


def split_rows(ours: str, theirs: Sequence[str], heads: int) -> Rule:
    """Split rows that hold, head after head, one run of rows for each of ``theirs`` (ADM's order of q, k and v).

    With ``heads`` 1 the parts simply follow each other.
    """
    count = len(theirs)

    def to_theirs(x: Tensor) -> Sequence[Tensor]:
        rows = x.reshape(heads, count, -1, *x.shape[1:])
        return [rows[:, part].flatten(0, 1) for part in range(count)]

    def to_ours(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)

    return Rule(ours, tuple(theirs), to_theirs, to_ours)


def interleaved(ours: str, theirs: str, heads: int, parts: int = 3) -> Rule:
    """Turn rows ordered part by part (ours) into rows ordered head by head, each with its parts (theirs)."""
    return Rule(
        ours,
        (theirs,),
        lambda x: (x.unflatten(0, (parts, heads, -1)).transpose(0, 1).flatten(0, 2),),
        lambda given: given[0].unflatten(0, (heads, parts, -1)).transpose(0, 1).flatten(0, 2),
    )


def affine(make: Callable[..., Rule], ours: str, theirs: str | Sequence[str], *arguments: object) -> list[Rule]:
    """Apply a kind of rule to the weight and the bias of a module."""
    names = [theirs] if isinstance(theirs, str) else theirs
    rules = []
    for kind in ("weight", "bias"):
        full = [f"{name}.{kind}" for name in names]
        rules.append(make(f"{ours}.{kind}", full[0] if isinstance(theirs, str) else full, *arguments))
    return rules


def to_theirs(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Carry our tensors out.

    Returns:
        Their tensors by name, and those of ours that no rule names.
    """
    made = {
        name: part.contiguous()
        for rule in rules
        for name, part in zip(rule.theirs, rule.to_theirs(state[rule.ours]), strict=True)
    }
    carried = {rule.ours for rule in rules}
    return made, {name: tensor for name, tensor in state.items() if name not in carried}


def to_ours(state: Mapping[str, Tensor], rules: Sequence[Rule], where: str) -> dict[str, Tensor]:
    """Carry their tensors in.

    Raises:
        ValueError: if some are missing, or some are not understood; ``where`` is named.
    """
    wanted = {name for rule in rules for name in rule.theirs}
    if missing := sorted(wanted - state.keys()):
        raise ValueError(f"{where}: lacks {missing[:3]} ({len(missing)} tensors); it is of another architecture")
    if extra := sorted(state.keys() - wanted):
        raise ValueError(f"{where}: has unknown {extra[:3]} ({len(extra)} tensors); it is of another architecture")
    return {rule.ours: rule.to_ours([state[name] for name in rule.theirs]).contiguous() for rule in rules}
