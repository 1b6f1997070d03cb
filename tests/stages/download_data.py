"""Sources of one shard for tests of the download, and what a download of them holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import storage
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import File, Manifest, ShardRecord
from stages.runner import run_stage
from stages.samples import Sample, read_tar, table_from_bytes, table_to_bytes


def run(stage: Any, inputs: dict[str, Manifest]) -> Manifest:
    fingerprint = stage.fingerprint({name: m.fingerprint for name, m in inputs.items()})
    cluster = ClusterConfig(executor="local", max_attempts=2, backoff_s=0.0)
    return run_stage(stage, fingerprint, inputs, LocalExecutor(), cluster)


def source_of(root: Path, rows: pa.Table, *, config: Mapping[str, Any] | None = None, **metrics: Any) -> Manifest:
    """Publish a source of one shard."""
    data = table_to_bytes(rows)
    storage.write_bytes(f"{root}/urls.parquet", data)
    file = File("urls.parquet", hashlib.sha256(data).hexdigest(), len(data))
    record = ShardRecord(shard_id="s0", files={"urls": file}, num_in=rows.num_rows, num_kept=rows.num_rows)
    return Manifest(
        root=str(root), stage="source", version=1, fingerprint="0" * 16, config=config or {}, inputs={},
        records=[record], metrics=metrics,
    )  # fmt: skip


def rows_of(urls: Sequence[str | None], captions: list[str | None] | None = None, **extra: Any) -> pa.Table:
    return pa.table(
        {
            "list": ["l"] * len(urls),
            "row": pa.array(range(len(urls)), pa.int64()),
            "url": pa.array(urls, pa.string()),
            "caption": pa.array(captions or ["c"] * len(urls), pa.string()),
            **extra,
        }
    )


def samples_of(manifest: Manifest) -> list[Sample]:
    return [sample for r in manifest.records for sample in read_tar(r.files["images"].read(manifest.root))]


def table_of(manifest: Manifest) -> list[dict[str, Any]]:
    tables = [table_from_bytes(r.files["table"].read(manifest.root)) for r in manifest.records]
    return list(pa.concat_tables(tables).to_pylist())
