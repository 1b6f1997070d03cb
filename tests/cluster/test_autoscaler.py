"""Ray's own autoscaler brings the nodes that a stage waits for, of the right type, and takes them away afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.executor import LocalExecutor
from stages.manifest import Manifest
from tests.cluster.autoscaled import run, stages
from tests.cluster.machines import machines
from tests.cluster.test_training import weights

SMALL = {"CPU": 1, "object_store_memory": 80 << 20}
POOLS: dict[str, Any] = {
    "available_node_types": {
        "data": {"resources": SMALL, "node_config": {}, "max_workers": 2},
        "training": {"resources": SMALL | {"training": 1}, "node_config": {}, "max_workers": 2},
    },
    "max_workers": 4,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
}


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_nodes_come_when_they_are_needed_and_go_when_they_are_not(tmp_path: Path) -> None:
    with machines(autoscaling=POOLS) as cluster:
        command = [sys.executable, "-m", "tests.cluster.autoscaled", cluster.gcs, str(tmp_path / "cluster")]
        child = cluster.on_head(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors[-6000:]
    found = json.loads(said.splitlines()[-1])
    slow, tiny = (run(stage, LocalExecutor()) for stage in stages(str(tmp_path / "here")))
    assert found["slow"]["digest"] == slow.digest
    ours = Manifest.read(str(tmp_path / "cluster"), tiny.stage, tiny.fingerprint)
    assert ours is not None
    # Of one process here, which rounds otherwise than two ranks.
    alone = weights(tiny.records[0], tmp_path / "here")
    assert torch.allclose(weights(ours.records[0], tmp_path / "cluster"), alone, atol=1e-5)
    assert found["slow"]["nodes"]["data"] == 2
    assert found["tiny"]["nodes"]["training"] == 2
    assert found["left"] == 0
