"""Garbage: what lies in the store and is named by nothing that counts.

Named means: by a manifest, by the record of a shard that a manifest names, by a version of the model registry, or by
the plan of a run that the given configs would go on with. Everything else goes once it is old enough; what is young
may belong to a run of another config that is in progress.

A run of another config also shows by its lease. What it will name nobody else knows: of a stage whose lease is held all
shards and checkpoints stay, whatever their age, and so do all results that it may read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from stages import storage
from stages.audit import Result, all_results
from stages.base import Stage
from stages.errors import IntegrityError, NotFoundError, StorageError
from stages.lease import LEASE_NAME, Holding, lease_uri, read_lease
from stages.manifest import MANIFEST_NAME, TABLE_NAME, Manifest, ShardRecord, manifest_uri
from stages.registry import read_versions
from stages.segments import SEGMENTS_FOLDER, read_records
from stages.storage import TEMPORARY_SUFFIX, Entry

_THREADS = 16
_DAY_S = 86_400
_RESULT = re.compile(r"[0-9a-f]{16}")
TEMPORARY_DAYS = 1.0
# A holder writes its lease several times a minute. One that has been silent for so long is dead, however much the
# clocks of the machines differ.
SILENT_DAYS = 1.0

TEMPORARY = "half-written temporary file"
STALE = "result of other settings"
NO_MANIFEST = "shard of no result"
NO_RESULT = "file of a result without a manifest"
NOT_NAMED = "not named by its record or manifest"
CHECKPOINT = "checkpoint of a finished or abandoned training"


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One file that can go.

    Attributes:
        path: relative to the store.
        stage: the folder it lies in.
        num_bytes: its size.
        reason: why it can go.
    """

    path: str
    stage: str
    num_bytes: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Names:
    """What counts.

    Attributes:
        paths: files, relative to the store.
        results: stage and fingerprint of results whose manifests count, or that a given config is making.
        finished: stage and id of shards that a manifest names.
        planned: stage and id of shards that a given config will name.
        unplanned: stages of which that is not known, because what a given config would read is not there yet.
    """

    paths: set[str]
    results: set[tuple[str, str]]
    finished: set[tuple[str, str]]
    planned: set[tuple[str, str]]
    unplanned: set[str]


@dataclass(frozen=True, kw_only=True)
class Held:
    """A result that a run is making at this moment.

    Attributes:
        result: its stage and fingerprint.
        holding: who makes it.
    """

    result: Result
    holding: Holding

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self.result), "owner": str(self.holding)}


def _ignore(held: Held) -> None:
    """Tell nobody."""


def find_garbage(
    root: str,
    pipelines: Sequence[Mapping[str, Stage[Any]]],
    fingerprints: Sequence[Mapping[str, str]],
    *,
    older_than_days: float = 7.0,
    stale: bool = False,
    on_held: Callable[[Held], None] = _ignore,
) -> list[Garbage]:
    """Find what can be deleted; deletes nothing.

    Args:
        root: the store.
        pipelines: the stages of every config whose work is to be kept; their names are the folders looked at.
        fingerprints: names of their results.
        older_than_days: nothing younger goes, except temporary files older than ``TEMPORARY_DAYS``.
        stale: whether results are garbage too that none of the configs reaches or names and no version is made of.
        on_held: told of every result that is being made, for whose sake the shards of its stage are kept.

    Returns:
        In the order in which they may be deleted: manifests first, then records, then what those name.

    Raises:
        IntegrityError: if a manifest that counts, a lease or a version cannot be read: what it names is then not known.
        StorageError: if the store does not answer.
    """
    now_s = time.time()
    stages = list(dict.fromkeys(name for pipeline in pipelines for name in pipeline))
    # The files first: a result that is finished after this is seen below, and names what was listed here.
    listings = {name: storage.list_entries(storage.join(root, name), temporary=True) for name in stages}
    held = _held(root, listings, now_s)
    for item in held:
        on_held(item)
    making, busy = {item.result for item in held}, {item.result.stage for item in held}
    reached = {Result(stage=name, fingerprint=f) for names in fingerprints for name, f in names.items()}
    live = set(all_results({name: storage.list_entries(storage.join(root, name)) for name in stages}))
    versions = read_versions(root).values()
    if stale:
        registered = {
            Result(stage=name, fingerprint=stage.fingerprint) for v in versions for name, stage in v.stages.items()
        }
        read = _with_upstream(busy, pipelines)
        kept = reached | registered | _named_elsewhere(root, pipelines)
        old = {r for r in live - kept if r.stage not in read and _age_days(listings, r, now_s) > older_than_days}
        live -= old
    names = _named(
        root, listings, sorted(live, key=lambda r: (r.stage, r.fingerprint)), reached, pipelines, fingerprints
    )
    # Also where the manifest of a registered version is gone: its weights are all that is left of it.
    names.paths.update(file.path for v in versions for stage in v.stages.values() for file in stage.weights)
    found: list[Garbage] = []
    for stage, listing in listings.items():
        newest = _newest_by_shard(listing)
        for name, entry in listing.items():
            folder = name.partition("/")[0]
            is_made = Result(stage=stage, fingerprint=folder) in making or (folder == "shards" and stage in busy)
            if is_made and not name.endswith(TEMPORARY_SUFFIX):
                continue
            reason, written_ns = _why(stage, name, entry, names, newest)
            least_days = TEMPORARY_DAYS if reason == TEMPORARY else older_than_days
            if reason and now_s - written_ns / 1e9 > least_days * _DAY_S:
                found.append(Garbage(path=f"{stage}/{name}", stage=stage, num_bytes=entry.num_bytes, reason=reason))
    return sorted(found, key=_order)


def delete_garbage(root: str, garbage: Sequence[Garbage]) -> None:
    """Delete, manifests before records before files, so that what is left at any moment names only what is there."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for rank in range(3):
            part = [item.path for item in garbage if _order(item)[0] == rank]
            list(pool.map(lambda path: storage.delete(storage.join(root, path)), part))


def _order(item: Garbage) -> tuple[int, str]:
    if item.path.endswith("/" + MANIFEST_NAME):
        return 0, item.path
    return (1 if item.path.endswith(".json") else 2), item.path


def _held(root: str, listings: Mapping[str, Mapping[str, Entry]], now_s: float) -> list[Held]:
    """Return what is being made: leases that are neither free nor left behind by the dead."""
    found: list[Held] = []
    for stage, listing in listings.items():
        for name, entry in listing.items():
            folder, _, rest = name.partition("/")
            if rest != LEASE_NAME or now_s - entry.modified_ns / 1e9 > SILENT_DAYS * _DAY_S:
                continue
            holding = read_lease(lease_uri(root, stage, folder))
            if holding is not None and not holding.is_over:
                found.append(Held(result=Result(stage=stage, fingerprint=folder), holding=holding))
    return found


def _with_upstream(stages: Iterable[str], pipelines: Sequence[Mapping[str, Stage[Any]]]) -> set[str]:
    """Return stages and all whose results they read, directly or through others."""
    found, following = set[str](), set(stages)
    while following:
        found |= following
        given = {up for pipeline in pipelines for name in following & pipeline.keys() for up in pipeline[name].upstream}
        following = given - found
    return found


def _named_elsewhere(root: str, pipelines: Sequence[Mapping[str, Stage[Any]]]) -> set[Result]:
    """Return the results of other runs that the configs name, and all that these were made from."""
    found = set[Result]()
    following = {
        Result(stage=name, fingerprint=fingerprint)
        for pipeline in pipelines
        for stage in pipeline.values()
        for name, fingerprint in stage.named_results()
    }
    while following:
        result = following.pop()
        found.add(result)
        manifest = Manifest.read(root, result.stage, result.fingerprint)
        inputs = manifest.inputs.items() if manifest is not None else ()
        following |= {Result(stage=name, fingerprint=given["fingerprint"]) for name, given in inputs} - found
    return found


def _age_days(listings: Mapping[str, Mapping[str, Entry]], result: Result, now_s: float) -> float:
    entry = listings[result.stage].get(f"{result.fingerprint}/{MANIFEST_NAME}")
    return (now_s - entry.modified_ns / 1e9) / _DAY_S if entry is not None else 0.0


def _named(
    root: str,
    listings: Mapping[str, Mapping[str, Entry]],
    live: Iterable[Result],
    reached: set[Result],
    pipelines: Sequence[Mapping[str, Stage[Any]]],
    fingerprints: Sequence[Mapping[str, str]],
) -> _Names:
    names = _Names(set(), {(r.stage, r.fingerprint) for r in reached}, set(), set(), set())
    manifests: dict[tuple[str, str], Manifest] = {}
    for result in live:
        try:
            manifest = Manifest.read_uri(root, manifest_uri(root, result.stage, result.fingerprint))
        except NotFoundError:
            continue  # deleted meanwhile
        except (IntegrityError, KeyError, TypeError, StorageError) as error:
            uri = manifest_uri(root, result.stage, result.fingerprint)
            raise IntegrityError(
                f"{uri}: cannot be read ({error}), so what it names is not known; `unclip repair` its config first"
            ) from error
        manifests[result.stage, result.fingerprint] = manifest
        output = storage.join(root, result.stage, "shards")
        listing = {n.removeprefix("shards/"): e for n, e in listings[result.stage].items() if n.startswith("shards/")}
        # `finish` may have put another record into the manifest than the one beside the shard.
        stored = read_records(output, listing, ((record.shard_id, record.inputs) for record in manifest.records))
        _add_manifest(manifest, stored.records.values(), names)
    for pipeline, own in zip(pipelines, fingerprints, strict=True):
        _add_plans(pipeline, own, manifests, names)
    return names


def _add_manifest(manifest: Manifest, stored: Iterable[ShardRecord], names: _Names) -> None:
    folder = f"{manifest.stage}/{manifest.fingerprint}"
    names.results.add((manifest.stage, manifest.fingerprint))
    names.paths.update((f"{folder}/{MANIFEST_NAME}", f"{folder}/{TABLE_NAME}", f"{folder}/{LEASE_NAME}"))
    names.paths.update(file.path for file in manifest.files.values())
    for record in (*manifest.records, *stored):
        names.finished.add((manifest.stage, record.shard_id))
        names.paths.add(f"{manifest.stage}/shards/{record.shard_id}.json")
        names.paths.update(file.path for files in (record.files, record.inputs) for file in files.values())


def _add_plans(
    pipeline: Mapping[str, Stage[Any]],
    fingerprints: Mapping[str, str],
    manifests: Mapping[tuple[str, str], Manifest],
    names: _Names,
) -> None:
    """Add the shards that a config would do next: those of unfinished stages whose inputs are there.

    Those of later stages, such as a takedown leaves, may be done already: it shows once their inputs are there again.
    """
    for name, stage in pipeline.items():
        if (name, fingerprints[name]) in manifests:
            continue
        inputs = {up: manifests.get((up, fingerprints[up])) for up in stage.upstream}
        given = {up: manifest for up, manifest in inputs.items() if manifest is not None}
        if len(given) < len(inputs):
            names.unplanned.add(name)
        else:
            shards = stage.plan(given)
            names.planned.update((name, shard.id) for shard in shards)
            names.paths.update(file.path for shard in shards for file in shard.inputs.values())


def _newest_by_shard(listing: Mapping[str, Entry]) -> dict[str, int]:
    """Return when anything of a shard was last written: its files go together or not at all."""
    newest: dict[str, int] = {}
    for name, entry in listing.items():
        if name.startswith("shards/"):
            shard = _shard_of(name)
            newest[shard] = max(newest.get(shard, 0), entry.modified_ns)
    return newest


def _shard_of(name: str) -> str:
    return name.split("/")[1].partition(".")[0]


def _why(stage: str, name: str, entry: Entry, names: _Names, newest: Mapping[str, int]) -> tuple[str, int]:
    """Say why a file can go, if it can, and from when its age counts, ns since the epoch."""
    if name.endswith(TEMPORARY_SUFFIX):
        return TEMPORARY, entry.modified_ns
    folder, _, rest = name.partition("/")
    if f"{stage}/{name}" in names.paths or rest.startswith(f"{SEGMENTS_FOLDER}/"):
        return "", 0
    if folder != "shards":
        if not _RESULT.fullmatch(folder):
            return "", 0  # what a stage keeps beside its results: the rows to be tried again, the lists it has read
        if (stage, folder) not in names.results:
            return (STALE if rest == MANIFEST_NAME else NO_RESULT), entry.modified_ns
        return NOT_NAMED, entry.modified_ns
    key = (stage, _shard_of(name))
    written_ns = newest[key[1]]
    if "/checkpoints/" in rest:
        return CHECKPOINT, written_ns
    if "/" in rest and key in names.finished:
        return "", 0  # logs of a training
    if key in names.planned:
        return "", 0
    if key in names.finished:
        return NOT_NAMED, written_ns
    return ("", 0) if stage in names.unplanned else (NO_MANIFEST, written_ns)
