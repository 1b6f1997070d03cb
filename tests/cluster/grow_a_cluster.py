"""A cluster that gets nodes in the middle of a stage, and loses one: what an autoscaler sees, and who does the shards.

Called as ``grow_a_cluster.py ROOT``. It prints one line of JSON: what is asked for before there is any node, the shards
done, on how many nodes and by how many processes at once, and what is left of the workers at the end.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster

from cluster.connection import connect
from stages.base import Shard
from stages.executor import ClusterConfig, ShardFailure
from stages.manifest import ShardRecord
from tests.stages.toy_stages import Numbers, NumbersConfig

_NODE: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}


class Slow(Numbers):
    """Numbers that take a second, and leave a line in a file."""

    name = "slow"

    def process(self, shard: Shard, output: str) -> ShardRecord:
        began_at = time.time()
        time.sleep(1.0)
        node = ray.get_runtime_context().get_node_id()
        with (Path(self.root) / "shards.txt").open("a") as file:
            file.write(f"{shard.index} {node} {began_at} {time.time()}\n")
        return super().process(shard, output)


def asked_for(cluster: Cluster) -> int:
    """Count the workers that an autoscaler would find without a place."""
    state = get_cluster_resource_state(GcsClient(address=cluster.address))
    return sum(demand.count for demand in state.pending_resource_requests)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def main(root: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **_NODE})
    executor = connect(ClusterConfig(address=cluster.address))
    stage = Slow(NumbersConfig(counts=(2,) * 24), root=str(root))
    found: dict[str, Any] = {}
    nodes: list[Any] = []
    outcomes: list[ShardRecord] = []

    def bring_the_first() -> None:
        """Do as an autoscaler does: bring a node once somebody asks for it."""
        if not nodes and (count := asked_for(cluster)) >= 4:
            time.sleep(1.0)  # until all have asked
            found["asked_for"] = max(count, asked_for(cluster))
            nodes.append(cluster.add_node(num_cpus=1, **_NODE))

    def stay(progress: object) -> None:
        """Show nothing."""

    try:
        for outcome in executor.map(stage, stage.plan({}), str(root / "slow"), stay, on_idle=bring_the_first):
            assert not isinstance(outcome, ShardFailure), outcome.error
            outcomes.append(outcome)
            if len(outcomes) == 2:
                found["asked_for_meanwhile"] = asked_for(cluster)
                nodes.append(cluster.add_node(num_cpus=2, **_NODE))
            if len(outcomes) == 12:
                cluster.remove_node(nodes[0], allow_graceful=False)
        until(lambda: asked_for(cluster) == 0)
        until(lambda: {a["State"] for a in actors().values() if a["ActorClassName"] == "_Worker"} == {"DEAD"})
    finally:
        executor.close()
        cluster.shutdown()
    print(json.dumps(found | {"num_outcomes": len(outcomes), "shards": _read(root / "shards.txt")}))


def _read(path: Path) -> list[Any]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return [[int(index), node, float(began), float(ended)] for index, node, began, ended in lines]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
