"""The laws of the data order: permutations, the same samples on any cluster, seek equals replay."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import ConfigError, InputError
from stages.sample_order import Place, SampleOrder

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=8)


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    num_streams = draw(st.sampled_from([1, 2, 4, 8]))
    sizes = draw(SIZES.filter(lambda sizes: sum(sizes) >= num_streams))
    per_stream = draw(st.integers(1, 5))
    return SampleOrder(
        sizes, num_streams=num_streams, global_batch_size=num_streams * per_stream, seed=draw(st.integers(-5, 5))
    )


def places_of_stream(order: SampleOrder, stream: int, num_steps: int) -> list[Place]:
    """Read one stream alone: the rank that owns it when there are as many ranks as streams."""
    return [d.place for step in range(num_steps) for d in order.batch(step, stream, order.num_streams)]


@given(SIZES, st.sampled_from([1, 2, 4, 8]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_epoch_of_a_stream_is_a_permutation_of_its_slice(sizes: list[int], num_streams: int, seed: int) -> None:
    everything = [Place(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    if len(everything) < num_streams:
        return
    order = SampleOrder(sizes, num_streams=num_streams, global_batch_size=num_streams, seed=seed)
    lengths = []
    for s in range(num_streams):
        own = everything[s * len(everything) // num_streams : (s + 1) * len(everything) // num_streams]
        lengths.append(len(own))
        read = places_of_stream(order, s, 3 * len(own))
        for epoch in range(3):
            assert sorted(read[epoch * len(own) : (epoch + 1) * len(own)]) == own
    assert sum(lengths) == len(everything)
    assert max(lengths) - min(lengths) <= 1


@given(orders(), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_any_world_size_gives_the_same_global_batch(order: SampleOrder, step: int) -> None:
    whole = order.batch(step)
    assert [draw.sample_index for draw in whole] == list(
        range(step * order.global_batch_size, (step + 1) * order.global_batch_size)
    )
    for world_size in (1, 2, 4, 8):
        if order.num_streams % world_size == 0:
            parts = [order.batch(step, rank, world_size) for rank in range(world_size)]
            assert len({len(part) for part in parts}) == 1
            assert [draw for part in parts for draw in part] == whole


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_seeking_equals_replaying(first: int, second: int) -> None:
    def fresh() -> SampleOrder:
        return SampleOrder([7, 0, 12, 5], num_streams=4, global_batch_size=8, seed=3)

    jumping = fresh()
    jumping.batch(second)
    assert jumping.batch(first) == fresh().batch(first)
    replayed = fresh()
    for step in range(first):
        replayed.batch(step)
    assert replayed.batch(first) == jumping.batch(first)


def test_epochs_and_seeds_differ() -> None:
    def epochs(seed: int) -> list[list[Place]]:
        order = SampleOrder([50, 50], num_streams=1, global_batch_size=100, seed=seed)
        return [[draw.place for draw in order.batch(step)] for step in range(2)]

    assert epochs(0)[0] != epochs(0)[1]
    assert epochs(0)[0] != epochs(1)[0]


def test_a_stream_reads_one_shard_after_the_other_and_announces_the_next() -> None:
    order = SampleOrder([20] * 6, num_streams=2, global_batch_size=2, seed=0)
    draws = [order.batch(step, 0, 2)[0] for step in range(60)]
    changes = [(a, b) for a, b in itertools.pairwise(draws) if a.place.shard != b.place.shard]
    assert len(changes) == 2
    assert all(a.upcoming == b.place.shard for a, b in changes)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="global_batch_size: 6 is not a multiple of num_streams: 4"):
        SampleOrder([100], num_streams=4, global_batch_size=6, seed=0)
    with pytest.raises(InputError, match="3 samples are kept, fewer than num_streams: 4"):
        SampleOrder([3], num_streams=4, global_batch_size=4, seed=0)
    with pytest.raises(ConfigError, match="cannot be dealt evenly to 3 ranks"):
        SampleOrder([30], num_streams=4, global_batch_size=4, seed=0).batch(0, 0, 3)
