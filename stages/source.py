"""Source: the list of image URLs and captions, cut into shards of rows.

Lists are Parquet, CSV, TSV, JSON, JSON lines or plain text files, on disk or on S3; or procedural shapes
(``stages/shapes.py``). A shard is a range of rows of one list, so that lists and rows appended later make new shards
and leave the old ones as they are.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import difflib
import gzip
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from stages import shapes, storage
from stages.base import Result, Shard, Stage, setting
from stages.errors import InputError, StorageError
from stages.list_changes import KnownRange, ListChange, compare_lists, known_lists, remember_lists
from stages.manifest import Manifest, ShardRecord, digest_of
from stages.partitions import check_date, date_of, is_within
from stages.samples import table_to_bytes
from stages.shapes import ShapesConfig

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")
MAX_ROWS_PER_SHARD = 1_000_000
# Columns that this stage and the download add.
_OWN_COLUMNS = "list row url caption key status reason sha256 width height original_width original_height"
RESERVED_COLUMNS = frozenset(_OWN_COLUMNS.split())


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the image-caption pairs come from."""

    kind: Literal["urls", "shapes"] = setting("urls", "`urls`: lists of URLs; `shapes`: procedural pictures")
    # The lists are identified by name and content (`external`), not by where they lie.
    lists: tuple[str, ...] = setting(
        (), "files or folders of URL lists, local or s3:// (parquet, csv, tsv, json, jsonl, txt)", affects="nothing"
    )
    url_column: str = setting("url", "column of the image URLs")
    caption_column: str | None = setting("caption", "column of the captions; null: none")
    extra_columns: tuple[str, ...] = setting((), "further columns to keep beside every row")
    rows_per_shard: int = setting(1000, "rows of one shard, the unit of work of all later stages")
    since: str | None = setting(
        None, "only lists whose name says this date (YYYY-MM-DD) or a later one", affects="nothing"
    )
    until: str | None = setting(
        None, "only lists whose name says this date or an earlier one, or none", affects="nothing"
    )
    changed_rows: Literal["refuse", "accept"] = setting(
        "refuse", "what to do when rows of a list that was read before are different now", affects="nothing"
    )
    shapes: ShapesConfig = setting(factory=ShapesConfig, help="the procedural pictures of `kind: shapes`")

    def __post_init__(self) -> None:
        if self.kind == "urls" and not self.lists:
            raise ValueError("lists: empty; name at least one file or folder of URLs, or set kind: shapes")
        if not 1 <= self.rows_per_shard <= MAX_ROWS_PER_SHARD:
            raise ValueError(f"rows_per_shard: {self.rows_per_shard} is not between 1 and {MAX_ROWS_PER_SHARD}")
        for name in ("since", "until"):
            if getattr(self, name) is not None:
                check_date(getattr(self, name), name)
        if self.since and self.until and self.since > self.until:
            raise ValueError(f"since: {self.since} comes after until: {self.until}; exchange them")
        taken = [name for name in self.extra_columns if name in RESERVED_COLUMNS]
        if taken:
            raise ValueError(f"extra_columns: '{taken[0]}' is a column of the pipeline's own; rename it in the list")


@dataclass(frozen=True)
class _UrlList:
    """One list: its name in the data set, where it lies, what it holds."""

    name: str
    uri: str
    sha256: str


class Source(Stage[SourceConfig]):
    """Cuts the lists into shards; see the module's docstring."""

    name: ClassVar[str] = "source"
    version: ClassVar[int] = 2

    def __init__(self, config: SourceConfig, *, root: str, seed: int = 0) -> None:
        super().__init__(config, root=root, seed=seed)
        # Absolute here, on the driver: a worker may have another working directory.
        self._places = tuple(storage.absolute(uri) for uri in config.lists)
        self._cached: tuple[_UrlList, pa.Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Travel to workers without the rows that the driver read while planning."""
        return self.__dict__ | {"_cached": None}

    def external(self) -> Any:
        """Identify the lists by name and content.

        Raises:
            InputError: if a list is missing or unreadable, or a folder holds none.
        """
        if self.config.kind == "shapes":
            return None
        return [[item.name, item.sha256] for item in self._lists()]

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Cut every list into ranges of ``rows_per_shard`` rows.

        Raises:
            InputError: if a list is missing, unreadable, empty, lacks a column, or has changed rows.
        """
        if self.config.kind == "shapes":
            ranges = _ranges(self.config.shapes.num_images, self.config.rows_per_shard)
            return [self.shard(index, start=start, stop=stop) for index, (start, stop) in enumerate(ranges)]
        shards: list[Shard] = []
        lists = self._lists()
        self._refuse_changed_rows(lists)
        for item in lists:
            for start, stop in _ranges(self._table(item).num_rows, self.config.rows_per_shard):
                # The content of the list stands for its place.
                shard = self.shard(len(shards), list=item.name, list_sha256=item.sha256, start=start, stop=stop)
                shards.append(shard)
        return shards

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Write the rows of one range as Parquet: list, row, url, caption and the extra columns.

        Raises:
            InputError: if a list has changed since the shards were planned.
        """
        started_at = time.monotonic()
        start, stop = int(shard.params["start"]), int(shard.params["stop"])
        if self.config.kind == "shapes":
            table = self._shape_rows(start, stop)
        else:
            item = self._planned_list(shard)
            rows = self._table(item).slice(start, stop - start)
            table = _with_origin(rows, item.name, start)
        files = {"urls": ("parquet", table_to_bytes(table))}
        count = table.num_rows
        # Where the rows are from, for a later comparison with changed lists.
        return self.commit(
            shard, output, files, started_at=started_at, num_in=count, num_kept=count, metrics=shard.params
        )

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Note in the manifest what the download has to serve."""
        if self.config.kind == "shapes":
            return Result(records=records, metrics={"shapes": dataclasses.asdict(self.config.shapes)})
        ranges = [KnownRange(**record.metrics, rows=record.files["urls"]) for record in records]
        others = [known for known in known_lists(self.root, self._reading()) if not self._is_meant(known.list)]
        remember_lists(self.root, self._reading(), [*others, *ranges])
        return Result(records=records, metrics={"num_lists": len({known.list for known in ranges})})

    def changes(self) -> list[ListChange]:
        """Tell what has changed in the lists since the store last read them."""
        return self._changes(self._lists()) if self.config.kind == "urls" else []

    def _changes(self, lists: Sequence[_UrlList]) -> list[ListChange]:
        by_name = {item.name: item for item in lists}
        present = {item.name: item.sha256 for item in lists}
        known = [known for known in known_lists(self.root, self._reading()) if self._is_meant(known.list)]
        return compare_lists(self.root, known, present, lambda name: self._table(by_name[name]))

    def _refuse_changed_rows(self, lists: Sequence[_UrlList]) -> None:
        if self.config.changed_rows == "accept":
            return
        if changed := [change for change in self._changes(lists) if change.num_changed]:
            raise InputError(
                "source.lists: rows that were read before have changed:\n  "
                + "\n  ".join(map(str, changed))
                + "\nadd changed rows as a new list, or set source.changed_rows: accept to replace what they made"
            )

    def _reading(self) -> str:
        """Identify how rows are read and cut."""
        return digest_of(self._work(("shard", "stage")))

    # ---- shapes -----------------------------------------------------------------------------------------------------

    def _shape_rows(self, start: int, stop: int) -> pa.Table:
        config = self.config.shapes
        rows = pa.table(
            {
                "url": pa.array([shapes.url_of(config, index) for index in range(start, stop)], pa.string()),
                "caption": pa.array([shapes.picture_of(config, i).caption for i in range(start, stop)], pa.string()),
            }
        )
        return _with_origin(rows, "shapes", start)

    # ---- lists ------------------------------------------------------------------------------------------------------

    def partitions(self) -> dict[datetime.date | None, list[str]]:
        """Return the names of the lists by their date, in order; those without one first.

        Raises:
            InputError: if a list is missing, or a folder holds none.
        """
        found: dict[datetime.date | None, list[str]] = {}
        for name in _named(self._places) if self.config.kind == "urls" else ():
            if self._is_meant(name):
                found.setdefault(date_of(name), []).append(name)
        return dict(sorted(found.items(), key=lambda item: item[0] or datetime.date.min))

    def _is_meant(self, name: str) -> bool:
        return is_within(name, self.config.since, self.config.until)

    def _lists(self) -> list[_UrlList]:
        named = {name: uri for name, uri in _named(self._places).items() if self._is_meant(name)}
        if not named:
            raise InputError(
                f"source.lists: none is of the days {self.config.since or 'ever'} to {self.config.until or 'now'}; "
                "correct source.since and source.until"
            )
        return [_UrlList(name, uri, _content_hash(uri)) for name, uri in named.items()]

    def _planned_list(self, shard: Shard) -> _UrlList:
        name, sha256 = shard.params["list"], shard.params["list_sha256"]
        if self._cached is not None and (self._cached[0].name, self._cached[0].sha256) == (name, sha256):
            return self._cached[0]
        for item in self._lists():
            if item.name == name and item.sha256 == sha256:
                return item
        raise InputError(f"source.lists: '{name}' has changed since this run was planned; run again")

    def _table(self, item: _UrlList) -> pa.Table:
        """Return the rows of a list as url, caption and extra columns; the last list stays in memory."""
        if self._cached is None or self._cached[0] != item:
            self._cached = (item, self._read(item.uri))
        return self._cached[1]

    def _read(self, uri: str) -> pa.Table:
        with _readable(uri) as path:
            try:
                table = _READERS[_format_of(uri)](path)
            except (pa.ArrowException, ValueError, OSError, EOFError) as error:
                message = " ".join(str(error).split())
                raise InputError(f"source.lists: {uri} is not a readable {_format_of(uri)} file: {message}") from error
        if not table.num_rows:
            raise InputError(f"source.lists: {uri} holds no rows; remove it from the lists")
        return self._columns_of(table, uri)

    def _columns_of(self, table: pa.Table, uri: str) -> pa.Table:
        is_text = _format_of(uri) == "txt"
        url_column = "url" if is_text else self.config.url_column
        caption_column = None if is_text else self.config.caption_column
        columns = {"url": _text(table, url_column, uri, "url_column")}
        if caption_column is None:
            columns["caption"] = pa.nulls(table.num_rows, pa.string())
        else:
            columns["caption"] = _text(table, caption_column, uri, "caption_column")
        for name in self.config.extra_columns:
            _require(table, name, uri, "extra_columns")
            columns[name] = table[name]
        return pa.table(columns).combine_chunks()


def _ranges(num_rows: int, rows_per_shard: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, rows_per_shard):
        yield start, min(start + rows_per_shard, num_rows)


def _with_origin(rows: pa.Table, name: str, start: int) -> pa.Table:
    count = rows.num_rows
    origin = {"list": pa.array([name] * count, pa.string()), "row": pa.array(range(start, start + count), pa.int64())}
    return pa.table(origin | {column: rows[column] for column in rows.column_names})


# ---- finding lists --------------------------------------------------------------------------------------------------


def _format_of(uri: str) -> str:
    """Return the format that a file's name says, one of ``FORMATS``, or an empty text."""
    extension = uri.lower().removesuffix(".gz").rpartition(".")[2]
    extension = {"ndjson": "jsonl", "pq": "parquet"}.get(extension, extension)
    return extension if extension in FORMATS else ""


def _named(places: Sequence[str]) -> dict[str, str]:
    """Name every list by its path inside the entry of ``source.lists`` that brings it.

    A name enters its shards' identities. So it depends on nothing that other lists could change, and a moved folder
    or file keeps its names.

    Raises:
        InputError: if a list is given twice, or two lists have one name.
    """
    named: dict[str, str] = {}
    given: set[str] = set()
    for place in places:
        for name, uri in _expand(place).items():
            if uri in given:
                raise InputError(f"source.lists: {uri} is given twice; remove one of the two")
            if name in named:
                raise InputError(
                    f"source.lists: {named[name]} and {uri} are both named '{name}'; give a folder that holds both, "
                    "so that they are told apart by their paths in it, or rename one"
                )
            given.add(uri)
            named[name] = uri
    return named


def _expand(place: str) -> dict[str, str]:
    """Return the lists that an entry of ``source.lists`` brings, itself or those in a folder: name -> URI."""
    if storage.exists(place):
        if not _format_of(place):
            raise InputError(f"source.lists: {place}: the name must end in {', '.join('.' + f for f in FORMATS)}")
        return {place.rpartition("/")[2]: place}
    names = storage.list_files(place)
    # Beside its tables img2dataset leaves statistics.
    statistics = {name.removesuffix(".parquet") + "_stats.json" for name in names if name.endswith(".parquet")}
    found = {name: storage.join(place, name) for name in names if _format_of(name) and name not in statistics}
    if not found:
        raise InputError(
            f"source.lists: {place} is neither a file nor a folder with {', '.join('.' + f for f in FORMATS)} files; "
            "correct the path"
        )
    return found


_HASHES: dict[tuple[str, int, int], str] = {}


def _content_hash(uri: str) -> str:
    """Hash a list; a local file that has not changed is not read again by this process."""
    with _readable(uri) as path:
        if not storage.is_local(uri):
            return storage.sha256_of(path)
        status = path.stat()
        key = (uri, status.st_size, status.st_mtime_ns)
        if key not in _HASHES:
            _HASHES[key] = storage.sha256_of(path)
        return _HASHES[key]


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[Path]:
    try:
        with storage.local_copy(uri) as path:
            yield path
    except (StorageError, PermissionError) as error:
        raise InputError(f"source.lists: {error}") from error


# ---- reading lists --------------------------------------------------------------------------------------------------


def _bytes_of(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.name.lower().endswith(".gz") else data


def _read_parquet(path: Path) -> pa.Table:
    return pq.read_table(path, memory_map=False)


def _read_delimited(path: Path, delimiter: str) -> pa.Table:
    data = _bytes_of(path)
    # Everything is read as text: a caption such as 1999 stays the caption it is.
    header = next(csv.reader(io.StringIO(data.split(b"\n", 1)[0].decode("utf-8-sig")), delimiter=delimiter), [])
    return pa_csv.read_csv(
        io.BytesIO(data),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )


def _read_json(path: Path) -> pa.Table:
    rows = json.loads(_bytes_of(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold a list of objects, one per row")
    return _table_of(rows)


def _read_json_lines(path: Path) -> pa.Table:
    rows = []
    for number, line in enumerate(_bytes_of(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: not an object")
        rows.append(row)
    return _table_of(rows)


def _table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _read_text(path: Path) -> pa.Table:
    """Read one URL a line; an empty line is a row without URL, which the download counts as such."""
    lines = [line.strip() for line in _bytes_of(path).decode().rstrip().splitlines()]
    return pa.table({"url": pa.array(lines, pa.string())})


_READERS: dict[str, Callable[[Path], pa.Table]] = {
    "parquet": _read_parquet,
    "csv": lambda path: _read_delimited(path, ","),
    "tsv": lambda path: _read_delimited(path, "\t"),
    "json": _read_json,
    "jsonl": _read_json_lines,
    "txt": _read_text,
}


def _require(table: pa.Table, name: str, uri: str, field: str) -> None:
    if name in table.column_names:
        return
    by_lower = {column.lower(): column for column in table.column_names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f"; did you mean '{by_lower[close[0]]}'?" if close else ""
    raise InputError(
        f"source.{field}: '{name}' is not a column of {uri}, which has {', '.join(table.column_names)}{hint}"
    )


def _text(table: pa.Table, name: str, uri: str, field: str) -> pa.ChunkedArray:
    _require(table, name, uri, field)
    try:
        return table[name].cast(pa.string())
    except pa.ArrowException as error:
        raise InputError(
            f"source.{field}: column '{name}' of {uri} holds {table[name].type}, not text; name another column"
        ) from error
