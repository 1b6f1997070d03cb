"""Audit: hold the store to what its manifests say, and undo exactly what does not hold.

``verify`` reads every byte that a manifest names. ``repair`` deletes the records of damaged work, so that the next run
does this work again and no other: a file is never patched, it is made anew by the stage that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from stages import storage
from stages.balance import check_balance
from stages.base import Stage, record_uri
from stages.errors import IntegrityError, NotFoundError, StorageError
from stages.manifest import MANIFEST_NAME, File, Manifest, ShardRecord, manifest_uri
from stages.storage import Entry
from stages.version import Version

_READ_THREADS = 16
_READ_AHEAD = 256

Kind = Literal["missing", "damaged", "record", "manifest", "balance", "version"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Names the output of a stage.

    Attributes:
        stage: its name.
        fingerprint: the folder of its manifest.
    """

    stage: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not what it should be.

    Attributes:
        kind: ``missing`` or ``damaged`` (a file), ``record`` (a shard's record is missing or says something else than
            the manifest), ``manifest`` (unreadable), ``balance`` (samples were lost or counted twice between stages),
            ``version`` (weights of a registered version are missing or damaged; no run makes these again).
        stage: the stage whose manifest names it.
        fingerprint: of that manifest.
        shard: id of the shard it belongs to; empty for a file of the stage as a whole.
        path: relative to the store.
        expected: what the manifest says.
        found: what there is.
    """

    kind: Kind
    stage: str
    fingerprint: str
    shard: str
    path: str
    expected: str
    found: str

    def to_json(self) -> dict[str, str]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        shard = f" shard {self.shard}" if self.shard else ""
        return f"{self.stage}{shard}: {self.path}: {self.kind}: expected {self.expected}, found {self.found}"


@dataclass(kw_only=True)
class Verified:
    """What ``verify`` saw.

    Attributes:
        num_results: manifests read.
        num_files: distinct files checked.
        num_bytes: their sizes by their records, bytes.
        findings: all that is wrong, in the order of the stages.
    """

    num_results: int
    num_files: int
    num_bytes: int
    findings: list[Finding]


def results_of(fingerprints: Mapping[str, str], root: str) -> list[Result]:
    """Return the results of a config that are in the store."""
    named = [Result(stage=stage, fingerprint=fingerprint) for stage, fingerprint in fingerprints.items()]
    return [r for r in named if storage.exists(manifest_uri(root, r.stage, r.fingerprint))]


def all_results(listings: Mapping[str, Mapping[str, Entry]]) -> list[Result]:
    """Return every result in the store.

    Args:
        listings: stage -> listing of its folder.
    """
    parts = ((stage, name.split("/")) for stage, names in listings.items() for name in names)
    return [Result(stage=stage, fingerprint=p[0]) for stage, p in parts if len(p) == 2 and p[1] == MANIFEST_NAME]


def verify(
    root: str,
    results: Sequence[Result],
    kinds: Mapping[str, type[Stage[Any]]],
    *,
    versions: Sequence[Version] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Check every file that the given results name, by size and checksum, their records, and their balance.

    Args:
        root: the store.
        results: what to check.
        kinds: stage -> its class, which knows whose samples it counts.
        versions: registered versions whose weights are checked too.
        on_progress: called with bytes checked and bytes in all.

    Raises:
        StorageError: if the store does not answer.
    """
    findings: list[Finding] = []
    manifests: dict[Result, Manifest] = {}
    for result in results:
        try:
            manifests[result] = Manifest.read_uri(root, manifest_uri(root, result.stage, result.fingerprint))
        except (IntegrityError, StorageError, KeyError, TypeError) as error:
            findings.append(_finding("manifest", result, "", MANIFEST_NAME, "a readable manifest", f"{error}"))
    listings = {stage: storage.list_entries(storage.join(root, stage)) for stage in {r.stage for r in manifests}}
    of_versions = [check for version in versions for check in _weights_of(version)]
    checks = {(c.file.path, c.file.sha256): c for r, m in manifests.items() for c in _files_of(r, m)}
    checks |= {key: c for c in of_versions if (key := (c.file.path, c.file.sha256)) not in checks}
    total, done = sum(c.file.num_bytes for c in checks.values()), 0
    damaged: dict[tuple[str, str], Finding] = {}
    for check, finding in _in_threads(lambda c: _check_file(root, c, listings), checks.values()):
        done += check.file.num_bytes
        on_progress(done, total)
        if finding is not None:
            damaged[check.file.path, check.file.sha256] = finding
    by_name = {(m.stage, m.fingerprint): m for m in manifests.values()}
    for result, manifest in manifests.items():
        findings += (damaged[k] for c in _files_of(result, manifest) if (k := (c.file.path, c.file.sha256)) in damaged)
        findings += _check_records(root, result, manifest)
        findings += _check_balance(result, manifest, kinds.get(result.stage), by_name)
    for check in of_versions:
        if (found := damaged.get((check.file.path, check.file.sha256))) is not None:
            findings.append(replace(found, kind="version", shard="", **asdict(check.result)))
    return Verified(num_results=len(results), num_files=len(checks), num_bytes=total, findings=findings)


@dataclass(frozen=True)
class _Check:
    """A file to check, and whose it is."""

    result: Result
    shard: str
    file: File


def _finding(kind: Kind, result: Result, shard: str, path: str, expected: str, found: str) -> Finding:
    if kind in ("manifest", "balance"):
        path = f"{result.stage}/{result.fingerprint}/{path}"
    names = {"stage": result.stage, "fingerprint": result.fingerprint, "shard": shard}
    return Finding(kind=kind, path=path, expected=expected, found=found, **names)


def _files_of(result: Result, manifest: Manifest) -> Iterator[_Check]:
    for record in manifest.records:
        for file in record.files.values():
            yield _Check(result, record.shard_id, file)
    for file in manifest.files.values():
        yield _Check(result, "", file)


def _weights_of(version: Version) -> Iterator[_Check]:
    for name, stage in version.stages.items():
        for file in stage.weights:
            yield _Check(Result(stage=name, fingerprint=stage.fingerprint), "", file)


def _check_file(root: str, check: _Check, listings: Mapping[str, Mapping[str, Entry]]) -> Finding | None:
    file = check.file
    stage, _, name = file.path.partition("/")
    entry = listings[stage].get(name) if stage in listings else None
    expected = f"{file.num_bytes} bytes, sha256 {file.sha256}"
    if entry is None and stage in listings:
        return _finding("missing", check.result, check.shard, file.path, expected, "nothing")
    if entry is not None and entry.num_bytes != file.num_bytes:
        return _finding("damaged", check.result, check.shard, file.path, expected, f"{entry.num_bytes} bytes")
    try:
        written = storage.checksum(storage.join(root, file.path))
    except NotFoundError:
        return _finding("missing", check.result, check.shard, file.path, expected, "nothing")
    if (written.num_bytes, written.sha256) == (file.num_bytes, file.sha256):
        return None
    found = f"{written.num_bytes} bytes, sha256 {written.sha256}"
    return _finding("damaged", check.result, check.shard, file.path, expected, found)


def _check_records(root: str, result: Result, manifest: Manifest) -> Iterator[Finding]:
    output = storage.join(root, result.stage, "shards")

    def read(record: ShardRecord) -> str | None:
        try:
            stored = ShardRecord.from_json(storage.read_json(record_uri(output, record.shard_id)))
        except NotFoundError:
            return "nothing"
        except (IntegrityError, StorageError) as error:
            return f"{error}"
        return _difference(stored, record)

    for record, found in _in_threads(read, manifest.records):
        if found is not None:
            path = f"{result.stage}/shards/{record.shard_id}.json"
            yield _finding("record", result, record.shard_id, path, "the record that the manifest tells of", found)


def _difference(stored: ShardRecord, final: ShardRecord) -> str | None:
    """Compare the record of a shard with that of the manifest, to which ``finish`` may have added files and drops."""
    if stored.shard_id != final.shard_id:
        return f"shard {stored.shard_id}"
    for role, file in stored.files.items():
        if final.files.get(role) != file:
            return f"another file {role}: {file.path}, sha256 {file.sha256}"
    if stored.num_in != final.num_in:
        return f"{stored.num_in} samples in, not {final.num_in}"
    if stored.files.keys() == final.files.keys() and stored.identity != final.identity:
        return f"{stored.num_kept} samples kept, not {final.num_kept}, or other reasons"
    return None


def _check_balance(
    result: Result,
    manifest: Manifest,
    kind: type[Stage[Any]] | None,
    manifests: Mapping[tuple[str, str], Manifest],
) -> Iterator[Finding]:
    """Compare with the upstream manifest that was read, if it is among those given and still the same."""
    source = manifest.inputs.get(kind.counts) if kind is not None and kind.counts is not None else None
    if kind is None or kind.counts is None or source is None:
        return
    upstream = manifests.get((kind.counts, source["fingerprint"]))
    if upstream is None or upstream.digest != source["digest"]:
        return
    planned = {record.shard_id: [file.path for file in record.inputs.values()] for record in manifest.records}
    if manifest.quarantined:
        # What they read is not told; it is what no other shard reads.
        read = {path for paths in planned.values() for path in paths}
        unread = [
            f.path for r in upstream.records for f in r.files.values() if not read & {g.path for g in r.files.values()}
        ]
        planned |= dict.fromkeys(manifest.quarantined, unread)
    try:
        check_balance(manifest.stage, manifest.records, upstream, planned=planned, quarantined=manifest.quarantined)
    except IntegrityError as error:
        yield _finding("balance", result, "", MANIFEST_NAME, f"{upstream.num_kept} samples in", f"{error}")


def _in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield items with what ``function`` makes of them, in order, a bounded number ahead."""
    waiting = list(items)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(waiting), _READ_AHEAD):
            part = waiting[start : start + _READ_AHEAD]
            yield from zip(part, pool.map(function, part), strict=True)


# ---- repair ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What has to go so that the next run makes damaged work anew.

    Attributes:
        records: records of shards, paths relative to the store.
        manifests: manifests of their stages.
        stages: the stages that will run, each for these shards only.
        unrepairable: findings that no deletion cures.
    """

    records: Sequence[str]
    manifests: Sequence[str]
    stages: Sequence[str]
    unrepairable: Sequence[Finding]


def plan_repair(findings: Iterable[Finding]) -> Repair:
    """Decide what to delete.

    A shard's own file goes with the shard's record. A file that ``finish`` made lies in the folder of the result; its
    shards are kept, and only the manifest goes.
    """
    records: dict[str, None] = {}
    manifests: dict[str, str] = {}
    unrepairable: list[Finding] = []
    for finding in findings:
        if finding.kind in ("balance", "version"):
            unrepairable.append(finding)
            continue
        if finding.shard and finding.path.startswith(f"{finding.stage}/shards/"):
            records[f"{finding.stage}/shards/{finding.shard}.json"] = None
        manifests[f"{finding.stage}/{finding.fingerprint}/{MANIFEST_NAME}"] = finding.stage
    stages = list(dict.fromkeys(manifests.values()))
    return Repair(records=list(records), manifests=list(manifests), stages=stages, unrepairable=unrepairable)


def apply_repair(root: str, repair: Repair) -> None:
    """Delete records, then manifests: broken off in between, the damage is still found by the next ``verify``."""
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        list(pool.map(lambda path: storage.delete(storage.join(root, path)), repair.records))
    for path in repair.manifests:
        storage.delete(storage.join(root, path))
