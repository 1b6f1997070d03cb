"""Storage: atomic, checked, and the same on disk and on S3."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import storage
from stages.errors import NotFoundError, StorageError
from tests.s3_forwarding import counting_proxy


def test_written_bytes_are_read_back(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    written = storage.write_bytes(uri, b"x" * 100_000)
    assert written == storage.Written(hashlib.sha256(b"x" * 100_000).hexdigest(), 100_000)
    assert storage.read_bytes(uri, expected_bytes=100_000) == b"x" * 100_000
    assert storage.exists(uri)
    assert not storage.exists(storage.join(root, "a"))


def test_a_range_is_read_of_what_there_is(root: str) -> None:
    uri = storage.join(root, "a")
    storage.write_bytes(uri, b"0123456789")
    ends = ((0, 3), (4, 10), (8, 20), (10, 20), (12, 20))
    assert [storage.read_range(uri, *ends) for ends in ends] == [b"012", b"456789", b"89", b"", b""]
    with pytest.raises(NotFoundError):
        storage.read_range(storage.join(root, "b"), 0, 3)


def test_upload_and_local_copy(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(6 << 20))  # larger than one multipart chunk
    uri = storage.join(root, "big.bin")
    assert storage.upload(source, uri).sha256 == storage.sha256_of(source)
    with storage.local_copy(uri) as path:
        assert path.read_bytes() == source.read_bytes()


def test_listing_is_recursive_and_relative(root: str) -> None:
    assert storage.list_files(root) == {}
    storage.write_bytes(storage.join(root, "x"), b"1")
    storage.write_bytes(storage.join(root, "deep/er/y"), b"22")
    assert storage.list_files(root) == {"deep/er/y": 2, "x": 1}
    assert storage.list_files(storage.join(root, "deep")) == {"er/y": 2}


def test_delete(root: str) -> None:
    uri = storage.join(root, "x/y")
    storage.delete(uri)  # a missing object is no error
    storage.delete_tree(storage.join(root, "x"))
    storage.write_bytes(uri, b"1")
    storage.write_bytes(storage.join(root, "x/z"), b"1")
    storage.delete(uri)
    assert storage.list_files(root) == {"x/z": 1}
    storage.delete_tree(storage.join(root, "x"))
    assert storage.list_files(root) == {}


def test_missing_object_is_named(root: str) -> None:
    uri = storage.join(root, "nothing")
    with pytest.raises(NotFoundError, match="nothing: it does not exist"):
        storage.read_bytes(uri)
    with pytest.raises(NotFoundError), storage.local_copy(uri):
        pass


def test_wrong_length_is_refused(root: str) -> None:
    uri = storage.join(root, "x")
    storage.write_bytes(uri, b"123")
    with pytest.raises(StorageError, match="read 3 bytes where the record says 4"):
        storage.read_bytes(uri, expected_bytes=4)


def test_check_writable_leaves_nothing(root: str) -> None:
    storage.check_writable(root)
    assert storage.list_files(root) == {}


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(StorageError, match="no storage for scheme 'ftp'"):
        storage.exists("ftp://host/x")


def test_a_failed_write_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "x")
    storage.write_bytes(uri, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left on the device"):
        storage.write_bytes(uri, b"new")
    monkeypatch.undo()
    assert storage.read_bytes(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_writer_publishes_nothing(tmp_path: Path) -> None:
    program = (
        "import os, signal; from stages import storage\n"
        "os.fsync = lambda d: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"storage.write_bytes({str(tmp_path / 'x')!r}, b'new')"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert storage.list_files(str(tmp_path)) == {}
    assert not (tmp_path / "x").exists()


def test_unreachable_s3_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-at-all")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing-at-all")
    with pytest.raises(StorageError, match=r"cannot write s3://bucket/.*127.0.0.1:9.*AWS_ENDPOINT_URL"):
        storage.check_writable("s3://bucket/store")
    with pytest.raises(StorageError, match=r"cannot look up s3://bucket/store/manifest\.json"):
        storage.exists("s3://bucket/store/manifest.json")


def test_a_missing_bucket_is_named(s3_root: str) -> None:
    with pytest.raises(StorageError, match="create the bucket"):
        storage.check_writable("s3://no-such-bucket/store")


def test_an_object_of_known_size_is_read_with_one_request(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3_root}/x.json"
    storage.write_json(uri, {"a": 1})
    num_bytes = len(storage.read_bytes(uri))
    with counting_proxy(s3_server) as (endpoint, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert storage.read_json(uri) == {"a": 1}
        assert storage.read_bytes(uri, expected_bytes=num_bytes)
    assert counts == {"GET": 2}
