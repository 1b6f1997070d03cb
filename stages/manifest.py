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
import functools
import hashlib
import io
import itertools
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages import storage
from stages.errors import IntegrityError
from stages.samples import batches_from_bytes

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TABLE_NAME = "shards.parquet"
LOG_ROLES = frozenset({"metrics"})  # files that tell how the work went, timings included, and not what came out
# Mappings are stored as JSON text: their keys differ from stage to stage.
_MAPPINGS = ("files", "inputs", "dropped", "metrics")
_NOTHING: Mapping[str, Any] = {}  # one for all: 100,000 records have many empty mappings


def digest_of(value: Any) -> str:
    """Hash a JSON-able value (mappings in any key order) to 64 hex digits."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True, slots=True)
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

    def to_json(self) -> dict[str, Any]:
        """Return the file as plain JSON values."""
        return {"path": self.path, "sha256": self.sha256, "num_bytes": self.num_bytes}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """What became of one shard.

    Attributes:
        shard_id: identity of the work: a hash of the stage, its settings and the shard's inputs.
        files: what it produced, by role (``images``, ``embeddings``, ``selection``, ...).
        inputs: what it was made from, by role; later stages find the images of an embedding here.
        num_in: samples that came in.
        num_kept: samples that went out.
        dropped: reason code -> samples; ``num_in == num_kept + sum(dropped.values())`` always.
        metrics: plain numbers and short texts worth keeping (not part of the identity).
        wall_time_s: seconds the shard took.
        version: of its JSON in the store (``storage.Entry``), where known; no part of the record itself.
    """

    shard_id: str
    files: Mapping[str, File]
    inputs: Mapping[str, File] = field(default_factory=dict)
    num_in: int = 0
    num_kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    wall_time_s: float = 0.0
    version: str = field(default="", compare=False, repr=False)

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
        return {
            "shard_id": self.shard_id,
            "files": {role: file.to_json() for role, file in self.files.items()},
            "inputs": {role: file.to_json() for role, file in self.inputs.items()},
            "num_in": self.num_in,
            "num_kept": self.num_kept,
            "dropped": dict(self.dropped),
            "metrics": dict(self.metrics),
            "wall_time_s": self.wall_time_s,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardRecord:
        """Rebuild a record from ``to_json``; a ``version`` beside its fields is taken as that of the JSON.

        Raises:
            IntegrityError: if it is not a record, or its counts do not balance.
        """
        try:
            fields = dict(value)
            for name in ("files", "inputs"):
                fields[name] = {role: File(**file) for role, file in fields[name].items()}
            for name in _MAPPINGS:
                fields[name] = fields[name] or _NOTHING
            return cls(**fields)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise IntegrityError(f"not a shard record: {error}") from error


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

    @functools.cached_property
    def digest(self) -> str:
        """Hash of everything the stage produced; equal for two undisturbed or disturbed runs of the same work.

        It is ``digest_of`` of stage, fingerprint, files and record identities, fed record by record: the text of
        100,000 records is never held as a whole.
        """
        head = {"files": {role: file.sha256 for role, file in self.files.items()}, "fingerprint": self.fingerprint}
        state = hashlib.sha256(_canonical(head)[:-1] + b',"records":[')
        for i, record in enumerate(self.records):
            state.update((b"," if i else b"") + _canonical(record.identity))
        state.update(b'],"stage":' + _canonical(self.stage) + b"}")
        return state.hexdigest()

    @property
    def uri(self) -> str:
        """Where the manifest is stored."""
        return manifest_uri(self.root, self.stage, self.fingerprint)

    def write(self, publish: Callable[[Mapping[str, bytes]], None] | None = None) -> str:
        """Publish the shard table, then the manifest; return the manifest's URI.

        Args:
            publish: writes objects in their order; as the owner of a lease does it (``Lease.publish``).
        """
        table = _records_to_parquet(self.records)
        header = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("root", "records")}
        header["files"] = {role: file.to_json() for role, file in self.files.items()}
        header |= {
            "format_version": FORMAT_VERSION,
            "num_shards": len(self.records),
            "num_in": self.num_in,
            "num_kept": self.num_kept,
            "dropped": self.dropped,
            "digest": self.digest,
            "table_sha256": hashlib.sha256(table).hexdigest(),
        }
        (publish or _write_all)(
            {
                storage.join(self.uri.removesuffix("/" + MANIFEST_NAME), TABLE_NAME): table,
                self.uri: storage.json_bytes(header),
            }
        )
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
        """Read the manifest at ``uri`` of the store ``root``.

        What this process has read before and somebody still holds is not read again while its header is the same: a
        run asks for the manifests of a finished pipeline several times, and each may have 100,000 records.
        """
        header = storage.read_json(uri)
        name = (root, uri, digest_of(header))
        if (held := _HELD.get(name)) is not None:
            return held
        if header.get("format_version") != FORMAT_VERSION:
            raise IntegrityError(f"{uri}: format version {header.get('format_version')} is not {FORMAT_VERSION}")
        table = storage.read_bytes(uri.removesuffix(MANIFEST_NAME) + TABLE_NAME)
        if hashlib.sha256(table).hexdigest() != header["table_sha256"]:
            raise IntegrityError(f"{uri}: the shard table beside it is damaged; run the stage again with --force")
        names = {f.name for f in dataclasses.fields(cls)}
        fields = {name: value for name, value in header.items() if name in names}
        fields["files"] = {role: File(**file) for role, file in header["files"].items()}
        manifest = cls(root=root, records=tuple(records_from_parquet(table)), **fields)
        if manifest.digest != header["digest"]:
            raise IntegrityError(f"{uri}: its contents do not match its digest; run the stage again with --force")
        _HELD[name] = manifest
        return manifest


# The header holds the checksum of the table: equal headers are of equal manifests.
_HELD: weakref.WeakValueDictionary[tuple[str, str, str], Manifest] = weakref.WeakValueDictionary()


def _write_all(objects: Mapping[str, bytes]) -> None:
    for uri, data in objects.items():
        storage.write_bytes(uri, data)


def manifest_uri(root: str, stage: str, fingerprint: str) -> str:
    """Return where the manifest of a stage is stored."""
    return storage.join(root, stage, fingerprint, MANIFEST_NAME)


_SCHEMA = pa.schema(
    [
        ("shard_id", pa.string()),
        ("files", pa.string()),
        ("inputs", pa.string()),
        ("num_in", pa.int64()),
        ("num_kept", pa.int64()),
        ("dropped", pa.string()),
        ("metrics", pa.string()),
        ("wall_time_s", pa.float64()),
    ]
)
BATCH_ROWS = 4096  # bounds what a table's rows take as text and as plain dicts beside the records themselves


def records_to_table(records: Iterable[ShardRecord]) -> pa.Table:
    """Return the records as a table, one row each."""
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for record in records:
        row = record.to_json()
        for name, column in columns.items():
            column.append(json.dumps(row[name], sort_keys=True) if name in _MAPPINGS else row[name])
    return pa.table(columns, schema=_SCHEMA)


def _records_to_parquet(records: Sequence[ShardRecord]) -> bytes:
    """Write the table of records as a file in memory, a part at a time."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, _SCHEMA, compression="zstd") as writer:
        for start in range(0, max(1, len(records)), BATCH_ROWS):
            writer.write_table(records_to_table(records[start : start + BATCH_ROWS]))
    return sink.getvalue()


def records_from_parquet(data: bytes) -> Iterator[ShardRecord]:
    """Rebuild the records of ``records_to_table`` from the file of that table, one by one."""
    for batch in batches_from_bytes(data, BATCH_ROWS):
        yield from records_from_batch(batch)


def records_from_batch(batch: pa.RecordBatch, *, chosen: Sequence[bool] = ()) -> Iterator[ShardRecord]:
    """Rebuild the records of a part of ``records_to_table``, one by one.

    Args:
        batch: the columns of that table, and ``version`` if the versions of the records' JSON objects are known.
        chosen: which rows are wanted; all if not given.
    """
    names = [name for name in ("version", *_SCHEMA.names) if name in batch.schema.names]
    columns: dict[str, list[Any]] = batch.select(names).to_pydict()
    for name in _MAPPINGS:
        # One parse for the whole column: equal keys become one text.
        columns[name] = json.loads(f"[{','.join(columns[name])}]")
    rows = zip(*columns.values(), strict=True)
    if chosen:
        rows = itertools.compress(rows, chosen)  # type: ignore[assignment]
    return (ShardRecord.from_json(dict(zip(columns, row, strict=True))) for row in rows)


def table_to_parquet(table: pa.Table) -> bytes:
    """Write a table as a Parquet file in memory."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
