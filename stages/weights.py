"""Find the weights that a stage published, and give them to a loader as a checked local file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages import storage
from stages.errors import InputError, IntegrityError
from stages.manifest import File, Manifest

ROLE = "weights"


def weights_of(manifest: Manifest) -> File:
    """Return the file of weights of a finished stage.

    Raises:
        InputError: if it published none.
    """
    for files in (manifest.files, *(record.files for record in manifest.records)):
        if ROLE in files:
            return files[ROLE]
    raise InputError(f"{manifest.uri} names no {ROLE}; run {manifest.stage} again with --force")


def content_sum(path: Path) -> str:
    """Hash a local file, once as long as it stays what it is; sha256 in hex digits."""
    status = path.stat()
    return _sha256_of(str(path), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _sha256_of(path: str, modified_ns: int, num_bytes: int) -> str:
    return storage.sha256_of(Path(path))


@contextmanager
def checked_copy(root: str, file: File) -> Iterator[Path]:
    """Give a local path to a recorded file for the length of a ``with`` block; it may be too large for memory.

    Raises:
        NotFoundError: if it is gone.
        IntegrityError: if its checksum differs from its record.
    """
    uri = storage.join(root, file.path)
    with storage.local_copy(uri) as path:
        found = storage.sha256_of(path)
        if found != file.sha256:
            raise IntegrityError(
                f"{uri}: sha256 {found[:16]}... is not the recorded {file.sha256[:16]}...; it is damaged"
            )
        yield path
