"""Lists of what must not be in the data: image files, places on the web, held-out images. All known by content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages import storage
from stages.errors import InputError, StorageError
from stages.image_hash import NUM_TONES, measure_image
from stages.manifest import digest_of

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HOST = re.compile(r"(?:[^\s/?#:@.]+\.)*[^\s/?#:@.]+")
# Scheme, user and password, host; in a syntax that RE2 and Python share. As for browsers, a backslash ends a host.
_AUTHORITY = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#\\]*@)?(?P<host>\[[^\]]*\]|[^/?#:\\]*)"
_IMAGE_NAME = re.compile(r".*\.(jpe?g|png|webp)", re.IGNORECASE)
_IO_THREADS = 16

Flags = npt.NDArray[np.bool_]
T = TypeVar("T")


def read_lines(uri: str, place: str) -> list[str]:
    """Read the entries of a text file: one a line, without outer spaces, empty lines and ``#`` comments.

    Args:
        uri: local or s3://.
        place: the setting that names it, for messages.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except (StorageError, UnicodeDecodeError) as error:
        raise InputError(f"{place}: {error}") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def read_image_blocklist(uri: str) -> frozenset[str]:
    """Read the sha256 sums of unwanted image files.

    Raises:
        InputError: if the file cannot be read or holds anything but sha256 sums.
    """
    sums = [word.lower() for line in read_lines(uri, "filter.image_blocklist") for word in line.split()]
    wrong = next((word for word in sums if not _SHA256.fullmatch(word)), None)
    if wrong is not None:
        raise InputError(f"filter.image_blocklist: {uri}: '{wrong[:80]}' is not a sha256 of 64 hex digits")
    return frozenset(sums)


# ---- places on the web ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UrlBlocklist:
    """Hosts, with their subdomains, and prefixes of URLs.

    Attributes:
        hosts: such as ``example.com``, in lower case.
        prefixes: such as ``https://example.com/ads/``; compared with the URL as it is written.
    """

    hosts: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()

    @classmethod
    def read(cls, uri: str) -> UrlBlocklist:
        """Read a file of host names and URL prefixes, one a line.

        Raises:
            InputError: if the file cannot be read, or a line is neither.
        """
        hosts, prefixes = set(), set()
        for line in read_lines(uri, "filter.url_blocklist"):
            if "://" in line:
                prefixes.add(line)
            elif _HOST.fullmatch(line.strip(".")):
                hosts.add(_plain_host(line))
            else:
                raise InputError(
                    f"filter.url_blocklist: {uri}: '{line[:80]}' is neither a host such as example.com nor a prefix "
                    "such as https://example.com/ads/"
                )
        return cls(frozenset(hosts), tuple(sorted(prefixes)))

    @property
    def identity(self) -> str:
        """Hash of what it blocks."""
        return digest_of([sorted(self.hosts), list(self.prefixes)])

    def blocks(self, urls: pa.ChunkedArray) -> Flags:
        """Tell which of ``(n,)`` URLs are blocked; a missing URL is not."""
        # As they are fetched: without blanks around them and line ends within.
        urls = pc.utf8_trim_whitespace(pc.replace_substring_regex(urls, r"[\t\r\n]", ""))
        urls = pc.utf8_trim(urls, "".join(map(chr, range(33))))
        blocked = np.zeros(len(urls), np.bool_)
        hosts = pc.struct_field(pc.extract_regex(urls, _AUTHORITY), "host")
        coded = pc.fill_null(hosts, "").combine_chunks().dictionary_encode()
        codes, distinct = np.asarray(coded.indices), [_plain_host(host) for host in coded.dictionary.to_pylist()]
        if self.hosts:
            blocked |= np.array([self._blocks_host(host) for host in distinct], np.bool_)[codes]
        if self.prefixes:
            # Only URLs on the host of some prefix are looked at one by one.
            named = {_plain_host(_host_of(prefix)) for prefix in self.prefixes}
            rows = np.flatnonzero(np.array([host in named or not host for host in distinct], np.bool_)[codes])
            texts = pc.fill_null(urls.take(pa.array(rows)), "").to_pylist()
            blocked[rows] |= np.array([text.startswith(self.prefixes) for text in texts], np.bool_)
        return blocked

    def _blocks_host(self, host: str) -> bool:
        labels = host.split(".")
        return any(".".join(labels[start:]) in self.hosts for start in range(len(labels)))


def _host_of(url: str) -> str:
    found = re.match(_AUTHORITY, url)
    return found["host"] if found else ""


def _plain_host(host: str) -> str:
    """Write a host one way: lower case, no final dot, international names in their ASCII form."""
    host = host.lower().rstrip(".")
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


# ---- held-out images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Measurements of images that must not be trained on.

    Attributes:
        hashes: perceptual hashes, uint64 ``(m,)``.
        tones: uint8 ``(m, 48)``.
    """

    hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    tones: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, NUM_TONES), np.uint8))

    @classmethod
    def read(cls, folder: str) -> HeldOut:
        """Measure all images below a folder.

        Raises:
            InputError: if it holds no images or one that does not decode.
        """
        measured = list(_each_image(folder, _measured))
        tones = np.frombuffer(b"".join(tones for _, tones in measured), np.uint8)
        return cls(np.array([hash_ for hash_, _ in measured], np.uint64), tones.reshape(-1, NUM_TONES))


def held_out_identity(folder: str) -> str:
    """Hash what a folder of held-out images holds, whatever the files are called.

    Raises:
        InputError: if it holds no images.
    """
    return digest_of(sorted(_each_image(folder, lambda _, data: hashlib.sha256(data).hexdigest())))


def _measured(uri: str, data: bytes) -> tuple[int, bytes]:
    try:
        return measure_image(data)
    except (OSError, ValueError) as error:
        raise InputError(f"filter.held_out_images: {uri} does not decode: {error}; remove it") from error


def _each_image(folder: str, work: Callable[[str, bytes], T]) -> Iterator[T]:
    """Read all images below a folder, a few at a time, and do something with each."""
    try:
        names = [name for name in storage.list_files(folder) if _IMAGE_NAME.fullmatch(name)]
        if not names:
            raise InputError(
                f"filter.held_out_images: {folder} holds no .jpg, .png or .webp file; name a folder of images, or null"
            )
        uris = [storage.join(folder, name) for name in names]
        with ThreadPoolExecutor(_IO_THREADS) as pool:
            yield from pool.map(lambda uri: work(uri, storage.read_bytes(uri)), uris)
    except StorageError as error:
        raise InputError(f"filter.held_out_images: {error}") from error
