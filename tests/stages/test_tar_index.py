"""The index of a tar against ``tarfile``, whatever wrote the tar."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from stages.samples import Sample, write_tar
from stages.tar_index import members_of


def expected(path: Path) -> list[tuple[str, tuple[int, int]]]:
    with tarfile.open(path) as tar:
        return [(member.name, (member.offset_data, member.size)) for member in tar if member.isfile()]


def test_our_shards(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(
        write_tar(
            Sample(key=f"{i:06d}", image=bytes(i * 171 % 2000), extension="jpg", caption="x" * (i % 3))
            for i in range(50)
        )
    )
    assert members_of(path) == expected(path)
    assert len(members_of(path)) == 150


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["plain.jpg", "folder/" * 12 + "n" * 40 + ".jpg", "ünïcode.jpg"])
def test_any_format(tmp_path: Path, form: int, name: str) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for member in ("first.txt", name, "last.json"):
            info = tarfile.TarInfo(member)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert members_of(path) == expected(path)
    assert [member[0] for member in members_of(path)] == ["first.txt", name, "last.json"]


@pytest.mark.parametrize("content", [b"", b"no tar" * 500, b"\1" * 512])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    with pytest.raises(tarfile.TarError):
        members_of(path)


def test_a_tar_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(write_tar([Sample(key="a", image=bytes(5000), extension="jpg", caption="")])[:3000])
    with pytest.raises(tarfile.TarError):
        members_of(path)
