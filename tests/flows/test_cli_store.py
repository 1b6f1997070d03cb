"""``unclip verify``, ``repair`` and ``gc`` on a real, small store."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.project import open_project
from stages.executor import LocalExecutor
from stages.lease import hold
from stages.life import find_lives
from stages.manifest import Manifest
from stages.runner import run_stage
from stages.tombstones import read_tombstones
from tests.conftest import free_port

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
STAGES = ("source", "download", "filter")


def config_of(folder: Path, root: Path, port: int, **settings: Any) -> str:
    lines = [f"extends: {TINY}", f"root: {root}", "cluster: {executor: local}"]
    lines.append(f"source: {{rows_per_shard: 8, shapes: {{num_images: 24, port: {port}}}}}")
    path = folder / "config.yaml"
    path.write_text("\n".join([*lines, *(f"{name}: {json.dumps(value)}" for name, value in settings.items())]) + "\n")
    return str(path)


def run(config: str) -> dict[str, Manifest]:
    """Bring the first stages to their end, as `unclip run --until filter` does."""
    project = open_project(config, [])
    found: dict[str, Manifest] = {}
    for name in STAGES:
        stage = project.stages[name]
        inputs = {up: found[up] for up in stage.upstream}
        found[name] = run_stage(stage, project.fingerprints[name], inputs, LocalExecutor(), project.config.cluster)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder, port = tmp_path_factory.mktemp("made"), free_port()
    run(config_of(folder, folder / "store", port))
    return folder / "store", port


@pytest.fixture
def config(made: tuple[Path, int], tmp_path: Path) -> str:
    shutil.copytree(made[0], tmp_path / "store")
    return config_of(tmp_path, tmp_path / "store", made[1])


def test_a_whole_store_passes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", config]) == 0
    assert capsys.readouterr().out.startswith("3 results, 15 files, ")
    assert main(["verify", config, "--all", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["num_results"], said["num_files"], said["findings"]) == (3, 15, [])
    assert main(["repair", config]) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_damage_is_found_repaired_and_made_again(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = run(config)
    root = Path(before["download"].root)
    record = before["download"].records[1]
    tar = root / record.files["images"].path
    content = bytearray(tar.read_bytes())
    content[700] ^= 0xFF
    tar.write_bytes(content)
    assert main(["verify", config, "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["stage"], finding["shard"], finding["kind"]) == ("download", record.shard_id, "damaged")
    assert finding["path"] == record.files["images"].path and record.files["images"].sha256 in finding["expected"]
    assert main(["verify", config]) == 1
    assert "1 wrong" in capsys.readouterr().out
    assert main(["repair", config, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"would delete download/shards/{record.shard_id}.json" in said and tar.exists()
    assert main(["verify", config]) == 1
    capsys.readouterr()
    assert main(["repair", config]) == 0
    said = capsys.readouterr().out
    assert f"deleted download/shards/{record.shard_id}.json" in said
    assert f"`unclip run {config}` then does again: download (1 shard)" in said
    kept = {p: p.stat().st_mtime_ns for p in (root / "download/shards").glob("*.tar") if p != tar}
    after = run(config)
    assert {name: m.digest for name, m in after.items()} == {name: m.digest for name, m in before.items()}
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert main(["verify", config]) == 0


def test_a_takedown_of_nothing_is_refused(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export of wishes that failed looks like this."""
    (tmp_path / "empty").write_text("\n \n")
    for given, code, said in (
        (["--file", str(tmp_path / "empty"), "--apply"], 1, "empty names nothing"),
        (["--url", ""], 2, "--url: is empty"),
    ):
        assert main(["takedown", config, *given]) == code
        assert said in capsys.readouterr().err


def test_a_store_that_is_not_there_is_not_all_right(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", config, "-s", f"root={tmp_path}/misspelt"]) == 1
    assert "misspelt holds no result of this config; is root right?" in capsys.readouterr().out


def test_a_takedown_names_what_it_does_not_know(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    (life, *_) = find_lives(open_project(config, []).manifests, "shapes:0")
    assert main(["takedown", config, "--url", life.url, "--url", life.url + "?", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["unknown"] == [life.url + "?"] and not said["applied"]
    (sample,) = said["samples"]
    assert (sample["key"], sample["url"]) == (life.key, life.url)
    for kind in ("sha256", "key"):
        assert main(["takedown", config, f"--{kind}", f" {sample[kind].upper()}"]) == 0
        said = capsys.readouterr().out
        assert "unknown" not in said and life.url in said
    assert main(["takedown", config, "--key", "0" * 16]) == 0
    assert f"unknown {'0' * 16}  no image here has this name; misspelt" in capsys.readouterr().out
    root = open_project(config, []).config.root
    with hold(root, "embed", "0123456789abcdef", ttl_s=60.0):
        assert main(["takedown", config, "--key", life.key, "--apply"]) == 1
    said = capsys.readouterr().err
    assert "the tombstones are up, and nothing is removed yet, but embed by process" in said
    assert life.url in read_tombstones(root).urls
    assert main(["takedown", config, "--key", life.key, "--apply"]) == 0
    assert "unknown" not in capsys.readouterr().out
    assert main(["takedown", config, "--key", life.key]) == 0
    assert f"unknown {life.key}  no image here" in capsys.readouterr().out


def test_gc_shows_then_deletes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(open_project(config, []).config.root)
    orphan, young = root / "download/shards/0123456789abcdef.tar", root / "download/shards/fedcba9876543210.tar"
    for path in (orphan, young):
        path.write_bytes(b"x" * 1000)
    os.utime(orphan, (time.time() - 8 * 86_400,) * 2)
    assert main(["gc", config]) == 0
    said = capsys.readouterr().out
    assert "shard of no result" in said and "nothing is deleted without --apply" in said and orphan.exists()
    assert main(["gc", config, "--apply", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["applied"] and [item["path"] for item in said["garbage"]] == ["download/shards/0123456789abcdef.tar"]
    assert not orphan.exists() and young.exists()
    assert main(["gc", config, "--older-than", "0", "--apply"]) == 0
    assert not young.exists() and main(["verify", config]) == 0


def test_gc_of_stale_results_keeps_what_the_configs_reach(
    config: str, made: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").mkdir()
    new = config_of(tmp_path / "new", tmp_path / "store", made[1], filter={"min_caption_length": 2})
    run(new)
    assert main(["gc", config, new, "--stale", "--older-than", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["garbage"] == []
    assert main(["gc", new, "--stale", "--older-than", "0", "--apply", "--json"]) == 0
    garbage = json.loads(capsys.readouterr().out)["garbage"]
    assert garbage and {item["stage"] for item in garbage} == {"filter"}
    assert main(["verify", new, "--all"]) == 0


def test_gc_says_whose_shards_it_keeps(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(open_project(config, []).config.root)
    orphan = root / "download/shards/0123456789abcdef.tar"
    orphan.write_bytes(b"x")
    os.utime(orphan, (time.time() - 30 * 86_400,) * 2)
    with hold(str(root), "download", "0" * 16, ttl_s=30.0, run="another"):
        assert main(["gc", config, "--apply"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "nothing to collect" in said and "run another" in said
        assert "download is being made by process" in said and "all its shards and checkpoints are kept" in said
        assert main(["gc", config, "--json"]) == 0
        (held,) = json.loads(capsys.readouterr().out)["held"]
        assert (held["stage"], held["fingerprint"]) == ("download", "0" * 16)
    assert orphan.exists() and main(["gc", config, "--apply"]) == 0 and not orphan.exists()


def test_gc_refuses_two_stores_and_negative_ages(
    config: str, made: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    other = config_of(tmp_path / "other", tmp_path / "elsewhere", made[1])
    assert main(["gc", config, other]) == 2
    assert "their stores differ" in capsys.readouterr().err
    assert main(["gc", config, "--older-than", "-1"]) == 2
    assert "--older-than -1: write a number of days" in capsys.readouterr().err
