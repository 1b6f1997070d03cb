"""Give the only worker node of a cluster its notice, in a training and among data shards; a new node comes meanwhile.

Called as ``drain_a_node.py ROOT``. It prints one line of JSON: digests, the steps and shards done, and by how many
processes.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from cluster.connection import connect
from stages.base import Progress, Shard
from stages.executor import ClusterConfig, ShardFailure
from stages.manifest import ShardRecord
from tests.cluster.metadata_service import ACTION, MetadataService, metadata_service
from tests.cluster.test_training import AccidentalStream, Tiny, TinyConfig
from tests.stages.toy_stages import Numbers, NumbersConfig

_NODE: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}


class Noted(Tiny):
    """The tiny training; every step is slow and leaves a line in a file."""

    def process(self, *arguments: Any, **named: Any) -> ShardRecord:
        AccidentalStream.batches = _slow_batches  # type: ignore[method-assign]
        return super().process(*arguments, **named)


def _slow_batches(self: Any, first_step: int, rank: int, world_size: int) -> Any:
    for batch in super(AccidentalStream, self).batches(first_step, rank, world_size):
        time.sleep(0.2)
        with Path(self._config.marker).open("a") as file:
            file.write(f"{batch.step} {os.getpid()}\n")
        yield batch


class Slow(Numbers):
    """Numbers that take a second, and leave a line in a file."""

    name = "slow"

    def process(self, shard: Shard, output: str) -> ShardRecord:
        time.sleep(1.0)
        with (Path(self.root) / "shards.txt").open("a") as file:
            file.write(f"{shard.index} {os.getpid()}\n")
        return super().process(shard, output)


class Spot:
    """The worker node that can be had, one at a time; for the program beside Ray it is a spot machine of EC2."""

    def __init__(self, cluster: Cluster, metadata: MetadataService) -> None:
        self._cluster = cluster
        self._metadata = metadata
        self._bring()

    def give_notice(self) -> None:
        """Announce the end of the node, and bring another one."""
        at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
        self._metadata.notices[ACTION] = f'{{"action": "terminate", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}'
        _, said = self._watcher.communicate(timeout=60)
        assert self._watcher.returncode == 0 and "its Ray node is being drained" in said, said
        self._metadata.notices.clear()
        self._old = self._node
        self._bring()

    def _bring(self) -> None:
        self._node = self._cluster.add_node(num_cpus=2, **_NODE)
        given = {"--address": self._cluster.address, "--metadata-url": self._metadata.url, "--poll-s": "0.1"}
        # Told its name, since all nodes of this cluster are on one machine.
        given["--node-id"] = self._node.node_id
        command = [sys.executable, "-m", "cluster.spot_notice", *(f"{name}={value}" for name, value in given.items())]
        self._watcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def close(self) -> None:
        """End the program of the last node, which had no notice."""
        self._watcher.kill()
        self._watcher.communicate()

    def take_away(self) -> None:
        """End the node that had its notice."""
        self._cluster.remove_node(self._old, allow_graceful=False)


def main(root: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **_NODE})
    with metadata_service() as metadata:
        spot = Spot(cluster, metadata)
        executor = connect(ClusterConfig(address=cluster.address))
        try:
            found = {"training": _train(root, executor, spot), "data": _process(root, executor, spot)}
        finally:
            spot.close()
            executor.close()
            cluster.shutdown()
    print(json.dumps(found))


def _train(root: Path, executor: Any, spot: Spot) -> dict[str, Any]:
    marker = root / "steps.txt"
    config = TinyConfig(num_steps=40, checkpoint_every_steps=1000, marker=str(marker), engine="torch")
    stage = Noted(config, root=str(root))

    def on_progress(progress: Progress) -> None:
        if not hasattr(spot, "_old") and progress.done >= 5:
            spot.give_notice()

    (outcome,) = executor.map(stage, stage.plan({}), str(root / "tiny"), on_progress)
    assert isinstance(outcome, ShardRecord), outcome.error
    spot.take_away()
    return _report(marker, outcome.files["weights"].sha256)


def _process(root: Path, executor: Any, spot: Spot) -> dict[str, Any]:
    stage = Slow(NumbersConfig(counts=(2,) * 12), root=str(root))
    outcomes: list[ShardRecord] = []
    for outcome in executor.map(stage, stage.plan({}), str(root / "slow"), lambda progress: None):
        assert not isinstance(outcome, ShardFailure), outcome.error
        outcomes.append(outcome)
        if len(outcomes) == 2:
            spot.give_notice()
        if len(outcomes) == 6:
            spot.take_away()
    return _report(root / "shards.txt", len(outcomes))


def _report(path: Path, result: Any) -> dict[str, Any]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {"result": result, "done": [int(number) for number, _ in lines], "processes": len({pid for _, pid in lines})}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
