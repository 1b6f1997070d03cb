"""Semantic duplicates: exact in one cell, never wrong in many, the same every time."""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.keepers import NONE
from stages.semantic_duplicates import semantic_duplicates

MIN_COSINE = 0.95
Embeddings = npt.NDArray[np.float16]


def cosines_of(x: Embeddings) -> npt.NDArray[np.float64]:
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(unit @ unit.T)


def is_clear(x: Embeddings) -> bool:
    """Whether no pair is so near the limit that single precision might decide otherwise."""
    return bool((np.abs(cosines_of(x) - MIN_COSINE) > 1e-6).all())


def walk(x: Embeddings) -> list[int]:
    cosines = cosines_of(x)
    keepers: list[int] = []
    for i in range(len(x)):
        near = (j for j, keeper in enumerate(keepers) if keeper == NONE and cosines[i, j] >= MIN_COSINE)
        keepers.append(next(near, NONE))
    return keepers


def motifs(seed: int, num: int, num_motifs: int, dim: int, spread: float) -> Embeddings:
    """Make unit embeddings around few directions."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_motifs, dim))
    x = centres[rng.integers(0, num_motifs, num)] + spread * rng.normal(size=(num, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), num=st.integers(1, 120), num_motifs=st.integers(1, 20))
def test_one_cell_equals_the_walk(seed: int, num: int, num_motifs: int) -> None:
    x = motifs(seed, num, num_motifs, 16, 0.2)
    assume(is_clear(x))
    assert semantic_duplicates(x, min_cosine=MIN_COSINE).tolist() == walk(x)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = motifs(0, 600, 40, 16, 0.2)
    assert is_clear(x)
    expected = walk(x)
    assert 50 < sum(keeper != NONE for keeper in expected) < 550
    for size in (1, 7, 100, 599):
        for name in ("ROWS_PER_BLOCK", "_MEMBERS_PER_CHUNK", "_ROWS_PER_STRIPE"):
            monkeypatch.setattr(f"stages.semantic_duplicates.{name}", size)
        assert semantic_duplicates(x, min_cosine=MIN_COSINE).tolist() == expected


def test_cells_miss_little_and_drop_nothing_wrongly() -> None:
    x = motifs(1, 4000, 300, 24, 0.15)
    exact = semantic_duplicates(x, min_cosine=MIN_COSINE)
    threads = faiss.omp_get_max_threads()
    found = semantic_duplicates(x, min_cosine=MIN_COSINE, num_cells=40)
    assert faiss.omp_get_max_threads() == threads
    assert (found == semantic_duplicates(x, min_cosine=MIN_COSINE, num_cells=40)).all()
    dropped = np.flatnonzero(found != NONE)
    assert (found[found[dropped]] == NONE).all() and (found[dropped] < dropped).all()
    assert (cosines_of(x)[dropped, found[dropped]] >= MIN_COSINE - 1e-6).all()
    assert len(dropped) >= 0.98 * (exact != NONE).sum()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_what_is_kept_is_kept_again(seed: int) -> None:
    x = motifs(seed, 100, 10, 16, 0.2)
    assume(is_clear(x))
    kept = semantic_duplicates(x, min_cosine=MIN_COSINE) == NONE
    assert (semantic_duplicates(x[kept], min_cosine=MIN_COSINE) == NONE).all()


@pytest.mark.parametrize("dim", [7, 512])
def test_a_cosine_of_one_means_every_copy(dim: int) -> None:
    own = np.random.default_rng(0).standard_normal((200, dim)).astype(np.float16)
    found = semantic_duplicates(np.concatenate([own, own]), min_cosine=1.0)
    assert found.tolist() == [NONE] * 200 + list(range(200))


def test_none_and_one() -> None:
    assert semantic_duplicates(np.zeros((0, 4), np.float16), min_cosine=0.9).tolist() == []
    assert semantic_duplicates(np.ones((1, 4), np.float16), min_cosine=0.9).tolist() == [NONE]
