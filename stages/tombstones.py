"""Tombstones: what must never be used again, by URL, by key or by the checksum of the image file.

They are kept in the store as batches that are added and never changed (``<root>/takedown/<time>-<random>.json``). The
download refuses their rows, whatever list they come with; ``stages/takedown.py`` removes what is there already.
"""

from __future__ import annotations

import datetime
import functools
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stages import storage
from stages.errors import ConfigError, IntegrityError

REASON = "takedown"
_FOLDER = "takedown"
_KEY, _SHA256 = re.compile(r"[0-9a-f]{10}\d{6}"), re.compile(r"[0-9a-f]{64}")

# Columns of the download's table that say something of the image or of what it shows.
_FORGOTTEN = ("caption", "sha256", "width", "height", "original_width", "original_height")


@dataclass(frozen=True, kw_only=True)
class Tombstones:
    """A set of things to be forgotten.

    Attributes:
        urls: as the lists have them.
        keys: of samples.
        sha256: of image files as they were served.
    """

    urls: frozenset[str] = field(default_factory=frozenset)
    keys: frozenset[str] = field(default_factory=frozenset)
    sha256: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for name, pattern, example in (
            ("keys", _KEY, "16 characters, as `unclip explain` shows it"),
            ("sha256", _SHA256, "64 hex digits"),
        ):
            wrong = next((value for value in getattr(self, name) if not pattern.fullmatch(value)), None)
            if wrong is not None:
                raise ConfigError(f"takedown: '{wrong}' is not one of {name}: {example}")

    def __bool__(self) -> bool:
        return bool(self.urls or self.keys or self.sha256)

    def __or__(self, other: Tombstones) -> Tombstones:
        return Tombstones(urls=self.urls | other.urls, keys=self.keys | other.keys, sha256=self.sha256 | other.sha256)

    def names(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row of a download's table is meant."""
        return row["key"] in self.keys or row["url"] in self.urls or row.get("sha256") in self.sha256


def add_tombstones(root: str, tombstones: Tombstones, note: str) -> str:
    """Put up a batch; return its URI.

    Args:
        root: the store.
        tombstones: what is meant.
        note: why, and on whose request.
    """
    now = datetime.datetime.now(datetime.UTC)
    uri = storage.join(root, _FOLDER, f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.json")
    batch = {name: sorted(getattr(tombstones, name)) for name in ("urls", "keys", "sha256")}
    storage.write_json(uri, {"at": now.isoformat(timespec="seconds"), "note": note, **batch})
    return uri


def read_tombstones(root: str) -> Tombstones:
    """Read all batches of a store; cheap when none was added since this process last asked.

    Raises:
        IntegrityError: if a batch is damaged: what it asks for is not known, so nothing may be downloaded.
    """
    return _read(root, tuple(storage.list_files(storage.join(root, _FOLDER))))


@functools.lru_cache(maxsize=4)
def _read(root: str, names: tuple[str, ...]) -> Tombstones:
    return _union(_batch(storage.join(root, _FOLDER, name)) for name in names)


def forget_rows(table: pa.Table, gone: Sequence[bool]) -> pa.Table:
    """Return a download's table in which some rows say no more than that they were taken down."""
    mask = pa.array(gone, pa.bool_())
    for name in table.column_names:
        field = table.schema.field(name)
        if name == "status":
            column = pc.if_else(mask, "failed", table[name])
        elif name == "reason":
            column = pc.if_else(mask, REASON, table[name])
        elif name in _FORGOTTEN:
            column = pc.if_else(mask, pa.scalar(None, field.type), table[name])
        else:
            continue
        table = table.set_column(table.column_names.index(name), field, column.cast(field.type))
    return table


def _union(batches: Iterable[Tombstones]) -> Tombstones:
    urls, keys, sha256 = set[str](), set[str](), set[str]()
    for batch in batches:
        urls |= batch.urls
        keys |= batch.keys
        sha256 |= batch.sha256
    return Tombstones(urls=frozenset(urls), keys=frozenset(keys), sha256=frozenset(sha256))


def _batch(uri: str) -> Tombstones:
    value = storage.read_json(uri)
    try:
        return Tombstones(**{name: frozenset(value[name]) for name in ("urls", "keys", "sha256")})
    except (KeyError, TypeError, ConfigError) as error:
        raise IntegrityError(f"{uri}: not a batch of tombstones ({error}); restore it from a backup") from error
