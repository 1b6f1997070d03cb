"""Compare and swap: write an object only if nobody else has written it since it was read.

What two runs may want at the same moment (a lease, a manifest, the name of the model in production) goes through here.
A version is a text that names the content; it is got by reading or from one's own last write.

* local: an object is created with ``link``, which fails if the name is taken, and replaced under ``flock`` of the file
  that is replaced. Both work between processes, and on NFS between machines.
* S3: ``If-None-Match: *`` and ``If-Match: <ETag>``.
* S3 servers that ignore these headers are found out by a probe. There a write counts if it still stands after
  ``SETTLE_S``. That is safe as long as nobody takes longer than this between looking and writing, and no safer.

On S3 two writers of equal bytes cannot be told apart, and both may be told that they succeeded: put something of your
own into an object that only one may have. A version comes back if its content does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stages import storage
from stages.errors import NotFoundError, StorageError

logger = logging.getLogger(__name__)

SETTLE_S = 1.0
_LOCK_WAIT_S = 30.0
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK})


@dataclass(frozen=True)
class Versioned:
    """What an object holds, and the version to hand in for replacing exactly this."""

    data: bytes
    version: str


def read(uri: str) -> Versioned | None:
    """Read an object with its version; None if there is none.

    Raises:
        StorageError: if the store does not answer.
    """
    try:
        if storage.is_local(uri):
            data = storage.read_bytes(uri)
            return Versioned(data, _version_of(data))
        return Versioned(*storage.get_object(uri))
    except NotFoundError:
        return None


def create(uri: str, data: bytes, *, settle: bool = True) -> str | None:
    """Write an object that does not exist yet.

    Args:
        uri: the object.
        data: its content.
        settle: whether to wait ``SETTLE_S`` on a server that ignores conditions; False where others write only after
            a failure, and speed counts.

    Returns:
        Its version; None if it exists, with other content.

    Raises:
        StorageError: if it cannot be written, or the file system knows no hard links.
    """
    if storage.is_local(uri):
        return storage.explained("create", uri, lambda: _link(uri, data))
    if is_atomic(uri):
        return _same_or(uri, data, storage.put_object(uri, data, IfNoneMatch="*"))
    return None if read(uri) is not None else _write(uri, data, settle)


def replace(uri: str, data: bytes, version: str, *, settle: bool = True) -> str | None:
    """Write an object that still has the given version; see ``create``.

    Returns:
        Its new version; None if it has another one by now, or is gone.

    Raises:
        StorageError: if it cannot be written, or the file system knows no locks.
    """
    if storage.is_local(uri):
        return _replace_locked(uri, data, version)
    if is_atomic(uri):
        try:
            return _same_or(uri, data, storage.put_object(uri, data, IfMatch=version))
        except NotFoundError:
            return None
    found = read(uri)
    return _write(uri, data, settle) if found is not None and found.version == version else None


def update(uri: str, change: Callable[[bytes | None], bytes]) -> bytes:
    """Replace an object by a function of its content, however many others do the same; return what was written.

    Args:
        uri: the object.
        change: makes the new content of the old one (None: there is no object); called again if another was faster.
    """
    while True:
        found = read(uri)
        data = change(found.data if found else None)
        written = create(uri, data) if found is None else replace(uri, data, found.version)
        if written is not None:
            return data


def is_atomic(uri: str) -> bool:
    """Tell whether the store really refuses a write whose condition does not hold; asked once for each bucket."""
    if storage.is_local(uri):
        return True
    bucket = uri.removeprefix("s3://").partition("/")[0]
    place = (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "", bucket)
    if place not in _REFUSES:
        _REFUSES[place] = _refuses(storage.join(f"s3://{bucket}", _neighbour(uri.removeprefix(f"s3://{bucket}/"))))
        if not _REFUSES[place]:
            logger.warning(
                "s3://%s: the server ignores conditional writes; who comes first is told by waiting %g s instead",
                bucket,
                SETTLE_S,
            )
    return _REFUSES[place]


_REFUSES: dict[tuple[str, str], bool] = {}  # endpoint and bucket -> whether conditions are heeded


def _neighbour(path: str) -> str:
    """Name a temporary file in the same folder."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.{secrets.token_hex(6)}{storage.TEMPORARY_SUFFIX}"


def _refuses(uri: str) -> bool:
    """Try both conditions where they do not hold."""
    storage.put_object(uri, b"first")
    try:
        return (
            storage.put_object(uri, b"second", IfNoneMatch="*") is None
            and storage.put_object(uri, b"third", IfMatch='"00000000000000000000000000000000"') is None
        )
    except StorageError:
        return False  # an error is no refusal: the headers are not known there
    finally:
        storage.delete(uri)


def _version_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _same_or(uri: str, data: bytes, version: str | None) -> str | None:
    """Return the version; if the write was refused, see whether it is our own, whose answer was lost."""
    if version is not None:
        return version
    found = read(uri)
    return found.version if found is not None and found.data == data else None


def _write(uri: str, data: bytes, settle: bool) -> str | None:
    """Write, wait, and see whether it stands; not sooner: such a server may lose a name that two write at once."""
    storage.put_object(uri, data)
    time.sleep(SETTLE_S if settle else 0.0)
    found = read(uri)
    return found.version if found is not None and found.data == data else None


def _link(uri: str, data: bytes) -> str | None:
    """Write a temporary neighbour and give it the name, unless that is taken."""
    path = Path(uri)
    temporary = Path(_neighbour(uri))
    storage.write_bytes(str(temporary), data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        if temporary.stat().st_nlink < 2:  # else it is ours: NFS loses answers
            return None
    except OSError as error:
        raise _without_locks(uri, error) from error
    finally:
        temporary.unlink()
    _sync_folder(path.parent)
    return _version_of(data)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_locked(uri: str, data: bytes, version: str) -> str | None:
    with _locked(uri) as exists:
        if not exists or _version_of(storage.read_bytes(uri)) != version:
            return None
        storage.write_bytes(uri, data)
        return _version_of(data)


@contextlib.contextmanager
def _locked(uri: str) -> Iterator[bool]:
    """Lock the file that has the name now; give False if there is none. A dead process's lock is gone with it."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while time.monotonic() < deadline:
        try:
            descriptor = storage.explained("lock", uri, lambda: os.open(uri, os.O_RDWR))
        except NotFoundError:
            yield False
            return
        try:
            if _try_lock(uri, descriptor) and _is_current(uri, descriptor):
                yield True
                return
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked child may have it open too
            os.close(descriptor)
        time.sleep(0.01)
    raise StorageError(f"cannot lock {uri}: another process has held it for {_LOCK_WAIT_S:g} s; is it stopped?")


def _try_lock(uri: str, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _without_locks(uri, error) from error
    return True


def _is_current(uri: str, descriptor: int) -> bool:
    """Tell whether the name still means the file that was locked: it may have been replaced while we waited."""
    try:
        return os.path.samestat(Path(uri).stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _without_locks(uri: str, error: OSError) -> StorageError:
    if error.errno in _NO_LOCKS:
        return StorageError(
            f"cannot lock {uri}: its file system knows no hard links or locks ({error}); move `root` to a disk or S3"
        )
    return StorageError(f"cannot lock {uri}: {error}")
