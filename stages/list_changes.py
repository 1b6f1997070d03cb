"""What has changed in the URL lists since the store last read them, told row by row.

Lists may grow: rows at the end and further lists make new shards, everything made before stays. Rows that changed
under a list's old name are another matter: their images, embeddings and models are about rows that no list has any
more. That is refused unless the config accepts it, with the rows in question.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import pyarrow as pa

from stages import storage
from stages.errors import NotFoundError
from stages.manifest import File
from stages.samples import table_from_bytes

_NUM_EXAMPLES = 3
_MAX_TEXT = 60


@dataclass(frozen=True, kw_only=True)
class KnownRange:
    """Rows of a list as the store has them.

    Attributes:
        list: name of the list.
        list_sha256: of the whole list when it was read.
        start: first row.
        stop: row after the last.
        rows: the stored rows.
    """

    list: str
    list_sha256: str
    start: int
    stop: int
    rows: File


@dataclass(frozen=True, kw_only=True)
class ListChange:
    """What happened to one list.

    Attributes:
        list: its name.
        num_before: rows it had; 0 for a new list.
        num_after: rows it has; 0 for one that is gone.
        num_changed: rows that were there before and are different now, or gone from a list that is still there.
        examples: some of those, in words.
    """

    list: str
    num_before: int
    num_after: int
    num_changed: int = 0
    examples: Sequence[str] = field(default_factory=tuple)

    def __str__(self) -> str:
        if not self.num_before:
            return f"{self.list}: new, {self.num_after:,} rows"
        if not self.num_after:
            return f"{self.list}: gone, {self.num_before:,} rows leave the data set"
        if not self.num_changed:
            return f"{self.list}: {self.num_after - self.num_before:,} rows added to {self.num_before:,}"
        what = f"{self.list}: {self.num_changed:,} of {self.num_before:,} rows changed"
        return "\n  ".join([what, *self.examples])


def remember_lists(root: str, settings: str, ranges: Sequence[KnownRange]) -> None:
    """Keep what was read, for the next comparison.

    Args:
        root: the store.
        settings: digest of the settings that decide how rows are read and cut.
        ranges: all of the data set, in order.
    """
    table = pa.Table.from_pylist([asdict(known) for known in ranges])
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    storage.write_bytes(_uri(root, settings), sink.getvalue())


def known_lists(root: str, settings: str) -> list[KnownRange]:
    """Return what was read last with these settings; nothing if nothing was."""
    try:
        data = storage.read_bytes(_uri(root, settings))
    except NotFoundError:
        return []
    rows = pa.ipc.open_file(io.BytesIO(data)).read_all().to_pylist()
    return [KnownRange(**{**row, "rows": File(**row["rows"])}) for row in rows]


def _uri(root: str, settings: str) -> str:
    return storage.join(root, "source", "lists", f"{settings[:16]}.arrow")


def compare_lists(
    root: str,
    known: Sequence[KnownRange],
    present: Mapping[str, str],
    *,
    count: Callable[[str], int],
    read: Callable[[str, int, int], pa.Table],
) -> list[ListChange]:
    """Compare lists with what the store knows of them.

    Args:
        root: the store.
        known: from ``known_lists``.
        present: name -> sha256 of every list there is now.
        count: returns the number of rows of a list.
        read: returns rows of a list from one to before another, as they are stored; fewer where it ends before.

    Returns:
        The lists that are not what they were, known ones first.
    """
    before: dict[str, list[KnownRange]] = {}
    for item in known:
        before.setdefault(item.list, []).append(item)
    changes = []
    for name, ranges in before.items():
        if name not in present:
            changes.append(ListChange(list=name, num_before=ranges[-1].stop, num_after=0))
        elif present[name] != ranges[0].list_sha256:
            change = _compare(root, ranges, count(name), functools.partial(read, name))
            # A list can be written anew, in another order of columns for example, and still hold the same rows.
            if change.num_changed or change.num_after != change.num_before:
                changes.append(change)
    if known:
        changes += [
            ListChange(list=name, num_before=0, num_after=count(name)) for name in present if name not in before
        ]
    return changes


def _compare(
    root: str, ranges: Sequence[KnownRange], num_after: int, read: Callable[[int, int], pa.Table]
) -> ListChange:
    num_changed, examples = 0, list[str]()
    for known in ranges:
        old = table_from_bytes(known.rows.read(root)).drop_columns(["list", "row"])
        new = read(known.start, known.stop)
        if new.equals(old):
            continue
        for position, (was, is_) in enumerate(zip_longest(old.to_pylist(), new.to_pylist())):
            if _differ(was, is_):
                num_changed += 1
                if len(examples) < _NUM_EXAMPLES:
                    examples.append(f"row {known.start + position:,}: {_difference(was, is_)}")
    if num_changed > len(examples):
        examples.append(f"and {num_changed - len(examples):,} more")
    return ListChange(
        list=ranges[0].list,
        num_before=ranges[-1].stop,
        num_after=num_after,
        num_changed=num_changed,
        examples=examples,
    )


def _difference(was: Mapping[str, Any], is_: Mapping[str, Any] | None) -> str:
    if is_ is None:
        return f"{_short(was['url'])} is gone"
    names = [name for name in was if _differ(was[name], is_.get(name))]
    return ", ".join(f"{name} {_short(was[name])} -> {_short(is_.get(name))}" for name in names)


def _differ(was: Any, is_: Any) -> bool:
    return bool(was != is_) and repr(was) != repr(is_)  # a number that is none (NaN) differs from itself


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
