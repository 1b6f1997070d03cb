"""Records of finished work: files, shards, stages. The manifest is the commit: its presence means done.

A store is laid out as::

    <root>/<stage>/shards/<shard id>.<extension>      what one shard produced
    <root>/<stage>/shards/<shard id>.json             its record, written last
    <root>/<stage>/<fingerprint>/manifest.json        the stage as a whole, written last of all
    <root>/<stage>/<fingerprint>/shards.parquet       the table of its shard records

Paths in records are relative to the root, so a store can be copied to another place as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages import storage
from stages.errors import IntegrityError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TABLE_NAME = "shards.parquet"
LOG_ROLES = frozenset({"metrics"})  # files that tell how the work went, timings included, and not what came out


def digest_of(value: Any) -> str:
    """Hash a JSON-able value (mappings in any key order) to 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class File:
    """One published file: where it is below the root, and what it must contain."""

    path: str
    sha256: str
    num_bytes: int

    def read(self, root: str) -> bytes:
        """Read the file and check it against this record.

        Raises:
            NotFoundError: if it is gone.
            StorageError: if its length differs.
            IntegrityError: if its checksum differs.
        """
        uri = storage.join(root, self.path)
        data = storage.read_bytes(uri, expected_bytes=self.num_bytes)
        self.check(data, uri)
        return data

    def check(self, data: bytes, uri: str) -> None:
        """Compare what was read from ``uri`` with this record.

        Raises:
            IntegrityError: if its checksum differs.
        """
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise IntegrityError(
                f"{uri}: sha256 {found[:16]}... is not the recorded {self.sha256[:16]}...; it is damaged"
            )


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What became of one shard.

    Attributes:
        shard_id: identity of the work: a hash of the stage, its settings and the shard's inputs.
        files: what it produced, by role (``images``, ``embeddings``, ``selection``, ...).
        inputs: what it was made from, by role; later stages find the images of an embedding here.
        num_in: samples that came in.
        num_kept: samples that went out.
        dropped: reason code -> samples; ``num_in == num_kept + sum(dropped.values())`` always.
        metrics: plain numbers worth keeping (not part of the identity).
        wall_time_s: seconds the shard took.
    """

    shard_id: str
    files: Mapping[str, File]
    inputs: Mapping[str, File] = field(default_factory=dict)
    num_in: int = 0
    num_kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    wall_time_s: float = 0.0

    def __post_init__(self) -> None:
        num_dropped = sum(self.dropped.values())
        if self.num_in != self.num_kept + num_dropped:
            raise IntegrityError(
                f"shard {self.shard_id}: {self.num_in} samples in, but {self.num_kept} kept + {num_dropped} dropped"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The part that two runs of the same work must agree on (no times, no metrics, no logs)."""
        return {
            "shard_id": self.shard_id,
            "files": {role: file.sha256 for role, file in self.files.items() if role not in LOG_ROLES},
            "counts": [self.num_in, self.num_kept, dict(self.dropped)],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardRecord:
        """Rebuild a record from ``to_json``."""
        fields = dict(value)
        for name in ("files", "inputs"):
            fields[name] = {role: File(**file) for role, file in fields[name].items()}
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished stage.

    Attributes:
        root: the store it was read from (not stored).
        fingerprint: 16 hex digits naming stage, version, settings and inputs.
        config: every setting of the stage, for people and for the report.
        inputs: upstream stage -> ``{"fingerprint", "digest"}`` of the manifest that was read.
        records: one per shard, in plan order.
        files: stage-wide results, by role.
        metrics: plain numbers and short texts of the stage as a whole.
        quarantined: shards given up on: shard id -> reason.
    """

    root: str
    stage: str
    version: int
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    records: Sequence[ShardRecord]
    files: Mapping[str, File] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    quarantined: Mapping[str, str] = field(default_factory=dict)
    code_version: str = ""
    created_at: str = ""
    wall_time_s: float = 0.0

    @property
    def num_in(self) -> int:
        """Samples that came into the stage."""
        return sum(record.num_in for record in self.records)

    @property
    def num_kept(self) -> int:
        """Samples that left the stage."""
        return sum(record.num_kept for record in self.records)

    @property
    def dropped(self) -> dict[str, int]:
        """Reason code -> samples dropped, over all shards, most frequent first."""
        totals: dict[str, int] = {}
        for record in self.records:
            for reason, count in record.dropped.items():
                totals[reason] = totals.get(reason, 0) + count
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))

    @property
    def digest(self) -> str:
        """Hash of everything the stage produced; equal for two undisturbed or disturbed runs of the same work."""
        return digest_of(
            {
                "stage": self.stage,
                "fingerprint": self.fingerprint,
                "records": [record.identity for record in self.records],
                "files": {role: file.sha256 for role, file in self.files.items()},
            }
        )

    @property
    def uri(self) -> str:
        """Where the manifest is stored."""
        return manifest_uri(self.root, self.stage, self.fingerprint)

    def write(self) -> str:
        """Publish the shard table, then the manifest; return the manifest's URI."""
        folder = self.uri.removesuffix("/" + MANIFEST_NAME)
        written = storage.write_bytes(storage.join(folder, TABLE_NAME), _records_to_parquet(self.records))
        header = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("root", "records")}
        header["files"] = {role: dataclasses.asdict(file) for role, file in self.files.items()}
        header |= {
            "format_version": FORMAT_VERSION,
            "num_shards": len(self.records),
            "num_in": self.num_in,
            "num_kept": self.num_kept,
            "dropped": self.dropped,
            "digest": self.digest,
            "table_sha256": written.sha256,
        }
        storage.write_json(self.uri, header)
        return self.uri

    @classmethod
    def read(cls, root: str, stage: str, fingerprint: str) -> Manifest | None:
        """Read a finished stage; ``None`` if it has not finished.

        Raises:
            IntegrityError: if the table is missing or differs from what the manifest says.
        """
        uri = manifest_uri(root, stage, fingerprint)
        if not storage.exists(uri):
            return None
        return cls.read_uri(root, uri)

    @classmethod
    def read_uri(cls, root: str, uri: str) -> Manifest:
        """Read the manifest at ``uri`` of the store ``root``."""
        header = storage.read_json(uri)
        if header.get("format_version") != FORMAT_VERSION:
            raise IntegrityError(f"{uri}: format version {header.get('format_version')} is not {FORMAT_VERSION}")
        table = storage.read_bytes(uri.removesuffix(MANIFEST_NAME) + TABLE_NAME)
        if hashlib.sha256(table).hexdigest() != header["table_sha256"]:
            raise IntegrityError(f"{uri}: the shard table beside it is damaged; run the stage again with --force")
        names = {f.name for f in dataclasses.fields(cls)}
        fields = {name: value for name, value in header.items() if name in names}
        fields["files"] = {role: File(**file) for role, file in header["files"].items()}
        manifest = cls(root=root, records=_records_from_parquet(table), **fields)
        if manifest.digest != header["digest"]:
            raise IntegrityError(f"{uri}: its contents do not match its digest; run the stage again with --force")
        return manifest


def manifest_uri(root: str, stage: str, fingerprint: str) -> str:
    """Return where the manifest of a stage is stored."""
    return storage.join(root, stage, fingerprint, MANIFEST_NAME)


def _records_to_parquet(records: Iterable[ShardRecord]) -> bytes:
    rows = [record.to_json() for record in records]
    columns: dict[str, pa.Array] = {}
    for name, kind in _SCHEMA.items():
        values = [row[name] for row in rows]
        if kind == pa.string() and name != "shard_id":
            values = [json.dumps(value, sort_keys=True) for value in values]
        columns[name] = pa.array(values, type=kind)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


# Mappings are stored as JSON text: their keys differ from stage to stage.
_SCHEMA = {
    "shard_id": pa.string(),
    "files": pa.string(),
    "inputs": pa.string(),
    "num_in": pa.int64(),
    "num_kept": pa.int64(),
    "dropped": pa.string(),
    "metrics": pa.string(),
    "wall_time_s": pa.float64(),
}


def _records_from_parquet(data: bytes) -> tuple[ShardRecord, ...]:
    rows = pq.read_table(io.BytesIO(data)).to_pylist()
    for row in rows:
        for name, kind in _SCHEMA.items():
            if kind == pa.string() and name != "shard_id":
                row[name] = json.loads(row[name])
    return tuple(ShardRecord.from_json(row) for row in rows)
