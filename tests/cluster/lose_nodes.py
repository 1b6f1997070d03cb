"""Run the data stages on two local Ray nodes; in every stage kill a worker, then the second node.

Called as ``lose_nodes.py ROOT CLIP_WEIGHTS PORT``.

It prints one line of JSON: stage -> digest of its manifest and what was killed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from cluster.ray_executor import connect
from stages.base import Stage
from stages.executor import ClusterConfig
from stages.manifest import Manifest
from stages.runner import StageProgress, run_stage
from tests.cluster.data_stages import data_stages

_NODE = {"object_store_memory": 80 << 20, "include_dashboard": False}


class Spot:
    """The node beside the head: whenever it is lost, another one comes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._node = cluster.add_node(num_cpus=1, **_NODE)

    def lose(self) -> None:
        """End it without warning."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(num_cpus=1, wait=False, **_NODE)


class Killer:
    """Kills a worker process after the first shard, and a node after the second."""

    def __init__(self, spot: Spot) -> None:
        self._spot = spot
        self.killed: list[str] = []

    def __call__(self, progress: StageProgress) -> None:
        if progress.finished or progress.num_shards == 1:
            return
        if progress.num_done >= 1 and not self.killed:
            self.killed.append(f"worker {self._kill_a_worker()}")
        elif progress.num_done >= 2 and len(self.killed) == 1:
            self._spot.lose()
            self.killed.append("node")

    def _kill_a_worker(self) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if " ".join(process.cmdline()).startswith("ray::_Worker"):
                        process.kill()
                        return process.pid
        raise TimeoutError("no worker to kill")


def main(root: str, weights: str, port: int) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **_NODE})
    spot = Spot(cluster)
    executor = connect(ClusterConfig(address=cluster.address))
    manifests: dict[str, Manifest] = {}
    found: dict[str, Any] = {}
    try:
        for stage in data_stages(root, weights, port):
            cluster.wait_for_nodes()
            killer = Killer(spot)
            manifests[stage.name] = _run(stage, manifests, executor, killer)
            found[stage.name] = {"digest": manifests[stage.name].digest, "killed": killer.killed}
    finally:
        executor.close()
        cluster.shutdown()
    print(json.dumps(found))


def _run(stage: Stage[Any], manifests: dict[str, Manifest], executor: Any, killer: Killer) -> Manifest:
    inputs = {name: manifests[name] for name in stage.upstream}
    fingerprint = stage.fingerprint({name: manifest.fingerprint for name, manifest in inputs.items()})
    policy = ClusterConfig(address="unused", backoff_s=0.1)
    return run_stage(stage, fingerprint, inputs, executor, policy, on_progress=killer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
