"""Bad steps, spikes and rollbacks of a training; hangs, stragglers, determinism and memory in the files' own terms."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.checkpoints import CheckpointFolder
from stages.engine import StepResult, TorchEngine
from stages.errors import StageError
from stages.metrics import read_metrics
from stages.out_of_memory import is_out_of_memory, what_to_change
from stages.rollback import RollbackHistory, rollback_target
from stages.step_guard import StepGuard
from stages.stragglers import slowest_rank
from stages.training import Trained, TrainingStoppedError, train
from stages.training_config import TrainingConfig
from stages.watchdog import EXIT_CODE, HangReport, read_reports, suspects, verdict
from tests.stages import train_until_killed
from tests.stages.train_until_killed import CONFIG
from tests.stages.training_data import TinyModel, VectorStream
from unclip_models.randomness import SampleRandom

BAD = frozenset(range(8, 12))
CAREFUL = dataclasses.replace(CONFIG, max_nonfinite_steps=3)


def run(folder: Path, config: TrainingConfig = CAREFUL, stream: Any = None, stop_after: int | None = None) -> Trained:
    asked = iter(range(1, 999))
    given = stream or VectorStream(poisoned_steps=BAD)
    return train_until_killed.run(str(folder), given, config, lambda: next(asked) == stop_after)


def same(a: Trained, b: Trained) -> bool:
    assert a.weights is not None and b.weights is not None
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return run(tmp_path_factory.mktemp("rolled"))


def test_a_rollback_skips_the_data_and_lowers_the_learning_rate(tmp_path: Path) -> None:
    trained = run(tmp_path)
    (rollback,) = RollbackHistory.read(str(tmp_path)).rollbacks
    assert (rollback.from_step, rollback.to_step, rollback.data_offset) == (11, 6, 5)
    last = read_metrics(trained.metrics_log)[-1]
    # Step 6 goes on at the data of step 11, the last bad one.
    assert (last["num_rollbacks"], last["num_skipped_steps"], last["learning_rate"]) == (1, 1, 0.5e-2)
    assert last["num_spikes"] == 0


@pytest.mark.parametrize("stop_after", [7, 9, 10, 11, 12, 15])
def test_stopped_around_a_rollback_and_resumed_is_the_same(
    rolled_back: Trained, tmp_path: Path, stop_after: int
) -> None:
    """Stops are counted in steps done, so 9 and 10 fall into the bad stretch and 11 on lie behind the rollback."""
    with pytest.raises(TrainingStoppedError):
        run(tmp_path, stop_after=stop_after)
    assert same(run(tmp_path), rolled_back)


@pytest.mark.parametrize("at", [10, 13, 16])
def test_killed_around_a_rollback_and_resumed_is_the_same(rolled_back: Trained, tmp_path: Path, at: int) -> None:
    class Deadly(VectorStream):
        def batches(self, first_step: int, rank: int, world_size: int) -> Any:
            for batch in super().batches(first_step, rank, world_size):
                if batch.step == at:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stream=Deadly(poisoned_steps=BAD))
    assert same(run(tmp_path), rolled_back)


def test_killed_before_the_history_is_written_it_decides_again(
    rolled_back: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RollbackHistory, "write", lambda self, folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert CheckpointFolder(str(tmp_path), 2).steps() == [6]
    assert same(run(tmp_path), rolled_back)


def test_without_a_checkpoint_or_a_rollback_left_it_stops_and_says_what_to_try(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="there is no checkpoint to go back to") as early:
        run(tmp_path / "early", stream=VectorStream(poisoned_steps=frozenset(range(2, 9))))
    assert "look at the data of steps 2 to 4" in str(early.value)
    with pytest.raises(StageError, match=r"step 10: not finite, loss nan.*Lower tiny.learning_rate"):
        run(tmp_path / "none", dataclasses.replace(CAREFUL, max_rollbacks=0))


def test_after_a_rollback_into_the_bad_stretch_counting_starts_anew(tmp_path: Path) -> None:
    """The only checkpoint holds two of four bad steps; two more afterwards are not four in a row."""

    class Deadly(VectorStream):
        def batches(self, first_step: int, rank: int, world_size: int) -> Any:
            for batch in super().batches(first_step, rank, world_size):
                if batch.step == 9:
                    raise KeyboardInterrupt
                yield batch

    config = dataclasses.replace(CONFIG, max_nonfinite_steps=4)
    bad = frozenset(range(4, 10))
    straight = run(tmp_path / "straight", config, VectorStream(poisoned_steps=bad))
    (rollback,) = RollbackHistory.read(str(tmp_path / "straight")).rollbacks
    assert (rollback.from_step, rollback.to_step, rollback.data_offset) == (8, 6, 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", config, Deadly(poisoned_steps=bad))
    with pytest.raises(TrainingStoppedError):
        run(tmp_path / "stopped", config, VectorStream(poisoned_steps=bad), stop_after=8)
    for name in ("killed", "stopped"):
        assert same(run(tmp_path / name, config, VectorStream(poisoned_steps=bad)), straight), name


def test_targets_are_regular_checkpoints_from_before_the_stretch() -> None:
    assert rollback_target([18, 14, 12, 6], 15, 6) == 12
    assert rollback_target([18, 14], 15, 6) == 14
    assert rollback_target([18], 15, 6) == 18
    assert rollback_target([], 15, 6) is None


class Spiking(VectorStream):
    """The vectors of one step are much too long."""

    def batches(self, first_step: int, rank: int, world_size: int) -> Any:
        for batch in super().batches(first_step, rank, world_size):
            scale = 1e3 if batch.step == 12 else 1.0
            tensors = {name: tensor * scale for name, tensor in batch.tensors.items()}
            yield dataclasses.replace(batch, tensors=tensors)


def test_spikes_are_skipped_and_resuming_knows_the_steps_before(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, spike_threshold=20.0, spike_window=8)
    straight = run(tmp_path / "straight", config, Spiking())
    last = read_metrics(straight.metrics_log)[-1]
    assert (last["num_spikes"], last["num_skipped_steps"]) == (1, 1)
    with pytest.raises(TrainingStoppedError):
        run(tmp_path / "stopped", config, Spiking(), stop_after=11)
    assert same(run(tmp_path / "stopped", config, Spiking()), straight)
    assert not same(run(tmp_path / "unguarded", CONFIG, Spiking()), straight)


def test_the_state_of_the_guard_comes_back_exactly() -> None:
    guard = StepGuard(5.0, 4)
    for step in range(6):
        guard.add(step, StepResult(1 / (step + 3), 0.1 + step, True, {}))
    guard.add(6, StepResult(float("nan"), 1.0, False, {}))
    again = StepGuard(5.0, 4, guard.to_json())
    assert again.to_json() == guard.to_json()
    assert again.accepts(0.2, 5.0) and not again.accepts(9.0, 5.0) and not again.accepts(float("inf"), 1.0)


# ---- hangs ----------------------------------------------------------------------------------------------------


def report(rank: int, **changes: Any) -> HangReport:
    values = {"host": "h", "pid": 1, "step": 3, "phase": "step", "num_phases": 9, "in_collective": True}
    return HangReport(rank=rank, **{**values, "where": "f (x.py:1)", "silent_s": 4.0, **changes})


def test_the_rank_that_others_wait_for_is_named() -> None:
    waiting = {rank: report(rank) for rank in range(3)}
    assert suspects(waiting, 3) == []
    assert suspects(waiting, 4) == [3]
    assert suspects(waiting | {1: report(1, num_phases=8, in_collective=False)}, 3) == [1]
    assert suspects(waiting | {2: report(2, in_collective=False)}, 3) == [2]
    assert "rank 3, which gives no sign of life" in verdict(waiting, 4)


@pytest.mark.slow
@pytest.mark.parametrize("holds_python", [False, True])
def test_a_hang_ends_the_process_with_stacks(tmp_path: Path, holds_python: bool) -> None:
    command = [sys.executable, "-m", "tests.stages.hang", str(tmp_path), str(int(holds_python))]
    child = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    if holds_python:  # only the timer in C is left to act
        assert child.returncode == 1 and "in batches" in child.stderr
        return
    assert child.returncode == EXIT_CODE, child.stderr
    (folder,) = (tmp_path / "hangs").iterdir()
    found = read_reports(str(folder))[0]
    assert (found.step, found.phase) == (7, "data")
    assert "in batches" in (folder / "rank-0000.txt").read_text()
    assert "has not got on" in child.stderr
    assert CheckpointFolder(str(tmp_path), 2).steps() == [6]


# ---- the rest ----------------------------------------------------------------------------------------------------


def test_the_slowest_rank() -> None:
    assert slowest_rank([[1.0, 0.0], [1.0, 2.0], [0.5, 0.5]]) == (1, 3.0)


class Undeterministic(TinyModel):
    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
        return super().loss(batch, random)


def test_deterministic_mode_names_the_operation_and_leaves_no_trace(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, deterministic=True)
    run(tmp_path / "fine", config, VectorStream())
    with pytest.raises(StageError, match=r"tiny.deterministic: true, but put_ has no deterministic"):
        train(
            Undeterministic(),
            VectorStream(),
            config,
            make_engine=TorchEngine,
            seed=0,
            folder=str(tmp_path),
            place="tiny",
        )
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


class Huge(TinyModel):
    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        torch.empty(1 << 60, dtype=torch.uint8)
        raise AssertionError


def test_out_of_memory_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"tiny: out of memory .*tiny.micro_batch_size: 2 \(now 4\)"):
        train(Huge(), VectorStream(), CONFIG, make_engine=TorchEngine, seed=0, folder=str(tmp_path), place="tiny")
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    # Pinned memory, and what cuBLAS says of its workspace.
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    on_gpu = dataclasses.replace(CONFIG, gpus_per_rank=1, zero_stage=2)
    assert any("tiny.offload_optimizer: cpu" in change for change in what_to_change(on_gpu, 1, "tiny"))
    offloaded = dataclasses.replace(on_gpu, offload_optimizer="cpu")
    assert any("tiny.offload_optimizer: nvme" in change for change in what_to_change(offloaded, 1, "tiny"))
    advice = " ".join(what_to_change(dataclasses.replace(CONFIG, num_ranks=2, micro_batch_size=None), 2, "tiny"))
    assert "micro_batch_size: 2 (now 4)" in advice and "zero_stage: 2 (now 1)" in advice


def test_history_is_readable_by_people(tmp_path: Path) -> None:
    run(tmp_path)
    value = json.loads((tmp_path / "rollbacks.json").read_text())
    assert value["rollbacks"][0]["bad_steps"][0] == "step 8: not finite, loss nan, gradient norm nan"
