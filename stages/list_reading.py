"""Reading URL lists in bounded memory: how many rows a list has, and ranges of them.

What a row says depends on the whole list, not on the part that was read: the types of JSON lines are those that all
lines have in common. So a range holds the same rows wherever a reader comes from.

* Parquet: the footer tells the rows; a range costs the row groups that hold it.
* CSV, TSV, JSON lines, plain text: streamed, compressed or not. A reader goes on where it stands, and begins anew for
  earlier rows.
* JSON is one document, and a dictionary of Parquet belongs to all rows of a column: both are read whole.
"""

from __future__ import annotations

import bisect
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

FORMATS = ("parquet", "csv", "tsv", "json", "jsonl", "txt")
# What a file that is not of its format makes the readers raise.
UNREADABLE = (pa.ArrowException, ValueError, OSError, EOFError, OverflowError, csv.Error, zlib.error)
_ROWS_PER_BATCH = 10_000
_BUFFER_BYTES = 1 << 20
_DELIMITERS = {"csv": ",", "tsv": "\t"}

Batches = Iterator[pa.Table]


@dataclass(frozen=True)
class Contents:
    """What a list holds.

    Attributes:
        num_rows: its rows.
        schema: its columns, with the types that all rows have in common.
    """

    num_rows: int
    schema: pa.Schema


def format_of(name: str) -> str:
    """Return the format that a file's name says, one of ``FORMATS``, or an empty text."""
    extension = name.lower().removesuffix(".gz").rpartition(".")[2]
    extension = {"ndjson": "jsonl", "pq": "parquet"}.get(extension, extension)
    return extension if extension in FORMATS else ""


def contents_of(path: Path) -> Contents:
    """Count the rows of a list and find out their types.

    Raises:
        Exception: one of ``UNREADABLE`` if the file is not of the format that its name says.
    """
    kind = format_of(path.name)
    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            return Contents(file.metadata.num_rows, file.schema_arrow)
    if kind == "json":
        table = _read_json(path)
        return Contents(table.num_rows, table.schema)
    if kind == "jsonl":
        return _json_lines_contents(path)
    if kind == "txt":
        return Contents(sum(batch.num_rows for batch in _text_batches(path)), pa.schema([("url", pa.string())]))
    with _delimited(path, _DELIMITERS[kind]) as reader:
        return Contents(sum(batch.num_rows for batch in _checked(reader, _DELIMITERS[kind])), reader.schema)


class RowReader:
    """Reads ranges of rows of one list; cheapest in their order, since it keeps what lies around the last range.

    Args:
        path: the list; must stay as it is.
        contents: from ``contents_of``.
        columns: names of those that are wanted.
        convert: turns every part into the table that is asked for, row by row.
    """

    def __init__(
        self, path: Path, contents: Contents, columns: Sequence[str], convert: Callable[[pa.Table], pa.Table]
    ) -> None:
        self.num_rows = contents.num_rows
        self._path = path
        self._contents = contents
        self._columns = list(dict.fromkeys(columns))
        self._convert = convert
        self._group_starts = self._find_group_starts()
        self._parts: list[pa.Table] = []
        self._first = 0  # row at which the parts begin
        self._next = 0  # row that the batches give next
        self._batches: Batches | None = None

    def close(self) -> None:
        """Let go of the file."""
        if self._batches is not None:
            cast(Any, self._batches).close()
        self._batches, self._parts = None, []

    def slice(self, start: int, length: int) -> pa.Table:
        """Return rows ``start`` to ``start + length``; fewer where the list ends before.

        Raises:
            Exception: one of ``UNREADABLE``.
        """
        stop = min(start + length, self.num_rows)
        opening = self._group_starts[bisect.bisect_right(self._group_starts, start) - 1]
        if self._batches is None or start < self._first or opening > self._next:
            self.close()
            self._first = self._next = opening
            self._batches = self._open(opening)
        while self._parts and self._first + self._parts[0].num_rows <= start:
            self._first += self._parts.pop(0).num_rows
        while self._next < stop:
            part = next(self._batches, None)
            if part is None:
                raise ValueError(
                    f"it ends at row {self._next:,}, before row {stop:,}; it was changed while it was read"
                )
            self._next += part.num_rows
            if self._next <= start:
                self._first = self._next
            else:
                self._parts.append(self._convert(part))
        if not self._parts:
            return self._convert(self._contents.schema.empty_table())
        rows = pa.concat_tables(self._parts).slice(start - self._first, max(0, stop - start))
        return rows.combine_chunks()

    def _is_whole(self) -> bool:
        kind = format_of(self._path.name)
        types = [self._contents.schema.field(name).type for name in self._columns if kind == "parquet"]
        return kind == "json" or any(map(pa.types.is_dictionary, types))

    def _find_group_starts(self) -> list[int]:
        """Return the rows at which reading can begin."""
        if format_of(self._path.name) != "parquet" or self._is_whole():
            return [0]
        with pq.ParquetFile(self._path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return [0, *itertools.accumulate(sizes[:-1])]

    def _open(self, start: int) -> Batches:
        kind = format_of(self._path.name)
        if kind == "json":
            return (table for table in [_read_json(self._path)])
        if kind == "jsonl":
            return _json_lines_batches(self._path, self._contents.schema)
        if kind == "txt":
            return _text_batches(self._path)
        if kind == "parquet":
            if self._is_whole():
                return (table for table in [pq.read_table(self._path, columns=self._columns, memory_map=False)])
            return _parquet_batches(self._path, self._columns, self._group_starts.index(start))
        return _delimited_batches(self._path, _DELIMITERS[kind])


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")


# ---- formats --------------------------------------------------------------------------------------------------------


def _parquet_batches(path: Path, columns: Sequence[str], first_group: int) -> Batches:
    # Buffered: a column of a row group is not held as a whole.
    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
        groups = range(first_group, file.num_row_groups)
        for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=list(groups), columns=list(columns)):
            yield pa.Table.from_batches([batch])


@contextmanager
def _delimited(path: Path, delimiter: str) -> Iterator[pa_csv.CSVStreamingReader]:
    with _opened(path) as file:
        line = file.readline().removesuffix(b"\n")
    # Everything is read as text: a caption such as 1999 stays the caption it is.
    header = next(csv.reader(io.StringIO(line.decode("utf-8-sig")), delimiter=delimiter), [])
    parsing = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    types = pa_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()))
    with (
        _opened(path) as file,
        closing(pa_csv.open_csv(file, parse_options=parsing, convert_options=types)) as reader,
    ):
        yield reader


def _delimited_batches(path: Path, delimiter: str) -> Batches:
    with _delimited(path, delimiter) as reader:
        for batch in _checked(reader, delimiter):
            yield pa.Table.from_batches([batch])


def _checked(reader: pa_csv.CSVStreamingReader, delimiter: str) -> Iterator[pa.RecordBatch]:
    """Refuse values that hold further rows: a quote that is never closed swallows them unseen."""
    num_rows = 0
    # A line with a URL and, if rows have several values, what stands between these.
    row = f"(?:://[^\\n]*{delimiter}|{delimiter}[^\\n]*://)" if len(reader.schema) > 1 else "://"
    for batch in reader:
        for column in batch.columns:
            if not pa.types.is_string(column.type) or not pc.any(pc.match_substring(column, "\n")).as_py():
                continue
            swallows = pc.fill_null(pc.match_substring_regex(column, rf"\n[^\n]*{row}"), False)
            if (position := pc.index(swallows, True).as_py()) >= 0:
                raise ValueError(
                    f"row {num_rows + position:,} holds what looks like further rows: "
                    f"{column[position].as_py()[:80]!r}; a quote at the beginning of a value is probably not closed. "
                    "Double quotes within quoted values, or write the list as jsonl or parquet"
                )
        num_rows += batch.num_rows
        yield batch


def _read_json(path: Path) -> pa.Table:
    with _opened(path) as file:
        rows = json.loads(file.read())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must hold a list of objects, one per row")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        # A file iterates by \n alone; a carriage return ends a line, too.
        lines = (line for part in file for line in part.splitlines())
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: not an object")
            yield row


def _json_lines_contents(path: Path) -> Contents:
    types: dict[str, pa.DataType] = {}
    num_rows = 0
    for rows in _batched(_json_lines(path)):
        num_rows += len(rows)
        for name in dict.fromkeys(name for row in rows for name in row):
            found = pa.array([row.get(name) for row in rows]).type
            types[name] = _common_type(types[name], found) if name in types else found
    return Contents(num_rows, pa.schema(list(types.items())))


def _json_lines_batches(path: Path, schema: pa.Schema) -> Batches:
    for rows in _batched(_json_lines(path)):
        yield pa.table(
            {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in schema}, schema=schema
        )


def _common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """Return the type that Arrow gives to values of both together; asked of Arrow itself, by an example of each."""
    return first if first == second else pa.array([_example_of(first), _example_of(second)]).type


def _example_of(kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return {field.name: _example_of(field.type) for field in kind}
    if pa.types.is_list(kind):
        return [_example_of(kind.value_type)]
    return None if pa.types.is_null(kind) else pa.scalar(1).cast(kind).as_py()


def _text_batches(path: Path) -> Batches:
    """Read one URL a line; an empty line is a row without URL, which the download counts as such."""
    for lines in _batched(_text_lines(path)):
        yield pa.table({"url": pa.array(lines, pa.string())})


def _text_lines(path: Path) -> Iterator[str]:
    num_empty = 0  # empty lines at the end are no rows
    with _opened(path) as file:
        for line in (line.strip() for part in file for line in part.decode("utf-8-sig").splitlines()):
            if not line:
                num_empty += 1
                continue
            yield from itertools.repeat("", num_empty)
            num_empty = 0
            yield line


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while part := list(itertools.islice(iterator, _ROWS_PER_BATCH)):
        yield part
