"""Our side of the PCA benchmark: the pca stage, run to its end in a store of its own. See ``bench_pca.py``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load

from stages.manifest import Manifest
from stages.pca import Pca, PcaConfig
from tests.benchmarks.pca_task import Task, answer
from tests.stages.small_store import run


def work(task: Task, output: Path) -> None:
    """Run the stage; what an earlier repetition left is not used."""
    shutil.rmtree(Path(task.root) / "pca", ignore_errors=True)
    uri = (Path(task.root) / "curate.txt").read_text()
    curate = Manifest.read_uri(task.root, uri)
    manifest = run(Pca(PcaConfig(num_components=task.num_components), root=task.root), {"curate": curate})
    np.save(output / "axes.npy", load(manifest.files["pca"].read(task.root))["axes"])


if __name__ == "__main__":
    answer(work)
