"""The training loop: exact resuming after every kind of end, checkpoints, metrics, refusal of numbers that explode."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from stages import storage
from stages.base import Progress
from stages.checkpoints import CheckpointFolder
from stages.engine import TorchEngine
from stages.errors import IntegrityError, StageError
from stages.metrics import read_metrics
from stages.training import Trained, TrainingStoppedError, train
from stages.training_config import TrainingConfig, learning_rate_at
from tests.stages.train_until_killed import CONFIG, run
from tests.stages.training_data import TinyModel, VectorStream


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The training without any disturbance."""
    return run(str(tmp_path_factory.mktemp("straight")), VectorStream())


def lines_of(trained: Trained) -> list[dict[str, float]]:
    """Metrics without those that measure time or memory."""
    timed = ("samples_per_s", "data_wait_fraction", "checkpoint_wait_fraction", "memory_gib")
    return [
        {name: value for name, value in line.items() if name not in timed} for line in read_metrics(trained.metrics_log)
    ]


def assert_same(a: Trained, b: Trained, *, extra_line: int | None = None) -> None:
    """Hold two trainings equal bit for bit: weights and losses; a stop adds a line, and shortens the next."""
    assert a.weights is not None and b.weights is not None
    assert a.weights.keys() == b.weights.keys()
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
    found, wanted = lines_of(a), lines_of(b)
    if extra_line is not None:
        at = next(i for i, line in enumerate(found) if line["step"] == extra_line)
        assert found.pop(at)["step"] not in [line["step"] for line in wanted]
        found[at], wanted[at] = {"step": found[at]["step"]}, {"step": wanted[at]["step"]}
    assert found == wanted


def kill_at(folder: str, step: int, number: signal.Signals) -> int:
    command = [sys.executable, "-m", "tests.stages.train_until_killed", folder, str(step), str(int(number))]
    return subprocess.run(command, cwd=Path(__file__).parents[2], timeout=300, check=False).returncode


def test_training_lowers_the_loss_and_exports_the_average(straight: Trained) -> None:
    lines = lines_of(straight)
    assert [line["step"] for line in lines] == [4, 6, 8, 12, 16, 18, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {f"loss_quartile_{q}" for q in range(1, 5)} <= lines[-1].keys()
    assert straight.metrics["loss"] == lines[-1]["loss"]


def test_killed_and_resumed_is_the_same_bit_for_bit(straight: Trained, tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert kill_at(folder, 15, signal.SIGKILL) == -signal.SIGKILL
    assert CheckpointFolder(folder, 2).steps() == [12, 6]
    assert_same(run(folder, VectorStream()), straight)


def test_sigterm_writes_a_checkpoint_first(straight: Trained, tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert kill_at(folder, 9, signal.SIGTERM) == -signal.SIGTERM
    assert CheckpointFolder(folder, 2).steps() == [10, 6]
    assert_same(run(folder, VectorStream()), straight, extra_line=10)


def test_stop_on_request_in_a_thread(straight: Trained, tmp_path: Path) -> None:
    asked = iter([False] * 3 + [True] * 99)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(str(tmp_path), VectorStream(), should_stop=lambda: next(asked))
        except StageError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(errors[0], TrainingStoppedError)
    assert str(errors[0]) == "tiny: stopped on request after step 4 of 20; run again to resume"
    assert_same(run(str(tmp_path), VectorStream()), straight)


def test_a_finished_training_is_not_done_again(straight: Trained, tmp_path: Path) -> None:
    first = run(str(tmp_path), VectorStream())
    second = run(str(tmp_path), VectorStream(poisoned_steps=frozenset(range(20))))
    assert_same(first, straight)
    assert_same(second, straight)


@pytest.mark.parametrize("damage", ["flip", "truncate", "lose", "record"])
def test_a_damaged_checkpoint_is_passed_over(
    straight: Trained, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(CONFIG, num_steps=20)
    _stop_after(14, str(tmp_path), config)
    newest = tmp_path / "checkpoints" / "step-000014"
    file = newest / "rank-0000.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(bytes(data))
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "lose":
        file.unlink()
    else:
        (newest / "checkpoint.json").write_text('{"step": 14')
    with caplog.at_level(logging.INFO):
        resumed = run(str(tmp_path), VectorStream())
    assert "checkpoint of step 14 is passed over" in caplog.text
    assert "resuming from step 12 of 20" in caplog.text
    assert_same(resumed, straight)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_checkpoints_push_no_whole_ones_out(straight: Trained, tmp_path: Path, keep_last: int) -> None:
    folder, config = str(tmp_path), dataclasses.replace(CONFIG, keep_last=3)
    _stop_after(14, folder, config)
    assert CheckpointFolder(folder, 3).steps() == [14, 12, 6]
    (tmp_path / "checkpoints" / "step-000014" / "rank-0000.safetensors").write_bytes(b"damaged")
    _stop_after(1, folder, dataclasses.replace(CONFIG, keep_last=keep_last))
    assert CheckpointFolder(folder, keep_last).steps() == [13, 12][:keep_last]
    assert_same(run(folder, VectorStream()), straight, extra_line=13)


def test_a_training_whose_checkpoints_are_all_damaged_does_not_start_over(straight: Trained, tmp_path: Path) -> None:
    _stop_after(14, str(tmp_path), CONFIG)
    for path in tmp_path.glob("checkpoints/*/rank-0000.safetensors"):
        path.write_bytes(b"damaged")
    with pytest.raises(
        IntegrityError, match=r"all 2 checkpoints are damaged, the newest of step 14; put them back, or"
    ):
        run(str(tmp_path), VectorStream())
    shutil.rmtree(tmp_path / "checkpoints")
    assert_same(run(str(tmp_path), VectorStream()), straight)


def _stop_after(step: int, folder: str, config: TrainingConfig) -> None:
    asked = iter([False] * (step - 1) + [True])
    with pytest.raises(TrainingStoppedError):
        run(folder, VectorStream(), config, lambda: next(asked))


def test_checkpoints_work_on_any_store(straight: Trained, root: str) -> None:
    _stop_after(7, f"{root}/training", dataclasses.replace(CONFIG, tensorboard=True))
    assert_same(run(f"{root}/training", VectorStream()), straight, extra_line=7)
    names = storage.list_files(f"{root}/training")
    assert [name for name in names if name.endswith("checkpoint.json")] == [
        "checkpoints/step-000018/checkpoint.json",
        "checkpoints/step-000020/checkpoint.json",
    ]
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in names)
    content = storage.read_bytes(f"{root}/training/metrics.jsonl")
    assert [line["step"] for line in read_metrics(content)] == [4, 6, 7, 8, 12, 16, 18, 20]


def test_leftovers_of_a_broken_off_write_are_no_checkpoint_and_go_away(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / "step-000005" / "rank-0000.safetensors"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    assert CheckpointFolder(str(tmp_path), 2).steps() == []
    run(str(tmp_path), VectorStream())
    assert not leftover.exists()


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    trained = run(str(tmp_path), VectorStream(poisoned_steps=frozenset({3, 9})))
    assert [line["num_skipped_steps"] for line in lines_of(trained)] == [1, 1, 1, 2, 2, 2, 2]
    assert trained.weights is not None
    assert all(bool(tensor.isfinite().all()) for tensor in trained.weights.values())


def test_many_in_a_row_end_the_training(tmp_path: Path) -> None:
    message = "10 bad steps in a row up to step 16, after 3 rollbacks; the checkpoint to go back to is of step 6"
    with pytest.raises(StageError, match=message):
        run(str(tmp_path), VectorStream(poisoned_steps=frozenset(range(8, 99))))


def test_an_all_skipped_window_is_valid_json(tmp_path: Path) -> None:
    trained = run(str(tmp_path), VectorStream(poisoned_steps=frozenset(range(8, 16))))
    line = json.loads(trained.metrics_log.splitlines()[3])
    assert line["step"] == 12 and line["loss"] is None


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[Progress] = []
    config = dataclasses.replace(CONFIG, num_steps=4, warmup_steps=0)
    options = {"make_engine": TorchEngine, "seed": 0, "folder": str(tmp_path), "place": "tiny"}
    train(TinyModel(), VectorStream(), config, report=seen.append, **options)  # type: ignore[arg-type]
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (4, 4, "steps")
    assert seen[-1].numbers.keys() == {"loss", "samples_per_s", "data_wait"}


def test_learning_rate_schedules() -> None:
    constant = TrainingConfig(num_steps=100, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate_at(constant, step) for step in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = dataclasses.replace(constant, learning_rate_schedule="cosine", warmup_steps=0)
    rates = [learning_rate_at(cosine, step) for step in range(100)]
    assert rates[0] == 1.0 and rates[50] == pytest.approx(0.5) and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps: 0 is not positive"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0 is not in"),
        ({"global_batch_size": 60}, "global_batch_size: 60 is not a multiple of num_streams: 8"),
        ({"num_ranks": 3}, "num_ranks: 3 does not divide num_streams: 8"),
        ({"micro_batch_size": 48}, "micro_batch_size: 48 does not divide the 64 samples"),
        ({"warmup_steps": 2000}, "warmup_steps: 2000 is not between 0 and num_steps: 1000"),
        ({"gpus_per_rank": 0.5}, "gpus_per_rank: 0.5"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)  # type: ignore[arg-type]
