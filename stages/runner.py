"""Run one stage: find what is committed, do the rest, write the manifest. The same on a laptop and on a cluster."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from stages import storage
from stages.balance import check_balance
from stages.base import Progress, Shard, Stage, identity_of, record_uri
from stages.clock import utc_now
from stages.code_version import code_version
from stages.errors import InputError, IntegrityError, StageError
from stages.executor import ClusterConfig, Executor, ShardFailure
from stages.lease import Lease
from stages.manifest import Manifest, ShardRecord, manifest_uri
from stages.segments import SegmentWriter, StoredRecords, read_records
from stages.storage import Entry

logger = logging.getLogger(__name__)

_READ_THREADS = 16
_BACKOFF_MAX_S = 60.0


@dataclass(frozen=True, kw_only=True)
class StageState:
    """Whether a stage has to run, and why.

    Attributes:
        name: the stage.
        fingerprint: name of its output.
        status: ``done``, or ``pending``.
        reason: one line for people.
        manifest: the finished stage when ``done``.
    """

    name: str
    fingerprint: str
    status: Literal["done", "pending"]
    reason: str
    manifest: Manifest | None = None


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """Live state of a running stage for the progress bars.

    Attributes:
        stage: its name.
        num_done: shards committed (earlier runs included).
        num_shards: shards in all.
        num_samples: samples that went into the shards done by this run.
        num_failures: tries of shards that failed in this run.
        num_retries: tries of shards after their first one.
        num_quarantined: shards given up on.
        inner: the last sign of life from inside a shard.
        finished: whether the stage is done.
        is_waiting: whether another run does the stage, whose progress this is.
    """

    stage: str
    num_done: int
    num_shards: int
    num_samples: int = 0
    num_failures: int = 0
    num_retries: int = 0
    num_quarantined: int = 0
    inner: Progress | None = None
    finished: bool = False
    is_waiting: bool = False


@dataclass
class _Counts:
    """Progress of one run of one stage, mutable."""

    stage: str
    num_shards: int
    num_done: int
    num_samples: int = 0
    num_failures: int = 0
    num_retries: int = 0
    num_quarantined: int = 0
    inner: Progress | None = None
    finished: bool = False

    def snapshot(self) -> StageProgress:
        return StageProgress(**vars(self))


def _silent(progress: StageProgress) -> None:
    """Show nothing."""


def output_uri(stage: Stage[Any]) -> str:
    """Return the folder of a stage's shards."""
    return storage.join(stage.root, stage.name, "shards")


def inspect_stage(stage: Stage[Any], fingerprint: str, inputs: Mapping[str, Manifest]) -> StageState:
    """Say whether a stage is done for exactly these inputs."""
    manifest = Manifest.read(stage.root, stage.name, fingerprint)
    if manifest is None:
        reason = _why_there_is_none(stage, inputs)
        return StageState(name=stage.name, fingerprint=fingerprint, status="pending", reason=reason)
    for name, upstream in inputs.items():
        if manifest.inputs[name]["digest"] != upstream.digest:
            reason = f"{name} has changed since"
            return StageState(name=stage.name, fingerprint=fingerprint, status="pending", reason=reason)
    reason = f"done {manifest.created_at}"
    return StageState(name=stage.name, fingerprint=fingerprint, status="done", reason=reason, manifest=manifest)


def _why_there_is_none(stage: Stage[Any], inputs: Mapping[str, Manifest]) -> str:
    """Say whether it is the software that has changed, or the settings."""
    version = stage.version - 1
    if version > 0:
        earlier = copy.copy(stage)
        with contextlib.suppress(AttributeError, InputError):  # a version that depends on settings, a list that is gone
            earlier.version = version  # type: ignore[misc]
            before = earlier.fingerprint({name: manifest.fingerprint for name, manifest in inputs.items()})
            if Manifest.read(stage.root, stage.name, before) is not None:
                return f"there is a result of this software's version {version} of the stage; now it is {stage.version}"
    return "no result for these settings"


def committed_records(stage: Stage[Any], shards: Sequence[Shard]) -> dict[str, ShardRecord]:
    """Read the records of the shards that are already committed.

    Costs one listing of the folder, one read for every segment (``stages/segments.py``) and one for every record that
    no segment holds.
    """
    return _find_committed(stage, shards).records


def _find_committed(stage: Stage[Any], shards: Sequence[Shard]) -> StoredRecords:
    output = output_uri(stage)
    listing = storage.list_entries(output)
    stored = read_records(output, listing, ((shard.id, shard.inputs) for shard in shards))
    prefix = output.removeprefix(stage.root).lstrip("/") + "/"
    whole = {i: record for i, record in stored.records.items() if _is_whole(record, prefix, listing)}
    single = [record for record in stored.single if record.shard_id in whole]
    return dataclasses.replace(stored, records=whole, single=single)


def _is_whole(record: ShardRecord, prefix: str, listing: Mapping[str, Entry]) -> bool:
    """Tell whether every file of a record is there with its size; a shard that lost a file is done again."""
    for file in record.files.values():
        if file.path.startswith(prefix):
            entry = listing.get(file.path.removeprefix(prefix))
            if entry is None or entry.num_bytes != file.num_bytes:
                logger.warning("%s is missing or has the wrong size; its shard is done again", file.path)
                return False
    return True


def forget(stage: Stage[Any], fingerprint: str, inputs: Mapping[str, Manifest]) -> None:
    """Delete the manifest of a stage, then the records and checkpoints of its shards, so that it runs anew.

    Rows of segments need no deletion: without its record none counts.
    """
    storage.delete(manifest_uri(stage.root, stage.name, fingerprint))
    output = output_uri(stage)
    listing = storage.list_entries(output)
    ids = {shard.id for shard in stage.plan(inputs)}
    records = [record_uri(output, shard_id) for shard_id in ids if f"{shard_id}.json" in listing]
    folders = [storage.join(output, name) for name in ids & {name.partition("/")[0] for name in listing if "/" in name}]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        list(pool.map(storage.delete, records))
        list(pool.map(storage.delete_tree, folders))


def run_stage(
    stage: Stage[Any],
    fingerprint: str,
    inputs: Mapping[str, Manifest],
    executor: Executor,
    cluster: ClusterConfig,
    *,
    on_progress: Callable[[StageProgress], None] = _silent,
    lease: Lease | None = None,
) -> Manifest:
    """Bring a stage to its end and return its manifest.

    Shards that an earlier run committed are not done again. A shard that fails is tried ``cluster.max_attempts``
    times, then quarantined and named in the manifest.

    Args:
        stage: the stage.
        fingerprint: name of its output.
        inputs: manifests of all its upstream stages.
        executor: where shards run.
        cluster: retry policy.
        on_progress: called on this thread or another whenever something moved, and now and then when nothing did; what
            it raises on this thread ends the stage.
        lease: the right to do so, if several runs share the store.

    Raises:
        StageError: if more shards failed than ``cluster.max_failed_fraction`` allows.
        LeaseLostError: if another run has taken over; nothing was published then.
        UnclipError: a fatal error of the stage itself.
    """
    started_at = time.monotonic()
    if lease is not None:
        stage.fence, on_progress = lease.fence.check, _noting_progress(lease, on_progress)
    shards = list(stage.plan(inputs))
    _refuse_twins(stage, shards)
    committed = _find_committed(stage, shards)
    records = committed.records
    counts = _Counts(stage.name, num_shards=len(shards), num_done=len(records))
    on_progress(counts.snapshot())
    with _noting(stage, committed) as note, stage.service(inputs):
        missing = [shard for shard in shards if shard.id not in records]
        quarantined = _process(stage, missing, records, executor, cluster, counts, on_progress, note)
    done = [records[shard.id] for shard in shards if shard.id in records]
    folder = manifest_uri(stage.root, stage.name, fingerprint).rsplit("/", 1)[0]
    if lease is not None:
        lease.confirm()
    result = executor.finish(stage, done, folder, inputs)
    if stage.counts is not None:
        planned = {shard.id: [file.path for file in shard.inputs.values()] for shard in shards}
        check_balance(stage.name, result.records, inputs[stage.counts], planned=planned, quarantined=quarantined)
    manifest = Manifest(
        root=stage.root,
        stage=stage.name,
        version=stage.version,
        fingerprint=fingerprint,
        config=identity_of(stage.config, ("shard", "stage", "nothing")),
        inputs={name: {"fingerprint": m.fingerprint, "digest": m.digest} for name, m in inputs.items()},
        records=tuple(result.records),
        files=result.files,
        metrics=result.metrics,
        quarantined=quarantined,
        code_version=code_version(),
        created_at=utc_now(),
        wall_time_s=round(time.monotonic() - started_at, 3),
    )
    manifest.write(lease.publish if lease is not None else None)
    counts.finished = True
    on_progress(counts.snapshot())
    return manifest


def _noting_progress(lease: Lease, on_progress: Callable[[StageProgress], None]) -> Callable[[StageProgress], None]:
    def note(progress: StageProgress) -> None:
        if not progress.finished:  # published: whoever has the lease now finds it done
            lease.note(progress.num_done, progress.num_shards)
        on_progress(progress)

    return note


@contextlib.contextmanager
def _noting(stage: Stage[Any], committed: StoredRecords) -> Iterator[Callable[[ShardRecord], None]]:
    """Give a function that notes finished records; segments of them are written meanwhile and at any kind of end."""
    committed.segments.tidy()
    writer = SegmentWriter(output_uri(stage))
    try:
        for record in committed.single:
            writer.add(record)
        yield writer.add
    finally:
        writer.close()


def _process(
    stage: Stage[Any],
    missing: Sequence[Shard],
    records: dict[str, ShardRecord],
    executor: Executor,
    cluster: ClusterConfig,
    counts: _Counts,
    on_progress: Callable[[StageProgress], None],
    note: Callable[[ShardRecord], None],
) -> dict[str, str]:
    """Process shards in rounds of retries; fill ``records``; return the quarantined ones with their reasons."""

    def on_inner(progress: Progress) -> None:
        counts.inner = progress
        on_progress(counts.snapshot())

    def on_idle() -> None:
        on_progress(counts.snapshot())

    quarantined: dict[str, str] = {}
    for attempt in range(1, cluster.max_attempts + 1):
        if not missing:
            break
        if attempt > 1:
            time.sleep(min(cluster.backoff_s * 2 ** (attempt - 2), _BACKOFF_MAX_S))
            counts.num_retries += len(missing)
        failures: list[ShardFailure] = []
        for outcome in executor.map(stage, missing, output_uri(stage), on_inner, on_idle=on_idle):
            if isinstance(outcome, ShardFailure):
                _log_failure(stage, outcome, attempt, cluster.max_attempts)
                failures.append(outcome)
                counts.num_failures += 1
                on_progress(counts.snapshot())
                continue
            records[outcome.shard_id] = outcome
            note(outcome)
            counts.num_done += 1
            counts.num_samples += outcome.num_in
            on_progress(counts.snapshot())
        final = attempt == cluster.max_attempts
        given_up = [f for f in failures if final or f.kind == "permanent"]
        quarantined |= {f.shard.id: str(f.error) for f in given_up}
        counts.num_quarantined = len(quarantined)
        missing = [f.shard for f in failures if f.shard.id not in quarantined]
    _refuse_failures(stage, quarantined, counts.num_shards, cluster.max_failed_fraction)
    return quarantined


def _log_failure(stage: Stage[Any], failure: ShardFailure, attempt: int, max_attempts: int) -> None:
    if failure.kind == "fatal":
        raise failure.error
    place = f"{stage.name} shard {failure.shard.index} ({failure.shard.id})"
    where = {"stage": stage.name, "shard": failure.shard.id}
    # Its secrets are gone: whoever made the failure had the environment that they are of (``failure_of``).
    logger.warning("%s failed, attempt %d of %d: %s", place, attempt, max_attempts, failure.error, extra=where)
    logger.debug("%s: %s", place, failure.details, extra=where)


def _refuse_failures(
    stage: Stage[Any], quarantined: Mapping[str, str], num_shards: int, allowed_fraction: float
) -> None:
    if len(quarantined) <= allowed_fraction * num_shards and len(quarantined) < max(num_shards, 1):
        return
    shard_id, reason = next(iter(quarantined.items()))
    raise StageError(
        f"{stage.name}: {len(quarantined)} of {num_shards} shards failed (cluster.max_failed_fraction allows "
        f"{allowed_fraction:g}, but not all); first: shard {shard_id}: {reason}. Finished shards are kept; run again "
        "to resume"
    )


def _refuse_twins(stage: Stage[Any], shards: Sequence[Shard]) -> None:
    if len({shard.id for shard in shards}) != len(shards):
        raise IntegrityError(
            f"{stage.name}: two shards of the plan have the same identity; their inputs are the same files"
        )
