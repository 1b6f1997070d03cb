"""What the two sides of the embedding benchmark are told, and how they answer. It imports no other library."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Which data, which model, how.

    Attributes:
        root: the store, with ``clip.json`` and ``clip.pt``, the model in open_clip's form, and ``plan.json``.
        tars: the shards.
        batch_size: images and captions per forward pass.
        num_threads: of the model, and threads or processes that decode.
        cores: the cores to stay on.
        on_gpu: whether to use CUDA.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """

    root: str
    tars: tuple[str, ...]
    batch_size: int
    num_threads: int
    cores: tuple[int, ...]
    on_gpu: bool = False
    precision: str = "fp32"

    def to_json(self) -> str:
        """Write it on one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Task:
        """Read what ``to_json`` wrote."""
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(line).items()})


def answer_every_line(repeat: Callable[[Path], None]) -> None:
    """Do the work once for every line of standard input, which names a folder to write to, and tell how long it took.

    CPU time is that of all threads, and of child processes that have ended.
    """
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        cpu_s, started_at = _cpu_s(), time.perf_counter()
        repeat(Path(line.strip()))
        facts = {"wall_s": time.perf_counter() - started_at, "cpu_s": _cpu_s() - cpu_s}
        print(json.dumps(facts), file=replies, flush=True)


def _cpu_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)
