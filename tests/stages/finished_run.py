"""Finished runs of chosen numbers, written as their contract says: what a registry sees, without the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages import storage
from stages.manifest import File, Manifest, ShardRecord, digest_of

LISTS = {"jan.csv": 30}


def publish_stage(
    root: str,
    stage: str,
    fingerprint: str,
    records: Sequence[ShardRecord] = (),
    *,
    weights: bytes = b"",
    upstream: Mapping[str, Manifest] | None = None,
    **fields: Any,
) -> Manifest:
    """Publish a manifest, with one shard of weights if given."""
    if weights:
        shard = digest_of([stage, fingerprint])[:16]
        path = f"{stage}/shards/{shard}.safetensors"
        written = storage.write_bytes(storage.join(root, path), weights)
        file = File(path=path, sha256=written.sha256, num_bytes=written.num_bytes)
        records = [ShardRecord(shard_id=shard, files={"weights": file})]
    inputs = {name: {"fingerprint": m.fingerprint, "digest": m.digest} for name, m in (upstream or {}).items()}
    values: dict[str, Any] = {"config": {}, "code_version": "1.0"} | fields
    found = Manifest(
        root=root, stage=stage, version=1, fingerprint=fingerprint, inputs=inputs, records=tuple(records), **values
    )
    found.write()
    return found


def rows_of(list_name: str, num_rows: int) -> ShardRecord:
    """Record one shard of a list, as the source stage does."""
    where = {"list": list_name, "list_sha256": digest_of([list_name, num_rows]), "start": 0, "stop": num_rows}
    return ShardRecord(shard_id=digest_of(where)[:16], files={}, num_in=num_rows, num_kept=num_rows, metrics=where)


def finished_run(
    root: str, seed: int, *, lists: Mapping[str, int] = LISTS, learning_rate: float = 1e-4, **metrics: Any
) -> dict[str, Manifest]:
    """Publish a run: its lists, two models and its metrics; other seeds make other results."""
    name = digest_of([seed, dict(lists), learning_rate])[:16]
    records = [rows_of(*item) for item in lists.items()]
    num_rows = sum(lists.values())
    kept = ShardRecord(shard_id=name, files={}, num_in=num_rows, num_kept=num_rows - 2, dropped={"low_clip_score": 2})
    training = {"learning_rate": learning_rate, "model": {"width": 16}}
    verdict = {"passed": True, "num_checked": 0, "reasons": []}
    return {
        "source": publish_stage(root, "source", name, records),
        "curate": publish_stage(root, "curate", name, [kept]),
        "prior": publish_stage(root, "prior", name, weights=b"prior of %d" % seed),
        "decoder": publish_stage(root, "decoder", name, weights=b"decoder of %d" % seed, config=training),
        "evaluate": publish_stage(root, "evaluate", name, metrics={"gate": verdict, "clip_score": 0.25, **metrics}),
    }
