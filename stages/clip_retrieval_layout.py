"""Embeddings in the folder layout of clip-retrieval, which its index builder, embedding-reader and autofaiss read.

::

    img_emb/img_emb_0.npy            float16 (n, D), one file per shard that has samples
    text_emb/text_emb_0.npy          float16 (n, D)
    metadata/metadata_0.parquet      image_path (the sample's key), caption, clip_score

Row i of the three files with the same number is the same sample. Numbers have leading zeros where there are more than
ten, so that the order of names is the order of the dataset.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.errors import ConfigError, InputError, IntegrityError
from stages.manifest import Manifest, ShardRecord
from stages.samples import embeddings_of, table_from_bytes

_SIDES = {"img": "image_embedding", "text": "text_embedding"}
_METADATA = {"key": "image_path", "caption": "caption", "clip_score": "clip_score"}


def export_embeddings(source: Manifest, folder: Path) -> int:
    """Write the embeddings of a dataset.

    The folder is written beside its place and moved there when it is whole; nothing is left behind otherwise.

    Args:
        source: manifest of curate, for the samples that it keeps; or of embed, for all that were embedded.
        folder: a new or empty folder.

    Returns:
        Samples written.

    Raises:
        ConfigError: if the folder holds something, or cannot be written.
        InputError: if there is no sample.
        IntegrityError: if a selection is about other samples than its embeddings, or a record states another number.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there already and not an empty folder; give a new one, or delete it first")
    if source.num_kept == 0:
        raise InputError(f"{source.uri}: keeps no sample; loosen the thresholds of curate")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(source, aside)
            aside.chmod(0o755)
            aside.replace(folder)  # also takes the place of an empty folder
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another place") from None
    return source.num_kept


def _write(source: Manifest, folder: Path) -> None:
    for name in (*(f"{side}_emb" for side in _SIDES), "metadata"):
        (folder / name).mkdir()
    records = [record for record in source.records if record.num_kept]
    digits = len(str(len(records) - 1))
    for index, table in enumerate(_tables(source, records)):
        number = f"{index:0{digits}d}"
        for side, column in _SIDES.items():
            values = embeddings_of(table, column).astype(np.float16)  # exact: they are stored in half precision
            np.save(folder / f"{side}_emb" / f"{side}_emb_{number}.npy", values)
        metadata = table.select(list(_METADATA)).rename_columns(list(_METADATA.values()))
        pq.write_table(metadata, folder / "metadata" / f"metadata_{number}.parquet", compression="zstd")


def _tables(source: Manifest, records: list[ShardRecord]) -> Iterator[pa.Table]:
    """Read what each shard contributes, one at a time."""
    for record in records:
        selected = source.stage == "curate"
        file = record.inputs["embeddings"] if selected else record.files["embeddings"]
        table = table_from_bytes(file.read(source.root), [*_METADATA, *_SIDES.values()])
        if selected:
            selection = table_from_bytes(record.files["selection"].read(source.root), ["key", "kept"])
            if not table["key"].equals(selection["key"]):
                raise IntegrityError(
                    f"{file.path} and {record.files['selection'].path} are not about the same samples; "
                    "run curate again with --force"
                )
            table = table.filter(selection["kept"])
        if table.num_rows != record.num_kept:
            raise IntegrityError(
                f"{file.path}: {table.num_rows} samples where the record of {source.stage} says {record.num_kept}; "
                f"run {source.stage} again with --force"
            )
        yield table
