"""Files of a remote store kept on a local disk, within a limit, for all processes of a host.

Files are named by their checksum, so trainings and ranks that read the same shard share one copy. Every file is fetched
once, by whoever wants it first, checked, and moved into place whole. Locks are ``flock``: the kernel drops those of a
process that is killed, and what it had fetched by half is removed by the next one that needs room.

Layout::

    <folder>/<sha256>                      a whole file; its time of modification is when it was last opened
    <folder>/<sha256>.<bytes>.part         a file on its way; locked by the process that fetches it
    <folder>/lock                          held while room is made
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from stages import storage
from stages.errors import IntegrityError
from stages.manifest import File
from stages.units import GIB

_PART = ".part"
_LOCK_NAME = "lock"


class DiskCache:
    """The cache; any number of processes and threads may use one folder.

    Args:
        folder: local folder, made if missing.
        max_bytes: what all files in it may take. The least recently opened ones make room for new ones; files in use
            stay, so that the limit is passed only where it is too small for what is open at once.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._max_bytes = max_bytes

    @contextlib.contextmanager
    def local(self, file: File, root: str) -> Iterator[Path]:
        """Give a local path to a file for the length of a ``with`` block; nobody removes it meanwhile.

        Its checksum was compared with the record when it was fetched, and is not computed again.

        Raises:
            IntegrityError: if the store's file differs from its record.
            StorageError: if it cannot be fetched.
        """
        with contextlib.ExitStack() as stack:
            while (path := self._held(file, stack)) is None:
                self._fetch(file, root)
            yield path

    def _held(self, file: File, stack: contextlib.ExitStack) -> Path | None:
        """Take a shared lock on a cached file; None if it is not there, or not as long as it should be."""
        path = self._folder / file.sha256
        with contextlib.ExitStack() as own:
            try:
                descriptor = _opened(path, os.O_RDONLY, own)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not _is_at(descriptor, path):
                return None  # it was evicted before the lock was there
            if os.fstat(descriptor).st_size != file.num_bytes:
                path.unlink(missing_ok=True)  # somebody else's doing: files come here whole
                return None
            os.utime(descriptor)
            stack.enter_context(own.pop_all())
        return path

    def _fetch(self, file: File, root: str) -> None:
        """Bring a file into the cache, unless another process does so meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{file.sha256}.{file.num_bytes}{_PART}"
        with contextlib.ExitStack() as stack:
            descriptor = _opened(part, os.O_RDWR | os.O_CREAT, stack)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, part):
                return  # the process that had the lock has moved it into place, or given up
            try:
                if not (self._folder / file.sha256).exists():
                    self._make_room()
                    uri = storage.join(root, file.path)
                    storage.copy_to(uri, part)
                    if part.stat().st_size != file.num_bytes or storage.sha256_of(part) != file.sha256:
                        raise IntegrityError(f"{uri}: differs from its record, it is damaged; run `unclip repair`")
                    os.fsync(descriptor)
                    part.replace(self._folder / file.sha256)
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self) -> None:
        """Remove files unused for longest until the rest, and what is on its way here, fits."""
        with contextlib.ExitStack() as stack:
            fcntl.flock(_opened(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, stack), fcntl.LOCK_EX)
            whole: list[tuple[int, Path, int]] = []
            num_bytes = 0
            for path in self._folder.iterdir():
                if path.name.endswith(_PART):
                    if not _removed_if_unused(path):
                        num_bytes += int(path.name.split(".")[1])
                elif path.name != _LOCK_NAME:
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        whole.append((status.st_mtime_ns, path, status.st_size))
                        num_bytes += status.st_size
            for _, path, size in sorted(whole):
                if num_bytes <= self._max_bytes:
                    return
                if _removed_if_unused(path):
                    num_bytes -= size


def disk_cache(folder: str | None, max_gib: float) -> DiskCache | None:
    """Make the cache that the settings ask for; None without a folder."""
    return None if folder is None else DiskCache(folder, int(max_gib * GIB))


def _opened(path: Path, flags: int, stack: contextlib.ExitStack) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    stack.callback(os.close, descriptor)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _removed_if_unused(path: Path) -> bool:
    """Remove a file, unless somebody has a lock on it."""
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(_opened(path, os.O_RDONLY, stack), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True
