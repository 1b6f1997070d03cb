"""Second chances: rows whose download failed for reasons that pass, fetched again as shards of their own.

The shards of a finished download are never rewritten. A request names rows of a shard
(``<root>/download/retries/<shard id>.json``); the download's plan then has a further shard of exactly these rows, with
the keys they had. In the final records a row counts where it was tried last, so that the numbers still balance. A retry
can be retried. A shard that is itself done anew (forced, repaired) tries all its rows, and its request is withdrawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pyarrow.compute as pc

from stages import storage
from stages.base import Shard, record_uri
from stages.manifest import Manifest, ShardRecord
from stages.samples import table_from_bytes

RETRIED = "retried"  # role, in the record of a shard, of the table of those of its rows that were tried again
_IO_THREADS = 16
_SUFFIX = ".json"


def request_retries(download: Manifest, is_transient: Callable[[str], bool]) -> dict[str, int]:
    """Ask for another try of every row that failed for a reason that passes; the download is no longer done then.

    Args:
        download: the finished download.
        is_transient: tells which reasons pass.

    Returns:
        reason -> rows that will be tried again.
    """
    folder = _folder(download.root)
    if any(is_transient(reason) for reason in download.dropped):
        storage.delete(download.uri)

    def request(record: ShardRecord) -> Counter[str]:
        if not any(is_transient(reason) for reason in record.dropped):
            return Counter()
        rows = _rows(download.root, record)
        failed = {position: reason for position, reason in rows.items() if reason and is_transient(reason)}
        storage.write_json(storage.join(folder, record.shard_id + _SUFFIX), sorted(failed))
        return Counter(failed.values())

    # A record that names a retry has already handed these rows on.
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        open_records = [record for record in download.records if RETRIED not in record.files]
        return dict(sum(pool.map(request, open_records), Counter[str]()))


def with_retries(root: str, shards: Sequence[Shard], again: Callable[[Shard, Sequence[int]], Shard]) -> list[Shard]:
    """Add the shards that were asked for to a plan, behind all others.

    Args:
        root: the store.
        shards: the plan without them.
        again: builds the shard of some rows of another.
    """
    requested = {name.removesuffix(_SUFFIX) for name in storage.list_files(_folder(root))}
    found = list(shards)
    for shard in found:  # grows meanwhile: a retry can be retried
        if shard.id in requested:
            positions = storage.read_json(storage.join(_folder(root), shard.id + _SUFFIX))
            found.append(replace(again(shard, positions), index=len(found)))
    return found


def withdraw(root: str, output: str, shard: Shard, again: Callable[[Shard, Sequence[int]], Shard]) -> None:
    """Forget the retries of a shard that is done anew, and that they were asked for.

    Args:
        root: the store.
        output: URI of the folder of the download's shards.
        shard: the shard, of which there is no record.
        again: as for ``with_retries``.
    """
    # The last retry first: what is left at any moment can be found from the shard.
    for asked, retry in reversed(list(pairwise(with_retries(root, [shard], again)))):
        storage.delete(record_uri(output, retry.id))
        storage.delete(storage.join(_folder(root), asked.id + _SUFFIX))


def settled(root: str, records: Sequence[ShardRecord], retry_of: Mapping[str, str]) -> list[ShardRecord]:
    """Count every row where it was tried last.

    Args:
        root: the store.
        records: of all shards, retries included.
        retry_of: id of a shard -> id of the shard that tries some of its rows again.

    Returns:
        The records; those with retries name the table of the rows they handed on, and no longer count them.
    """
    by_id = {record.shard_id: record for record in records}

    def settle(record: ShardRecord) -> ShardRecord:
        retry = by_id.get(retry_of.get(record.shard_id, ""))
        if retry is None:
            return record
        own, handed_on = _rows(root, record), _rows(root, retry)
        dropped = Counter(record.dropped)
        dropped.subtract(Counter(reason for position in handed_on if (reason := own[position]) is not None))
        return replace(
            record,
            files={**record.files, RETRIED: retry.files["table"]},
            num_in=record.num_in - len(handed_on),
            dropped={reason: count for reason, count in sorted(dropped.items()) if count},
        )

    with ThreadPoolExecutor(_IO_THREADS) as pool:
        return list(pool.map(settle, records))


def _folder(root: str) -> str:
    return storage.join(root, "download", "retries")


def _rows(root: str, record: ShardRecord) -> dict[int, str | None]:
    """Return position in the source shard -> reason, of the rows of a download shard."""
    table = table_from_bytes(record.files["table"].read(root), ["key", "reason"])
    positions = pc.utf8_slice_codeunits(table["key"], 10).cast("int64").to_pylist()
    return dict(zip(positions, table["reason"].to_pylist(), strict=True))
