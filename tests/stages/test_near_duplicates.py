"""The search is exact whatever the plan and the images, and the keeper is the one of a walk from first to last."""

from __future__ import annotations

import io
from collections.abc import Sequence
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from stages.filter_rules import FilterConfig
from stages.hash_tables import Hashes, SearchPlan, Tones
from stages.image_hash import NUM_TONES, measure_image
from stages.keepers import NONE, keepers_of
from stages.near_duplicates import HashRelation, near_any, near_duplicates, plan_search
from stages.neighbours import rows_with_neighbours
from stages.shapes import ShapesConfig, image_bytes

LEVELS = 5
MAX_BITS = (*range(9), 12, 16)


def files_of(image: Image.Image) -> list[bytes]:
    """Write an image as others might find it on the web."""
    darker = Image.fromarray(np.maximum(np.asarray(image).astype(int) - 1, 0).astype(np.uint8))
    found = []
    for variant, how in (
        *((image, {"format": "PNG"}), (image, {"format": "JPEG", "quality": 95}), (image, {"format": "JPEG"})),
        (image.resize((300, 300), Image.Resampling.LANCZOS), {"format": "PNG"}),
        (darker, {"format": "PNG"}),
    ):
        sink = io.BytesIO()
        variant.save(sink, **how)  # type: ignore[arg-type]
        found.append(sink.getvalue())
    return found


@pytest.mark.parametrize("what", ["flat", "circle", "cross", "stripes"])
def test_what_is_flat_or_symmetric_is_found_again(what: str) -> None:
    """Most of their frequencies are nothing, of which the noise must decide nothing."""
    image = Image.new("RGB", (256, 256), (128, 128, 128) if what == "flat" else "white")
    draw = ImageDraw.Draw(image)
    if what == "circle":
        draw.ellipse((48, 48, 208, 208), fill="red")
    elif what == "cross":
        draw.rectangle((108, 20, 148, 236), fill="blue")
        draw.rectangle((20, 108, 236, 148), fill="blue")
    elif what == "stripes":
        for y in range(0, 256, 64):
            draw.rectangle((0, y, 255, y + 31), fill="black")
    measured = [measure_image(data) for data in files_of(image)]
    hashes = np.array([h for h, _ in measured], np.uint64)
    tones = np.frombuffer(b"".join(t for _, t in measured), np.uint8).reshape(-1, NUM_TONES)
    assert max(int(h ^ hashes[0]).bit_count() for h in hashes) <= 2
    assert near_duplicates(hashes, tones, max_bits=4, max_levels=LEVELS).tolist() == [NONE, 0, 0, 0, 0]


def walk(hashes: Hashes, tones: Tones, max_bits: int) -> list[int]:
    """Compare every image with every kept one before it; return who keeps it out."""
    keepers: list[int] = []
    for i in range(len(hashes)):
        near = (
            j
            for j, keeper in enumerate(keepers)
            if keeper == NONE
            and int(hashes[i] ^ hashes[j]).bit_count() <= max_bits
            and np.abs(tones[i].astype(int) - tones[j].astype(int)).max() <= LEVELS
        )
        keepers.append(next(near, NONE))
    return keepers


def flat(tones: Sequence[int]) -> Tones:
    return np.repeat(np.asarray(tones, np.uint8)[:, None], NUM_TONES, axis=1)


def clustered(seed: int, num: int, num_centres: int, max_flips: int) -> tuple[Hashes, Tones]:
    """Make hashes around few centres, so that many are within a few bits of each other and some are equal."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64 - 1, max(num_centres, 1), dtype=np.uint64)
    hashes = centres[rng.integers(0, len(centres), num)]
    for _ in range(max_flips):
        hashes ^= np.uint64(1) << rng.integers(0, 64, num, dtype=np.uint64)
    return hashes, flat(10 * rng.integers(0, 3, num))


def plans(max_bits: int) -> list[SearchPlan]:
    found = [SearchPlan(max(max_bits + shared, 1), shared) for shared in range(4)]
    return [plan for plan in found if plan.num_tables <= 1200]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num=st.integers(0, 80),
    num_centres=st.integers(1, 8),
    max_flips=st.integers(0, 8),
    max_bits=st.sampled_from(MAX_BITS),
    rows_per_block=st.integers(1, 90),
)
def test_every_plan_equals_the_walk(
    seed: int, num: int, num_centres: int, max_flips: int, max_bits: int, rows_per_block: int
) -> None:
    hashes, tones = clustered(seed, num, num_centres, max_flips)
    expected = walk(hashes, tones, max_bits)
    assert near_duplicates(hashes, tones, max_bits=max_bits, max_levels=LEVELS).tolist() == expected
    for plan in plans(max_bits)[:3]:
        found = near_duplicates(hashes, tones, max_bits=max_bits, max_levels=LEVELS, plan=plan)
        assert found.tolist() == expected
        relation = HashRelation(hashes, tones, max_bits=max_bits, max_levels=LEVELS, plan=plan)
        assert keepers_of(num, relation, rows_per_block=rows_per_block).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num=st.integers(0, 300),
    num_centres=st.integers(1, 20),
    max_flips=st.integers(0, 12),
    max_bits=st.sampled_from(MAX_BITS),
    step=st.integers(1, 3),
    small=st.sampled_from([0, 2, 128]),
    rows_per_chunk=st.sampled_from([1, 50, 1 << 20]),
    pairs_per_stripe=st.sampled_from([1, 200, 1 << 21]),
)
def test_neighbours_are_those_of_all_pairs(
    seed: int,
    num: int,
    num_centres: int,
    max_flips: int,
    max_bits: int,
    step: int,
    small: int,
    rows_per_chunk: int,
    pairs_per_stripe: int,
) -> None:
    hashes, tones = clustered(seed, num, num_centres, max_flips)
    rows = np.arange(0, num, step)
    near = np.bitwise_count(hashes[rows, None] ^ hashes[None, rows]) <= max_bits
    near &= np.abs(tones[rows, None].astype(int) - tones[None, rows].astype(int)).max(axis=2) <= LEVELS
    np.fill_diagonal(near, False)
    sizes = {"_SMALL_BUCKET": small, "_ROWS_PER_CHUNK": rows_per_chunk, "_PAIRS_PER_STRIPE": pairs_per_stripe}
    with mock.patch.multiple("stages.neighbours", **sizes):
        for plan in plans(max_bits)[1:]:
            found = rows_with_neighbours(hashes, tones, rows, max_bits=max_bits, max_levels=LEVELS, plan=plan)
            assert found.tolist() == near.any(axis=1).tolist()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 1000])
def test_one_motif_has_neighbours_only(num_rows: int) -> None:
    numbers = np.arange(num_rows, dtype=np.uint64)
    for plan in plans(4)[1:]:
        found = rows_with_neighbours(
            numbers, flat([7] * num_rows), np.arange(num_rows), max_bits=4, max_levels=0, plan=plan
        )
        assert found.tolist() == [num_rows > 1] * num_rows


def test_what_is_not_asked_about_keeps_nothing_out() -> None:
    hashes, tones = clustered(3, 120, 6, 2)
    among = np.flatnonzero(np.arange(120) % 3 != 0)
    expected = walk(hashes[among], tones[among], 4)
    found = near_duplicates(hashes, tones, max_bits=4, max_levels=LEVELS, among=among)
    assert found.tolist() == [NONE if keeper == NONE else among[keeper] for keeper in expected]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 255), min_size=2, max_size=40), st.integers(0, 6))
def test_repeated_bytes_equal_the_walk(values: list[int], max_bits: int) -> None:
    # Few different bytes repeated eight times: many hashes within a few bits of each other.
    hashes = np.array([int.from_bytes(bytes([v] * 7 + [v // 2]), "big") for v in values], np.uint64)
    tones = flat([10 * (value % 3) for value in values])
    for plan in plans(max_bits):
        found = near_duplicates(hashes, tones, max_bits=max_bits, max_levels=LEVELS, plan=plan)
        assert found.tolist() == walk(hashes, tones, max_bits)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), max_bits=st.sampled_from(MAX_BITS))
def test_what_is_kept_is_kept_again(seed: int, max_bits: int) -> None:
    hashes, tones = clustered(seed, 120, 6, 5)
    kept = near_duplicates(hashes, tones, max_bits=max_bits, max_levels=LEVELS) == NONE
    again = near_duplicates(hashes[kept], tones[kept], max_bits=max_bits, max_levels=LEVELS)
    assert (again == NONE).all()


@pytest.mark.parametrize("num_shared", [0, 1, 2, 3])
@pytest.mark.parametrize("max_bits", [0, 1, 4, 7, 16])
def test_each_place_and_number_of_bits(num_shared: int, max_bits: int) -> None:
    # One image, and copies of it that differ in 0 .. 2r bits at random places: exactly those within r go.
    rng = np.random.default_rng(max_bits)
    plan = SearchPlan(max(max_bits + num_shared, 1), num_shared)
    num_flips = np.arange(2 * max_bits + 2).repeat(20)
    masks = [sum(1 << int(bit) for bit in rng.choice(64, n, replace=False)) for n in num_flips]
    image = 0x0123_4567_89AB_CDEF
    relation = HashRelation(
        np.array([image, *(image ^ mask for mask in masks)], np.uint64),
        flat([0] * (len(masks) + 1)),
        max_bits=max_bits,
        max_levels=LEVELS,
        plan=plan,
    )
    relation.narrow(np.arange(len(masks) + 1))
    found = {int(row) for _, rows in relation.search(np.array([0]), after=0) for row in rows}
    assert found == set((np.flatnonzero(num_flips <= max_bits) + 1).tolist())


def test_thousands_across_blocks() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 3000, dtype=np.uint64)
    both = np.concatenate([hashes, hashes ^ np.uint64(0b1011)])
    for plan in plans(4):
        keepers = near_duplicates(both, flat([0] * 6000), max_bits=4, max_levels=12, plan=plan)
        assert keepers.tolist() == [NONE] * 3000 + list(range(3000))


def test_one_bucket_with_everything() -> None:
    # All images of one motif, none equal to another: 12 million pairs, each of them near.
    numbers = np.arange(5000, dtype=np.uint64)
    for plan in plans(16)[:2]:
        keepers = near_duplicates(numbers, flat([7] * 5000), max_bits=16, max_levels=0, plan=plan)
        assert keepers[0] == NONE and (keepers[1:] == 0).all()


def test_equal_hashes_of_other_colours_all_stay() -> None:
    tones = np.zeros((200, NUM_TONES), np.uint8)
    tones[np.arange(200), np.arange(200) % NUM_TONES] = 20 + 40 * (np.arange(200) // NUM_TONES)
    keepers = near_duplicates(np.full(200, 5, np.uint64), tones, max_bits=4, max_levels=19)
    assert (keepers == NONE).all()
    again = near_duplicates(np.full(400, 5, np.uint64), np.tile(tones, (2, 1)), max_bits=4, max_levels=19)
    assert again.tolist() == [NONE] * 200 + list(range(200))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), num_given=st.integers(0, 10), max_bits=st.sampled_from(MAX_BITS))
def test_near_any_is_the_comparison_with_all_given(seed: int, num_given: int, max_bits: int) -> None:
    hashes, tones = clustered(seed, 60, 4, 5)
    given_hashes, given_tones = clustered(seed, num_given, 4, 3)
    near = near_any(hashes, tones, given_hashes, given_tones, max_bits=max_bits, max_levels=LEVELS)
    bits = np.bitwise_count(hashes[:, None] ^ given_hashes[None]) <= max_bits
    levels = np.abs(tones[:, None].astype(int) - given_tones[None].astype(int)).max(axis=2) <= LEVELS
    assert near.tolist() == (bits & levels).any(axis=1).tolist()


def test_plans_cost_what_they_find() -> None:
    assert plan_search(1_000_000, 4) == SearchPlan(6, 2)
    assert plan_search(1_000_000, 16).num_shared == 0  # all pairs
    for max_bits in range(17):
        for num_hashes in (0, 1, 1000, 10**6, 10**8):
            plan = plan_search(num_hashes, max_bits)
            assert plan.num_groups == max(max_bits + plan.num_shared, 1) and plan.num_tables <= 64


def shapes_measured(num: int) -> tuple[Hashes, npt.NDArray[np.uint8]]:
    config = ShapesConfig(
        missing_fraction=0, broken_fraction=0, tiny_fraction=0, placeholder_fraction=0, duplicate_fraction=0
    )
    measured = [measure_image(image_bytes(config, index) or b"") for index in range(num)]
    tones = np.stack([np.frombuffer(tones, np.uint8) for _, tones in measured])
    return np.array([hash_ for hash_, _ in measured], np.uint64), tones


def test_shapes_are_not_near_duplicates_of_each_other() -> None:
    hashes, tones = shapes_measured(500)
    config = FilterConfig()
    keepers = near_duplicates(
        hashes, tones, max_bits=config.near_duplicate_bits or 0, max_levels=config.near_duplicate_levels
    )
    assert (keepers == NONE).sum() >= 497
