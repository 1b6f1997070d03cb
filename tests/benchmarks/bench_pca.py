"""The pca stage against scikit-learn's IncrementalPCA, on the same shards of synthetic embeddings.

``python -m tests.benchmarks.bench_pca`` writes embeddings of a decaying spectrum, and compares both with the exact
solution over all of them: the eigenvectors of a covariance summed in float64 by numpy. scikit-learn lives in an
environment of its own::

    uv venv --python 3.11 /tmp/sklearn-venv
    uv pip install --python /tmp/sklearn-venv/bin/python scikit-learn pyarrow
    python -m tests.benchmarks.bench_pca --sklearn-python /tmp/sklearn-venv/bin/python

Both sides read the same Parquet tables, each in a process of its own, in turns, on the same cores. Ours also reads the
selections, verifies checksums, places the bucket edges and commits; theirs fits and saves. Errors: the sine of the
largest angle between the subspace of the k components and the exact one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.samples import embedding_array, embeddings_of, selection_table, table_to_bytes
from tests.benchmarks.bench_models import cpu_model
from tests.benchmarks.pca_task import Answer, Task, Worker
from tests.stages.small_store import Given


def write_store(root: str, num: int, dim: int, num_shards: int) -> list[str]:
    """Publish embed and curate for unit vectors whose variance falls by a power law; return the tables' paths."""
    embed, curate = Given("embed", root), Given("curate", root)
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((dim, dim)))[0].astype(np.float32)
    scales = np.arange(1, dim + 1, dtype=np.float32) ** -0.75
    centre = np.random.default_rng(2).standard_normal(dim).astype(np.float32) / np.float32(np.sqrt(dim))
    records, paths = [], []
    for i, size in enumerate(len(part) for part in np.array_split(np.arange(num), num_shards)):
        rng = np.random.default_rng(100 + i)
        sides = {}
        for name in ("image_embedding", "text_embedding"):
            x = rng.standard_normal((size, dim), dtype=np.float32) * scales @ basis + centre
            sides[name] = x / np.linalg.norm(x, axis=1, keepdims=True)
        keys = pa.array([f"{i:04x}{j:06d}" for j in range(size)])
        scores = np.einsum("ij,ij->i", *sides.values())
        columns = {name: embedding_array(x) for name, x in sides.items()}
        table = pa.table({"key": keys, **columns, "clip_score": pa.array(scores, pa.float32())})
        made = embed.record(i, {"embeddings": ("parquet", table_to_bytes(table))}, {}, num_in=size, num_kept=size)
        selection = table_to_bytes(selection_table(keys.to_pylist(), [None] * size))
        files = {"selection": ("selection.parquet", selection)}
        records.append(curate.record(i, files, made.files, num_in=size, num_kept=size))
        paths.append(f"{root}/{made.files['embeddings'].path}")
    (Path(root) / "curate.txt").write_text(curate.manifest(records).uri)
    return paths


def tables(paths: Sequence[str]) -> Iterator[np.ndarray]:
    """Read the image embeddings shard by shard, float64."""
    for path in paths:
        yield embeddings_of(pq.read_table(path, columns=["image_embedding"]), "image_embedding").astype(np.float64)


def exact_axes(paths: Sequence[str], k: int) -> np.ndarray:
    """Solve for the axes by the book, in two passes: the mean, then the covariance of what is centred."""
    count = total = 0
    for x in tables(paths):
        count, total = count + len(x), total + x.sum(axis=0)
    mean = total / count
    covariance = sum((x - mean).T @ (x - mean) for x in tables(paths)) / count
    return np.linalg.eigh(covariance)[1][:, ::-1][:, :k].T


def subspace_error(axes: np.ndarray, exact: np.ndarray) -> float:
    """Return the sine of the largest principal angle between two subspaces given by orthonormal rows."""
    basis = np.linalg.qr(axes.astype(np.float64).T)[0].T  # float32 rows are orthonormal only to seven digits
    return float(np.linalg.norm(basis - basis @ exact.T @ exact, 2))


def report(task: Task, times: dict[str, list[Answer]], errors: dict[str, float], num_rows: int, dim: int) -> str:
    """Write a table in Markdown, and under which conditions it arose."""
    lines = ["| side | seconds | CPU seconds | subspace error |", "| --- | --- | --- | --- |"]
    for name, answers in times.items():
        walls, cpus = ([getattr(a, clock) for a in answers] for clock in ("wall_s", "cpu_s"))
        spans = (f"{statistics.median(s):.1f} ({min(s):.1f}-{max(s):.1f})" for s in (walls, cpus))
        lines.append(f"| {name} | {' | '.join(spans)} | {errors[name]:.1e} |")
    for name in times:
        if name != "ours":
            ratios = {
                clock: statistics.median(
                    getattr(b, clock) / getattr(a, clock) for a, b in zip(times["ours"], times[name], strict=True)
                )
                for clock in ("wall_s", "cpu_s")
            }
            lines.append(
                f"\n{name} takes **{ratios['wall_s']:.1f}** times our time, {ratios['cpu_s']:.1f} our CPU time."
            )
    lines.append(
        f"\n{num_rows:,} embeddings of {dim} dimensions in {len(task.tables)} shards, half precision as stored; "
        f"{task.num_components} components. Median (least-most) of {len(times['ours'])} alternating repetitions, each "
        f"in a new process, imports not counted. {cpu_model()}, {len(task.cores)} core(s) and thread(s) for each side."
    )
    return "\n".join(lines)


def main() -> None:
    """Write the data, let the sides take turns, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sklearn-python", help="interpreter of an environment with scikit-learn")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--components", type=int, default=319)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    cores = tuple(sorted(os.sched_getaffinity(0))[: args.threads])
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as root:
        paths = write_store(root, args.rows, args.dim, args.shards)
        print("data written", file=sys.stderr)
        task = Task(root=root, tables=tuple(paths), num_components=args.components, cores=cores)
        sides = {"ours": (sys.executable, "pca_worker", "float64")}
        if args.sklearn_python is not None:
            for precision in ("float64", "float32"):
                sides[f"IncrementalPCA, {precision}"] = (args.sklearn_python, "sklearn_worker", precision)
        exact = exact_axes(paths, args.components)
        print("exact solution found", file=sys.stderr)
        times: dict[str, list[Answer]] = {name: [] for name in sides}
        errors: dict[str, float] = {}
        for repetition in range(args.repetitions):
            for name in list(sides)[:: 1 if repetition % 2 == 0 else -1]:
                output = Path(root) / f"{len(times[name])}-{list(sides).index(name)}"
                output.mkdir()
                python, module, precision = sides[name]
                times[name].append(Worker(python, module).run(dataclasses.replace(task, precision=precision), output))
                errors[name] = subspace_error(np.load(output / "axes.npy"), exact)
                print(json.dumps({name: times[name][-1].__dict__, "error": errors[name]}), file=sys.stderr)
        print(report(task, times, errors, args.rows, args.dim))


if __name__ == "__main__":
    main()
