"""The life of one sample: what every stage decided about it, found by its key, its URL or its place in a list."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages.errors import InputError
from stages.ledger import DECIDING, KEPT, Verdict, tables_of, verdicts_of
from stages.manifest import Manifest, ShardRecord
from stages.retries import RETRIED
from stages.samples import table_from_bytes

_IO_THREADS = 16
_KEY = re.compile(r"[0-9a-f]{10}\d{6}")
_PLACE = re.compile(r"(?P<list>.+):(?P<row>\d{1,18})")


@dataclass(frozen=True, kw_only=True)
class Life:
    """One row of a list and what became of it.

    Attributes:
        key: names the sample in every table and tar.
        list: the URL list it came from.
        row: its row there, counted from 0.
        url: where the image was.
        caption: its caption, if the list has one.
        shard: path of the tar that holds its image, or would.
        verdicts: of the stages that were given it, in order; the last one is final as far as the pipeline has come.
        trained: finished trainings that had it among their samples.
    """

    key: str
    list: str
    row: int
    url: str
    caption: str | None
    shard: str
    verdicts: Sequence[Verdict]
    trained: Sequence[str]

    @property
    def state(self) -> str:
        """``kept``, ``dropped by STAGE: REASON``, or how far it has come."""
        last = self.verdicts[-1]
        if last.reason is not None:
            return f"dropped by {last.stage}: {last.reason}"
        return KEPT if last.stage == list(DECIDING)[-1] else f"passed {last.stage}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        verdicts = [{**vars(verdict), "scores": dict(verdict.scores)} for verdict in self.verdicts]
        return {**vars(self), "verdicts": verdicts, "trained": list(self.trained), "state": self.state}


def find_lives(manifests: Mapping[str, Manifest], name: str) -> list[Life]:
    """Find all samples that ``name`` means.

    Args:
        manifests: of the finished stages; ``download`` at least.
        name: a key, a URL (several rows may have it), or ``LIST:ROW``.

    Raises:
        InputError: if there is no such sample, or the download has not finished.
    """
    if "download" not in manifests:
        raise InputError("explain: the download has not finished; run it first (unclip run --until download)")
    found = _by_key(manifests, name) if _KEY.fullmatch(name) else _by_place_or_url(manifests, name)
    if not found:
        raise InputError(f"explain: no row is '{name}'; give a key of a sample, a URL as the list has it, or LIST:ROW")
    tables = tables_of(manifests)
    lives = [_life(manifests, tables, record, key) for record, key in found]
    return [life for life in lives if life is not None]


def _by_key(manifests: Mapping[str, Manifest], key: str) -> list[tuple[ShardRecord, str]]:
    """Find the shards of a key: it begins with the hash of the rows that its shard was made from."""
    found = []
    for record in manifests["download"].records:
        if record.inputs["urls"].sha256.startswith(key[:10]):
            table = table_from_bytes(record.files["table"].read(manifests["download"].root), ["key"])
            if key in table["key"].to_pylist():
                found.append((record, key))
    return found


def _by_place_or_url(manifests: Mapping[str, Manifest], name: str) -> list[tuple[ShardRecord, str]]:
    """Look through all rows of the data set."""
    download = manifests["download"]
    place = _PLACE.fullmatch(name) if "://" not in name else None
    wanted = {"url": name} if place is None else {"list": place["list"], "row": int(place["row"])}

    def keys(record: ShardRecord) -> list[str]:
        table: pa.Table = table_from_bytes(record.files["table"].read(download.root), ["key", *wanted])
        meant = functools.reduce(pc.and_, (pc.equal(table[column], value) for column, value in wanted.items()))
        return list(table.filter(meant)["key"].to_pylist())

    with ThreadPoolExecutor(_IO_THREADS) as pool:
        found = zip(download.records, pool.map(keys, download.records), strict=True)
        return [(record, key) for record, own in found for key in own]


def _life(
    manifests: Mapping[str, Manifest], tables: Mapping[str, Mapping[str, Any]], record: ShardRecord, key: str
) -> Life | None:
    """Read a life; None if the row was tried again and its life is told there."""
    root = manifests["download"].root
    own = {stage: table_from_bytes(file.read(root)) for stage, file in tables[record.shard_id].items()}
    if RETRIED in own and key in own[RETRIED]["key"].to_pylist():
        return None
    row = own["download"].filter(pc.equal(own["download"]["key"], key)).slice(0, 1).to_pylist()[0]
    verdicts = verdicts_of(own, key)
    passed = {verdict.stage for verdict in verdicts if verdict.reason is None}
    return Life(
        key=key,
        list=row["list"],
        row=row["row"],
        url=row["url"],
        caption=row["caption"],
        shard=record.files["images"].path,
        verdicts=verdicts,
        trained=_trainings(manifests, passed),
    )


def _trainings(manifests: Mapping[str, Manifest], passed: set[str]) -> list[str]:
    """Name the finished stages that learned from the samples kept by one of the stages that this one has passed."""
    return [name for name, m in manifests.items() if "weights" in _roles(m) and passed & m.inputs.keys()]


def _roles(manifest: Manifest) -> set[str]:
    return {role for record in manifest.records for role in record.files}
