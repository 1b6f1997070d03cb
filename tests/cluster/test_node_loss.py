"""Workers die in commits of every data stage, and whole nodes; the tables come out the same, and nothing is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stages.audit import Result, verify
from stages.graph import STAGES
from stages.manifest import Manifest
from tests.cluster.data_stages import data_stages
from tests.cluster.lose_nodes import STEPS
from tests.conftest import free_port
from tests.stages.small_store import run, small_clip


@pytest.mark.chaos
def test_lost_workers_and_nodes_change_nothing(root: str, tmp_path: Path) -> None:
    weights, port = tmp_path / "clip.safetensors", free_port()
    small_clip().save(weights)
    notes = tmp_path / "notes"
    notes.mkdir()
    command = [sys.executable, "-m", "tests.cluster.lose_nodes", root, str(weights), str(port), str(notes)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parents[2])
    assert child.returncode == 0, child.stderr[-4000:]
    disturbed = json.loads(child.stdout.splitlines()[-1])
    calm: dict[str, Manifest] = {}
    for stage in data_stages(str(tmp_path / "local"), str(weights), port):
        calm[stage.name] = run(stage, {name: calm[name] for name in stage.upstream})
        assert disturbed[stage.name]["digest"] == calm[stage.name].digest
        if stage.name != "clip":  # one shard only
            assert disturbed[stage.name]["killed"] == ["-".join(STEPS[stage.name]), "node"]
    results = [Result(stage=name, fingerprint=end["fingerprint"]) for name, end in disturbed.items()]
    assert verify(root, results, {kind.name: kind for kind in STAGES}).findings == []
