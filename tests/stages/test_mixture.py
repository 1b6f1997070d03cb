"""The laws of mixing data sets: exact shares at every point, seek equals replay, nothing read twice or left out."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError
from stages.mixture import Mixture, shares_of
from stages.sample_order import Place, SampleOrder


@st.composite
def shares(draw: st.DrawFn, max_size: int = 5) -> list[Fraction]:
    parts = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=max_size))
    return [Fraction(part, sum(parts)) for part in parts]


@given(shares(), st.sampled_from([1, 2, 6, 8]), st.data())
@settings(max_examples=60, deadline=None)
def test_shares_are_exact_at_every_point_and_positions_are_counted_up(
    weights: list[Fraction], num_streams: int, data: st.DataObject
) -> None:
    stream = data.draw(st.integers(0, num_streams - 1))
    mixture, counts = Mixture(weights, num_streams), [0] * len(weights)
    for position in range(300):
        dataset, own = mixture.turn(stream, position)
        assert own == counts[dataset]
        counts[dataset] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (position + 1) * weight) < len(weights)


@given(shares(), st.integers(0, 10**12), st.sampled_from([1, 4, 64]))
@settings(max_examples=60, deadline=None)
def test_a_far_position_is_as_exact_as_a_near_one(weights: list[Fraction], position: int, num_streams: int) -> None:
    mixture = Mixture(weights, num_streams)
    dataset, own = mixture.turn(num_streams - 1, position)
    assert abs(own - position * weights[dataset]) < len(weights)
    later = mixture.turn(num_streams - 1, position + 1)
    assert later.position == own + 1 if later.dataset == dataset else later.position <= position


@given(st.integers(1, 99), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_batches_of_two_data_sets_hold_the_share_to_within_one_sample(
    percent: int, num_streams: int, per_stream: int
) -> None:
    weight = Fraction(percent, 100)
    mixture, count = Mixture([1 - weight, weight], num_streams), 0
    for step in range(60):
        for stream in range(num_streams):
            for j in range(per_stream):
                count += mixture.turn(stream, step * per_stream + j).dataset == 1
        assert abs(count - (step + 1) * num_streams * per_stream * weight) < 1


@st.composite
def mixed_orders(draw: st.DrawFn) -> tuple[SampleOrder, list[list[int]], list[Fraction]]:
    num_streams = draw(st.sampled_from([1, 2, 4]))
    weights = draw(shares(max_size=3))
    sizes = st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) >= num_streams)
    datasets = [draw(sizes) for _ in weights]
    order = SampleOrder(
        datasets[0],
        num_streams=num_streams,
        global_batch_size=num_streams * draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 5)),
        mixed_in=datasets[1:],
        shares=weights,
    )
    return order, datasets, weights


@given(mixed_orders(), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_any_world_size_gives_the_same_mixed_batch(drawn: tuple[SampleOrder, object, object], step: int) -> None:
    order = drawn[0]
    whole = order.batch(step)
    for world_size in (2, 4):
        if order.num_streams % world_size == 0:
            assert [d for rank in range(world_size) for d in order.batch(step, rank, world_size)] == whole


@given(mixed_orders())
@settings(max_examples=60, deadline=None)
def test_every_data_set_is_read_once_per_its_own_epoch(
    drawn: tuple[SampleOrder, list[list[int]], list[Fraction]],
) -> None:
    order, datasets, _ = drawn
    first_shard, dataset_of, everything = 0, {}, set()
    for d, sizes in enumerate(datasets):
        for shard, size in enumerate(sizes, first_shard):
            dataset_of[shard] = d
            everything |= {Place(shard, row) for row in range(size)}
        first_shard += len(sizes)
    read: Counter[Place] = Counter()
    for stream in range(order.num_streams):
        slices: list[list[Place]] = [[] for _ in datasets]
        for step in range(80):
            for draw in order.batch(step, stream, order.num_streams):
                slices[dataset_of[draw.place.shard]].append(draw.place)
                assert dataset_of[draw.upcoming] == dataset_of[draw.place.shard]
        for d, places in enumerate(slices):
            total = sum(datasets[d])
            length = (stream + 1) * total // order.num_streams - stream * total // order.num_streams
            epochs = [places[i : i + length] for i in range(0, len(places), length)]
            for epoch in epochs:
                assert len(set(epoch)) == len(epoch)
            assert all(set(epoch) == set(epochs[0]) for epoch in epochs[:-1])
        read.update(place for places in slices for place in places)
    assert read.keys() <= everything


@given(mixed_orders(), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_substitutes_are_the_rest_of_the_segment(drawn: tuple[SampleOrder, object, object], step: int) -> None:
    order = drawn[0]
    for draw in order.batch(step):
        places = [draw.place, *order.substitutes(draw.sample_index)]
        assert {place.shard for place in places} == {draw.place.shard}
        rows = sorted(place.row for place in places)
        assert rows == list(range(rows[0], rows[0] + len(rows)))  # each once, without a gap


def test_one_data_set_alone_is_in_the_order_it_always_had() -> None:
    order = SampleOrder([5, 4], num_streams=2, global_batch_size=4, seed=1)
    rows = [[(d.place.shard, d.place.row) for d in order.batch(step)] for step in range(2)]
    assert rows == [[(0, 2), (0, 1), (0, 4), (1, 2)], [(0, 3), (0, 0), (1, 0), (1, 3)]]


def test_weights_are_taken_as_written() -> None:
    assert shares_of([0.3, 0.1], "prior.datasets") == [Fraction(6, 10), Fraction(3, 10), Fraction(1, 10)]
    assert shares_of([], "prior.datasets") == [Fraction(1)]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"prior.datasets: weight 0 is not positive"):
        shares_of([0.5, 0.0], "prior.datasets")
    with pytest.raises(ValueError, match=r"prior.datasets: the weights add up to 1; they must leave a share"):
        shares_of([0.7, 0.3], "prior.datasets")
    with pytest.raises(InputError, match="2 samples are kept, fewer than num_streams: 4"):
        SampleOrder(
            [8], num_streams=4, global_batch_size=4, seed=0, mixed_in=[[2]], shares=shares_of([0.5], "prior.datasets")
        )
