"""Ranks of a group on this machine: a test starts them as processes, and each of them joins the others."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(module: str, world_size: int, place: Path, *, timeout_s: float) -> tuple[list[int], str]:
    """Run ``python -m <module> RANK WORLD_SIZE PLACE`` for every rank.

    Returns:
        How each ended, and the end of what they said.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(world_size), str(place)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]
    said = [rank.communicate(timeout=timeout_s)[0].decode() for rank in ranks]
    return [rank.returncode for rank in ranks], "\n".join(said)[-4000:]


@contextlib.contextmanager
def joined(rank: int, world_size: int, meeting: Path | str) -> Iterator[None]:
    """Be one rank of a gloo group that meets over a file, with one thread."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()
