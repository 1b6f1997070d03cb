"""The store: whole objects named by URI, on a local disk or on S3, written atomically.

A reader sees an object complete or not at all:

* local: temporary file in the same folder, fsync, ``os.replace``, fsync of the folder;
* S3: one PUT, or a multipart upload that the server completes atomically. Objects are never streamed through
  ``fs.open(..., "wb")``, which publishes a truncated object when the writing block raises.

The S3 endpoint and credentials come from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...), never
from the config.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from stages.errors import NotFoundError, StorageError

_CHUNK_BYTES = 1 << 20
_TEMPORARY_SUFFIX = ".tmp"
SCHEMES = ("s3",)


@dataclass(frozen=True)
class Written:
    """What was published: the checksum and the size of the bytes handed in, re-checked against the store."""

    sha256: str
    num_bytes: int


def is_local(uri: str) -> bool:
    """Tell whether ``uri`` is a path on this machine.

    Raises:
        StorageError: if the scheme is neither a path nor one of ``SCHEMES``.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return True
    if scheme not in SCHEMES:
        raise StorageError(f"{uri}: no storage for scheme '{scheme}'; use a local path or {', '.join(SCHEMES)}://")
    return False


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI with single slashes between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(uri: str) -> bool:
    """Tell whether an object (not a folder) of that name exists.

    Raises:
        StorageError: if the store does not answer; that is not the same as "no".
    """
    try:
        with _explained("look up", uri):
            # fsspec's `isfile` takes every failure for a "no".
            return Path(uri).is_file() if is_local(uri) else bool(_remote().info(uri)["type"] == "file")
    except NotFoundError:
        return False


def list_files(uri: str) -> dict[str, int]:
    """List all objects below a folder in one sweep.

    Returns:
        Path relative to ``uri`` -> size in bytes; empty when the folder does not exist. Half-written temporary files
        are left out.
    """
    with _explained("list", uri):
        if is_local(uri):
            top = Path(uri)
            found = {str(path.relative_to(top)): path.stat().st_size for path in top.rglob("*") if path.is_file()}
            return {name: size for name, size in sorted(found.items()) if not name.endswith(_TEMPORARY_SUFFIX)}
        prefix = uri.removeprefix("s3://").rstrip("/") + "/"
        entries: dict[str, Any] = _remote().find(uri, detail=True)
        return {name.removeprefix(prefix): int(info["size"]) for name, info in sorted(entries.items())}


def read_bytes(uri: str, *, expected_bytes: int | None = None) -> bytes:
    """Read a whole object.

    Args:
        uri: the object.
        expected_bytes: its recorded size; a shorter or longer answer is an error, so a truncated read is never parsed.

    Raises:
        NotFoundError: if there is no such object.
        StorageError: if it cannot be read, or its length is not ``expected_bytes``.
    """
    with _explained("read", uri):
        data = Path(uri).read_bytes() if is_local(uri) else bytes(_remote().cat_file(uri))
    if expected_bytes is not None and len(data) != expected_bytes:
        raise StorageError(
            f"{uri}: read {len(data)} bytes where the record says {expected_bytes}; the object is damaged"
        )
    return data


def read_json(uri: str) -> Any:
    """Read a JSON object.

    Raises:
        StorageError: if it is missing, unreadable or not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: not valid JSON ({error}); delete it and run again") from error


def write_bytes(uri: str, data: bytes) -> Written:
    """Publish ``data`` under ``uri`` atomically and check the published size.

    Raises:
        StorageError: if it cannot be written (no space, no permission, no connection); nothing is published then.
    """
    with _explained("write", uri):
        if is_local(uri):
            with _replacing(Path(uri)) as temporary:
                temporary.write_bytes(data)
        else:
            _remote().pipe_file(uri, data)
    return _checked(uri, Written(sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data)))


def write_json(uri: str, value: Any) -> Written:
    """Publish ``value`` as readable JSON, atomically."""
    return write_bytes(uri, (json.dumps(value, indent=1, sort_keys=True, allow_nan=True) + "\n").encode())


def upload(path: Path, uri: str) -> Written:
    """Publish a local file under ``uri`` atomically and check the published size."""
    written = Written(sha256=sha256_of(path), num_bytes=path.stat().st_size)
    with _explained("write", uri):
        if is_local(uri):
            with _replacing(Path(uri)) as temporary:
                shutil.copyfile(path, temporary)
        else:
            _remote().put_file(str(path), uri)
    return _checked(uri, written)


def delete(uri: str) -> None:
    """Delete one object; a missing one is no error."""
    with contextlib.suppress(NotFoundError), _explained("delete", uri):
        Path(uri).unlink(missing_ok=True) if is_local(uri) else _remote().rm_file(uri)


def delete_tree(uri: str) -> None:
    """Delete everything below a folder; a missing folder is no error."""
    with contextlib.suppress(NotFoundError), _explained("delete", uri):
        if is_local(uri):
            if Path(uri).exists():
                shutil.rmtree(uri)
        elif _remote().find(uri):
            _remote().rm(uri, recursive=True)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Give a local path to the object for the length of a ``with`` block; remote objects are copied to scratch."""
    if is_local(uri):
        if not Path(uri).is_file():
            raise NotFoundError(f"{uri}: no such file")
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="unclip-") as folder:
        path = Path(folder) / uri.rsplit("/", 1)[-1]
        with _explained("read", uri):
            _remote().get_file(uri, str(path))
        yield path


def check_writable(root: str) -> None:
    """Write, read back and delete a small object below ``root``.

    Raises:
        StorageError: says what is wrong with the store and what to do.
    """
    uri = join(root, f".probe-{secrets.token_hex(8)}")
    write_bytes(uri, b"probe")
    try:
        read_bytes(uri, expected_bytes=5)
    finally:
        delete(uri)


def sha256_of(path: Path) -> str:
    """Hash a local file without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=4)
def _remote_of(process_id: int, environment: tuple[str | None, ...]) -> Any:
    return fsspec.filesystem(
        "s3",
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            # S3-compatible servers other than AWS reject or omit the newer integrity headers.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "retries": {"max_attempts": 3, "mode": "standard"},
            "connect_timeout": 10,
        },
    )


def _remote() -> Any:
    # A file system carries an event loop thread, which does not survive a fork, and reads the environment once.
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
    return _remote_of(os.getpid(), tuple(os.environ.get(name) for name in names))


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{_TEMPORARY_SUFFIX}")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary neighbour of ``path``; make it durable and move it into place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(uri: str, written: Written) -> Written:
    with _explained("check", uri):
        size = Path(uri).stat().st_size if is_local(uri) else int(_remote().info(uri)["size"])
    if size != written.num_bytes:
        delete(uri)
        raise StorageError(f"{uri}: wrote {written.num_bytes} bytes but the store holds {size}; run again")
    return written


@contextlib.contextmanager
def _explained(action: str, uri: str) -> Iterator[None]:
    """Turn what a file system raises into one error that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if not is_local(uri) and "specified bucket" in str(error).lower():
            raise StorageError(f"cannot {action} {uri}: {error}; create the bucket or correct `root`") from error
        raise NotFoundError(f"cannot {action} {uri}: it does not exist") from error
    except OSError as error:
        raise StorageError(f"cannot {action} {uri}: {_remedy(error, uri)}") from error
    except Exception as error:
        # botocore's and aiohttp's errors share no base class with OSError.
        if type(error).__module__.split(".")[0] not in {"botocore", "aiobotocore", "aiohttp", "s3fs"}:
            raise
        raise StorageError(f"cannot {action} {uri}: {_remedy(error, uri)}") from error


def _remedy(error: Exception, uri: str) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device ({error}); free some space or move `root`, then run again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "check the permissions" if is_local(uri) else "check the credentials and the bucket policy"
        return f"permission denied ({error}); {hint}"
    if is_local(uri):
        return f"{error}"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS's own endpoint"
    return (
        f"{type(error).__name__}: {error}; endpoint {endpoint}: "
        "check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the network"
    )
