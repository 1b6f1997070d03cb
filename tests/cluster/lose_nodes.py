"""Run the data stages on two local Ray nodes; in every stage kill a worker in a commit, then the second node.

Called as ``lose_nodes.py ROOT CLIP_WEIGHTS PORT FOLDER``; the folder is for notes of what was killed.

It prints one line of JSON: stage -> fingerprint and digest of its manifest, and what was killed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from cluster.connection import connect
from stages.base import Shard, Stage
from stages.executor import ClusterConfig
from stages.manifest import Manifest, ShardRecord
from stages.runner import StageProgress, run_stage
from tests.chaos.driver import kill_at
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


# In which step of a commit a worker of each stage dies.
STEPS = {
    "source": ("writing", "data"),
    "download": ("publishing", "data"),
    "filter": ("published", "data"),
    "embed": ("writing", "record"),
    "curate": ("publishing", "record"),
    "ledger": ("published", "record"),
    "pca": ("published", "data"),
}


def strike(stage: Stage[Any], note: Path) -> None:
    """Have the worker that comes first to a shard of a stage die while it commits it."""
    moment, kind = STEPS[stage.name]
    base: type[Stage[Any]] = type(stage)

    class Struck(base):  # type: ignore[misc,valid-type]
        def process(self, shard: Shard, output: str) -> ShardRecord:
            with contextlib.suppress(FileExistsError), note.open("x") as file:
                file.write(f"{moment}-{kind}")
                kill_at(moment, kind, 1)
            return super().process(shard, output)

    stage.__class__ = Struck


class Killer:
    """Loses a node once two shards are done."""

    def __init__(self, spot: Spot) -> None:
        self._spot = spot
        self.killed: list[str] = []

    def __call__(self, progress: StageProgress) -> None:
        if not progress.finished and progress.num_shards > 1 and progress.num_done >= 2 and not self.killed:
            self._spot.lose()
            self.killed.append("node")


def main(root: str, weights: str, port: int, folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **_NODE})
    spot = Spot(cluster)
    executor = connect(ClusterConfig(address=cluster.address))
    manifests: dict[str, Manifest] = {}
    found: dict[str, Any] = {}
    try:
        for stage in data_stages(root, weights, port):
            cluster.wait_for_nodes()
            killer, note = Killer(spot), folder / stage.name
            if stage.name in STEPS:
                strike(stage, note)
            done = manifests[stage.name] = _run(stage, manifests, executor, killer)
            killed = [*([note.read_text()] if note.exists() else []), *killer.killed]
            found[stage.name] = {"fingerprint": done.fingerprint, "digest": done.digest, "killed": killed}
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
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
