"""One stage, run to its end: nothing done twice, nothing lost, failures retried, quarantined or refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from stages import storage
from stages.errors import InputError, StageError
from stages.executor import ClusterConfig, LocalExecutor
from stages.graph import STAGES
from stages.lease import LeaseLostError
from stages.manifest import Manifest
from stages.runner import StageProgress, forget, inspect_stage, run_stage
from tests.stages.toy_stages import Numbers, NumbersConfig, Squares, SquaresConfig

PATIENT = ClusterConfig(backoff_s=0.0)


def run_numbers(root: str, *counts: int, seed: int = 0) -> Manifest:
    stage = Numbers(NumbersConfig(counts=counts or (3, 4, 5)), root=root, seed=seed)
    return run_stage(stage, stage.fingerprint({}), {}, LocalExecutor(), PATIENT)


def run_squares(
    root: str, numbers: Manifest, config: SquaresConfig | None = None, cluster: ClusterConfig = PATIENT, **watch: object
) -> Manifest:
    stage = Squares(config or SquaresConfig(), root=root)
    fingerprint = stage.fingerprint({"numbers": numbers.fingerprint})
    return run_stage(stage, fingerprint, {"numbers": numbers}, LocalExecutor(), cluster, **watch)  # type: ignore[arg-type]


def test_results_are_right(root: str) -> None:
    squares = run_squares(root, run_numbers(root))
    values = [json.loads(record.files["powers"].read(root)) for record in squares.records]
    assert values == [[0, 1, 4], [100, 121, 144, 169], [400, 441, 484, 529, 576]]
    assert squares.metrics["sum"] == sum(v for part in values for v in part if v % 2 == 0)
    assert json.loads(squares.files["sum"].read(root)) == squares.metrics["sum"]


def test_done_is_done_for_these_inputs_only(tmp_path: Path) -> None:
    root = str(tmp_path)
    numbers = run_numbers(root)
    squares = run_squares(root, numbers)
    stage = Squares(SquaresConfig(), root=root)
    state = inspect_stage(stage, squares.fingerprint, {"numbers": numbers})
    assert (state.status, state.manifest) == ("done", squares)
    changed = dataclasses.replace(numbers, records=numbers.records[:2])
    assert inspect_stage(stage, squares.fingerprint, {"numbers": changed}).reason == "numbers has changed since"
    assert inspect_stage(stage, "0" * 16, {"numbers": numbers}).status == "pending"


def test_finished_shards_are_not_done_again(tmp_path: Path) -> None:
    root = str(tmp_path)
    run_squares(root, run_numbers(root, 3, 4))
    before = storage.list_files(root)
    seen: list[StageProgress] = []
    run_squares(root, run_numbers(root, 3, 4, 5), on_progress=seen.append)
    assert seen[0].num_done == 2 and seen[0].num_shards == 3
    assert seen[-1].finished and seen[-1].num_samples == 5
    shards = [name for name in storage.list_files(root) if name not in before and "/shards/" in name]
    assert len(shards) == 4  # one new shard in each stage: a file and its record


def test_a_stage_wide_setting_keeps_the_shards(tmp_path: Path) -> None:
    root = str(tmp_path)
    numbers = run_numbers(root)
    first = run_squares(root, numbers)
    seen: list[StageProgress] = []
    second = run_squares(root, numbers, SquaresConfig(keep_even=False), on_progress=seen.append)
    assert first.fingerprint != second.fingerprint and seen[0].num_done == 3
    third = run_squares(root, numbers, SquaresConfig(power=3))
    assert {r.shard_id for r in third.records}.isdisjoint(r.shard_id for r in first.records)


def test_a_result_of_an_earlier_version_of_the_software_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    numbers = run_numbers(root)
    run_squares(root, numbers)
    for config, version, expected in (
        (SquaresConfig(), 2, "there is a result of this software's version 1 of the stage; now it is 2"),
        (SquaresConfig(power=3), 2, "no result for these settings"),
        (SquaresConfig(), 3, "no result for these settings"),
    ):
        monkeypatch.setattr(Squares, "version", version)
        stage = Squares(config, root=root)
        state = inspect_stage(stage, stage.fingerprint({"numbers": numbers.fingerprint}), {"numbers": numbers})
        assert (state.status, state.reason) == ("pending", expected)


def test_settings_that_affect_nothing_change_nothing(tmp_path: Path) -> None:
    numbers = run_numbers(str(tmp_path))
    stages = [Squares(SquaresConfig(num_workers=n), root=str(tmp_path)) for n in (1, 7)]
    assert len({stage.fingerprint({"numbers": numbers.fingerprint}) for stage in stages}) == 1


def test_the_seed_matters_only_where_it_is_used(tmp_path: Path) -> None:
    by_seed = [Numbers(NumbersConfig(), root=str(tmp_path), seed=seed).fingerprint({}) for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
    squares = [Squares(SquaresConfig(), root=str(tmp_path), seed=seed).fingerprint({"numbers": "x"}) for seed in (0, 1)]
    assert squares[0] == squares[1]


def test_a_lost_shard_file_is_made_again(tmp_path: Path) -> None:
    root = str(tmp_path)
    numbers = run_numbers(root)
    first = run_squares(root, numbers)
    storage.delete(storage.join(root, first.records[1].files["powers"].path))
    assert run_squares(root, numbers).digest == first.digest
    assert storage.exists(storage.join(root, first.records[1].files["powers"].path))


def test_forget_starts_anew(tmp_path: Path) -> None:
    root = str(tmp_path)
    numbers = run_numbers(root)
    first = run_squares(root, numbers)
    stage = Squares(SquaresConfig(), root=root)
    forget(stage, first.fingerprint, {"numbers": numbers})
    assert Manifest.read(root, "squares", first.fingerprint) is None
    seen: list[StageProgress] = []
    assert run_squares(root, numbers, on_progress=seen.append).digest == first.digest
    assert seen[0].num_done == 0


@pytest.mark.parametrize("how", ["flaky", "bug"])
def test_a_passing_failure_is_retried(tmp_path: Path, how: str) -> None:
    root, scratch = str(tmp_path / "store"), tmp_path
    numbers = run_numbers(root)
    undisturbed = run_squares(str(tmp_path / "other"), run_numbers(str(tmp_path / "other")))
    disturbed = run_squares(root, numbers, SquaresConfig(misbehave={"10": how}, scratch=str(scratch)))
    assert disturbed.digest == undisturbed.digest
    assert (scratch / "10").read_text() == "2"


@pytest.mark.parametrize(("how", "attempts"), [("corrupt", "1"), ("always", "3")])
def test_a_lasting_failure_is_refused_or_quarantined(tmp_path: Path, how: str, attempts: str) -> None:
    root = str(tmp_path / "store")
    numbers = run_numbers(root)
    config = SquaresConfig(misbehave={"10": how}, scratch=str(tmp_path))
    with pytest.raises(StageError, match=r"squares: 1 of 3 shards failed.*allows 0.*run again to resume"):
        run_squares(root, numbers, config)
    assert (tmp_path / "10").read_text() == attempts
    fingerprint = Squares(config, root=root).fingerprint({"numbers": numbers.fingerprint})
    assert Manifest.read(root, "squares", fingerprint) is None
    tolerant = ClusterConfig(backoff_s=0.0, max_failed_fraction=0.4)
    manifest = run_squares(root, numbers, config, tolerant)
    assert len(manifest.records) == 2 and len(manifest.quarantined) == 1


def test_what_a_shard_died_of_is_kept_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log, its traceback too, and in the manifest."""
    monkeypatch.setenv("SOME_TOKEN", "never works")  # what the shard says when it fails
    root, tolerant = str(tmp_path / "store"), ClusterConfig(backoff_s=0.0, max_failed_fraction=0.4)
    with caplog.at_level("DEBUG"):
        manifest = run_squares(
            root, run_numbers(root), SquaresConfig(misbehave={"10": "always"}, scratch=str(tmp_path)), tolerant
        )
    assert list(manifest.quarantined.values()) == ["***"]
    assert "failed, attempt 3 of 3: ***" in caplog.text and "ShardError: ***" in caplog.text
    # The line of source code that a traceback quotes is no secret.
    assert "never works" not in caplog.text.replace('"never works"', "")


@pytest.mark.parametrize("fraction", [0.7, 1.0])
def test_a_stage_of_which_nothing_is_left_is_refused(tmp_path: Path, fraction: float) -> None:
    tolerant = ClusterConfig(backoff_s=0.0, max_attempts=1, max_failed_fraction=fraction)
    config = SquaresConfig(misbehave=dict.fromkeys(("0", "10", "20"), "always"), scratch=str(tmp_path))
    root = str(tmp_path / "store")
    with pytest.raises(StageError, match=r"squares: 3 of 3 shards failed.*first: shard \w+: never works"):
        run_squares(root, run_numbers(root), config, tolerant)


def test_a_run_that_was_replaced_spoils_no_shard_of_its_successor(tmp_path: Path) -> None:
    """Where doing a shard twice gives other bytes."""
    root = str(tmp_path)
    numbers = run_numbers(root)

    class Downloads(Squares):
        repeatable = False

    def replaced() -> None:
        raise LeaseLostError("squares: taken over")

    for kind, spoils in ((Downloads, False), (Squares, True)):
        stage = kind(SquaresConfig(), root=root)
        stage.fence = replaced
        stage.setup()
        shard = stage.plan({"numbers": numbers})[0]
        with contextlib.nullcontext() if spoils else pytest.raises(LeaseLostError):
            stage.process(shard, f"{root}/squares/shards")
        assert bool(storage.list_files(f"{root}/squares/shards")) == spoils
    kinds = {kind.name: kind.repeatable for kind in STAGES}
    assert {name for name, repeatable in kinds.items() if not repeatable} >= {"download", "embed", "generate", "prior"}


def test_a_fatal_failure_stops_at_once(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    config = SquaresConfig(misbehave={"0": "fatal"}, scratch=str(tmp_path))
    with pytest.raises(InputError, match="the input is wrong"):
        run_squares(root, run_numbers(root), config)
    assert not storage.list_files(storage.join(root, "squares"))


def test_an_empty_input_is_refused(tmp_path: Path) -> None:
    numbers = run_numbers(str(tmp_path))
    with pytest.raises(InputError, match=r"give numbers\.counts"):
        run_squares(str(tmp_path), dataclasses.replace(numbers, records=()))
