"""Distances of feature sets against closed forms and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stages import distances
from stages.distances import (
    effective_number,
    frechet_distance,
    frechet_of_moments,
    kernel_distance,
    manifold_scores,
    mean_pairwise_distance,
    nearest,
)


def features(seed: int, n: int, d: int = 5, *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def test_frechet_of_commuting_gaussians_is_the_closed_form() -> None:
    # Axis-aligned: |m|^2 + sum (sigma_a - sigma_b)^2.
    mean, a, b = np.array([1.0, -2.0, 0.0]), np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.25])
    expected = 5.0 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_of_moments(mean, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected, abs=1e-12)


def test_frechet_of_two_by_two_gaussians_is_the_closed_form() -> None:
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), also for matrices that do not commute.
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * root
    assert frechet_of_moments(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, abs=1e-12)


def test_frechet_of_samples_approaches_the_gaussians_they_come_from() -> None:
    a, b = features(0, 40_000), features(1, 40_000, shift=0.5, scale=2.0)
    assert frechet_distance(a, b) == pytest.approx(5 * 0.5**2 + 5 * 1.0, rel=0.03)


def test_frechet_laws() -> None:
    a, b = features(0, 50), features(1, 60, shift=1.0)
    rotation = np.linalg.qr(features(2, 5))[0]
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert frechet_distance(a + 3, a) == pytest.approx(45.0, rel=1e-12)


def test_frechet_with_fewer_images_than_dimensions_is_finite_and_zero_on_itself() -> None:
    a = features(0, 6, d=40)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(a, a[::-1] + 1) == pytest.approx(40.0, rel=1e-10)


def brute_force_mmd(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    within = [np.mean([k(x, y) for x, y in itertools.permutations(s, 2)]) for s in (a, b)]
    return float(sum(within) - 2 * np.mean([k(x, y) for x in a for y in b]))


def test_kernel_distance_and_its_jackknife_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_ROWS_PER_BLOCK", 4)
    a, b = features(0, 9), features(1, 7, shift=0.3)
    found = kernel_distance(a, b)
    assert found.value == pytest.approx(brute_force_mmd(a, b), rel=1e-10)
    without_a = [brute_force_mmd(np.delete(a, i, axis=0), b) for i in range(len(a))]
    without_b = [brute_force_mmd(a, np.delete(b, i, axis=0)) for i in range(len(b))]
    variance = (len(a) - 1) * np.var(without_a) + (len(b) - 1) * np.var(without_b)
    assert found.standard_error == pytest.approx(np.sqrt(variance), rel=1e-8)


def test_kernel_distance_is_unbiased_and_its_error_is_honest() -> None:
    trials = [kernel_distance(features(2 * i, 40, d=3), features(2 * i + 1, 30, d=3)) for i in range(300)]
    values = np.array([trial.value for trial in trials])
    errors = np.array([trial.standard_error for trial in trials])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.5)
    far = kernel_distance(features(0, 40), features(1, 40, shift=1.0))
    assert far.value > 3 * far.standard_error


def test_manifold_scores_of_equal_and_of_distant_sets() -> None:
    a = features(0, 30)
    same = manifold_scores(a, a)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    apart = manifold_scores(a, a + 100)
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0.0, 0.0, 0.0, 0.0)


def test_manifold_scores_by_hand() -> None:
    # On a line, k = 1. Real 0, 1, 10, 11: radius 1. Generated 0.5, 0.6, 30, 30.1: radius 0.1.
    real, generated = (np.array(x, dtype=float)[:, None] for x in ([0, 1, 10, 11], [0.5, 0.6, 30, 30.1]))
    scores = manifold_scores(real, generated, num_neighbours=1)
    assert scores.precision == 0.5  # the two near 0.5
    assert scores.recall == 0.0  # no real point is within 0.1 of a generated one
    assert scores.density == 1.0  # two of four lie in two balls each
    assert scores.coverage == 0.5  # balls around 0 and 1


def test_dropped_modes_lower_recall_not_precision() -> None:
    modes = np.concatenate([features(0, 60), features(1, 60, shift=50.0)])
    scores = manifold_scores(modes, features(2, 60))
    assert scores.precision > 0.7 and scores.recall < 0.5 and scores.coverage <= 0.5


def test_blocks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(0, 23), features(1, 17, shift=0.2)
    whole = manifold_scores(a, b)
    monkeypatch.setattr(distances, "_ROWS_PER_BLOCK", 5)
    assert manifold_scores(a, b) == whole


def test_diversity_closed_forms() -> None:
    identity = np.eye(6)
    assert effective_number(identity) == pytest.approx(6.0)
    assert effective_number(np.repeat(identity[:1], 9, axis=0)) == pytest.approx(1.0)
    assert effective_number(np.repeat(identity, 4, axis=0) * 3.0) == pytest.approx(6.0)
    assert mean_pairwise_distance(identity) == pytest.approx(1.0)
    assert mean_pairwise_distance(np.array([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(2.0)
    assert mean_pairwise_distance(np.ones((5, 3))) == pytest.approx(0.0, abs=1e-12)


def test_nearest_finds_rows_and_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_ROWS_PER_BLOCK", 2)
    among = np.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    rows, values = nearest(np.array([[0.0, 1.0], [9.0, 0.0], [3.0, 4.0]]), among)
    assert rows.tolist() == [0, 2, 1]
    assert values == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, manifold_scores])
def test_too_few_rows_or_other_widths_are_refused(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match="1 and 5 feature rows; at least"):
        measure(features(0, 1), features(1, 5))
    with pytest.raises(ValueError, match="of one width"):
        measure(features(0, 9, d=3), features(1, 9, d=4))
