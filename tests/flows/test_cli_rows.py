"""``unclip run --retry-failed``, ``adopt`` and ``what-if`` on a small finished store, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli import main
from flows.project import open_project
from stages import storage
from stages.manifest import Manifest
from tests.stages.data_run import Pictures, serving, write_list
from tests.stages.small_store import run, small_clip
from tests.stages.test_adopt import MAKE

TINY = Path(__file__).parents[1] / "tiny.yaml"
NUM_ROWS = 12
STAGES = ("source", "download", "filter", "clip", "embed", "curate")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Torch see no GPU, whatever the machine has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def served_state(prefect_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands of a test find the session's Prefect server."""
    monkeypatch.setenv("XDG_STATE_HOME", str(prefect_state))


@pytest.fixture
def server() -> Iterator[Pictures]:
    with serving() as found:
        found.failing = {"/5.png"}
        yield found


def config_of(folder: Path, lists: Path) -> str:
    small_clip().save(folder / "clip.safetensors")
    settings: dict[str, Any] = {
        "root": str(folder / "store"),
        "cluster": {"executor": "local"},
        "source": {"kind": "urls", "lists": [str(lists)], "rows_per_shard": 8},
        "download": {
            "allowed_networks": ["127.0.0.0/8"],
            "image_format": "png",
            "image_quality": 1,
            "retries": 0,
            "backoff_s": 0.0,
            "max_transient_fraction": 1.0,
        },
        "filter": {"near_duplicate_bits": None, "min_caption_length": 9},
        "clip": {"kind": "pretrained", "name": str(folder / "clip.safetensors")},
    }
    path = folder / "config.yaml"
    path.write_text(f"extends: {TINY}\n" + "".join(f"{name}: {json.dumps(v)}\n" for name, v in settings.items()))
    return str(path)


@pytest.fixture
def config(tmp_path: Path, server: Pictures) -> str:
    rows: list[tuple[str, str | None]] = [(server.url(i), f"picture {i}") for i in range(NUM_ROWS)]
    write_list(tmp_path / "lists" / "pairs.jsonl", rows)
    return config_of(tmp_path, tmp_path / "lists")


def finish(config: str) -> dict[str, Manifest]:
    """Bring the data stages to their end."""
    project, found = open_project(config, []), dict[str, Manifest]()
    for name in STAGES:
        found[name] = run(project.stages[name], {up: found[up] for up in project.stages[name].upstream})
    return found


def test_what_if_needs_neither_images_nor_a_gpu(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = finish(config)
    root = found["download"].root
    for record in found["download"].records:
        storage.delete(storage.join(root, record.files["images"].path))
    before = storage.list_files(root)
    assert main(["what-if", config, "-s", "filter.min_caption_length=10", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    # One row failed; of the others, those with two digits are left.
    assert said["kept"] == [NUM_ROWS - 1, 2] and (said["gained"], said["lost"], said["not_embedded"]) == (0, 9, 0)
    assert said["dropped"]["filter"]["caption_too_short"] == [0, 9]
    assert main(["what-if", config, "-s", "filter.min_caption_length=10"]) == 0
    said = capsys.readouterr().out
    assert "0 samples gained, 9 lost" in said and "caption_too_short" in said
    assert storage.list_files(root) == before, "it writes nothing"
    assert main(["what-if", config]) == 2
    assert "what-if: no change given" in capsys.readouterr().err


@pytest.mark.usefixtures("served_state")
def test_what_may_have_passed_is_fetched_again(
    config: str, server: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finish(config)["download"].dropped == {"http_503": 1}
    server.failing = set()
    server.num_requests.clear()
    line = ["run", config, "--until", "download", "--retry-failed"]
    assert main(line) == 0
    assert "1 rows are tried again (http_503: 1)" in capsys.readouterr().err
    assert server.num_requests == {"/5.png": 1}
    download = open_project(config, []).manifests["download"]
    assert (download.num_in, download.num_kept, download.dropped) == (NUM_ROWS, NUM_ROWS, {})
    assert main(line) == 0
    assert "no row failed for a reason that passes" in capsys.readouterr().err
    assert server.num_requests == {"/5.png": 1}


def test_retries_need_a_finished_download(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", config, "--retry-failed"]) == 2
    assert "--retry-failed: the download has not finished; `unclip run` finishes it" in capsys.readouterr().err
    assert main(["run", config, "--only", "filter", "--retry-failed"]) == 2
    assert "download is not among the stages of this run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("served_state")
def test_an_output_of_img2dataset_becomes_the_download(
    tmp_path: Path, server: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"url": server.url(i), "caption": f"picture {i}"} for i in range(NUM_ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    made = tmp_path / "made"
    command = [sys.executable, "-c", MAKE, str(tmp_path / "list.parquet"), str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    config = config_of(tmp_path, made)
    server.num_requests.clear()
    assert main(["adopt", config, str(tmp_path)]) in (1, 2)
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["adopt", config, str(made)]) == 0
    assert f"2 tables in {made}" in capsys.readouterr().err
    download = open_project(config, []).manifests["download"]
    assert (download.num_in, download.num_kept, download.dropped) == (NUM_ROWS, NUM_ROWS - 1, {"http_503": 1})
    assert server.num_requests == {}, "nothing is fetched"
    assert main(["adopt", config, str(made)]) == 2
    assert "adopt: the download has finished already" in capsys.readouterr().err
