"""S3 behind a proxy that answers 500 and 503, cuts answers short and resets connections, by a seeded schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages import storage
from stages.config import Config, load_config
from stages.errors import StageError, StorageError
from stages.executor import LocalExecutor
from stages.graph import build_stages, fingerprints
from stages.manifest import Manifest
from stages.runner import run_stage
from tests.chaos.s3_proxy import FAULTS, Schedule, faulty_proxy

STAGES = ("source", "download", "filter", "clip", "embed", "curate", "pca")


class AtFirst(Schedule):
    """Spoils the first requests, and none after them."""

    def __init__(self, fault: str, number: int) -> None:
        super().__init__(fraction=1.0, faults=(fault,))
        self.remaining = number

    def next(self, path: str) -> str:
        self.remaining -= 1
        if self.remaining < 0:
            self.counts["ok"] += 1
            return "ok"
        return super().next(path)


OPERATIONS: dict[str, Callable[[str], Any]] = {
    "write": lambda uri: storage.write_bytes(uri, b"y" * 9999),
    "read": lambda uri: storage.read_bytes(uri, expected_bytes=9999),
    "list": lambda uri: storage.list_files(uri.rsplit("/", 1)[0]),
    "look up": storage.exists,
    "check": storage.checksum,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_not_seen(
    fault: str, operation: str, s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3_root}/folder/x"
    storage.write_bytes(uri, b"y" * 9999)
    expected = OPERATIONS[operation](uri)
    with faulty_proxy(s3_server, AtFirst(fault, 1)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert OPERATIONS[operation](uri) == expected


@pytest.mark.chaos
@pytest.mark.parametrize("fault", FAULTS)
def test_more_faults_than_the_libraries_bear(
    fault: str, s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_RETRY_WAITS_S", (0.0, 0.0, 0.0))
    uri = f"{s3_root}/x"
    for operation in ("write", "read", "look up"):
        with faulty_proxy(s3_server, AtFirst(fault, 5)) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            OPERATIONS[operation](uri)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert storage.read_bytes(uri) == b"y" * 9999


@pytest.mark.chaos
def test_a_fault_that_stays_ends_in_a_clear_error(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_RETRY_WAITS_S", (0.0, 0.0))
    schedule = Schedule(1.0, faults=("500",))
    with faulty_proxy(s3_server, schedule) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError, match=rf"cannot write {s3_root}/x: .*endpoint {endpoint}"):
            storage.write_bytes(f"{s3_root}/x", b"y")
    assert schedule.counts["500"] <= 3 * 5  # bounded


@pytest.fixture(scope="module")
def config(config_path: Path) -> Config:
    return load_config(config_path)


@pytest.fixture(scope="module")
def digests(config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run undisturbed on a local disk."""
    root = str(tmp_path_factory.mktemp("undisturbed") / "store")
    return {name: manifest.digest for name, manifest in run(replace(config, root=root), {}).items()}


def run(config: Config, found: dict[str, Manifest]) -> dict[str, Manifest]:
    """Run what is not in ``found`` yet."""
    stages = build_stages(config)
    names = fingerprints(stages)
    for name in STAGES:
        if name not in found:
            inputs = {up: found[up] for up in stages[name].upstream}
            found[name] = run_stage(stages[name], names[name], inputs, LocalExecutor(), config.cluster)
    return found


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [1, 2])
def test_a_pipeline_finishes_on_a_bad_connection(
    seed: int, config: Config, digests: dict[str, str], s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(0.08, seed=seed)
    found: dict[str, Manifest] = {}
    with faulty_proxy(s3_server, schedule) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for _ in range(5):
            with contextlib.suppress(StorageError, StageError):
                run(replace(config, root=s3_root), found)
                break
    assert {name: manifest.digest for name, manifest in found.items()} == digests
    assert all(schedule.counts[fault] for fault in FAULTS), schedule.counts


@pytest.mark.chaos
def test_a_server_lost_in_the_middle_fails_and_the_same_run_then_finishes(
    config: Config, digests: dict[str, str], s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FromThen(Schedule):
        def next(self, path: str) -> str:
            return super().next(path) if self.counts["ok"] >= 25 else self._ok()

        def _ok(self) -> str:
            self.counts["ok"] += 1
            return "ok"

    monkeypatch.setattr(storage, "_RETRY_WAITS_S", (0.0,))
    found: dict[str, Manifest] = {}
    with faulty_proxy(s3_server, FromThen(1.0, faults=("reset_before",))) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises((StorageError, StageError), match="s3://bucket/"):
            run(replace(config, root=s3_root), found)
    assert 0 < len(found) < len(STAGES)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert {name: manifest.digest for name, manifest in run(replace(config, root=s3_root), found).items()} == digests
