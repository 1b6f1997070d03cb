"""Work on a cluster whose nodes an autoscaler brings and takes away: a data stage, then a training.

Called as ``autoscaled.py ADDRESS ROOT``. It prints one line of JSON: for each stage the digest of its manifest and the
types of the nodes that were there, most at once; and how many nodes are left at the end.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray

from cluster.connection import connect
from stages.base import Resources, Shard
from stages.executor import ClusterConfig, Executor
from stages.manifest import Manifest, ShardRecord
from stages.runner import run_stage
from tests.cluster.test_training import Tiny, TinyConfig
from tests.stages.toy_stages import Numbers, NumbersConfig


class Slow(Numbers):
    """Numbers that take a second each, on machines for data."""

    name = "slow"

    @property
    def resources(self) -> Resources:
        return Resources(num_cpus=1.0)

    def process(self, shard: Shard, output: str) -> ShardRecord:
        time.sleep(1.0)
        return super().process(shard, output)


def stages(root: str) -> tuple[Slow, Tiny]:
    """Build both: twelve shards, and a training of two ranks on machines for trainings."""
    where: Any = {"num_ranks": 2, "cpus_per_rank": 1.0, "resources_per_rank": {"training": 1.0}, "engine": "torch"}
    return Slow(NumbersConfig(counts=(2,) * 12), root=root), Tiny(TinyConfig(**where), root=root)


def run(stage: Any, executor: Executor) -> Manifest:
    """Bring one to its end."""
    return run_stage(stage, stage.fingerprint({}), {}, executor, ClusterConfig())


def nodes() -> Counter[str]:
    """Count the nodes beside the head, by their resource."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Counter("training" if "training" in had else "data" for had in alive if had.get("CPU"))


@contextlib.contextmanager
def watched(most: Counter[str]) -> Iterator[None]:
    """Note how many nodes of each type there are at once at most."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            most.update(nodes() - most)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main(address: str, root: str) -> None:
    executor = connect(ClusterConfig(address=address))
    found: dict[str, Any] = {}
    try:
        for stage in stages(root):
            most: Counter[str] = Counter()
            with watched(most):
                digest = run(stage, executor).digest
            found[stage.name] = {"digest": digest, "nodes": most}
        deadline = time.monotonic() + 60
        while nodes() and time.monotonic() < deadline:
            time.sleep(0.5)
        found["left"] = nodes().total()
    finally:
        executor.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
