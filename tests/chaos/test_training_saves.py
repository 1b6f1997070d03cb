"""A training whose store fails while checkpoints are written."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import metrics, storage
from stages.checkpoints import CheckpointFolder
from stages.errors import StageError, StorageError
from stages.training import Trained, TrainingStoppedError
from stages.training_config import TrainingConfig
from tests.chaos.s3_proxy import Schedule, faulty_proxy
from tests.chaos.test_full_disk import small_disk  # noqa: F401 - a fixture
from tests.stages import train_until_killed
from tests.stages.train_until_killed import CONFIG
from tests.stages.training_data import Disturbed, VectorStream

BACKGROUND = dataclasses.replace(CONFIG, checkpoint_in_background=True)


def run(folder: str, stream: VectorStream, config: TrainingConfig = BACKGROUND) -> Trained:
    return train_until_killed.run(folder, stream, config)


def assert_same_weights(a: Trained, b: Trained) -> None:
    assert a.weights is not None and b.weights is not None
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in b.weights)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return run(str(tmp_path_factory.mktemp("straight")), VectorStream(), CONFIG)


def test_spoiled_requests_are_not_noticed(
    straight: Trained, s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_RETRY_WAITS_S", (0.0, 0.0, 0.0))
    schedule = Schedule(fraction=0.15)
    with faulty_proxy(s3_server, schedule) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        trained = run(s3_root, VectorStream())
        assert sum(schedule.counts.values()) > schedule.counts["ok"], "some were spoiled"
        assert_same_weights(trained, straight)
        assert CheckpointFolder(s3_root, 2).steps() == [20, 18]


def test_a_checkpoint_that_cannot_be_read_for_a_while_is_not_given_up(
    straight: Trained, s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_RETRY_WAITS_S", (0.0, 0.0, 0.0))
    with pytest.raises(TrainingStoppedError):
        asked = iter([False] * 13 + [True])
        train_until_killed.run(s3_root, VectorStream(), CONFIG, lambda: next(asked))
    said = r"step 14 cannot be read at present \(.*run again to go on from there"
    with (
        faulty_proxy(s3_server, Schedule(1.0, faults=("503",), part="step-000014/")) as endpoint,
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(StorageError, match=said),
    ):
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        run(s3_root, VectorStream())
    assert CheckpointFolder(s3_root, 2).steps() == [14, 12]
    assert_same_weights(run(s3_root, VectorStream()), straight)


# TensorBoard's thread ends with the error that its next caller gets.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("remote", [False, True])
def test_tensorboard_without_room_ends_alone(
    straight: Trained,
    filler: Any,
    s3_root: str,
    remote: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its files lie in the training's folder, or in scratch where the store is remote; the checkpoints have room."""
    disk, fill, make_room = filler
    (Path(disk) / "tensorboard").mkdir()
    monkeypatch.setattr(metrics, "_PUBLISH_EVERY_S", -1.0)  # every line is flushed
    if remote:
        root = s3_root
        monkeypatch.setattr("tempfile.tempdir", disk)
    else:
        root = f"{disk}/training"
    config = dataclasses.replace(CONFIG, tensorboard=True, log_every_steps=1)
    with caplog.at_level(logging.WARNING):
        trained = run(root, Disturbed(at_8=fill, at_17=make_room), config)
    assert caplog.text.count("TensorBoard gets no more numbers until the training is started again") == 1
    assert_same_weights(trained, straight)


@pytest.fixture
def filler(small_disk: Path) -> Iterator[Any]:  # noqa: F811
    """Give two functions: one fills the disk, the other makes room again."""
    path = small_disk / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 512)

    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    yield str(small_disk), fill, path.unlink


def test_a_disk_that_is_full_for_a_while(straight: Trained, filler: Any, caplog: pytest.LogCaptureFixture) -> None:
    root, fill, make_room = filler
    with caplog.at_level(logging.WARNING):
        trained = run(f"{root}/training", Disturbed(at_8=fill, at_15=make_room), CONFIG)
    assert "the checkpoint of step 12 is not written" in caplog.text
    assert "no space left on the device" in caplog.text
    assert_same_weights(trained, straight)


def test_a_disk_that_stays_full(straight: Trained, filler: Any) -> None:
    root, fill, make_room = filler
    config = dataclasses.replace(CONFIG, max_failed_saves=2)
    with pytest.raises(StageError, match=r"step 18 cannot be written \(that of step 6 is whole\): .*no space left"):
        run(f"{root}/training", Disturbed(at_8=fill), config)
    make_room()
    assert CheckpointFolder(f"{root}/training", 2).steps() == [6]
    assert_same_weights(run(f"{root}/training", VectorStream()), straight)


def test_scratch_that_is_full_for_a_while(
    straight: Trained, filler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store has room; the local disk, on which a rank puts its files together, has none."""
    scratch, fill, make_room = filler
    monkeypatch.setattr("tempfile.tempdir", scratch)
    with caplog.at_level(logging.WARNING):
        trained = run(str(tmp_path / "store"), Disturbed(at_8=fill, at_15=make_room), CONFIG)
    (said,) = [record.getMessage() for record in caplog.records if "is not written" in record.getMessage()]
    assert "step 12" in said and "No space left" in said and scratch in said and "set TMPDIR" in said
    assert_same_weights(trained, straight)
    assert CheckpointFolder(str(tmp_path / "store"), 2).steps() == [20, 18]
