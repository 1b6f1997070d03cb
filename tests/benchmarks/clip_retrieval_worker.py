"""clip-retrieval's side of the embedding benchmark, in its own environment: its reader, mapper and writer.

Its runner is given a logger that does nothing: the real one starts a process for every run, which imports for seconds.
See ``embed_worker.py`` for what a worker is told and answers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from all_clip import load_clip
from clip_retrieval.clip_inference.mapper import ClipMapper
from clip_retrieval.clip_inference.reader import WebdatasetReader
from clip_retrieval.clip_inference.runner import Runner
from clip_retrieval.clip_inference.writer import NumpyWriter

from tests.benchmarks.embed_task import Task, answer_every_line


class SilentLogger:
    """Log nothing."""

    def start(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""

    def __call__(self, stats: object) -> None:
        """Do nothing."""


def main() -> None:
    """Load the model once, then embed whenever asked to."""
    task = Task.from_json(sys.argv[2])
    os.sched_setaffinity(0, task.cores)
    torch.set_num_threads(task.num_threads)
    open_clip.add_model_config(Path(task.root) / "clip.json")
    name = f"open_clip:clip/{Path(task.root) / 'clip.pt'}"
    both = {"enable_text": True, "enable_image": True, "enable_metadata": False}
    _, preprocess, tokenizer = load_clip(clip_model=name, use_jit=False, warmup_batch_size=task.batch_size)

    def reader(sampler: Any) -> WebdatasetReader:
        return WebdatasetReader(
            sampler, preprocess, tokenizer, list(task.tars), task.batch_size, task.num_threads, **both
        )

    def mapper() -> ClipMapper:
        return ClipMapper(
            **both, use_mclip=False, clip_model=name, use_jit=False, mclip_model="", warmup_batch_size=task.batch_size
        )

    def repeat(output: Path) -> None:
        def writer(partition: int) -> NumpyWriter:
            return NumpyWriter(partition, str(output), **both, output_partition_count=1)

        Runner(reader, mapper, writer, lambda _partition: SilentLogger(), 1)(0)

    answer_every_line(repeat)


if __name__ == "__main__":
    main()
