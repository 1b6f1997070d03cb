"""Early stop where checkpoints fail or go: what is exported has a checkpoint, resumed or not."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import insight, storage
from stages.checkpoints import CheckpointFolder
from stages.dataset import Batch
from stages.early_stop import LOST, EarlyStop
from stages.engine import Engine, TorchEngine
from stages.errors import StorageError
from stages.insight import Insight, Seen, Watch
from stages.metrics import read_metrics
from stages.storage import Written
from stages.training import Trained, TrainingStoppedError, train
from stages.training_config import TrainingConfig
from stages.validation_config import LOSS, ValidationConfig
from tests.stages.train_until_killed import CONFIG
from tests.stages.training_data import Disturbed, TinyModel, VectorStream


class Nothing:
    """Held-out samples that are never asked for."""

    def __len__(self) -> int:
        return 4

    def load(self, first: int, last: int, *, whole: bool = False) -> Batch:
        raise AssertionError


class Script:
    """Gives validations their losses, by step (the last one again and again), and lets saves fail.

    The save of a step in ``held_back`` fails only once it is let go; that of another in ``failing`` at once.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        losses: dict[int, list[float]],
        *,
        failing: tuple[int, ...] = (),
        held_back: int | None = None,
        let_go_at: int | None = None,
    ) -> None:
        self.let_go = threading.Event()
        self._losses = losses
        self._failing, self._held_back, self._let_go_at = failing, held_back, let_go_at
        self._step = 0
        self._upload, look = storage.upload, Insight.look

        def look_at(seeing: Insight, done: int) -> Seen:
            self._step = done
            return look(seeing, done)

        monkeypatch.setattr(Insight, "look", look_at)
        monkeypatch.setattr(insight, "Validation", lambda *given: self._validate)
        monkeypatch.setattr(storage, "upload", self._upload_or_fail)

    def _validate(self, engine: Engine) -> dict[str, float]:
        if self._step == self._let_go_at:
            self.let_go.set()
        losses = self._losses.get(self._step, [9.0])
        return {LOSS: losses.pop(0) if len(losses) > 1 else losses[0]}

    def _upload_or_fail(self, path: Path, uri: str) -> Written:
        for step in self._failing:
            if f"step-{step:06d}" in uri:
                assert step != self._held_back or self.let_go.wait(60)
                raise StorageError("no room")
        return self._upload(path, uri)


def config(every_steps: int = 5, **changes: Any) -> TrainingConfig:
    validation = ValidationConfig(num_samples=4, every_steps=every_steps, early_stop_patience=20)
    common: dict[str, Any] = {"checkpoint_every_steps": 100, "log_every_steps": 100, "max_failed_saves": 5}
    return dataclasses.replace(CONFIG, validation=validation, **(common | changes))


def run(
    folder: Path, settings: TrainingConfig, stream: VectorStream | None = None, stop: Callable[[], bool] = lambda: False
) -> Trained:
    where: dict[str, Any] = {"folder": str(folder), "place": "tiny", "watch": Watch(held_out=Nothing())}
    given = stream or VectorStream()
    return train(TinyModel(), given, settings, make_engine=TorchEngine, seed=5, should_stop=stop, **where)


def told(trained: Trained) -> dict[float, float]:
    """Give what was told lost, by step of the line."""
    return {line["step"]: line[LOST] for line in read_metrics(trained.metrics_log) if LOST in line}


def test_a_step_lost_between_lines_is_told_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and resumed, the training does not take the lost step for the best again."""
    Script(monkeypatch, {5: [1.0], 10: [0.5]}, failing=(10,))
    asked = iter(range(1, 999))
    with pytest.raises(TrainingStoppedError):
        run(tmp_path, config(), stop=lambda: next(asked) == 13)
    trained = run(tmp_path, config())
    assert told(trained) == {13: 10}
    assert trained.step == 5 and trained.weights is not None


def test_two_failed_saves_in_a_row_do_not_lead_back_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is known to have failed only after the second was found better."""
    losses = {5: [1.0], 10: [0.8], 15: [0.5]}
    Script(monkeypatch, losses, failing=(10, 15), held_back=10, let_go_at=15)
    trained = run(tmp_path, config(checkpoint_in_background=True))
    assert told(trained) == {15: 10, 20: 15}
    assert trained.step == 5 and trained.weights is not None
    replayed = EarlyStop(20, 0.0, LOSS).replay(read_metrics(trained.metrics_log))
    assert replayed.best_step == 5


def test_a_validation_while_a_save_was_failing_has_no_checkpoint_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch, {5: [2.0], 10: [0.5], 15: [0.7]}, failing=(10,), held_back=10)
    trained = run(tmp_path, config(checkpoint_in_background=True), Disturbed(at_17=script.let_go.set))
    assert told(trained) == {20: 10}
    assert trained.step == 5 and trained.weights is not None


def test_the_step_that_becomes_the_best_by_a_loss_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, {5: [2.0], 10: [0.5], 11: [0.7]}, failing=(10,))
    trained = run(tmp_path, config(every_steps=1))
    assert told(trained) == {11: 10}
    assert trained.step == 11 and trained.weights is not None


def test_a_rollback_to_where_a_deleted_step_was_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 10 pushes out step 5, and is undone by going back to step 6."""
    Script(monkeypatch, {5: [1.0], 10: [0.5, 2.0]})
    settings = config(checkpoint_every_steps=6, max_nonfinite_steps=2)
    trained = run(tmp_path, settings, VectorStream(poisoned_steps=frozenset({9, 10})))
    assert "tiny: step 5, the best, has no checkpoint; now: None" in caplog.text
    assert trained.metrics["num_rollbacks"] == 1
    assert trained.step == 10 and 10 in CheckpointFolder(str(tmp_path), 2).steps()


def test_lost_steps_do_not_use_up_patience() -> None:
    early_stop = EarlyStop(2, 0.0, LOSS)
    for step, loss in ((5, 1.0), (10, 1.5), (15, 0.5)):
        early_stop.see(step, {LOSS: loss})
    assert early_stop.lose(15, 16) and early_stop.best_step == 5 and not early_stop.has_ended
    early_stop.see(20, {LOSS: 1.2})
    assert early_stop.has_ended
