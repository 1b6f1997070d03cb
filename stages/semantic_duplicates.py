"""Semantic duplicates: images whose CLIP embeddings are nearly the same, of which the earliest stays.

Images are put into cells around centres found by k-means on a sample, and compared with the images of their own cell
and of the cells nearest to it. So the search is exact within a cell and between neighbouring cells; a pair that lies
across a border between cells that are not neighbours is missed. Up to ``EXACT_ROWS`` images there is one cell and
nothing is missed. Everything is deterministic: a fixed seed, one thread for k-means, a sample at even distances. But
centres depend on all images, so with more of them other pairs are missed: only within one cell are old decisions final.

Cost, of n images of D dimensions: about ``n * 2500 * D`` multiplications in the cells, and reading all embeddings once
per ``ROWS_PER_BLOCK`` images that are still undecided. Memory: embeddings lie in a file in half precision, ``2 D``
bytes per image; beside it one block and one cell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import faiss
import numpy as np
import numpy.typing as npt

from stages.keepers import Pairs, Rows, keepers_of

Embeddings = npt.NDArray[np.float16]

EXACT_ROWS = 20_000
ROWS_PER_BLOCK = 8192
_ROWS_PER_CELL = 1000
_MAX_CELLS = 4096
_NEAREST_CELLS = 4
_SAMPLE_PER_CELL = 64
_ITERATIONS = 10
_SEED = 0
_MEMBERS_PER_CHUNK = 8192
_ROWS_PER_STRIPE = 512
_ROUNDING = 2e-6


def semantic_duplicates(embeddings: Embeddings, *, min_cosine: float, num_cells: int | None = None) -> Rows:
    """Find the images that are nearly the same as an earlier image that is kept.

    Args:
        embeddings: image embeddings in rank order, ``(n, D)``; may lie in a file.
        min_cosine: cosine from which two images count as the same.
        num_cells: cells to search in; by default one per thousand images, and one for up to ``EXACT_ROWS``.

    Returns:
        int64 ``(n,)``: of every duplicate, the earliest kept image near it; ``NONE`` of every kept image.
    """
    num = len(embeddings)
    if num == 0:
        return np.zeros(0, np.int64)
    if num_cells is None:
        num_cells = 1 if num <= EXACT_ROWS else min(num // _ROWS_PER_CELL, _MAX_CELLS)
    cells, linked = _cells_of(embeddings, min(num_cells, num))
    relation = CosineRelation(embeddings, min_cosine, cells, linked)
    return keepers_of(num, relation, rows_per_block=ROWS_PER_BLOCK)


class CosineRelation:
    """Images of the same or of linked cells whose embeddings have a high cosine; see ``keepers.Relation``.

    Args:
        embeddings: ``(n, D)``.
        min_cosine: cosine from which two images are near.
        cells: cell of every image, ``(n,)``.
        linked: which cells are compared, symmetric bool ``(k, k)``.
    """

    def __init__(self, embeddings: Embeddings, min_cosine: float, cells: Rows, linked: npt.NDArray[np.bool_]) -> None:
        # Of a vector and itself, single precision makes a cosine a little below 1.
        self._embeddings, self._min_cosine = embeddings, np.float32(min(min_cosine, 1 - _ROUNDING))
        self._cells, self._linked = cells, linked
        self._members: list[Rows] = []

    def among(self, rows: Rows) -> Pairs:
        """Compare cell by cell, in stripes, with the later rows of linked cells."""
        x, cells = _unit(self._embeddings[rows]), self._cells[rows]
        earlier, later = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for cell in np.unique(cells):
            own, others = np.flatnonzero(cells == cell), np.flatnonzero(self._linked[cell, cells])
            of_others = x[others].T
            for start in range(0, len(own), _ROWS_PER_STRIPE):
                stripe = own[start : start + _ROWS_PER_STRIPE]
                cosines = x[stripe] @ of_others
                i, j = np.divmod(np.flatnonzero(cosines >= self._min_cosine), len(others))
                a, b = stripe[i], others[j]
                earlier.append(rows[a[a < b]])
                later.append(rows[b[a < b]])
        return np.concatenate(earlier), np.concatenate(later)

    def narrow(self, rows: Rows) -> None:
        """Sort the rows into their cells."""
        order = np.argsort(self._cells[rows], kind="stable")
        bounds = np.searchsorted(self._cells[rows][order], np.arange(1, len(self._linked)))
        self._members = np.split(rows[order], bounds)

    def search(self, rows: Rows, *, after: int) -> Iterator[Pairs]:
        """Compare cell by cell with the rows of linked cells."""
        x, cells = _unit(self._embeddings[rows]), self._cells[rows]
        for cell, members in enumerate(self._members):
            query = np.flatnonzero(self._linked[cell, cells])
            members = members[np.searchsorted(members, after, side="right") :]
            for start in range(0, len(members) if len(query) else 0, _MEMBERS_PER_CHUNK):
                chunk = members[start : start + _MEMBERS_PER_CHUNK]
                cosines = x[query] @ _unit(self._embeddings[chunk]).T
                i, j = np.divmod(np.flatnonzero(cosines >= self._min_cosine), len(chunk))
                yield rows[query[i]], chunk[j]


def _unit(embeddings: Embeddings) -> npt.NDArray[np.float32]:
    """Return unit vectors in single precision; half precision has rounded their norms."""
    x: npt.NDArray[np.float32] = np.array(embeddings, np.float32)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return x


def _cells_of(embeddings: Embeddings, num_cells: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Put images into cells.

    Returns:
        The cell of every image, int64 ``(n,)``; and which cells are neighbours, symmetric bool ``(k, k)``.
    """
    num, dim = embeddings.shape
    if num_cells == 1:
        return np.zeros(num, np.int64), np.ones((1, 1), np.bool_)
    sample = np.linspace(0, num - 1, min(num, _SAMPLE_PER_CELL * num_cells)).astype(np.int64)
    kmeans = faiss.Kmeans(
        dim, num_cells, niter=_ITERATIONS, seed=_SEED, spherical=True, min_points_per_centroid=1, verbose=False
    )
    with _one_thread():
        kmeans.train(_unit(embeddings[sample]))
    centres: npt.NDArray[np.float32] = np.asarray(kmeans.centroids)
    cells = np.concatenate(
        [
            np.argmax(_unit(embeddings[start : start + _MEMBERS_PER_CHUNK]) @ centres.T, axis=1)
            for start in range(0, num, _MEMBERS_PER_CHUNK)
        ]
    )
    nearest = np.argsort(-(centres @ centres.T), axis=1, kind="stable")[:, :_NEAREST_CELLS]
    linked = np.eye(num_cells, dtype=np.bool_)
    linked[np.arange(num_cells)[:, None], nearest] = True
    return cells, linked | linked.T


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep faiss to one thread: the order in which several add up numbers is not fixed."""
    num_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(num_threads)
