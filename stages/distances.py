"""How far two sets of images are apart, measured on their feature vectors.

Every function takes float arrays ``(n, d)``, one row per image, and computes in float64 with numpy alone. Distances of
few images are noisy and, for the Frechet distance, biased upwards: callers report ``n`` beside every number and, as the
floor that a perfect generator would reach, the same distance between two disjoint sets of real images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ROWS_PER_BLOCK = 1024


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class ManifoldScores:
    """Fidelity and coverage of a generator, each 0 to 1 (``density`` may exceed 1).

    Attributes:
        precision: fraction of generated images inside the manifold of the real ones (Kynkaanniemi et al. 2019, Eq. 2).
        recall: fraction of real images inside the manifold of the generated ones (Eq. 2, roles swapped).
        density: how many real neighbourhoods a generated image lies in, over k (Naeem et al. 2020, Eq. 3).
        coverage: fraction of real images with a generated one in their neighbourhood (Naeem et al. 2020, Eq. 5).
    """

    precision: float
    recall: float
    density: float
    coverage: float


def frechet_distance(a: Array, b: Array) -> float:
    """Return the squared Frechet distance of the Gaussians fitted to two sets of features (Heusel et al. 2017).

    Args:
        a: ``(n, d)``, n >= 2.
        b: ``(m, d)``, m >= 2.

    Raises:
        ValueError: if a set is too small or the widths differ.
    """
    a, b = _checked(a, b, at_least=2)
    return frechet_of_moments(a.mean(axis=0), np.cov(a, rowvar=False), b.mean(axis=0), np.cov(b, rowvar=False))


def frechet_of_moments(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """Return ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`` for covariances A and B ``(d, d)``.

    With A = F F^T and B = G G^T the last trace is the nuclear norm of F^T G. No matrix root is taken, so singular
    covariances (fewer images than dimensions) need neither a small constant nor complex numbers.
    """
    covariance_a, covariance_b = np.atleast_2d(covariance_a), np.atleast_2d(covariance_b)
    shared = np.linalg.svd(_factor(covariance_a).T @ _factor(covariance_b), compute_uv=False).sum()
    means = float(np.sum((mean_a - mean_b) ** 2))
    return max(means + float(np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared), 0.0)


def kernel_distance(a: Array, b: Array) -> Estimate:
    """Return KID, the unbiased squared MMD with kernel ``(x.y / d + 1)^3`` (Binkowski et al. 2018), and its error.

    The error is the delete-one jackknife over both sets: it needs no subset size and draws nothing at random. The
    estimate may be negative when the sets are alike.

    Args:
        a: ``(n, d)``, n >= 3.
        b: ``(m, d)``, m >= 3.

    Raises:
        ValueError: if a set is too small or the widths differ.
    """
    a, b = _checked(a, b, at_least=3)
    n, m = len(a), len(b)
    within_a, within_b = _kernel_sums(a, a) - _self_kernel(a), _kernel_sums(b, b) - _self_kernel(b)
    across_a, across_b = _kernel_sums(a, b), _kernel_sums(b, a)
    sum_a, sum_b, sum_across = within_a.sum(), within_b.sum(), across_a.sum()
    mean_a, mean_b = sum_a / (n * (n - 1)), sum_b / (m * (m - 1))
    value = mean_a + mean_b - 2 * sum_across / (n * m)
    # The same statistic with row i of a (of b) left out; a row occurs twice in its own within-sum.
    without_a = (sum_a - 2 * within_a) / ((n - 1) * (n - 2)) + mean_b - 2 * (sum_across - across_a) / ((n - 1) * m)
    without_b = (sum_b - 2 * within_b) / ((m - 1) * (m - 2)) + mean_a - 2 * (sum_across - across_b) / ((m - 1) * n)
    variance = (n - 1) * without_a.var() + (m - 1) * without_b.var()
    return Estimate(float(value), float(np.sqrt(variance)))


def manifold_scores(real: Array, generated: Array, *, num_neighbours: int = 3) -> ManifoldScores:
    """Compare two sets by balls around each point that reach to its k-th nearest neighbour in its own set.

    Args:
        real: ``(n, d)``, n > ``num_neighbours``.
        generated: ``(m, d)``, m > ``num_neighbours``.
        num_neighbours: k; the papers use 3 to 5.

    Raises:
        ValueError: if a set is too small or the widths differ.
    """
    real, generated = _checked(real, generated, at_least=num_neighbours + 1)
    real_radii, generated_radii = (_neighbour_distances(x, num_neighbours) for x in (real, generated))
    num_balls = np.zeros(len(generated))  # balls of real images that each generated one lies in
    num_inside, num_covered = 0, 0
    for rows, distances in _distance_blocks(real, generated):  # (rows, m)
        in_real_ball = distances <= real_radii[rows, None]
        num_balls += in_real_ball.sum(axis=0)
        num_covered += int(in_real_ball.any(axis=1).sum())
        num_inside += int((distances <= generated_radii[None]).any(axis=1).sum())
    return ManifoldScores(
        precision=float((num_balls > 0).mean()),
        recall=num_inside / len(real),
        density=float(num_balls.mean() / num_neighbours),
        coverage=num_covered / len(real),
    )


def mean_pairwise_distance(features: Array) -> float:
    """Return the mean of ``1 - cosine`` over all pairs of different rows: 0 when all images are the same.

    Args:
        features: ``(n, d)``, n >= 2, rows not zero.

    Raises:
        ValueError: if there are fewer than two rows.
    """
    unit = _unit_rows(features, at_least=2)
    n = len(unit)
    total = float(np.sum(unit.sum(axis=0) ** 2))  # sum of all cosines, the n ones of the diagonal included
    return 1.0 - (total - n) / (n * (n - 1))


def effective_number(features: Array) -> float:
    """Return the Vendi score with the cosine kernel: how many entirely different images the set is worth, 1 to n.

    It is the exponential of the entropy of the eigenvalues of the normalised Gram matrix (Friedman and Dieng 2023),
    taken here from the smaller ``(d, d)`` matrix with the same eigenvalues.

    Args:
        features: ``(n, d)``, rows not zero.
    """
    unit = _unit_rows(features, at_least=1)
    eigenvalues = np.linalg.eigvalsh(unit.T @ unit / len(unit))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-np.sum(positive * np.log(positive))))


def nearest(queries: Array, among: Array) -> tuple[NDArray[np.int64], Array]:
    """Find each query's nearest row by Euclidean distance.

    Args:
        queries: ``(n, d)``.
        among: ``(m, d)``.

    Returns:
        Row numbers ``(n,)`` and distances ``(n,)``.
    """
    queries, among = _checked(queries, among, at_least=1)
    rows, values = [], []
    for _, distances in _distance_blocks(queries, among):
        best = distances.argmin(axis=1)
        rows.append(best)
        values.append(distances[np.arange(len(best)), best])
    return np.concatenate(rows).astype(np.int64), np.concatenate(values)


def _checked(a: Array, b: Array, *, at_least: int) -> tuple[Array, Array]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shape {a.shape} and {b.shape}; give two arrays (n, d) of one width")
    if min(len(a), len(b)) < at_least:
        raise ValueError(f"{len(a)} and {len(b)} feature rows; at least {at_least} of each are needed")
    return a, b


def _unit_rows(features: Array, *, at_least: int) -> Array:
    features, _ = _checked(features, features, at_least=at_least)
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def _factor(covariance: Array) -> Array:
    """Return F with ``F F^T`` equal to a positive semi-definite matrix."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(eigenvalues.clip(min=0.0)))


def _blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, _ROWS_PER_BLOCK):
        yield slice(start, min(start + _ROWS_PER_BLOCK, num_rows))


def _kernel_sums(a: Array, b: Array) -> Array:
    """Sum the polynomial kernel of each row of ``a`` with all rows of ``b``, without holding the whole matrix."""
    width = a.shape[1]
    return np.concatenate([((a[rows] @ b.T / width + 1) ** 3).sum(axis=1) for rows in _blocks(len(a))])


def _self_kernel(a: Array) -> Array:
    return np.asarray((np.einsum("nd,nd->n", a, a) / a.shape[1] + 1) ** 3)


def _distance_blocks(a: Array, b: Array) -> Iterator[tuple[slice, Array]]:
    """Yield the Euclidean distances of some rows of ``a`` to all rows of ``b``."""
    norms = np.einsum("nd,nd->n", b, b)
    for rows in _blocks(len(a)):
        part = a[rows]
        squared = np.einsum("nd,nd->n", part, part)[:, None] + norms[None] - 2 * part @ b.T
        yield rows, np.sqrt(squared.clip(min=0.0))


def _neighbour_distances(x: Array, num_neighbours: int) -> Array:
    """Return each row's distance to its k-th nearest other row."""
    found = []
    for rows, distances in _distance_blocks(x, x):
        distances[np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)] = 0.0  # itself, exactly
        found.append(np.partition(distances, num_neighbours, axis=1)[:, num_neighbours])
    return np.concatenate(found)
