"""The contract of a stage, held by every stage of the pipeline: one small real run, then the same questions to all."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import storage
from stages.audit import results_of, verify
from stages.base import Stage, identity_of
from stages.config import Config, load_config
from stages.executor import LocalExecutor
from stages.garbage import CHECKPOINT, find_garbage
from stages.graph import STAGE_NAMES, STAGES, build_stages, fingerprints, inspect_all
from stages.manifest import Manifest, ShardRecord
from stages.runner import output_uri, run_stage
from tests.conftest import free_port

TINY = Path(__file__).with_name("tiny.yaml")


@dataclass(frozen=True)
class Finished:
    """A finished pipeline."""

    config: Config
    stages: dict[str, Stage[Any]]
    manifests: dict[str, Manifest]

    def inputs(self, name: str) -> Mapping[str, Manifest]:
        return {upstream: self.manifests[upstream] for upstream in self.stages[name].upstream}


def run_locally(config: Config) -> Finished:
    stages = build_stages(config)
    names = fingerprints(stages)
    manifests: dict[str, Manifest] = {}
    for name, stage in stages.items():
        inputs = {upstream: manifests[upstream] for upstream in stage.upstream}
        manifests[name] = run_stage(stage, names[name], inputs, LocalExecutor(), config.cluster)
    return Finished(config, build_stages(config), manifests)  # stages that have not worked yet, as a driver has them


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("contract") / "store"
    return run_locally(load_config(TINY, [f"root={root}", f"source.shapes.port={free_port()}"]))


every_stage = pytest.mark.parametrize("name", STAGE_NAMES)


@every_stage
def test_plan_is_pure(finished: Finished, name: str) -> None:
    before = storage.list_files(finished.config.root)
    plans = [list(finished.stages[name].plan(finished.inputs(name))) for _ in range(2)]
    assert plans[0] == plans[1] and plans[0]
    assert len({shard.id for shard in plans[0]}) == len(plans[0])
    assert storage.list_files(finished.config.root) == before


@every_stage
def test_a_stage_travels(finished: Finished, name: str) -> None:
    stage = finished.stages[name]
    copy = pickle.loads(pickle.dumps(stage))
    inputs = finished.inputs(name)
    assert list(copy.plan(inputs)) == list(stage.plan(inputs))
    upstream = {other: finished.manifests[other].fingerprint for other in stage.upstream}
    assert copy.fingerprint(upstream) == stage.fingerprint(upstream) == finished.manifests[name].fingerprint


@every_stage
def test_twice_is_once(finished: Finished, name: str) -> None:
    stage = pickle.loads(pickle.dumps(finished.stages[name]))
    shard = stage.plan(finished.inputs(name))[0]
    before = contents(finished.config.root)
    with stage.service(finished.inputs(name)):
        stage.setup()
        record = stage.process(shard, output_uri(stage))
    assert record.identity == record_of(stage, shard.id).identity
    assert contents(finished.config.root) == before


def contents(root: str) -> dict[str, int]:
    """Return all files but those that tell how the work went: records hold times, events are written as it goes."""
    found = storage.list_files(root)
    return {name: size for name, size in found.items() if not name.endswith(".json") and "/tensorboard/" not in name}


def record_of(stage: Stage[Any], shard_id: str) -> ShardRecord:
    return ShardRecord.from_json(storage.read_json(f"{output_uri(stage)}/{shard_id}.json"))


@every_stage
def test_every_named_file_is_there_and_whole(finished: Finished, name: str) -> None:
    manifest = finished.manifests[name]
    files = [file for record in manifest.records for file in record.files.values()] + list(manifest.files.values())
    assert files
    for file in files:
        file.read(manifest.root)


@every_stage
def test_samples_are_not_lost_between_stages(finished: Finished, name: str) -> None:
    of = finished.manifests
    manifest = of[name]
    if name in ("download", "filter", "embed", "curate", "pca"):
        previous = {"download": "source", "filter": "download", "embed": "filter", "curate": "embed", "pca": "curate"}
        assert manifest.num_in == of[previous[name]].num_kept
    assert manifest.num_in == manifest.num_kept + sum(manifest.dropped.values())


@every_stage
def test_written_manifest_is_read_back(finished: Finished, name: str) -> None:
    manifest = finished.manifests[name]
    assert Manifest.read(manifest.root, name, manifest.fingerprint) == manifest


def test_all_is_done(finished: Finished) -> None:
    states = inspect_all(finished.stages, fingerprints(finished.stages))
    assert {state.status for state in states.values()} == {"done"}


def test_the_store_is_what_its_manifests_say(finished: Finished) -> None:
    names, kinds = fingerprints(finished.stages), {kind.name: kind for kind in STAGES}
    verified = verify(finished.config.root, results_of(names, finished.config.root), kinds)
    assert verified.findings == [] and verified.num_results == len(STAGE_NAMES)


def test_only_checkpoints_of_finished_trainings_are_garbage(finished: Finished) -> None:
    names = fingerprints(finished.stages)
    garbage = find_garbage(finished.config.root, [finished.stages], [names], older_than_days=0.0, stale=True)
    assert garbage and {item.reason for item in garbage} == {CHECKPOINT}


def test_a_copied_store_is_as_good(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.config.root, tmp_path / "copy")
    stages = build_stages(replace(finished.config, root=str(tmp_path / "copy")))
    states = inspect_all(stages, fingerprints(stages))
    assert {state.status for state in states.values()} == {"done"}
    for name, state in states.items():
        assert state.manifest is not None and state.manifest.digest == finished.manifests[name].digest


@pytest.mark.parametrize(
    ("override", "rerun"),
    [
        ("decoder.learning_rate=1e-5", {"decoder", "generate", "evaluate"}),
        ("pca.num_buckets=9", {"pca"}),
        ("curate.keep_fraction=0.5", set(STAGE_NAMES[STAGE_NAMES.index("curate") :])),
        ("evaluate.num_neighbours=2", {"evaluate"}),
        ("cluster.max_attempts=7", set()),
        ("decoder.num_ranks=2", set()),
        ("source.rows_per_shard=32", set(STAGE_NAMES)),
    ],
)
def test_a_changed_setting_reruns_what_depends_on_it(finished: Finished, override: str, rerun: set[str]) -> None:
    root, port = finished.config.root, finished.config.source.shapes.port
    config = load_config(TINY, [f"root={root}", f"source.shapes.port={port}", override])
    stages = build_stages(config)
    states = inspect_all(stages, fingerprints(stages))
    assert {name for name, state in states.items() if state.status == "pending"} == rerun


@every_stage
def test_settings_are_plain_data(finished: Finished, name: str) -> None:
    config = finished.stages[name].config
    assert identity_of(config, ("shard", "stage", "nothing"))
    with pytest.raises(AttributeError):
        config.anything = 1
