"""Checkpoints written beside the training: what they hold, when they count, and what failing to write them does."""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import saving, storage
from stages.checkpoints import CheckpointFolder
from stages.errors import StageError
from stages.storage import Written
from stages.training import Trained
from stages.training_config import TrainingConfig
from tests.stages import train_until_killed
from tests.stages.test_training import assert_same
from tests.stages.train_until_killed import CONFIG
from tests.stages.training_data import TinyModel, VectorStream

BACKGROUND = dataclasses.replace(CONFIG, checkpoint_in_background=True)


def run(folder: Path, config: TrainingConfig = BACKGROUND, stream: VectorStream | None = None) -> Trained:
    return train_until_killed.run(str(folder), stream or VectorStream(), config)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The training whose steps wait for their checkpoints."""
    return run(tmp_path_factory.mktemp("straight"), CONFIG)


class SlowDisk:
    """Holds back the files of one checkpoint until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.go_on = threading.Event()
        self._name = f"step-{step:06d}"
        self._upload = storage.upload
        monkeypatch.setattr(saving.storage, "upload", self)

    def __call__(self, path: Path, uri: str) -> Written:
        if self._name in uri:
            assert self.go_on.wait(60)
        return self._upload(path, uri)


class Watched(VectorStream):
    """Notes which checkpoints count when a batch is asked for, and lets the disk go on at a step."""

    def __init__(self, folder: Path, disk: SlowDisk, release_at: int) -> None:
        super().__init__()
        self.seen: dict[int, list[int]] = {}
        self._folder, self._disk, self._release_at = folder, disk, release_at

    def batches(self, first_step: int, rank: int, world_size: int) -> Any:
        for batch in super().batches(first_step, rank, world_size):
            self.seen[batch.step] = CheckpointFolder(str(self._folder), 2).steps()
            if batch.step == self._release_at:
                self._disk.go_on.set()
            yield batch


def test_steps_go_on_while_a_checkpoint_is_written(
    straight: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Watched(tmp_path, SlowDisk(monkeypatch, 6), release_at=11)
    trained = run(tmp_path, stream=stream)
    assert all(stream.seen[step] == [] for step in range(6, 12)), "steps 7 to 11 were made without it"
    assert stream.seen[18][0] == 12, "the save at step 12 waited for that of step 6, which counted"
    assert_same(trained, straight)


def test_it_holds_the_state_of_its_step(straight: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the steps change while the files are held back does not get into them."""
    config = dataclasses.replace(BACKGROUND, keep_last=10)
    run(tmp_path / "slow", config, Watched(tmp_path / "slow", SlowDisk(monkeypatch, 6), release_at=11))
    run(tmp_path / "fast", dataclasses.replace(CONFIG, keep_last=10))
    shapes = {name: param.shape for name, param in TinyModel().named_parameters()}
    for step in (6, 12, 18, 20):
        slow, fast = (CheckpointFolder(str(tmp_path / name), 10).weights(step, shapes) for name in ("slow", "fast"))
        assert all(torch.equal(slow[name], fast[name]) for name in shapes), step


def test_a_killed_training_goes_on_exactly(straight: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with files of step 12 half there: they do not count, step 6 does."""
    disk = SlowDisk(monkeypatch, 12)

    class Killed(VectorStream):
        def batches(self, first_step: int, rank: int, world_size: int) -> Any:
            for batch in super().batches(first_step, rank, world_size):
                if batch.step == 15:
                    disk.go_on.set()
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stream=Killed())
    assert CheckpointFolder(str(tmp_path), 2).steps() == [6]
    assert_same(run(tmp_path), straight)


def obstruct(folder: Path, *steps: int) -> None:
    """Make checkpoints impossible to write: a file is where their folder would be."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for step in steps:
        (folder / "checkpoints" / f"step-{step:06d}").write_text("in the way")


@pytest.mark.parametrize("in_background", [True, False])
def test_a_failed_save_is_told_and_passed_over(
    straight: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture, in_background: bool
) -> None:
    obstruct(tmp_path, 12)
    with caplog.at_level(logging.WARNING):
        trained = run(tmp_path, dataclasses.replace(BACKGROUND, checkpoint_in_background=in_background))
    assert "tiny: the checkpoint of step 12 is not written" in caplog.text
    assert CheckpointFolder(str(tmp_path), 2).steps() == [20, 18]
    assert_same(trained, straight)


@pytest.mark.parametrize("in_background", [True, False])
def test_too_many_failed_saves_stop_the_training_and_the_last_good_one_stays(
    straight: Trained, tmp_path: Path, in_background: bool
) -> None:
    obstruct(tmp_path, 12, 18)
    config = dataclasses.replace(BACKGROUND, max_failed_saves=2, checkpoint_in_background=in_background)
    with pytest.raises(StageError, match=r"step 18 cannot be written \(that of step 6 is whole\): .*step-000018"):
        run(tmp_path, config)
    assert CheckpointFolder(str(tmp_path), 2).steps() == [6]
    for step in (12, 18):
        (tmp_path / "checkpoints" / f"step-{step:06d}").unlink()
    assert_same(run(tmp_path), straight)


def test_the_last_one_may_not_fail(tmp_path: Path) -> None:
    obstruct(tmp_path, 20)
    with pytest.raises(StageError, match="the checkpoint of step 20 cannot be written"):
        run(tmp_path)


def test_minutes_count_too(straight: Trained, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_every_minutes=1e-9, keep_last=100)
    trained = run(tmp_path, config)
    assert CheckpointFolder(str(tmp_path), 100).steps() == list(range(20, 0, -1))
    assert trained.weights is not None and straight.weights is not None
    assert all(torch.equal(trained.weights[name], straight.weights[name]) for name in trained.weights)


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(CONFIG, checkpoint_every_steps=2, keep_every_steps=8))
    assert CheckpointFolder(str(tmp_path), 2).steps() == [20, 18, 16, 8]
