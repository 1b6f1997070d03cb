"""Source: the list of image URLs and captions, cut into shards of rows.

Lists are Parquet, CSV, TSV, JSON, JSON lines or plain text files, on disk or on S3; or procedural shapes
(``stages/shapes.py``). A shard is a range of rows of one list, so that lists and rows appended later make new shards
and leave the old ones as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

from stages import shapes, storage
from stages.base import Result, Shard, Stage, setting
from stages.errors import InputError, StorageError
from stages.list_changes import KnownRange, ListChange, compare_lists, known_lists, remember_lists
from stages.list_reading import FORMATS, UNREADABLE, Contents, RowReader, contents_of, format_of
from stages.manifest import Manifest, ShardRecord, digest_of
from stages.partitions import check_date, date_of, is_within
from stages.samples import table_to_bytes
from stages.shapes import ShapesConfig

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


@dataclass
class _Seen:
    """What this process knows of the content of a list: its hash, and what it holds once that was asked."""

    sha256: str
    contents: Contents | None = None


@dataclass(frozen=True)
class _UrlList:
    """One list: its name in the data set, where it lies, what it holds."""

    name: str
    uri: str
    seen: _Seen

    @property
    def sha256(self) -> str:
        return self.seen.sha256


class _OpenList:
    """The list whose rows are read: on S3 a copy of this process, and checked to be the one that was planned.

    Raises:
        InputError: if it is another one by now, or not of its format.
    """

    def __init__(self, item: _UrlList) -> None:
        self.item = item
        self.reader: RowReader | None = None
        self._scratch = contextlib.ExitStack()
        # Nobody tells a worker that its work is over: the copy goes with this object, at the latest.
        self.close = weakref.finalize(self, self._scratch.close)
        self.path = self._scratch.enter_context(_readable(item.uri))
        if not storage.is_local(item.uri):
            _refuse_other(item, storage.sha256_of(self.path))
        self.check()
        if item.seen.contents is None:
            with _explained(item.uri):
                item.seen.contents = contents_of(self.path)
        self.contents = item.seen.contents

    def check(self) -> None:
        """Make sure that a list that is not a copy is still the same; costs no reading unless it was written anew."""
        if storage.is_local(self.item.uri):
            _refuse_other(self.item, _look_at(self.item.uri).sha256)


class Source(Stage[SourceConfig]):
    """Cuts the lists into shards; see the module's docstring."""

    name: ClassVar[str] = "source"
    version: ClassVar[int] = 2

    def __init__(self, config: SourceConfig, *, root: str, seed: int = 0) -> None:
        super().__init__(config, root=root, seed=seed)
        # Absolute here, on the driver: a worker may have another working directory.
        self._places = tuple(storage.absolute(uri) for uri in config.lists)
        # What the driver found out while planning travels to the workers, which need not find it out again.
        self._planned: dict[str, _UrlList] = {}
        self._open: _OpenList | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Travel to workers without the list that is being read."""
        return self.__dict__ | {"_open": None}

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
            for start, stop in _ranges(self._num_rows(item), self.config.rows_per_shard):
                # The content of the list stands for its place.
                shard = self.shard(len(shards), list=item.name, list_sha256=item.sha256, start=start, stop=stop)
                shards.append(shard)
        self._close()
        self._planned = {item.name: item for item in lists}
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
            table = _with_origin(self._rows(item, start, stop), item.name, start)
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
        return compare_lists(
            self.root,
            known,
            present,
            count=lambda name: self._num_rows(by_name[name]),
            read=lambda name, start, stop: self._rows(by_name[name], start, stop),
        )

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
        return [_UrlList(name, uri, _look_at(uri)) for name, uri in named.items()]

    def _planned_list(self, shard: Shard) -> _UrlList:
        """Find the list of a shard: no other list is looked at."""
        name, sha256 = str(shard.params["list"]), str(shard.params["list_sha256"])
        if name in self._planned and self._planned[name].sha256 == sha256:
            return self._planned[name]
        if name not in (named := _named(self._places)):
            raise InputError(f"source.lists: '{name}' is gone since this run was planned; run again")
        self._planned[name] = _UrlList(name, named[name], _Seen(sha256))
        return self._planned[name]

    def _num_rows(self, item: _UrlList) -> int:
        """Count the rows of a list and make sure that it has the columns; this process counts a list once."""
        contents = item.seen.contents or self._opened(item).contents
        if not contents.num_rows:
            raise InputError(f"source.lists: {item.uri} holds no rows; remove it from the lists")
        self._columns_of(contents.schema.empty_table(), item.uri)
        return contents.num_rows

    def _rows(self, item: _UrlList, start: int, stop: int) -> pa.Table:
        """Return rows of a list as url, caption and extra columns; fewer where the list ends before."""
        try:
            opened = self._opened(item)
            with _explained(item.uri):
                return self._reader(opened).slice(start, stop - start)
        except BaseException:
            self._close()
            raise

    def _opened(self, item: _UrlList) -> _OpenList:
        """Return the list, opened; the last one stays open, so that its shards verify and copy it once."""
        if self._open is None or (self._open.item.uri, self._open.item.sha256) != (item.uri, item.sha256):
            self._close()
            self._open = _OpenList(item)
        self._open.check()
        return self._open

    def _reader(self, opened: _OpenList) -> RowReader:
        if opened.reader is None:
            schema, uri = opened.contents.schema, opened.item.uri
            wanted = {column for column, _ in self._wanted(uri).values()}
            columns = [name for name in schema.names if name in wanted]
            opened.reader = RowReader(opened.path, opened.contents, columns, lambda part: self._columns_of(part, uri))
        return opened.reader

    def _close(self) -> None:
        if self._open is not None:
            if self._open.reader is not None:
                self._open.reader.close()
            self._open.close()
        self._open = None

    def _columns_of(self, table: pa.Table, uri: str) -> pa.Table:
        columns: dict[str, Any] = {"caption": pa.nulls(table.num_rows, pa.string())}
        for name, (column, field) in self._wanted(uri).items():
            _require(table, column, uri, field)
            columns[name] = table[column] if field == "extra_columns" else _text(table, column, uri, field)
        return pa.table({name: columns[name] for name in ("url", "caption", *self.config.extra_columns)})

    def _wanted(self, uri: str) -> dict[str, tuple[str, str]]:
        """Return the columns that are read: name -> its name in the list, and the setting that says so."""
        if format_of(uri) == "txt":
            wanted = {"url": ("url", "url_column")}
        else:
            wanted = {"url": (self.config.url_column, "url_column")}
            if self.config.caption_column is not None:
                wanted["caption"] = (self.config.caption_column, "caption_column")
        return wanted | {name: (name, "extra_columns") for name in self.config.extra_columns}


def _ranges(num_rows: int, rows_per_shard: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, rows_per_shard):
        yield start, min(start + rows_per_shard, num_rows)


def _with_origin(rows: pa.Table, name: str, start: int) -> pa.Table:
    count = rows.num_rows
    origin = {"list": pa.array([name] * count, pa.string()), "row": pa.array(range(start, start + count), pa.int64())}
    return pa.table(origin | {column: rows[column] for column in rows.column_names})


# ---- finding lists --------------------------------------------------------------------------------------------------


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
        if not format_of(place):
            raise InputError(f"source.lists: {place}: the name must end in {', '.join('.' + f for f in FORMATS)}")
        return {place.rpartition("/")[2]: place}
    names = storage.list_files(place)
    # Beside its tables img2dataset leaves statistics.
    statistics = {name.removesuffix(".parquet") + "_stats.json" for name in names if name.endswith(".parquet")}
    found = {name: storage.join(place, name) for name in names if format_of(name) and name not in statistics}
    if not found:
        raise InputError(
            f"source.lists: {place} is neither a file nor a folder with {', '.join('.' + f for f in FORMATS)} files; "
            "correct the path"
        )
    return found


_SEEN: dict[tuple[str, str], _Seen] = {}


def _look_at(uri: str) -> _Seen:
    """Hash a list; one that has not changed since this process read it is not read again."""
    try:
        entry = storage.entry_of(uri)
    except StorageError as error:
        raise InputError(f"source.lists: {error}") from error
    key = (uri, entry.version)
    if key in _SEEN:
        return _SEEN[key]
    with _readable(uri) as path:
        seen = _Seen(storage.sha256_of(path))
        if format_of(uri) == "parquet" and not storage.is_local(uri):
            # The footer costs nothing while the copy is here. A file that has none is refused when its rows are asked.
            with contextlib.suppress(*UNREADABLE):
                seen.contents = contents_of(path)
    # Times on S3 are too coarse to tell two versions of one size.
    if storage.is_local(uri) or entry.etag:
        _SEEN[key] = seen
    return seen


def _refuse_other(item: _UrlList, sha256: str) -> None:
    if sha256 != item.sha256:
        raise InputError(f"source.lists: '{item.name}' has changed since this run was planned; run again")


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        message = " ".join(str(error).split())
        raise InputError(f"source.lists: {uri} is not a readable {format_of(uri)} file: {message}") from error


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[Path]:
    try:
        with storage.local_copy(uri) as path:
            yield path
    except (StorageError, PermissionError) as error:
        raise InputError(f"source.lists: {error}") from error


# ---- columns of lists -----------------------------------------------------------------------------------------------


def _require(table: pa.Table, name: str, uri: str, field: str) -> None:
    count = table.column_names.count(name)
    if count > 1:
        raise InputError(f"source.{field}: {uri} has {count} columns named '{name}'; rename all but one")
    if count:
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
