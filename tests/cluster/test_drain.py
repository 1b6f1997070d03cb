"""A node that gets its notice: the training leaves it with a checkpoint and repeats no step, shards go elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.executor import LocalExecutor
from tests.cluster.test_training import run


@pytest.mark.chaos
def test_a_spot_notice_costs_no_step_and_no_shard(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cluster.drain_a_node", str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert child.returncode == 0, child.stderr[-4000:]
    found = json.loads(child.stdout.splitlines()[-1])
    training, data = found["training"], found["data"]
    assert training["processes"] == 2
    assert training["done"] == list(range(40))
    calm = run(LocalExecutor(), tmp_path / "calm", num_steps=40)
    assert training["result"] == calm.files["weights"].sha256
    assert data["result"] == 12
    assert sorted(data["done"]) == list(range(12))
    assert data["processes"] >= 4
