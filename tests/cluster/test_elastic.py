"""Fewer ranks go on where nodes are lost for good: how many, and that they end where all would have."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.elastic import num_ranks_on, shrunk
from stages.base import Resources
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import Manifest
from stages.metrics import METRICS_NAME, read_metrics
from stages.runner import run_stage
from stages.training_config import TrainingConfig
from tests.cluster.machines import machines
from tests.cluster.train_on import stage_of

NUM_STEPS = 30


def node(**resources: float) -> dict[str, Any]:
    return {"Resources": resources, "Labels": {"pool": "training" if "GPU" in resources else "data"}}


@pytest.mark.parametrize(
    ("wanted", "num_ranks"),
    [
        ({"num_cpus": 4}, 5),
        ({"num_cpus": 3, "num_gpus": 1}, 6),
        ({"num_cpus": 1, "num_gpus": 1, "placement": "strict_pack"}, 8),
        ({"num_cpus": 1, "num_gpus": 1, "placement": "strict_spread"}, 2),
        ({"num_cpus": 1, "num_gpus": 1, "node_labels": {"pool": "data"}}, 0),
        ({"num_cpus": 0.1, "custom": {"fast": 0.1}}, 10),
        ({"num_cpus": 1, "num_gpus": 1, "accelerator_type": "H100"}, 8),
        ({"num_cpus": 64}, 0),
    ],
)
def test_ranks_are_counted_node_by_node(wanted: dict[str, Any], num_ranks: int) -> None:
    nodes: list[Mapping[str, Any]] = [
        node(CPU=8, GPU=8, **{"accelerator_type:H100": 1.0}),
        node(CPU=12, GPU=4, **{"accelerator_type:A100": 1.0}),
        node(CPU=2, fast=1),
    ]
    wanted = {"num_cpus": 1, **wanted}
    assert num_ranks_on(nodes, Resources(**wanted)) == num_ranks


@pytest.mark.parametrize(
    ("room", "micro", "min_ranks", "expected"),
    [
        (7, 4, 1, (6, 4)),
        (5, 4, 1, (4, 4)),
        (3, None, 1, (3, 4)),  # 48 samples on 12 ranks were 4 at once; so they stay
        (1, 4, 1, (1, 4)),
        (5, 4, 6, None),
        (0, 4, 1, None),
        (40, 4, 1, (6, 4)),
    ],
)
def test_ranks_divide_the_streams_and_micro_batches_do_not_grow(
    room: int, micro: int | None, min_ranks: int, expected: tuple[int, int] | None
) -> None:
    config = TrainingConfig(
        global_batch_size=48, num_streams=12, num_ranks=12, micro_batch_size=micro, min_ranks=min_ranks
    )
    found = shrunk(config, room)
    assert (found and (found.num_ranks, found.micro_batch_size)) == expected


@pytest.mark.chaos
@pytest.mark.timeout(400)
def test_a_node_that_does_not_come_back_is_not_waited_for(tmp_path: Path) -> None:
    root = tmp_path / "shrunk"
    with machines() as cluster:
        lost, _ = cluster.add_all(2, num_cpus=1)
        settings = json.dumps({"min_ranks": 1, "shrink_after_minutes": 0.1})
        command = [sys.executable, "-m", "tests.cluster.train_on", cluster.gcs, str(root), str(NUM_STEPS), settings]
        log = tmp_path / "log"
        with log.open("wb") as file:
            driver = cluster.on_head(command, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while not (root / "steps.txt").exists() or len((root / "steps.txt").read_text().splitlines()) < 8:
            assert time.monotonic() < deadline and driver.poll() is None, log.read_text()[-6000:]
            time.sleep(0.1)
        cluster.lose(lost)
        assert driver.wait(timeout=200) == 0, log.read_text()[-6000:]
    said = log.read_text()
    assert "the nodes that are left have room for 1 of 2 ranks; the training goes on with 1" in said
    calm = stage_of(str(tmp_path / "calm"), NUM_STEPS, num_ranks=1)
    wanted = run_stage(calm, calm.fingerprint({}), {}, LocalExecutor(), ClusterConfig())
    found = Manifest.read(str(root), calm.name, calm.fingerprint({}))
    assert found is not None and found.records[0].shard_id == wanted.records[0].shard_id
    weights, losses = [], []
    for manifest in (found, wanted):
        (record,) = manifest.records
        data = bytearray(record.files["weights"].read(manifest.root))
        weights.append(torch.frombuffer(data, dtype=torch.float32))
        folder = Path(manifest.root) / calm.name / "shards" / record.shard_id / "checkpoints"
        lines = read_metrics((folder / f"step-{NUM_STEPS:06d}" / METRICS_NAME).read_bytes())
        assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
        losses.append([line["loss"] for line in lines])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
