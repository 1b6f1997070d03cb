"""The loss scale: halves on overflow, grows after a while, stays within bounds, goes on from a checkpoint."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from stages.loss_scale import LossScale


def test_it_halves_and_grows() -> None:
    scale = LossScale()
    assert scale.take(1.0, math.inf) and scale.value == 2.0**15
    assert not any(scale.take(1.0, 1.0) for _ in range(1999)) and scale.value == 2.0**15
    assert not scale.take(1.0, 1.0) and scale.value == 2.0**16


def test_at_the_lowest_scale_an_overflow_is_a_bad_step() -> None:
    scale = LossScale()
    assert [scale.take(1.0, math.nan) for _ in range(18)] == [True] * 16 + [False] * 2
    assert scale.value == 1.0


def test_a_loss_that_is_not_finite_says_nothing_of_the_scale() -> None:
    scale = LossScale()
    assert not scale.take(math.nan, math.nan) and scale.value == 2.0**16


@given(st.lists(st.sampled_from([1.0, math.inf]), max_size=60), st.integers(0, 60))
def test_it_goes_on_from_its_state(norms: list[float], cut: int) -> None:
    straight = LossScale()
    for norm in norms[:cut]:
        straight.take(1.0, norm)
    resumed = LossScale()
    resumed.load(straight.to_metadata())
    for norm in norms[cut:]:
        assert straight.take(1.0, norm) == resumed.take(1.0, norm)
        assert straight.value == resumed.value
    assert straight.to_metadata() == resumed.to_metadata()
