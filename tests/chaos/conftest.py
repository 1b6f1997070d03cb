"""A small finished run of the data stages on either store, and a driver that does stages of it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stages import storage
from stages.audit import Result, verify
from stages.config import load_config
from stages.graph import STAGES, build_stages, fingerprints
from stages.manifest import Manifest, ShardRecord
from tests.chaos.driver import kind_of
from tests.conftest import free_port, s3_environment
from tests.stages.small_store import small_clip

TOP = Path(__file__).parents[2]
DATA_STAGES = ("source", "download", "filter", "clip", "embed", "curate", "ledger", "pca")
SHARDS = 3
KINDS = {kind.name: kind for kind in STAGES}


@dataclass(frozen=True)
class Run:
    """A store with a finished run.

    Attributes:
        root: the store.
        names: stage -> fingerprint.
        digests: stage -> digest of the undisturbed run.
        files: path below a stage's folder -> content, of every stage; without records and manifests: they hold times.
        records: stage -> shard id -> identity of its stored record.
        process: the driver.
    """

    root: str
    names: Mapping[str, str]
    digests: Mapping[str, str]
    files: Mapping[str, Mapping[str, bytes]]
    records: Mapping[str, Mapping[str, Any]]
    process: subprocess.Popen[str]

    def do(self, stage: str, **options: Any) -> dict[str, Any]:
        """Run one stage in a process of its own."""
        return ask(self.process, root=self.root, stage=stage, **options)

    def num_shards(self, stage: str) -> int:
        """Return how many shards a stage has: `SHARDS`, and the clip one."""
        return len(self.records[stage])

    def forget(self, stage: str) -> None:
        """Delete all that a stage has made."""
        storage.delete_tree(f"{self.root}/{stage}")

    def check_nothing_is_half_published(self, stage: str) -> None:
        """Hold everything that can be seen of a stage to the undisturbed run."""
        for name in storage.list_files(f"{self.root}/{stage}"):
            uri = f"{self.root}/{stage}/{name}"
            if kind_of(uri) == "record":
                record = ShardRecord.from_json(storage.read_json(uri))
                assert record.identity == self.records[stage][record.shard_id], uri
                for file in record.files.values():
                    file.read(self.root)
            elif kind_of(uri) == "data":
                assert storage.read_bytes(uri) == self.files[stage][name], uri

    def check_finished(self, stage: str) -> None:
        """Hold a finished stage to the undisturbed run, byte by byte."""
        manifest = Manifest.read(self.root, stage, self.names[stage])
        assert manifest is not None and manifest.digest == self.digests[stage]
        assert contents(self.root, stage) == self.files[stage]
        results = [Result(stage=name, fingerprint=self.names[name]) for name in (*upstream_of(stage), stage)]
        assert verify(self.root, results, KINDS).findings == []


def upstream_of(stage: str) -> tuple[str, ...]:
    counts = KINDS[stage].counts
    return (counts,) if counts else ()


def ask(process: subprocess.Popen[str], **order: Any) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def contents(root: str, stage: str) -> dict[str, bytes]:
    names = [name for name in storage.list_files(f"{root}/{stage}") if kind_of(name) == "data"]
    return {name: storage.read_bytes(f"{root}/{stage}/{name}") for name in names}


@pytest.fixture(scope="session")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chaos") / "config.yaml"
    # Of given weights: a stage that trains leaves more than tables, and is killed in drills of its own.
    small_clip().save(path.with_name("clip.safetensors"))
    shapes = f"{{num_images: {8 * SHARDS}, port: {free_port()}}}"
    cluster = "{executor: local, backoff_s: 0.0, max_attempts: 2}"
    path.write_text(
        f"extends: {TOP}/tests/tiny.yaml\ncluster: {cluster}\nsource: {{rows_per_shard: 8, shapes: {shapes}}}\n"
        f"clip: {{kind: pretrained, name: {path.with_name('clip.safetensors')}}}\n"
    )
    return path


@pytest.fixture(scope="session", params=["local", "s3"])
def finished(
    request: pytest.FixtureRequest, config_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """Run the data stages undisturbed, on disk and on S3 in turn."""
    with pytest.MonkeyPatch.context() as patch:
        root = str(tmp_path_factory.mktemp("finished") / "store")
        if request.param == "s3":
            root = f"s3://bucket/{Path(root).parent.name}"
            for name, value in s3_environment(request.getfixturevalue("s3_server")).items():
                patch.setenv(name, value)
        environment = os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.chaos.driver", str(config_path)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=TOP
        ) as process:
            yield undisturbed(root, config_path, process)
            assert process.stdin is not None
            process.stdin.close()


def undisturbed(root: str, config_path: Path, process: subprocess.Popen[str]) -> Run:
    names = fingerprints(build_stages(load_config(config_path, [f"root={root}"])))
    digests: dict[str, str] = {}
    records: dict[str, dict[str, Any]] = {}
    for stage in DATA_STAGES:
        assert ask(process, root=root, stage=stage) == {"status": 0, "said": ""}, stage
        manifest = Manifest.read(root, stage, names[stage])
        assert manifest is not None
        digests[stage] = manifest.digest
        ids = [record.shard_id for record in manifest.records]
        stored = [ShardRecord.from_json(storage.read_json(f"{root}/{stage}/shards/{i}.json")) for i in ids]
        records[stage] = {record.shard_id: record.identity for record in stored}
    files = {stage: contents(root, stage) for stage in DATA_STAGES}
    return Run(root, names, digests, files, records, process)
