"""What the command line says of URL lists that have changed; no stage has to run for that but the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from stages.config import load_config
from stages.executor import ClusterConfig, LocalExecutor
from stages.graph import build_stages, fingerprints
from stages.runner import run_stage

TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    folder = tmp_path / "lists"
    folder.mkdir()
    write(folder, ["a", "b", "c"])
    return folder


def write(folder: Path, names: list[str]) -> None:
    rows = [json.dumps({"url": f"http://host/{name}.jpg", "caption": name}) + "\n" for name in names]
    (folder / "pairs.jsonl").write_text("".join(rows))


def arguments(folder: Path, *more: str) -> list[str]:
    settings = [f"root={folder.parent}/store", "source.kind=urls", f"source.lists=[{folder}]", *more]
    return [str(TINY), *(word for setting in settings for word in ("-s", setting))]


def run_source(folder: Path) -> None:
    config = load_config(TINY, arguments(folder)[2::2])
    stages = build_stages(config)
    run_stage(stages["source"], fingerprints(stages)["source"], {}, LocalExecutor(), ClusterConfig(executor="local"))


def test_plan_tells_what_changed(lists: Path, capsys: Any) -> None:
    run_source(lists)
    assert main(["plan", *arguments(lists)]) == 0
    assert "list " not in capsys.readouterr().err
    write(lists, ["a", "b", "c", "d"])
    assert main(["plan", *arguments(lists)]) == 0
    assert "list pairs.jsonl: 1 rows added to 3" in capsys.readouterr().err


def test_changed_rows_block_the_run_until_they_are_accepted(lists: Path, capsys: Any) -> None:
    run_source(lists)
    write(lists, ["a", "x", "c"])
    assert main(["plan", *arguments(lists)]) == 0
    shown = capsys.readouterr()
    assert "row 1: url 'http://host/b.jpg' -> 'http://host/x.jpg', caption 'b' -> 'x'" in shown.err
    assert "blocked" in shown.out
    assert main(["plan", *arguments(lists, "source.changed_rows=accept"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["status"] == "will run"
