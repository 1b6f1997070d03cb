"""Pca stage: principal axes of the image embeddings, and the buckets that the autoregressive prior quantises them into.

unCLIP section 2.2: CLIP image embeddings have low rank; a few hundred components keep all but 1% of the mean squared
error. Every shard contributes its count, sum and sum of outer products in float64. These add up, so appended shards
cost one more small sum, and one eigenvalue problem solves the whole dataset; no embedding is left out or seen twice.
A second, light pass over (at most ``num_edge_samples``) projected embeddings then places the bucket edges, and measures
on them the reconstruction error that the spectrum predicts. The mathematics is in ``principal_axes.py``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from stages import storage
from stages.base import Result, Shard, Stage, refuse_below, setting
from stages.errors import InputError, IntegrityError
from stages.manifest import Manifest, ShardRecord
from stages.principal_axes import Solution, Sums, Vectors, project, solve, spectrum_metrics, sums_of
from stages.samples import half_embeddings_of, table_from_bytes

_IO_THREADS = 8
MAX_EDGE_SHARDS = 1024  # that are read again to place the edges
_BLOCK_ROWS = 4096  # components that are quantised together, so that they stay in cache

T = TypeVar("T")
R = TypeVar("R")
Array64 = npt.NDArray[np.float64]
Array32 = npt.NDArray[np.float32]
Edges = Literal["quantile", "uniform"]
Solver = Literal["auto", "full", "partial"]
FULL_UP_TO_DIM = 4096


@dataclass(frozen=True, kw_only=True)
class PcaConfig:
    """How many components, and how they are quantised.

    The paper gives 319 components of 1024 and 1,024 buckets each. How it places the edges, and in how many buckets it
    quantises the dot product, it does not say: ``edges`` and ``num_dot_buckets`` are this project's choices. Uniform
    edges lose less (``quantisation_mse``); quantile edges give the prior evenly filled classes.
    """

    num_components: int | None = setting(
        None, "components to keep (paper: 319); null: as few as reach variance_target", affects="stage"
    )
    variance_target: float = setting(
        0.99,
        "share of the variance that the components keep, 0 to 1; not used when num_components is given",
        affects="stage",
    )
    solver: Solver = setting(
        "auto",
        "`full`: all eigenvalues; `partial`: only the num_components largest, as exact and faster in many dimensions; "
        f"`auto`: partial above {FULL_UP_TO_DIM} dimensions if num_components is given",
        affects="stage",
    )
    num_buckets: int = setting(1024, "buckets per component", affects="stage")
    num_dot_buckets: int = setting(64, "buckets of the dot product of image and text embedding", affects="stage")
    edges: Edges = setting(
        "uniform", "`uniform`: equally wide buckets; `quantile`: equally many samples in every bucket", affects="stage"
    )
    num_edge_samples: int = setting(
        262_144, "embeddings that the edges are measured on, spread evenly over the dataset", affects="stage"
    )

    def __post_init__(self) -> None:
        if self.num_components is not None and self.num_components < 1:
            raise ValueError(f"num_components: {self.num_components} is below 1; write for example 319, or null")
        if not 0 < self.variance_target <= 1:
            raise ValueError(f"variance_target: {self.variance_target} is not above 0 and at most 1; write 0.99")
        if self.solver == "partial" and self.num_components is None:
            raise ValueError("solver: `partial` needs to know how many; give num_components, or write `full`")
        refuse_below(self, 2, "num_buckets", "num_dot_buckets", "num_edge_samples")


class Pca(Stage[PcaConfig]):
    """Sums per shard, one solution over all of them."""

    name = "pca"
    counts = "curate"
    version = 4

    @property
    def upstream(self) -> tuple[str, ...]:
        """The selection, which also names the embeddings."""
        return ("curate",)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Plan one shard per shard of the curate stage."""
        return [
            self.shard(i, inputs={"embeddings": r.inputs["embeddings"], "selection": r.files["selection"]})
            for i, r in enumerate(inputs["curate"].records)
        ]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Sum over the selected embeddings of one shard."""
        started_at = time.monotonic()
        x, _ = self._selected(shard.inputs)
        return self.commit(
            shard,
            output,
            {"sums": ("sums.safetensors", save_safetensors(sums_of(x).to_arrays()))},
            started_at=started_at,
            num_in=len(x),
            num_kept=len(x),
        )

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Solve for the axes, choose how many to keep and place the bucket edges.

        Raises:
            InputError: if there are too few samples, or fewer dimensions than ``num_components``.
        """
        sums = self._merged(records)
        solution = solve(sums, largest=num_wanted(sums.dim, self.config))
        k = choose_components(solution, self.config)
        axes = solution.axes[:k]
        components, dots, lost = self._project(self._planned(records, inputs), solution.mean, axes)
        edges = bucket_edges(components, self.config.num_buckets, self.config.edges)
        dot_edges = bucket_edges(dots[:, None], self.config.num_dot_buckets, self.config.edges)[0]
        arrays = {
            "mean": solution.mean.astype(np.float32),
            "std": np.sqrt(solution.variances).astype(np.float32),
            "axes": axes.astype(np.float32),
            "eigenvalues": solution.eigenvalues.astype(np.float32),
            "edges": edges,
            "dot_edges": dot_edges,
        }
        file = self.publish(storage.join(output, "pca.safetensors"), save_safetensors(arrays))
        metrics = spectrum_metrics(solution, k)
        metrics["reconstruction_mse_measured"] = float(lost.mean())
        # What rounding to the middle of a bucket adds to what the dropped components cost.
        metrics["quantisation_mse"] = float(
            quantisation_errors(components, edges, self.config.edges).mean(dtype=np.float64)
        )
        metrics |= {"num_samples": sums.count, "num_edge_samples": len(components)}
        return Result(records=records, files={"pca": file}, metrics=metrics)

    def _selected(self, inputs: Mapping[str, Any]) -> tuple[Vectors, Array32]:
        """Read what the selection keeps: image embeddings ``(n, D)``, and their products with the captions' ``(n,)``.

        The dot products are the CLIP scores that embed has stored: to read the captions' embeddings for them would
        double what is read.

        Raises:
            IntegrityError: if the tables are not about the same samples.
        """
        columns = ["key", "image_embedding", "clip_score"]
        table = table_from_bytes(inputs["embeddings"].read(self.root), columns)
        selection = table_from_bytes(inputs["selection"].read(self.root), ["key", "kept"])
        if not table["key"].equals(selection["key"]):
            raise IntegrityError(
                f"{self.uri(inputs['embeddings'])} and {self.uri(inputs['selection'])} are not about the same samples; "
                "run curate again with --force"
            )
        # Rows are left out of the array: Arrow's own filter takes lists apart, number by number.
        kept = selection["kept"].to_numpy()
        image, dots = half_embeddings_of(table, "image_embedding"), table["clip_score"].to_numpy()
        return (image, dots) if kept.all() else (image[kept], dots[kept])

    def _merged(self, records: Sequence[ShardRecord]) -> Sums:
        """Add up the sums of all shards, in plan order, so that a repetition gives the same bits."""

        def read(record: ShardRecord) -> Sums:
            return Sums.from_arrays(load_safetensors(record.files["sums"].read(self.root)))

        total: Sums | None = None
        for sums in _map_ahead(read, records):
            if total is not None and total.dim != sums.dim:
                raise IntegrityError(
                    f"pca: embeddings of {total.dim} and {sums.dim} dimensions are mixed; run embed again with --force"
                )
            total = sums if total is None else total.merged(sums)
        if total is None or total.count < 2:
            count = 0 if total is None else total.count
            raise InputError(f"pca: {count} samples came in, 2 are the least; loosen the thresholds of curate")
        return total

    def _planned(self, records: Sequence[ShardRecord], inputs: Mapping[str, Manifest]) -> list[tuple[Shard, int]]:
        """Pair the shards of this plan with their numbers of samples.

        A record kept from an earlier run names the selection of an earlier curate folder, equal but perhaps gone.
        """
        shards = {shard.id: shard for shard in self.plan(inputs)}
        return [(shards[record.shard_id], record.num_kept) for record in records]

    def _project(
        self, planned: Sequence[tuple[Shard, int]], mean: Array64, axes: Array64
    ) -> tuple[Array32, Array32, Array64]:
        """Project the samples that the edges are measured on.

        Returns:
            Components ``(m, k)`` and dot products of image and text embedding ``(m,)``, float32; and the squared
            distance of every image embedding from what its components restore, ``(m,)``.
        """
        rows = spread_rows([num_samples for _, num_samples in planned], self.config.num_edge_samples)

        def read(pair: tuple[Shard, npt.NDArray[np.int64]]) -> tuple[Vectors, Array32]:
            shard, chosen = pair
            image, products = self._selected(shard.inputs)
            return (image[chosen], products[chosen]) if len(chosen) < len(image) else (image, products)

        wanted = [(shard, chosen) for (shard, _), chosen in zip(planned, rows, strict=True) if len(chosen)]
        num = sum(len(chosen) for _, chosen in wanted)
        components = np.empty((num, len(axes)), np.float32)
        dots, lost = np.empty(num, np.float32), np.empty(num)
        end = 0
        # Threads read; products are computed here, one after the other, each by all of BLAS's threads.
        for image, image_dots in _map_ahead(read, wanted):
            part = slice(end, end + len(image))
            components[part], lost[part] = project(image, mean, axes)
            dots[part] = image_dots
            end = part.stop
        return components, dots, lost


def num_wanted(dim: int, config: PcaConfig) -> int | None:
    """Return how many eigenvalues to solve for; None for all ``dim`` of them.

    Raises:
        InputError: if there are fewer dimensions than ``num_components``.
    """
    if config.num_components is not None and config.num_components > dim:
        raise InputError(
            f"pca.num_components: {config.num_components} is more than the {dim} dimensions of the CLIP "
            "embeddings; lower it, or set it to null and use pca.variance_target"
        )
    partial = config.solver == "partial" or (config.solver == "auto" and dim > FULL_UP_TO_DIM)
    return config.num_components if partial else None


def choose_components(solution: Solution, config: PcaConfig) -> int:
    """Return k: ``num_components``, or the fewest that reach ``variance_target``.

    Raises:
        InputError: if there is no variance at all.
    """
    if solution.total_variance <= 0:
        raise InputError("pca: all image embeddings are equal; the dataset or the CLIP is degenerate")
    if config.num_components is not None:
        return config.num_components
    # The last sum can fall short of 1 by rounding; all components then.
    reached = np.cumsum(solution.eigenvalues) / solution.total_variance >= config.variance_target
    return int(reached.argmax()) + 1 if reached.any() else len(solution.eigenvalues)


def spread_rows(shard_sizes: Sequence[int], limit: int) -> list[npt.NDArray[np.int64]]:
    """Choose at most ``limit`` rows, evenly spaced over the shards laid end to end.

    Of many shards only ``MAX_EDGE_SHARDS``, evenly spaced ones, are taken.

    Returns:
        Rows of every shard, increasing.
    """
    num_shards = len(shard_sizes)
    if sum(shard_sizes) > limit and num_shards > MAX_EDGE_SHARDS:
        # A few rows of every shard would have one worker read the whole data set again.
        read = {i * num_shards // MAX_EDGE_SHARDS for i in range(MAX_EDGE_SHARDS)}
        shard_sizes = [size if i in read else 0 for i, size in enumerate(shard_sizes)]
    ends = np.cumsum([0, *shard_sizes], dtype=np.int64)
    total = int(ends[-1])
    chosen = np.arange(total) if total <= limit else np.arange(limit) * total // limit
    bounds = np.searchsorted(chosen, ends)
    return [chosen[bounds[i] : bounds[i + 1]] - ends[i] for i in range(len(shard_sizes))]


def bucket_edges(values: Array32, num_buckets: int, kind: Edges) -> Array32:
    """Place bucket edges from the least to the greatest value of every column.

    Args:
        values: ``(n, k)``.
        num_buckets: buckets per column.
        kind: ``quantile`` or ``uniform``.

    Returns:
        Edges that nowhere decrease, float32 ``(k, num_buckets + 1)``; a column without spread gets narrow uniform ones.
    """
    positions = np.linspace(0, 1, num_buckets + 1)
    low, high = values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)
    if kind == "quantile":
        edges = np.stack([np.quantile(column.astype(np.float64), positions) for column in values.T])
    else:
        edges = low[:, None] + (high - low)[:, None] * positions
    flat = high - low < 1e-6
    edges[flat] = low[flat, None] + 1e-6 * (positions - 0.5)
    return np.maximum.accumulate(edges.astype(np.float32), axis=1)


def quantisation_errors(components: Array32, edges: Array32, kind: Edges) -> Array32:
    """Return the squared distance between components ``(n, k)`` and the middles of their buckets, ``(n,)``.

    Args:
        components: ``(n, k)``.
        edges: from ``bucket_edges``, ``(k, num_buckets + 1)``.
        kind: of the edges; in equally wide buckets nothing need be searched.
    """
    errors = np.zeros(len(components), np.float32)
    last = edges.shape[1] - 2
    for start in range(0, len(components), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        for column, own in zip(np.ascontiguousarray(components[rows].T), edges, strict=True):
            width = (own[-1] - own[0]) / (last + 1)
            if kind == "uniform" and width > 0:
                middles = own[0] + (np.clip(np.floor((column - own[0]) / width), 0, last) + np.float32(0.5)) * width
            else:
                middles = ((own[:-1] + own[1:]) / 2)[np.searchsorted(own[1:-1], column, side="right")]
            errors[rows] += (column - middles) ** 2
    return errors


def _map_ahead(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Map in order on threads, a few items ahead of the consumer, so that memory holds only those."""
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > _IO_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
