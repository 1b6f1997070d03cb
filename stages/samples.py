"""Shard formats: webdataset tars of samples, and Parquet tables beside them.

A tar holds, for every sample, ``<key>.<jpg|png|webp>``, ``<key>.txt`` (the caption) and ``<key>.json`` (everything
else). The same samples always give the same bytes: members are sorted by key and carry no times or owners. Tables are
keyed by the same ``key``; a selection table says of every sample whether it is kept and, if not, why.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import ShardError

IMAGE_EXTENSIONS = ("jpg", "png", "webp")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image-caption pair.

    Attributes:
        key: unique in the dataset, sorts in shard order.
        image: the encoded image file.
        extension: its format, one of ``IMAGE_EXTENSIONS``.
        caption: text.
        metadata: everything else that is known (url, sha256, width, height, ...).
    """

    key: str
    image: bytes
    extension: str
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def row_keys(urls_sha256: str, num_rows: int) -> list[str]:
    """Return the keys of the samples of a source shard: they name its rows by content and sort in row order."""
    return [f"{urls_sha256[:10]}{position:06d}" for position in range(num_rows)]


def write_tar(samples: Iterable[Sample]) -> bytes:
    """Write samples as a webdataset tar, sorted by key; equal samples give equal bytes."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in sorted(samples, key=lambda s: s.key):
            metadata = json.dumps(dict(sample.metadata), sort_keys=True, ensure_ascii=False)
            members = {sample.extension: sample.image, "json": metadata.encode(), "txt": sample.caption.encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size, info.mode = len(content), 0o644
                tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def read_tar(data: bytes, *, keys: frozenset[str] | None = None) -> Iterator[Sample]:
    """Read the samples of a webdataset tar in order.

    Args:
        data: the whole tar (its length already checked against its record).
        keys: only these samples, or all.

    Raises:
        ShardError: if the tar is damaged or a sample lacks its image or caption.
    """
    parts: dict[str, bytes] = {}
    current = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if key != current and parts:
                    yield _sample(current, parts)
                    parts = {}
                current = key
                if keys is None or key in keys:
                    file = tar.extractfile(member)
                    parts[extension] = file.read() if file else b""
    except tarfile.TarError as error:
        raise ShardError(f"damaged tar after sample '{current}': {error}") from error
    if parts:
        yield _sample(current, parts)


def _sample(key: str, parts: Mapping[str, bytes]) -> Sample:
    extension = next((name for name in IMAGE_EXTENSIONS if name in parts), None)
    if extension is None or "txt" not in parts:
        raise ShardError(
            f"sample '{key}' has members {sorted(parts)}: needs an image ({'/'.join(IMAGE_EXTENSIONS)}) and txt"
        )
    return Sample(
        key=key,
        image=parts[extension],
        extension=extension,
        caption=parts["txt"].decode(),
        metadata=json.loads(parts.get("json", b"{}")),
    )


def table_to_bytes(table: pa.Table) -> bytes:
    """Write a Parquet file; equal tables give equal bytes."""
    sink = io.BytesIO()
    # In embeddings nothing repeats but sign and exponent: a byte of every number. Kept apart from the other byte, they
    # take 15% less room than the plain numbers, and less time to read.
    vectors = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=[name for name in table.column_names if name not in vectors],
        use_byte_stream_split=[f"{name}.list.element" for name in vectors],
    )
    return sink.getvalue()


def table_from_bytes(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns, in the order of the file.

    It is read by the thread that asks. Arrow's own threads let go of ``data`` a moment after the table is there, for
    which they want the interpreter's lock: in a process that ends at that moment, they abort it.
    """
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
        return file.read(list(columns) if columns else None, use_threads=False)


def batches_from_bytes(data: bytes, num_rows: int) -> Iterator[pa.RecordBatch]:
    """Read a Parquet file ``num_rows`` at a time: a table of which only the rows are kept is never whole in memory."""
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as file:
        yield from file.iter_batches(num_rows, use_threads=False)


def selection_table(
    keys: Sequence[str], reasons: Sequence[str | None], scores: Mapping[str, Sequence[Any] | pa.Array] | None = None
) -> pa.Table:
    """Build a selection table: ``key``, ``kept`` (bool), ``reason`` (null when kept), then score columns.

    Args:
        keys: all samples of the shard, in order.
        reasons: why each sample is dropped; None keeps it.
        scores: further columns of the same length.
    """
    columns: dict[str, Any] = {
        "key": pa.array(keys, pa.string()),
        "kept": pa.array([reason is None for reason in reasons], pa.bool_()),
        "reason": pa.array(reasons, pa.string()),
    }
    return pa.table(columns | dict(scores or {}))


def kept_keys(selection: pa.Table) -> list[str]:
    """Return the keys that a selection table keeps, in order."""
    return list(selection.filter(selection["kept"])["key"].to_pylist())


def embedding_array(values: Any) -> pa.Array:
    """Turn a float array ``(n, d)`` into a ``fixed_size_list<half>[d]`` column."""
    half = values.astype("float16")
    return pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), half.shape[1])


def half_embeddings_of(table: pa.Table, column: str) -> Any:
    """Turn an embedding column back into a float16 array ``(n, d)``, as it is stored."""
    import numpy as np

    array = table[column].combine_chunks()
    # flatten() respects slices of the parent, .values does not.
    return np.asarray(array.flatten(), np.float16).reshape(len(array), array.type.list_size)


def embeddings_of(table: pa.Table, column: str) -> Any:
    """Turn an embedding column back into a float32 array ``(n, d)``."""
    return half_embeddings_of(table, column).astype("float32")
