"""Two runs of one config at the same moment: each stage is done by one of them, the other waits and finds it done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import storage
from stages.lease import Holding, lease_uri
from tests.conftest import free_port

TOP = Path(__file__).parents[2]


@pytest.mark.chaos
def test_two_runs_give_one_result(prefect_state: Path, tmp_path: Path) -> None:
    settings = [f"root={tmp_path / 'store'}", f"source.shapes.port={free_port()}", "cluster.executor=local"]
    arguments = [part for setting in settings for part in ("-s", setting)]
    command = [sys.executable, "-m", "flows.cli", "run", str(TOP / "tests" / "tiny.yaml"), *arguments]
    runs = [
        subprocess.Popen(
            [*command, "--until", "clip", "--json"],
            env=os.environ | {"XDG_STATE_HOME": str(prefect_state)},
            cwd=TOP,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    answers = [{stage["stage"]: stage for stage in json.loads(out)["stages"]} for out, _ in said]
    assert "waiting for process" in said[0][1] + said[1][1]
    for name in ("source", "download", "filter", "clip"):
        both = [answer[name] for answer in answers]
        assert sorted(stage["status"] for stage in both) == ["cached", "done"], name
        assert both[0]["manifest"] == both[1]["manifest"]
        uri = lease_uri(str(tmp_path / "store"), name, both[0]["fingerprint"])
        assert Holding.from_bytes(storage.read_bytes(uri), uri).is_free
