"""A disk without room: a clear error, nothing half-published, and the same run finishes once there is room."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stages import storage
from tests.chaos.conftest import DATA_STAGES, Run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", ["source", "embed", "pca"])
def test_files_may_not_grow(finished: Run, stage: str) -> None:
    if not storage.is_local(finished.root):
        pytest.skip("the limit is one of local files")
    finished.forget(stage)
    largest = max(len(content) for content in finished.files[stage].values())
    answer = finished.do(stage, max_file_bytes=largest - 1)
    assert answer["status"] == 1, answer
    assert "a limit on the size of files is reached" in answer["said"] and "ulimit" in answer["said"]
    finished.check_nothing_is_half_published(stage)
    assert finished.do(stage) == {"status": 0, "said": ""}
    finished.check_finished(stage)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 MiB; skipped where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(file: Path) -> None:
    """Write until nothing more fits."""
    with file.open("wb", buffering=0) as sink, contextlib.suppress(OSError):
        while sink.write(bytes(4096)):
            pass


def test_no_space_left(finished: Run, small_disk: Path) -> None:
    if not storage.is_local(finished.root):
        pytest.skip("the disk is a local one")
    there = replace(finished, root=str(small_disk / "store"))
    for stage in DATA_STAGES:
        fill(small_disk / "filler")
        answer = there.do(stage)
        assert answer["status"] == 1 and "no space left on the device" in answer["said"], answer
        there.check_nothing_is_half_published(stage)
        (small_disk / "filler").unlink()
        assert there.do(stage) == {"status": 0, "said": ""}
        there.check_finished(stage)
