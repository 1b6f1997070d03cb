"""Takedown: remove samples from everything the store holds of them, and say which models were trained on them.

The image goes from its tar, the caption and measurements from the download's table (the row stays, with the reason
``takedown``); whatever was derived from that shard - selections, embeddings, sums, ledger parts, images generated from
its captions, the report - is deleted and made anew by the next run, which trains anew as well, because its data has
changed. Pictures that trainings drew of held-out images are deleted. Weights are not: they are named, and the versions
of the models that hold them are withdrawn (``stages/withdrawn.py``), so that nothing serves or trains on from them.

The tombstones are put up first. A takedown that was interrupted is finished by the same command: what it was about to
delete is written down before, since what is deleted first leads to the rest. The download's own manifest goes too: the
next run writes it anew from the shards that are there and downloads nothing twice.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages import storage
from stages.base import record_uri
from stages.errors import NotFoundError
from stages.exposure import Exposed, find_exposed
from stages.manifest import MANIFEST_NAME, File, Manifest, ShardRecord
from stages.samples import read_tar, table_from_bytes, table_to_bytes, write_tar
from stages.tombstones import REASON, Tombstones, forget_rows
from stages.withdrawn import withdraw

_IO_THREADS = 16
# What is made of downloaded shards, in order; every one may read the ones before it.
_DERIVED = ("filter", "embed", "curate", "ledger", "pca", "generate", "evaluate")
_REPORT = ("report.html", "report.json")
_UNFINISHED = "takedown.unfinished.json"


@dataclass(frozen=True, kw_only=True)
class Affected:
    """What a takedown touches.

    Attributes:
        samples: rows of the download's tables: key, url, sha256 of the image, shard.
        shards: records of the download shards that hold them.
        derived: paths of what was made from those shards, records and manifests included.
        exposed: what has learned from them or shows them: models, versions of these, pictures.
    """

    samples: Sequence[Mapping[str, str]]
    shards: Sequence[ShardRecord]
    derived: Sequence[str]
    exposed: Exposed

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        shards = [record.files["images"].path for record in self.shards]
        return {"samples": self.samples, "shards": shards, "derived": self.derived, **vars(self.exposed)}


def find_affected(root: str, tombstones: Tombstones) -> Affected:
    """Find everything in a store that is about samples with a tombstone; changes nothing."""
    found = list(_matches(root, tombstones))
    dead = {file.path for record, _ in found for file in record.files.values()}
    shards = {record.shard_id for record, _ in found}
    derived = [
        f"download/{manifest.fingerprint}/{MANIFEST_NAME}"
        for manifest in _manifests(root, "download")
        if any(record.shard_id in shards for record in manifest.records)
    ]
    for stage in _DERIVED:
        derived += _derived_of(root, stage, dead)
    gone = {(stage, name) for stage, name, *rest in (path.split("/") for path in derived) if rest == [MANIFEST_NAME]}
    if found:
        derived += [name for name in _REPORT if storage.exists(storage.join(root, name))]
    return Affected(
        samples=[
            {
                "key": row["key"],
                "url": row["url"] or "",
                "sha256": row["sha256"] or "",
                "shard": record.files["images"].path,
            }
            for record, rows in found
            for row in rows
        ],
        shards=[record for record, _ in found],
        derived=derived,
        exposed=find_exposed(root, gone, ("source", "download", *_DERIVED)),
    )


def widened(root: str, tombstones: Tombstones) -> Tombstones:
    """Add the URLs and the images' checksums of the samples that are meant.

    A key names a row of a shard of the list, and is another one when the list grows; a URL may serve a copy elsewhere.
    """
    rows = [row for _, found in _matches(root, tombstones) for row in found]
    return tombstones | Tombstones(
        urls=frozenset(row["url"] for row in rows if row["url"]),
        sha256=frozenset(row["sha256"] for row in rows if row["sha256"]),
    )


def take_down(root: str, tombstones: Tombstones) -> Affected:
    """Remove samples with a tombstone (put up before) from a store; see the module's docstring.

    Returns:
        What was touched; repeating finds nothing more.
    """
    affected = find_affected(root, tombstones)
    affected = replace(affected, derived=list(dict.fromkeys([*_unfinished(root), *affected.derived])))
    if affected.derived:
        storage.write_json(storage.join(root, _UNFINISHED), affected.derived)
    # What leads to models and pictures is deleted last: an interrupted takedown finds them again.
    for number, models in affected.exposed.versions.items():
        withdraw(root, number, models)
    for path in affected.exposed.pictures:
        storage.delete(storage.join(root, path))
    # Manifests first: a stage without one is not done, whatever else is there.
    for path in sorted(affected.derived, key=lambda path: not path.endswith(MANIFEST_NAME)):
        storage.delete(storage.join(root, path))
    for record in affected.shards:
        _clean(root, record, tombstones)
    _delete_leftovers(root)
    storage.delete(storage.join(root, _UNFINISHED))
    return affected


def _unfinished(root: str) -> list[str]:
    """Return what an earlier takedown was about to delete and may have left."""
    try:
        found: list[str] = storage.read_json(storage.join(root, _UNFINISHED))
    except NotFoundError:
        return []
    return found


def _matches(root: str, tombstones: Tombstones) -> Iterator[tuple[ShardRecord, list[dict[str, Any]]]]:
    """Yield the download shards with rows that have a tombstone and are not yet forgotten, and those rows."""
    if not tombstones:
        return

    def look(record: ShardRecord) -> list[dict[str, Any]]:
        table = table_from_bytes(record.files["table"].read(root), ["key", "url", "sha256", "reason"])
        meant = pc.or_(
            pc.or_(_is_in(table, "key", tombstones.keys), _is_in(table, "url", tombstones.urls)),
            _is_in(table, "sha256", tombstones.sha256),
        )
        already = pc.fill_null(pc.equal(table["reason"], REASON), False)
        rows: list[dict[str, Any]] = table.filter(pc.and_(meant, pc.invert(already))).to_pylist()
        return rows

    records = list(_records(root, "download"))
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        for record, rows in zip(records, pool.map(look, records), strict=True):
            if rows:
                yield record, rows


def _is_in(table: pa.Table, column: str, values: frozenset[str]) -> Any:
    return pc.is_in(table[column], value_set=pa.array(sorted(values), pa.string()))


def _clean(root: str, record: ShardRecord, tombstones: Tombstones) -> None:
    """Publish a download shard without the samples that have a tombstone, then its record; delete the old files."""
    table = table_from_bytes(record.files["table"].read(root))
    rows = table.to_pylist()
    gone = [tombstones.names(row) for row in rows]
    keys = frozenset(row["key"] for row, is_gone in zip(rows, gone, strict=True) if is_gone)
    samples = [s for s in read_tar(record.files["images"].read(root)) if s.key not in keys]
    # Under new names: a record always names whole files, the old ones or the new ones.
    cleaned = replace(
        record,
        files={
            **record.files,
            "images": _publish(root, record, "tar", write_tar(samples)),
            "table": _publish(root, record, "parquet", table_to_bytes(forget_rows(table, gone))),
        },
        num_kept=len(samples),
        dropped=_dropped(rows, gone),
    )
    storage.write_json(record_uri(storage.join(root, "download", "shards"), record.shard_id), cleaned.to_json())
    for role in ("images", "table"):
        storage.delete(storage.join(root, record.files[role].path))


def _delete_leftovers(root: str) -> None:
    """Delete files of downloaded shards that no record names any more: an interrupted takedown leaves them."""
    folder = storage.join(root, "download", "shards")
    named = {record.shard_id: {file.path for file in record.files.values()} for record in _records(root, "download")}
    for name in storage.list_files(folder):
        shard_id, _, extension = name.partition(".")
        path = f"download/shards/{name}"
        if shard_id in named and path not in named[shard_id] and extension.endswith(("tar", "parquet")):
            storage.delete(storage.join(root, path))


def _dropped(rows: Sequence[Mapping[str, Any]], gone: Sequence[bool]) -> dict[str, int]:
    reasons = [REASON if is_gone else row["reason"] for row, is_gone in zip(rows, gone, strict=True)]
    return dict(sorted(Counter(reason for reason in reasons if reason is not None).items()))


def _publish(root: str, record: ShardRecord, extension: str, content: bytes) -> File:
    name = f"{record.shard_id}.{hashlib.sha256(content).hexdigest()[:8]}.{extension}"
    path = f"download/shards/{name}"
    written = storage.write_bytes(storage.join(root, path), content)
    return File(path=path, sha256=written.sha256, num_bytes=written.num_bytes)


# ---- what the store holds -------------------------------------------------------------------------------------------


def _records(root: str, stage: str) -> Iterator[ShardRecord]:
    """Read all shard records of a stage, those of earlier settings included."""
    folder = storage.join(root, stage, "shards")
    # Beside the records lie JSON files that are results, such as <shard>.metrics.json.
    names = [name for name in storage.list_files(folder) if name.partition(".")[2] == "json" and "/" not in name]
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        for value in pool.map(lambda name: storage.read_json(storage.join(folder, name)), names):
            yield ShardRecord.from_json(value)


def _manifests(root: str, stage: str) -> Iterator[Manifest]:
    """Read all manifests of a stage."""
    for name in storage.list_files(storage.join(root, stage)):
        if name.endswith("/" + MANIFEST_NAME):
            yield Manifest.read_uri(root, storage.join(root, stage, name))


def _derived_of(root: str, stage: str, dead: set[str]) -> list[str]:
    """List what a stage made of dead files, and add its files to them."""
    shards = {
        record.shard_id: record
        for record in _records(root, stage)
        if any(file.path in dead for file in record.inputs.values())
    }
    found: list[str] = []
    for shard_id, record in shards.items():
        found += [f"{stage}/shards/{shard_id}.json", *(file.path for file in record.files.values())]
    for manifest in _manifests(root, stage):
        touched = [r for r in manifest.records if any(file.path in dead for file in r.inputs.values())]
        if touched:
            found += [file.path for r in touched for file in r.files.values()]
            found += [file.path for file in manifest.files.values()]
            found.append(f"{stage}/{manifest.fingerprint}/{MANIFEST_NAME}")
    found = list(dict.fromkeys(found))
    dead.update(found)
    return found
