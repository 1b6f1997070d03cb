"""scikit-learn's side of the PCA benchmark, in an environment of its own. See ``bench_pca.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.decomposition import IncrementalPCA

from tests.benchmarks.pca_task import Task, answer


def work(task: Task, output: Path) -> None:
    """Fit one table after the other, each in batches of scikit-learn's own choice: five rows per dimension."""
    model = IncrementalPCA(n_components=task.num_components)
    for path in task.tables:
        column = pq.read_table(path, columns=["image_embedding"])["image_embedding"].combine_chunks()
        x = np.asarray(column.flatten()).astype(task.precision).reshape(len(column), column.type.list_size)
        size = 5 * x.shape[1]
        batches = np.array_split(x, max(1, len(x) // size))
        for batch in batches:
            model.partial_fit(batch)
    np.save(output / "axes.npy", model.components_)


if __name__ == "__main__":
    answer(work)
