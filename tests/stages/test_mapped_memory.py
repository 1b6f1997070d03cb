"""Tensors in files: ordinary tensors whose bytes lie on a disk, and of which nothing stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.errors import StorageError
from stages.mapped_memory import zeros_in_files


def mapped(folder: Path) -> list[str]:
    """Return the lines of this process's memory map that are of files below a folder."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def test_they_are_tensors_of_zeros_in_files_without_names(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    zeros_like = zeros_in_files(str(folder))
    found = zeros_like(torch.ones(3, 5))
    assert found.shape == (3, 5) and found.dtype == torch.float32 and not found.any()
    found += torch.arange(15.0).view(3, 5)
    other = zeros_like(found)
    assert not other.any() and found.sum() == 105
    assert len(mapped(folder)) == 2 and all(line.endswith("(deleted)") for line in mapped(folder))
    assert list(folder.iterdir()) == []
    del found, other
    assert mapped(folder) == []


def test_what_is_empty_takes_no_file(tmp_path: Path) -> None:
    assert zeros_in_files(str(tmp_path / "made"))(torch.ones(0)).numel() == 0
    assert not (tmp_path / "made").exists()


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^offload_dir: no file of 4194304\.00 GiB in .*name a folder"):
        zeros_in_files(str(tmp_path))(torch.empty(2**50, device="meta"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="offload_dir: no file"):
        zeros_in_files(str(tmp_path / "file" / "below"))(torch.ones(1))
