"""Segments: many shard records in one file, so that a run resumes from one listing and few reads.

The driver appends what it learned of a stage's shards beside them::

    <root>/<stage>/shards/_segments/<rows>-<checksum>.parquet

The record of a shard, ``<shard id>.json``, stays the truth. A row of a segment counts only while a listing shows that
record with the size and the version it had; a shard that is forgotten, repaired or done again thereby voids its row.
A segment's name holds the checksum of its content: damage is noticed, and two drivers that write the same rows write
the same file. Losing every segment loses nothing but time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from stages import storage
from stages.errors import IntegrityError, NotFoundError, StorageError
from stages.manifest import BATCH_ROWS, File, ShardRecord, records_from_batch, records_to_table, table_to_parquet
from stages.samples import batches_from_bytes, table_from_bytes
from stages.storage import Entry

logger = logging.getLogger(__name__)

SEGMENTS_FOLDER = "_segments"
_NAME = re.compile(rf"{SEGMENTS_FOLDER}/(\d+)-([0-9a-f]{{16}})\.parquet")
_READ_THREADS = 4
_RECORD_THREADS = 16
_READ_AHEAD = 1024
_FLUSH_ROWS = 4096
# Fewer records than these are not worth a file: reading them one by one takes no time.
_MIN_ROWS = 64
_FULL_ROWS = 32_768
_MAX_SMALL = 16


class Segments:
    """The segments of one stage.

    Args:
        output: URI of the folder of the stage's shards.
        listing: all objects in it.
    """

    def __init__(self, output: str, listing: Mapping[str, Entry]) -> None:
        self._output = output
        self._listing = listing
        self._names = [name for name in listing if _NAME.fullmatch(name)]
        self._useless: list[str] = []

    def read(self, wanted: Mapping[str, Mapping[str, File]]) -> dict[str, ShardRecord]:
        """Return the records of the shards ``wanted`` that segments hold and that still count, by shard id.

        A damaged segment is passed over with a warning.

        Args:
            wanted: shard id -> what that shard is made from.
        """
        found: dict[str, ShardRecord] = {}
        for name, content in self._contents(self._names):
            useful = False
            for batch in batches_from_bytes(content, BATCH_ROWS):
                current = self._current(batch)
                useful |= any(current)
                ids = batch["shard_id"].to_pylist()
                chosen = [ok and i in wanted and i not in found for i, ok in zip(ids, current, strict=True)]
                for record in records_from_batch(batch, chosen=chosen):
                    found[record.shard_id] = _sharing(record, wanted[record.shard_id])
            if not useful:
                self._useless.append(name)
        return found

    def tidy(self) -> None:
        """Delete what ``read`` found to be of no use; merge small segments into large ones if there are many.

        Another driver that does the same meanwhile is in nobody's way: whatever both delete has been written anew, or
        is read one by one.
        """
        for name in self._useless:
            storage.delete(storage.join(self._output, name))
        names = [name for name in self._names if name not in self._useless]
        small = [name for name in names if int(name.removeprefix(f"{SEGMENTS_FOLDER}/").partition("-")[0]) < _FULL_ROWS]
        if len(small) >= _MAX_SMALL:
            self._merge(small)

    def _merge(self, names: Sequence[str]) -> None:
        whole: pa.Table | None = None
        seen: set[str] = set()
        written: set[str] = set()
        for _, content in self._contents(names):
            table = table_from_bytes(content)
            ids = table["shard_id"].to_pylist()
            fresh = [ok and i not in seen for i, ok in zip(ids, self._current(table), strict=True)]
            seen.update(itertools.compress(ids, fresh))
            table = table.filter(pa.array(fresh, pa.bool_()))
            whole = pa.concat_tables([whole, table]) if whole is not None else table
            if whole.num_rows >= _FULL_ROWS:
                written.add(_write(self._output, whole.slice(0, _FULL_ROWS)))
                whole = whole.slice(_FULL_ROWS)
        if whole is not None and whole.num_rows:
            written.add(_write(self._output, whole))
        for name in set(names) - written:
            storage.delete(storage.join(self._output, name))

    def _current(self, rows: pa.Table | pa.RecordBatch) -> list[bool]:
        """Tell of every row whether its record is still the one that the listing shows."""
        entries = (self._listing.get(f"{shard_id}.json") for shard_id in rows["shard_id"].to_pylist())
        versions = rows["version"].to_pylist()
        return [e is not None and e.version == version for e, version in zip(entries, versions, strict=True)]

    def _contents(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Read segments, a few ahead; damaged ones are left out."""
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            for start in range(0, len(names), _READ_THREADS):
                part = names[start : start + _READ_THREADS]
                for name, content in zip(part, pool.map(self._read, part), strict=True):
                    if content is not None:
                        yield name, content

    def _read(self, name: str) -> bytes | None:
        uri = storage.join(self._output, name)
        try:
            content = storage.read_bytes(uri)
        except NotFoundError:
            return None  # another driver has merged it
        except StorageError as error:
            logger.warning("%s; the records it holds are read one by one", error)
            return None
        if _name_of(int(name.rpartition("/")[2].partition("-")[0]), content) != name:
            logger.warning("%s is damaged; the records it holds are read one by one", uri)
            self._useless.append(name)
            return None
        return content


@dataclass(frozen=True)
class StoredRecords:
    """What one listing of a stage's shards told.

    Attributes:
        records: of the shards asked for that have one, by shard id.
        single: those of them that no segment holds.
        segments: the stage's segments.
    """

    records: dict[str, ShardRecord]
    single: Sequence[ShardRecord]
    segments: Segments


def read_records(
    output: str, listing: Mapping[str, Entry], shards: Iterable[tuple[str, Mapping[str, File]]]
) -> StoredRecords:
    """Read records of shards: from segments, and one by one where no segment holds them.

    Args:
        output: URI of the folder of the stage's shards.
        listing: all objects in it.
        shards: ids of the shards and what each is made from; those without a record are left out, and with a warning
            those whose record is damaged.
    """
    wanted = {shard_id: inputs for shard_id, inputs in shards if f"{shard_id}.json" in listing}
    segments = Segments(output, listing)
    records = segments.read(wanted)
    missing = [shard_id for shard_id in wanted if shard_id not in records]

    def read(shard_id: str) -> ShardRecord | None:
        uri = storage.join(output, f"{shard_id}.json")
        try:
            value = json.loads(storage.read_bytes(uri))
            # The listing is older than this read: at worst it names a version that is gone, never one yet to come.
            record = ShardRecord.from_json({**value, "version": listing[f"{shard_id}.json"].version})
            return _sharing(record, wanted[shard_id])
        except NotFoundError:
            return None
        except (ValueError, TypeError, IntegrityError) as error:
            logger.warning("%s is damaged (%s); its shard is done again", uri, error)
            return None

    single: list[ShardRecord] = []
    with ThreadPoolExecutor(_RECORD_THREADS) as pool:
        for start in range(0, len(missing), _READ_AHEAD):
            found = pool.map(read, missing[start : start + _READ_AHEAD])
            single += (record for record in found if record is not None)
    records |= {record.shard_id: record for record in single}
    return StoredRecords(records, single, segments)


def _sharing(record: ShardRecord, inputs: Mapping[str, File]) -> ShardRecord:
    """Let a record share the plan's ``inputs``: a driver that holds 100,000 shards would hold each input twice."""
    return dataclasses.replace(record, inputs=inputs) if record.inputs == inputs else record


class SegmentWriter:
    """Collects what a driver learns of shards and writes it every few thousand records, and when it is closed.

    Args:
        output: URI of the folder of the stage's shards.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._records: list[ShardRecord] = []

    def add(self, record: ShardRecord) -> None:
        """Note a record; one whose version is not known is left to its JSON."""
        if record.version:
            self._records.append(record)
        if len(self._records) >= _FLUSH_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left, if it is worth a file."""
        if len(self._records) >= _MIN_ROWS:
            self._flush()

    def _flush(self) -> None:
        records, self._records = self._records, []
        versions = pa.array([record.version for record in records], pa.string())
        try:
            _write(self._output, records_to_table(records).append_column("version", versions))
        except StorageError as error:
            # Nothing is lost: the records are there one by one.
            logger.warning("no segment of %d records is written: %s", len(records), error)


def _write(output: str, table: pa.Table) -> str:
    content = table_to_parquet(table)
    name = _name_of(table.num_rows, content)
    storage.write_bytes(storage.join(output, name), content)
    return name


def _name_of(num_rows: int, content: bytes) -> str:
    return f"{SEGMENTS_FOLDER}/{num_rows}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
