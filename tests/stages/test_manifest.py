"""Manifests: what is written is read, counters balance, damage is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages import storage
from stages.errors import IntegrityError
from stages.manifest import File, Manifest, ShardRecord, digest_of


def record(name: str = "a1", **changes: object) -> ShardRecord:
    fields = {
        "shard_id": name,
        "files": {"table": File(path=f"s/shards/{name}.parquet", sha256="0" * 64, num_bytes=3)},
        "inputs": {"urls": File(path="u", sha256="1" * 64, num_bytes=4)},
        "num_in": 10,
        "num_kept": 7,
        "dropped": {"http_404": 2, "timeout": 1},
        "metrics": {"loss": 0.5},
        "wall_time_s": 1.5,
    }
    return ShardRecord(**(fields | changes))  # type: ignore[arg-type]


def manifest(root: str, *records: ShardRecord, **changes: object) -> Manifest:
    fields = {
        "root": root,
        "stage": "s",
        "version": 1,
        "fingerprint": "f" * 16,
        "config": {"x": 1e-4, "y": [1, 2]},
        "inputs": {"u": {"fingerprint": "0", "digest": "1"}},
        "records": records,
        "files": {"pca": File(path="p", sha256="2" * 64, num_bytes=5)},
        "metrics": {"k": 3},
        "created_at": "2026-01-01T00:00:00+00:00",
        "wall_time_s": 2.0,
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def test_written_is_read(root: str) -> None:
    written = manifest(root, record("a"), record("b", dropped={}, num_kept=10))
    uri = written.write()
    assert Manifest.read(root, "s", "f" * 16) == written
    assert Manifest.read_uri(root, uri) == written
    assert Manifest.read(root, "s", "0" * 16) is None


def test_no_records_at_all(tmp_path: Path) -> None:
    written = manifest(str(tmp_path))
    written.write()
    assert Manifest.read(str(tmp_path), "s", "f" * 16) == written


def test_counters_must_balance() -> None:
    with pytest.raises(IntegrityError, match="10 samples in, but 7 kept \\+ 2 dropped"):
        record(dropped={"http_404": 2})


def test_totals(tmp_path: Path) -> None:
    whole = manifest(str(tmp_path), record("a"), record("b"))
    assert (whole.num_in, whole.num_kept, whole.dropped) == (20, 14, {"http_404": 4, "timeout": 2})


def test_digest_ignores_times_and_metrics_but_not_content(tmp_path: Path) -> None:
    base = manifest(str(tmp_path), record())
    same = manifest(
        str(tmp_path / "elsewhere"), record(wall_time_s=9.0, metrics={}), created_at="later", wall_time_s=7.0
    )
    other_file = record(files={"table": File(path="s/shards/a1.parquet", sha256="3" * 64, num_bytes=3)})
    assert base.digest == same.digest
    assert base.digest != manifest(str(tmp_path), other_file).digest
    assert base.digest != manifest(str(tmp_path), record(num_kept=8, dropped={"http_404": 2})).digest


def test_damage_is_noticed(tmp_path: Path) -> None:
    uri = manifest(str(tmp_path), record()).write()
    table = uri.replace("manifest.json", "shards.parquet")
    storage.write_bytes(table, storage.read_bytes(table) + b"!")
    with pytest.raises(IntegrityError, match="shard table beside it is damaged"):
        Manifest.read(str(tmp_path), "s", "f" * 16)


def test_what_is_held_is_read_once_and_what_changed_anew(tmp_path: Path) -> None:
    root = str(tmp_path)
    uri = manifest(root, record("a"), record("b")).write()
    held = Manifest.read_uri(root, uri)
    assert Manifest.read_uri(root, uri) is held
    manifest(root, record("a")).write()
    assert [one.shard_id for one in Manifest.read_uri(root, uri).records] == ["a"]
    storage.write_bytes(uri.replace("manifest.json", "shards.parquet"), b"")
    with pytest.raises(IntegrityError, match="shard table beside it is damaged"):
        Manifest.read_uri(root, uri)  # nobody holds that one


def test_an_edited_manifest_is_noticed(tmp_path: Path) -> None:
    uri = manifest(str(tmp_path), record()).write()
    text = storage.read_bytes(uri).replace(b"2" * 64, b"4" * 64)
    storage.write_bytes(uri, text)
    with pytest.raises(IntegrityError, match="do not match its digest"):
        Manifest.read(str(tmp_path), "s", "f" * 16)


def test_file_read_checks_content(tmp_path: Path) -> None:
    written = storage.write_bytes(str(tmp_path / "x"), b"abc")
    good = File(path="x", sha256=written.sha256, num_bytes=3)
    assert good.read(str(tmp_path)) == b"abc"
    storage.write_bytes(str(tmp_path / "x"), b"abd")
    with pytest.raises(IntegrityError, match="it is damaged"):
        good.read(str(tmp_path))


def test_digest_of_ignores_key_order() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})
