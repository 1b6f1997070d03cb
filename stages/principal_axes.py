"""Principal axes of a set of vectors, from sums that add up over any division of the set.

The sums are float64 and the eigenvalue solvers are LAPACK's: axes and eigenvalues are those of the whole set to
rounding. The covariance is the difference of two sums, so its error is about 1e-16 of the mean square; an axis is off
by that error over the gap between its eigenvalue and the next, at most. Sums in single precision would be twice as
fast, and wrong: the gaps are that small where a spectrum of hundreds of components is flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array64 = npt.NDArray[np.float64]
Array32 = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float16] | Array32

_BLOCK_ROWS = 4096  # rows that are widened at once


@dataclass(frozen=True)
class Sums:
    """Sufficient statistics of a set of vectors; those of a union are their sum.

    Attributes:
        count: vectors.
        total: their sum, ``(D,)``.
        outer: sum of their outer products, ``(D, D)``.
    """

    count: int
    total: Array64
    outer: Array64

    @property
    def dim(self) -> int:
        """Dimension D."""
        return len(self.total)

    def merged(self, other: Sums) -> Sums:
        """Return the statistics of both sets together."""
        return Sums(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return plain arrays, for a file."""
        return {"count": np.array([self.count], np.int64), "total": self.total, "outer": self.outer}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Sums:
        """Rebuild from ``to_arrays``."""
        return cls(int(arrays["count"][0]), arrays["total"], arrays["outer"])


def sums_of(x: Vectors) -> Sums:
    """Sum over vectors ``(n, D)`` in float64, a few thousand rows at a time."""
    dim = x.shape[1]
    total, outer = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, len(x), _BLOCK_ROWS):
        block = x[start : start + _BLOCK_ROWS].astype(np.float64)
        total += block.sum(axis=0)
        outer += block.T @ block  # numpy sees the symmetry: BLAS's syrk computes one half
    return Sums(len(x), total, outer)


@dataclass(frozen=True)
class Solution:
    """Principal axes, all or the first m.

    Attributes:
        mean: ``(D,)``.
        variances: of every dimension, ``(D,)``, not negative.
        axes: orthonormal rows in order of decreasing eigenvalue, ``(m, D)``.
        eigenvalues: variance along every axis, ``(m,)``, not negative.
    """

    mean: Array64
    variances: Array64
    axes: Array64
    eigenvalues: Array64

    @property
    def total_variance(self) -> float:
        """Sum of all D eigenvalues, also of those that were not computed: the trace of the covariance."""
        return float(self.variances.sum())


def solve(sums: Sums, *, largest: int | None = None) -> Solution:
    """Diagonalise the covariance; the largest entry of every axis is made positive, so that signs are determined.

    Args:
        sums: of at least one vector.
        largest: compute only so many eigenvalues and axes, the largest; None for all. They are the same to rounding.
    """
    import scipy.linalg  # half a second, in the one process that solves

    mean = sums.total / sums.count
    covariance = sums.outer / sums.count - np.outer(mean, mean)
    covariance = (covariance + covariance.T) / 2
    variances = np.maximum(covariance.diagonal(), 0.0)
    if largest is None or largest == sums.dim:
        values, vectors = scipy.linalg.eigh(covariance, driver="evd", overwrite_a=True)
    else:
        wanted = (sums.dim - largest, sums.dim - 1)
        values, vectors = scipy.linalg.eigh(covariance, subset_by_index=wanted, driver="evr", overwrite_a=True)
    axes = np.ascontiguousarray(vectors.T[::-1])
    peaks = np.abs(axes).argmax(axis=1)
    axes *= np.where(axes[np.arange(len(axes)), peaks] < 0, -1.0, 1.0)[:, None]
    return Solution(mean, variances, axes, np.maximum(values[::-1], 0.0))


def project(x: Vectors, mean: Array64, axes: Array64) -> tuple[Array32, Array64]:
    """Return the components of vectors ``(n, D)`` along orthonormal ``axes`` ``(k, D)``, and what they lose.

    Returns:
        float32 ``(n, k)``; and the squared distance of each vector from what its components restore, ``(n,)``.
    """
    components = np.empty((len(x), len(axes)), np.float32)
    lost = np.empty(len(x))
    onto, centre = axes.T.astype(np.float32), mean.astype(np.float32)
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        centred = x[rows].astype(np.float32) - centre
        components[rows] = centred @ onto
        # Pythagoras instead of a second product; right to about 1e-7 of the squared length.
        lost[rows] = _squared_lengths(centred) - _squared_lengths(components[rows])
    return components, np.maximum(lost, 0.0)


def _squared_lengths(x: Array32) -> Array64:
    return np.asarray(np.einsum("ij,ij->i", x, x, dtype=np.float64))


def spectrum_metrics(solution: Solution, k: int) -> dict[str, Any]:
    """Describe a spectrum of which all or the first m eigenvalues are known.

    The effective rank is the exponential of the entropy of the normalised eigenvalues (Roy and Vetterli 2007); it is
    None unless all are known. The reconstruction error of k components, mean over samples of the squared distance, is
    the sum of the other eigenvalues: the total variance, known from the trace, less the first k.
    """
    eigenvalues, total = solution.eigenvalues, solution.total_variance
    complete = len(eigenvalues) == len(solution.mean)
    shares = eigenvalues / total
    positive = shares[shares > 0]
    rest = eigenvalues[k:].sum() if complete else max(0.0, total - eigenvalues[:k].sum())
    return {
        "embedding_dim": len(solution.mean),
        "num_components": k,
        "effective_rank": float(np.exp(-(positive * np.log(positive)).sum())) if complete else None,
        "explained_variance_fraction": float(shares[:k].sum()),
        "total_variance": total,
        "reconstruction_mse": float(rest),
        "spectrum": [float(f"{share:.6g}") for share in shares],
    }
