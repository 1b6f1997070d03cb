"""What the sides of the PCA benchmark are told, and how they answer. It imports no other library."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Which tables, how many components.

    Attributes:
        root: the store; ``curate.txt`` in it names the manifest of curate.
        tables: the Parquet files of embeddings.
        num_components: components to keep.
        cores: the cores to stay on; as many threads are used.
        precision: of the other side, ``float32`` or ``float64``, which is what scikit-learn makes of half precision by
            itself; ours is what the stage does.
    """

    root: str
    tables: tuple[str, ...]
    num_components: int
    cores: tuple[int, ...]
    precision: str = "float64"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What one repetition took, imports not counted."""

    wall_s: float
    cpu_s: float


class Worker:
    """A process that does the work once.

    Args:
        python: its interpreter.
        module: of this folder.
    """

    def __init__(self, python: str, module: str) -> None:
        self._command = [python, "-m", f"tests.benchmarks.{module}"]

    def run(self, task: Task, output: Path) -> Answer:
        """Let it write ``axes.npy`` into a folder, and tell how long it took.

        Raises:
            RuntimeError: if it fails.
        """
        threads = str(len(task.cores))
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        done = subprocess.run(
            [*self._command, json.dumps(dataclasses.asdict(task)), str(output)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **dict.fromkeys(names, threads)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"a worker of the benchmark failed; its last words:\n{done.stderr[-2000:]}")
        return Answer(**json.loads(done.stdout.splitlines()[-1]))


def answer(work: Callable[[Task, Path], None]) -> None:
    """Do the work that the command line describes and print an ``Answer``."""
    values = json.loads(sys.argv[1])
    task = Task(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    os.sched_setaffinity(0, task.cores)
    cpu_s, started_at = time.process_time(), time.perf_counter()
    work(task, Path(sys.argv[2]))
    found = Answer(
        wall_s=round(time.perf_counter() - started_at, 3),
        cpu_s=round(time.process_time() - cpu_s, 3),
    )
    print(json.dumps(dataclasses.asdict(found)))
