"""Adoption: an existing output of img2dataset becomes a finished download, without its images being fetched again.

Its Parquet tables are the lists of the source, so every row is accounted for. Nothing it says is taken on trust: an
image must be in the tar, decode, have the size and the caption that the table says. Rows that it counts as successes
without such an image are ``lost``; ``unclip run --retry-failed`` downloads them.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from stages import storage
from stages.base import Shard
from stages.download import Download, DownloadConfig
from stages.errors import ConfigError, InputError, NotFoundError, ShardError
from stages.img2dataset_unit import FACTS, UnitRow
from stages.samples import Sample, read_tar, table_from_bytes
from stages.source import SourceConfig

# img2dataset's error messages are those of Python's urllib.
_REASONS: Sequence[tuple[str, str]] = (
    (r"HTTP Error (\d{3})", r"http_\1"),
    (r"Name or service not known|name resolution|getaddrinfo|nodename nor servname", "dns"),
    (r"timed out", "timeout"),
    (r"X-Robots-Tag", "opt_out"),
    (r"unknown url type", "scheme"),
    (r"no host given|InvalidURL|URL can't contain", "invalid_url"),
    (r"CERTIFICATE|SSL", "tls"),
    (r"IncompleteRead", "truncated"),
    (r"hash mismatch", "hash_mismatch"),
    (r"Image decoding error", "decode"),
    (r"image area too large", "too_many_pixels"),
)


class Adoption(Download):
    """A download whose rows come from an existing output where they can; other lists are downloaded as ever.

    Args:
        config: of the download; ``image_format`` must be the one of the output.
        root: the store.
        folder: local or s3 folder with ``00000.tar``, ``00000.parquet``, ...
    """

    def __init__(self, config: DownloadConfig, *, root: str, folder: str) -> None:
        super().__init__(config, root=root)
        self._folder = storage.absolute(folder)
        self._names = frozenset(storage.list_files(self._folder))

    def rows_of(self, shard: Shard, urls: pa.Table) -> tuple[list[UnitRow], dict[str, float]]:
        """Look up the rows of a shard; all of them are of one list.

        Raises:
            InputError: if the table is not img2dataset's.
            ShardError: if the tar cannot be read.
        """
        name = urls["list"][0].as_py()  # the path in its folder; no other list of the source has the same
        if name not in self._names:
            return super().rows_of(shard, urls)
        table = self._table(name).take(urls["row"].combine_chunks()).to_pylist()
        wanted = zip(table, urls["url"].to_pylist(), urls["caption"].to_pylist(), strict=True)
        samples = self._samples(name)
        rows = [self._row(row, samples.get(row["key"]), url, caption) for row, url, caption in wanted]
        return rows, {"adopted": sum(row.reason is None for row in rows)}

    def refuse_outage(self, dropped: Mapping[str, int], num_rows: int, metrics: Mapping[str, float]) -> None:
        """Refuse nothing: trying again finds the same; what is missing can be downloaded afterwards."""

    def _table(self, name: str) -> pa.Table:
        table = table_from_bytes(storage.read_bytes(storage.join(self._folder, name)))
        if missing := {"key", "status", "error_message"} - set(table.column_names):
            raise InputError(
                f"adopt: {storage.join(self._folder, name)} has no column {', '.join(sorted(missing))}; it is no table "
                "of img2dataset"
            )
        return table

    def _samples(self, name: str) -> dict[str, Sample]:
        """Read the samples of the tar beside a table, as far as it goes: a killed run leaves it short."""
        uri = storage.join(self._folder, name.removesuffix(".parquet") + ".tar")
        found: dict[str, Sample] = {}
        try:
            for sample in read_tar(storage.read_bytes(uri)):
                found[sample.key] = sample
        except NotFoundError:
            return {}
        except ShardError:
            return found
        return found

    def _row(self, row: Mapping[str, Any], sample: Sample | None, url: str | None, caption: str | None) -> UnitRow:
        if row["status"] != "success":
            return UnitRow(_reason_of(row), None, {})
        if url is None or sample is None or sample.caption != (caption or ""):
            return UnitRow("lost", None, {})
        if sample.extension != self.config.image_format:
            raise ConfigError(
                f"adopt: {self._folder} holds {sample.extension} images, download.image_format is "
                f"{self.config.image_format}; set it to {sample.extension}"
            )
        try:
            with Image.open(io.BytesIO(sample.image)) as image:
                image.load()
                size = image.size
        except MemoryError:
            raise
        except Exception:  # of what is wrong with a file, Pillow tells in exceptions of any class
            return UnitRow("lost", None, {})
        facts = {name: row.get(name) for name in FACTS}
        if any(
            said is not None and said != found
            for said, found in zip((facts["width"], facts["height"]), size, strict=True)
        ):
            return UnitRow("lost", None, {})
        for name, found in zip(("width", "height"), size, strict=True):
            facts[name] = found
            facts[f"original_{name}"] = facts[f"original_{name}"] or found
        facts["sha256"] = facts["sha256"] or hashlib.sha256(sample.image).hexdigest()
        return UnitRow(None, sample.image, facts)


def _reason_of(row: Mapping[str, Any]) -> str:
    """Translate img2dataset's error message to a reason code."""
    message = row["error_message"] or ""
    for pattern, code in _REASONS:
        if found := re.search(pattern, message):
            return found.expand(code)
    return "connect" if row["status"] == "failed_to_download" else "resize"


def check_adoptable(folder: str, source: SourceConfig) -> int:
    """Check that a config reads an output of img2dataset as its lists; return the number of its tables.

    Raises:
        InputError: if the folder holds no such output, or an unfinished one.
        ConfigError: if the config does not name the folder.
    """
    names = sorted(storage.list_files(folder))
    tables = [name for name in names if name.endswith(".parquet") and "/" not in name]
    if not tables:
        raise InputError(f"adopt: {folder} holds no .parquet tables of img2dataset's webdataset output")
    stems = {name.removesuffix(".parquet") for name in tables}
    unfinished = [name for name in names if name.endswith(".tar") and name.removesuffix(".tar") not in stems]
    if unfinished:
        raise InputError(
            f"adopt: {storage.join(folder, unfinished[0])} has no table beside it: that shard was never finished, its "
            f"rows are unknown ({len(unfinished)} such); run img2dataset again on the folder, or move these tars away"
        )
    if storage.absolute(folder) not in map(storage.absolute, source.lists):
        raise ConfigError(
            f"adopt: source.lists does not name {folder}; its tables are the lists of what it holds: write "
            f"source: {{lists: [{folder}], url_column: url, caption_column: caption}}"
        )
    return len(tables)
