"""How a training mixes several data sets: which one every position of a canonical stream reads, by weight.

The choice is a low-discrepancy sequence in closed form. For two data sets, positions ``0 .. p - 1`` of a stream hold
``floor(p * w + phase)`` samples of the first (Bresenham's line); what the first leaves over is shared out among the
others in the same way. So after any number of samples every share is exact to within a constant, and which sample of
which data set a position reads costs a few integer operations: nothing is replayed, at any step.

The phases of the streams are spread evenly, and ``sum over s of floor(x + s / S) = floor(S * x)`` (Hermite's identity):
of two data sets, all global batches together hold their share to within one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


class Turn(NamedTuple):
    """What a position reads: the data set, and the position in that data set's own stream."""

    dataset: int
    position: int


class Mixture:
    """The choice of data sets along every stream.

    Args:
        weights: share of every data set; positive, their sum is 1. Exact numbers: at step 10^9 a rounded one is off.
        num_streams: canonical streams.
    """

    def __init__(self, weights: Sequence[Fraction], num_streams: int) -> None:
        assert sum(weights) == 1 and min(weights) > 0, weights
        self._num_streams = num_streams
        # From the largest share down: what is left over is shared out with the error of all choices before.
        self._datasets = sorted(range(len(weights)), key=lambda d: (-weights[d], d))
        self._shares: list[tuple[int, int]] = []
        rest = Fraction(1)
        for d in self._datasets[:-1]:
            share = weights[d] / rest
            self._shares.append((share.numerator, share.denominator))
            rest -= weights[d]

    def turn(self, stream: int, position: int) -> Turn:
        """Say what position ``position`` of a stream reads."""
        for d, (numerator, denominator) in zip(self._datasets, self._shares, strict=False):
            scale, phase = denominator * self._num_streams, stream * denominator
            step = numerator * self._num_streams
            before = (position * step + phase) // scale
            if (position * step + step + phase) // scale > before:
                return Turn(d, before)
            position -= before
        return Turn(self._datasets[-1], position)


def shares_of(weights: Sequence[float], place: str) -> list[Fraction]:
    """Return the exact shares of all data sets: the main one, which has what remains, and the others.

    Args:
        weights: of the others, as written: ``0.3`` is taken for three tenths.
        place: the setting, for messages.

    Raises:
        ValueError: if a weight is not positive, or nothing remains for the main data set.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    if exact and min(exact) <= 0:
        raise ValueError(
            f"{place}: weight {min(weights):g} is not positive; write the share of samples, for example 0.2"
        )
    if sum(exact) >= 1:
        raise ValueError(
            f"{place}: the weights add up to {float(sum(exact)):g}; they must leave a share below 1 for this run's own "
            "samples"
        )
    return [1 - sum(exact, Fraction(0)), *exact]
