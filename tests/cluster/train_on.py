"""Train the tiny model on a cluster, as one of perhaps many drivers: all that one ends, the next one takes over.

Called as ``train_on.py ADDRESS ROOT NUM_STEPS [SETTINGS]``, the settings as JSON. Every step takes a while and leaves a
line in ``ROOT/steps.txt``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from cluster.connection import connect
from stages.executor import ClusterConfig
from stages.lease import hold
from stages.manifest import ShardRecord
from stages.runner import run_stage
from tests.cluster.test_training import Tiny, TinyConfig
from tests.stages.training_data import VectorStream

STEP_S = 0.2
LEASE_TTL_S = 4.0


class Slow(Tiny):
    """The tiny training; every step takes a while and leaves a line in a file."""

    def process(self, *arguments: Any, **named: Any) -> ShardRecord:
        VectorStream.batches = _slowly(VectorStream.batches, Path(self.root) / "steps.txt")  # type: ignore[method-assign]
        return super().process(*arguments, **named)


def _slowly(batches: Any, path: Path) -> Any:
    def slow(stream: Any, first_step: int, rank: int, world_size: int) -> Any:
        for batch in batches(stream, first_step, rank, world_size):
            time.sleep(STEP_S)
            if rank == 0:
                with path.open("a") as file:
                    file.write(f"{batch.step} {socket.gethostname()} {os.getpid()}\n")
            yield batch

    return slow


def stage_of(root: str, num_steps: int, **settings: Any) -> Slow:
    """Build the training: two ranks, a core each, a checkpoint every third step."""
    steps = {"num_steps": num_steps, "checkpoint_every_steps": 3, "log_every_steps": 1}
    fixed = {"num_ranks": 2, "cpus_per_rank": 1.0, "engine": "torch", "checkpoint_in_background": True}
    config: Any = TinyConfig(**{**steps, **fixed, **settings})
    return Slow(config, root=root)


def main(address: str, root: str, num_steps: int, settings: dict[str, Any]) -> None:
    executor = connect(ClusterConfig(address=address))
    stage = stage_of(root, num_steps, **settings)
    fingerprint = stage.fingerprint({})
    try:
        with hold(root, stage.name, fingerprint, ttl_s=LEASE_TTL_S) as lease:
            run_stage(stage, fingerprint, {}, executor, ClusterConfig(), lease=lease)
    finally:
        executor.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads("".join(sys.argv[4:]) or "{}"))
