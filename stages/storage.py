"""The store: whole objects named by URI, on a local disk or on S3, written atomically.

A reader sees an object complete or not at all:

* local: temporary file in the same folder, fsync, ``os.replace``, fsync of the folder;
* S3: one PUT, or a multipart upload that the server completes atomically. Objects are never streamed through
  ``fs.open(..., "wb")``, which publishes a truncated object when the writing block raises.

Every request to S3 goes through ``explained``, which repeats the ones that failed for reasons that pass.

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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
import fsspec.asyn

from stages.errors import NotFoundError, StorageError

T = TypeVar("T")

TEMPORARY_SUFFIX = ".tmp"
SCHEMES = ("s3",)
# Seconds between our own attempts; the libraries below have had several quick ones by then.
_RETRY_WAITS_S = (0.2, 0.6, 1.8)
_ONE_REQUEST_BYTES = 16 << 20  # what is larger is read faster in parts
_LIBRARIES = frozenset({"botocore", "aiobotocore", "aiohttp", "s3fs"})
_LASTING_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class Written:
    """What was published: the checksum and the size of the bytes handed in, re-checked against the store."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing, lean: there may be a million.

    Attributes:
        num_bytes: its size.
        modified_ns: when it was written, ns since the epoch.
        etag: on S3, what identifies its content; empty on a disk.
    """

    num_bytes: int
    modified_ns: int
    etag: str = ""

    @property
    def version(self) -> str:
        """Text that changes whenever the object is written anew: the ETag, or time of writing and size."""
        return self.etag or f"{self.modified_ns:x}-{self.num_bytes:x}"


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


def absolute(uri: str) -> str:
    """Return a URI that means the same in every working directory."""
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI with single slashes between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(uri: str) -> bool:
    """Tell whether an object (not a folder) of that name exists.

    Raises:
        StorageError: if the store does not answer; that is not the same as "no".
    """
    if is_local(uri):
        return explained("look up", uri, lambda: Path(uri).is_file())
    try:
        # fsspec's `isfile` takes every failure for a "no".
        return bool(explained("look up", uri, lambda: _remote().info(uri)["type"] == "file"))
    except NotFoundError:
        return False


def entry_of(uri: str) -> Entry:
    """Return what a listing would say of one object, without reading it.

    Raises:
        NotFoundError: if there is no such object.
    """
    if is_local(uri):
        return explained("look up", uri, lambda: _entry_of(Path(uri).stat()))
    info = explained("look up", uri, lambda: _remote().info(uri))
    return _entry_of_item({"ETag": "", **info, "Size": info["size"]})


def list_files(uri: str) -> dict[str, int]:
    """List all objects below a folder in one sweep.

    Returns:
        Path relative to ``uri`` -> size in bytes; empty when the folder does not exist. Half-written temporary files
        are left out.
    """
    return {name: entry.num_bytes for name, entry in list_entries(uri).items()}


def list_entries(uri: str, *, temporary: bool = False) -> dict[str, Entry]:
    """List all objects below a folder in one sweep, with their versions.

    Args:
        uri: the folder.
        temporary: whether half-written temporary files are listed too.

    Returns:
        Path relative to ``uri`` -> entry, sorted by path; empty when the folder does not exist.
    """
    if is_local(uri):
        items = explained("list", uri, lambda: sorted(_scan(uri, ""), key=_name_of))
    else:
        items = sorted((item for page in _pages(uri) for item in page), key=_name_of)
    return {name: entry for name, entry in items if temporary or not name.endswith(TEMPORARY_SUFFIX)}


def read_bytes(uri: str, *, expected_bytes: int | None = None) -> bytes:
    """Read a whole object.

    Args:
        uri: the object.
        expected_bytes: its recorded size; a shorter or longer answer is an error, so a truncated read is never parsed.

    Raises:
        NotFoundError: if there is no such object.
        StorageError: if it cannot be read, or its length is not ``expected_bytes``.
    """
    data = _read(uri, at_once=expected_bytes is not None and expected_bytes <= _ONE_REQUEST_BYTES)
    if expected_bytes is not None and len(data) != expected_bytes:
        raise StorageError(
            f"{uri}: read {len(data)} bytes where the record says {expected_bytes}; the object is damaged, and `unclip "
            "repair` has it made again"
        )
    return data


def read_range(uri: str, start: int, end: int) -> bytes:
    """Read the bytes from ``start`` to before ``end`` of an object; fewer, if it is shorter.

    Raises:
        NotFoundError: if there is no such object.
        StorageError: if it cannot be read.
    """

    def request() -> bytes:
        if not is_local(uri):
            try:
                return bytes(_remote().cat_file(uri, start=start, end=end))
            except OSError as error:
                if _status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return b""
                raise
        with Path(uri).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    return explained("read", uri, request)


def read_json(uri: str) -> Any:
    """Read a JSON object.

    Raises:
        StorageError: if it is missing, unreadable or not JSON.
    """
    try:
        return json.loads(_read(uri, at_once=True))
    except ValueError as error:
        raise StorageError(f"{uri}: not valid JSON ({error}); delete it and run again") from error


def _read(uri: str, *, at_once: bool) -> bytes:
    """Read an object with one request, or by parts side by side; for that s3fs asks for its size first."""
    if is_local(uri):
        return explained("read", uri, lambda: Path(uri).read_bytes())
    options = {"max_concurrency": 1} if at_once else {}
    return explained("read", uri, lambda: bytes(_remote().cat_file(uri, **options)))


def write_bytes(uri: str, data: bytes) -> Written:
    """Publish ``data`` under ``uri`` atomically and check the published size.

    Raises:
        StorageError: if it cannot be written (no space, no permission, no connection); nothing is published then.
    """
    _publish(uri, data)
    return Written(sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))


def write_json(uri: str, value: Any) -> Entry:
    """Publish ``value`` as readable JSON, atomically; return what a listing will say of it until it is written anew."""
    return _publish(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return ``value`` as readable JSON."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=True) + "\n").encode()


def upload(path: Path, uri: str) -> Written:
    """Publish a local file under ``uri`` atomically and check the published size."""
    written = Written(sha256=sha256_of(path), num_bytes=path.stat().st_size)
    if is_local(uri):
        with path.open("rb") as source:
            explained("write", uri, lambda: _replace(uri, lambda file: shutil.copyfileobj(source, file, 1 << 20)))
    else:
        explained("write", uri, lambda: _remote().put_file(str(path), uri))
    _check_size(uri, written.num_bytes)
    return written


def delete(uri: str) -> None:
    """Delete one object; a missing one is no error."""
    with contextlib.suppress(NotFoundError):
        explained("delete", uri, lambda: Path(uri).unlink() if is_local(uri) else _remote().rm_file(uri))


def delete_tree(uri: str) -> None:
    """Delete everything below a folder; a missing folder is no error."""
    with contextlib.suppress(NotFoundError):
        if is_local(uri):
            explained("delete", uri, lambda: shutil.rmtree(uri))
        elif list_entries(uri, temporary=True):
            explained("delete", uri, lambda: _remote().rm(uri, recursive=True))


def get_object(uri: str) -> tuple[bytes, str]:
    """Read an object of S3 together with the ETag of exactly these bytes.

    Raises:
        NotFoundError: if there is no such object.
    """

    async def get(remote: Any, bucket: str, key: str) -> tuple[bytes, str]:
        answer = await remote._call_s3("get_object", Bucket=bucket, Key=key)  # its public twin cannot read the body
        async with answer["Body"] as body:
            return bytes(await body.read()), str(answer["ETag"])

    def request() -> tuple[bytes, str]:
        remote = _remote()
        found: tuple[bytes, str] = fsspec.asyn.sync(remote.loop, get, remote, *_bucket_and_key(uri))
        return found

    return explained("read", uri, request)


def put_object(uri: str, data: bytes, **condition: str) -> str | None:
    """Write an object of S3 if a condition holds; ``stages/swap.py`` says what that is worth.

    Args:
        uri: the object.
        data: its new content.
        condition: ``IfNoneMatch="*"`` or ``IfMatch=<ETag>``.

    Returns:
        The new ETag; None if the server says that the condition does not hold.
    """

    def request() -> str | None:
        bucket, key = _bucket_and_key(uri)
        try:
            return str(_remote().call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
        except OSError as error:
            if _status(error) == HTTPStatus.PRECONDITION_FAILED:
                return None
            raise

    return explained("write", uri, request)


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
        copy_to(uri, path)
        yield path


def copy_to(uri: str, path: Path) -> None:
    """Copy an object into a local file, which is overwritten in place.

    Raises:
        NotFoundError: if there is no such object.
        StorageError: if it cannot be read.
    """
    if is_local(uri):
        explained("read", uri, lambda: shutil.copyfile(uri, path))
    else:
        explained("read", uri, lambda: _remote().get_file(uri, str(path)))


def checksum(uri: str) -> Written:
    """Read an object and return its checksum and size, without holding it in memory.

    Raises:
        NotFoundError: if there is no such object.
        StorageError: if it cannot be read.
    """
    with local_copy(uri) as path:
        return Written(sha256=explained("read", uri, lambda: sha256_of(path)), num_bytes=path.stat().st_size)


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


def _name_of(item: tuple[str, Entry]) -> str:
    return item[0]


def _scan(folder: str, prefix: str) -> Iterator[tuple[str, Entry]]:
    """Walk a local folder; what vanishes meanwhile is left out."""
    folders: list[str] = []
    try:
        with os.scandir(folder) as found:
            for item in found:
                if item.is_dir(follow_symlinks=False):
                    folders.append(item.name)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        yield prefix + item.name, _entry_of(item.stat())
    except FileNotFoundError:
        return
    for name in folders:
        yield from _scan(f"{folder}/{name}", f"{prefix}{name}/")


def _entry_of(status: os.stat_result) -> Entry:
    return Entry(status.st_size, status.st_mtime_ns)


def _entry_of_item(item: dict[str, Any]) -> Entry:
    modified_ns = int(item["LastModified"].timestamp() * 1000) * 1_000_000
    return Entry(int(item["Size"]), modified_ns, item["ETag"].strip('"'))


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _pages(uri: str) -> Iterator[list[tuple[str, Entry]]]:
    """List an S3 folder page by page: s3fs's own `find` holds a kilobyte for every object."""
    bucket, key = _bucket_and_key(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    request = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = explained("list", uri, lambda: _remote().call_s3("list_objects_v2", **request))
        yield [(item["Key"].removeprefix(prefix), _entry_of_item(item)) for item in page.get("Contents", ())]
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _publish(uri: str, data: bytes) -> Entry:
    """Write an object and return its entry: of exactly these bytes, whoever else writes the same name meanwhile."""

    def write_all(file: BinaryIO) -> None:
        file.write(data)

    if is_local(uri):
        entry = explained("write", uri, lambda: _replace(uri, write_all))
        if entry.num_bytes != len(data):
            _refuse_size(uri, len(data), entry.num_bytes)
        return entry
    answer = explained("write", uri, lambda: _remote().pipe_file(uri, data))
    _check_size(uri, len(data))
    # The answer of a multipart upload is not passed on: no listing will show this entry's version.
    return Entry(len(data), time.time_ns(), (answer or {}).get("ETag", "").strip('"'))


def _replace(uri: str, write: Callable[[BinaryIO], None]) -> Entry:
    """Write a temporary neighbour, make it durable and move it into place; return the entry of what was written."""
    path = Path(uri)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    try:
        try:
            file = temporary.open("xb")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("xb")
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            entry = _entry_of(os.fstat(file.fileno()))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return entry


def _check_size(uri: str, num_bytes: int) -> None:
    size = explained(
        "check", uri, lambda: Path(uri).stat().st_size if is_local(uri) else int(_remote().info(uri)["size"])
    )
    if size != num_bytes:
        _refuse_size(uri, num_bytes, size)


def _refuse_size(uri: str, num_bytes: int, found: int) -> None:
    # It is not deleted: it may be another writer's, whole and recorded. Nothing records what was written here.
    raise StorageError(f"{uri}: wrote {num_bytes} bytes but the store holds {found}; run again")


def explained(action: str, uri: str, request: Callable[[], T]) -> T:
    """Make a request, again if it failed for a reason that passes; turn what is raised into one error that helps."""
    try:
        for wait_s in () if is_local(uri) else _RETRY_WAITS_S:
            try:
                return request()
            except Exception as error:
                if not _passes(error):
                    raise
                time.sleep(wait_s)
        return request()
    except StorageError:
        raise
    except FileNotFoundError as error:
        if not is_local(uri) and "specified bucket" in str(error).lower():
            raise StorageError(f"cannot {action} {uri}: {error}; create the bucket or correct `root`") from error
        raise NotFoundError(f"cannot {action} {uri}: it does not exist") from error
    except OSError as error:
        raise StorageError(f"cannot {action} {uri}: {_remedy(error, uri)}") from error
    except Exception as error:
        if not _from_library(error):
            raise
        raise StorageError(f"cannot {action} {uri}: {_remedy(error, uri)}") from error


def _status(error: OSError) -> int | None:
    """Return the status of S3's answer that s3fs made an error of."""
    status: int | None = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _from_library(error: BaseException) -> bool:
    """Tell whether an error is botocore's or aiohttp's: they share no base class with OSError."""
    return type(error).__module__.split(".")[0] in _LIBRARIES


def _passes(error: Exception) -> bool:
    """Tell whether a request to S3 that failed so may succeed if repeated: a reset, a time-out, an error of the server.

    Not among them: what is missing, forbidden or malformed, and a server that is not there at all.
    """
    from aiohttp import ClientError
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError | HTTPClientError | IncompleteReadError | ResponseParserError):
        return True
    lasting = isinstance(error, FileNotFoundError | PermissionError | FileExistsError)
    return isinstance(error, OSError) and not lasting and error.errno not in _LASTING_ERRNOS


def _remedy(error: Exception, uri: str) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device ({error}); free some space or move `root`, then run again"
    if number == errno.EFBIG:
        return (
            f"a limit on the size of files is reached ({error}); raise it (`ulimit -f`) or move `root`, then run again"
        )
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
