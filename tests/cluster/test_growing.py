"""A cluster that grows in the middle of a stage: nodes are asked for, and those that come do shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_nodes_that_join_in_the_middle_do_shards(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cluster.grow_a_cluster", str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=Path(__file__).parents[2])
    assert child.returncode == 0, child.stderr[-4000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["asked_for"] == 4  # on a cluster without a core
    assert found["asked_for_meanwhile"] >= 1
    shards = found["shards"]
    assert found["num_outcomes"] == 24 and {index for index, *_ in shards} == set(range(24))
    first, second = dict.fromkeys(node for _, node, *_ in sorted(shards, key=lambda shard: shard[2]))
    num_done = {name: sum(node == name for _, node, *_ in shards) for name in (first, second)}
    assert num_done[first] >= 2 and num_done[second] >= 12
    assert max(sum(began <= moment < ended for *_, began, ended in shards) for *_, moment, _ in shards) == 3
