"""A real training that logs to Weights & Biases, offline: what is in its files; and what of W&B may fail under it."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import wandb
from PIL import Image
from torch import nn
from wandb.proto.wandb_internal_pb2 import Record

from stages.engine import TorchEngine
from stages.insight import Watch
from stages.metrics import read_metrics
from stages.sample_grids import Drawn
from stages.training import Trained, TrainingStoppedError, train
from stages.training_config import TrainingConfig
from stages.validation_config import SamplesConfig, ValidationConfig
from stages.wandb_log import WandbConfig
from tests.stages.training_data import Disturbed, TinyModel

_BLOCK, _BEFORE_RECORDS, _HEADER = 32768, 7, 7  # bytes of W&B's files, which are LevelDB's logs with a word in front


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep W&B away from the user's files and key, and end its process behind each test."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    with contextlib.suppress(OSError):  # it may be gone already
        wandb.teardown()


def run(folder: Path, mode: Any, *, stop_after: int | None = None, **calls: Any) -> Trained:
    """Train the tiny model for six steps; a line at every second, pictures at every third."""
    config = TrainingConfig(
        num_steps=6,
        global_batch_size=8,
        log_every_steps=2,
        checkpoint_every_steps=2,
        tensorboard=False,
        validation=ValidationConfig(num_samples=1, every_steps=0),
        samples=SamplesConfig(every_steps=3),
        wandb=WandbConfig(project="tiny", mode=mode),
    )
    num_done = 0

    def stops() -> bool:
        nonlocal num_done
        num_done += 1
        return num_done == stop_after

    def draw(model: nn.Module, device: Any) -> Drawn:
        return Drawn(picture=np.full((4, 6, 3), 7, dtype=np.uint8))

    options: dict[str, Any] = {"make_engine": TorchEngine, "seed": 1, "folder": str(folder), "place": "tiny"}
    return train(TinyModel(), Disturbed(**calls), config, watch=Watch(draw=draw), should_stop=stops, **options)


def records_of(path: Path) -> list[Record]:
    """Read what W&B has written for ``wandb sync``."""
    content, at, parts, found = path.read_bytes(), _BEFORE_RECORDS, b"", []
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:  # too little for a record: the block ends with zeros
            at += _BLOCK - at % _BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (1, 4):  # whole, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def rows_of(records: list[Record]) -> list[dict[str, Any]]:
    """Return what was logged, parts of values under ``<name>/<part>``, without W&B's own numbers."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({name: json.loads(value) for name, value in items.items() if not name.startswith("_")})
    return rows


def test_a_training_and_its_resumption_are_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    with pytest.raises(TrainingStoppedError):
        run(folder, "offline", stop_after=4)
    time.sleep(1)  # W&B names the folder of a start after the second
    lines = read_metrics(run(folder, "offline").metrics_log)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    first, second = (records_of(path) for path in files)
    found = [next(r.run for r in records if r.WhichOneof("record_type") == "run") for records in (first, second)]
    assert found[0].run_id == found[1].run_id and {r.project for r in found} == {"tiny"}
    settings = {item.key: json.loads(item.value_json) for item in found[0].config.update}
    assert settings["global_batch_size"] == 8 and settings["wandb"]["mode"] == "offline"
    rows = rows_of(first) + rows_of(second)
    numbers = [row for row in rows if "loss" in row]
    assert numbers == [{name: value for name, value in line.items() if value is not None} for line in lines]
    pictures = [row for row in rows if "samples/path" in row]
    assert [row["step"] for row in pictures] == [3, 6] and len(rows) == len(numbers) + 2
    for row, path in zip(pictures, files, strict=True):
        picture = Image.open(path.parent / "files" / row["samples/path"])
        assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (7, 7, 7)


def end_of_its_process() -> None:
    (process,) = (child for child in psutil.Process().children(recursive=True) if "wandb" in child.name())
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("mode", "calls", "why"),
    [("offline", {"at_3": end_of_its_process}, "onnection"), ("online", {}, "No API key configured")],
    ids=["its process dies", "nobody is logged in"],
)
def test_a_training_goes_on_without_it(
    tmp_path: Path, mode: str, calls: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "stages.wandb_log")
    trained = run(tmp_path / "training", mode, **calls)
    assert trained.step == 6 and trained.metrics["loss"] > 0
    (record,) = (record for record in caplog.records if record.name == "stages.wandb_log")
    assert why in record.getMessage() and "the training goes on without it" in record.getMessage()
