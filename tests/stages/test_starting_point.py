"""Starting from production: one version for one question, whatever happens to production meanwhile."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages import storage
from stages.errors import ConfigError, ConflictError, InputError, IntegrityError
from stages.executor import ClusterConfig, LocalExecutor
from stages.gate import PromotionGateConfig
from stages.manifest import Manifest
from stages.registry import promote, register, rollback
from stages.runner import run_stage
from stages.starting_point import find_starting_point, keep_starting_point, start_from_scratch
from stages.train import Decoder
from stages.warm_start import InitFrom
from stages.withdrawn import withdraw
from tests.stages.finished_run import finished_run, publish_stage
from tests.stages.test_other_datasets import DECODER, publish
from unclip_models.checkpoint import load_model

OPEN = PromotionGateConfig()
WARM = dataclasses.replace(DECODER, init_from=InitFrom(version="production"))


def promoted(root: str, *seeds: int) -> None:
    for seed in seeds:
        promote(root, register(root, finished_run(root, seed), OPEN).number, OPEN)


def test_a_question_is_decided_once(atomic_root: str) -> None:
    root = atomic_root

    def start(question: str) -> int | None:
        found = find_starting_point(root, "prior", question, root)
        keep_starting_point(root, found)
        return found.number

    assert start("week 1") is None
    promoted(root, 1)
    assert (start("week 1"), start("week 2")) == (None, 1)
    promoted(root, 2)
    rollback(root)
    promoted(root, 3)
    assert (start("week 1"), start("week 2"), start("week 3")) == (None, 1, 3)
    found = find_starting_point(root, "prior", "week 3", root)
    start_from_scratch(root, found)
    assert start("week 3") is None and start("week 2") == 1


def test_of_two_runs_that_begin_the_same_training_one_decides(atomic_root: str) -> None:
    promoted(atomic_root, 1)
    late = find_starting_point(atomic_root, "prior", "week", atomic_root)
    promoted(atomic_root, 2)
    keep_starting_point(atomic_root, find_starting_point(atomic_root, "prior", "week", atomic_root))
    with pytest.raises(ConflictError, match="another run has begun this training from version 2; run again"):
        keep_starting_point(atomic_root, late)
    assert find_starting_point(atomic_root, "prior", "week", atomic_root).number == 2


def test_a_withdrawn_version_is_no_start(tmp_path: Path) -> None:
    root = str(tmp_path)
    promoted(root, 1)
    withdraw(root, 1, ["prior"])
    start = find_starting_point(root, "prior", "week", root)
    with pytest.raises(InputError, match=r"retrain --from-scratch\): version 1 is withdrawn .*: prior learned from"):
        keep_starting_point(root, start)
    assert not find_starting_point(root, "prior", "week", root).is_kept
    storage.write_json(f"{root}/registry/starts/week.json", {"version": "1"})
    with pytest.raises(IntegrityError, match="not a starting point"):
        find_starting_point(root, "prior", "week", root)


@pytest.fixture
def week(tmp_path: Path) -> dict[str, Manifest]:
    return publish(str(tmp_path / "store"), (12, 20))


def train(config: Any, inputs: dict[str, Manifest]) -> Manifest:
    root = inputs["curate"].root
    stage = Decoder(config, root=root, seed=3)
    own = {name: inputs[name] for name in stage.upstream}
    fingerprint = stage.fingerprint({name: own[name].fingerprint for name in own})
    stage.settle()
    return run_stage(stage, fingerprint, own, LocalExecutor(), ClusterConfig())


def version_of(decoder: Manifest) -> int:
    evaluate = publish_stage(decoder.root, "evaluate", decoder.fingerprint, metrics={"clip_score": 0.3})
    return register(decoder.root, {"decoder": decoder, "evaluate": evaluate}, OPEN).number


def test_trainings_go_on_from_production(week: dict[str, Manifest], tmp_path: Path) -> None:
    root = week["curate"].root
    first = train(WARM, week)
    assert first.fingerprint == train(DECODER, week).fingerprint, "with nothing in production it is a cold training"
    assert first.config["init_from"] is None
    promote(root, version_of(first), OPEN)
    assert train(WARM, week).digest == first.digest, "its own promotion does not make it another training"

    more = {**week, "curate": dataclasses.replace(week["curate"], fingerprint="f" * 16)}  # as with further lists
    second = train(WARM, more)
    assert second.config["init_from"]["version"] == 1
    assert second.fingerprint == train(dataclasses.replace(WARM, init_from=InitFrom(version=1)), more).fingerprint
    stage = Decoder(dataclasses.replace(WARM, init_from=InitFrom(version=1)), root=root, seed=3)
    weights = load_model(Path(root) / first.records[0].files["weights"].path)[0].state_dict()
    begun = stage.build_model(stage.plan(more)[0]).state_dict()
    assert all((begun[name] == tensor).all() for name, tensor in weights.items())
    promote(root, version_of(second), OPEN)
    assert [train(WARM, inputs).digest for inputs in (week, more)] == [first.digest, second.digest]
    assert json.loads(storage.read_bytes(f"{root}/registry/production.json"))["number"] == 2

    # A store that is copied elsewhere goes on there; a training that began elsewhere names that store's registry.
    shutil.copytree(root, tmp_path / "copy")
    away = publish(str(tmp_path / "away"), (12, 20))
    other = dataclasses.replace(WARM, init_from=InitFrom(version="production", root=str(tmp_path / "copy")))
    assert train(other, away).config["init_from"]["version"] == 2

    withdraw(root, 1, ["decoder"])
    with pytest.raises(InputError, match=r"decoder.init_from: version 1 is withdrawn"):
        stage.build_model(stage.plan(more)[0])


def test_what_cannot_be_started_from_is_refused(week: dict[str, Manifest]) -> None:
    root = week["curate"].root
    names = {"curate": "c", "clip": "d"}
    frozen = dataclasses.replace(WARM, frozen=("text_encoder.*",))
    with pytest.raises(ConfigError, match=r"decoder.frozen: nothing is in production yet"):
        Decoder(frozen, root=root).fingerprint(names)
    for init, message in (
        (InitFrom(version=7), "version 7: .* has no such version"),
        (
            InitFrom(version=1, stage="upsampler_256"),
            "version 1 has no weights of upsampler_256; it has those of: prior",
        ),
    ):
        promoted(root, 1)
        with pytest.raises(InputError, match=message):
            Decoder(dataclasses.replace(DECODER, init_from=init), root=root).fingerprint(names)
    with pytest.raises(ValueError, match="or a version"):
        InitFrom(version=1, file="x")
