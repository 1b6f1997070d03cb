"""One shard of training data, open: images by row out of the tar, embeddings and captions joined to them by key."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from stages import storage
from stages.disk_cache import DiskCache
from stages.errors import IntegrityError, NotFoundError, StorageError
from stages.manifest import File
from stages.pictures import to_rgb
from stages.samples import IMAGE_EXTENSIONS, embeddings_of, kept_keys, table_from_bytes
from stages.tar_index import members_of

T = TypeVar("T")

_ATTEMPTS = 4
_BACKOFF_S = 1.0
_ROW_BYTES = 200  # key, caption and place of one sample in Python objects, roughly


class BadSampleError(IntegrityError):
    """One image cannot be decoded; the rest of its shard can be used."""


@dataclass(frozen=True, kw_only=True)
class TrainingShard:
    """What one shard of the data set consists of.

    Attributes:
        selection: which samples to use.
        num_kept: how many those are, from the record of the selection.
        images: the tar, if images are wanted.
        embeddings: the table with ``image_embedding``, ``text_embedding`` and ``caption``, if those are wanted.
        num_held_out: how many of the samples are not trained on; an open shard has them last.
    """

    selection: File
    num_kept: int
    images: File | None = None
    embeddings: File | None = None
    num_held_out: int = 0

    @property
    def num_trained(self) -> int:
        """Samples to train on."""
        return self.num_kept - self.num_held_out


class OpenShard:
    """The selected samples of one shard, by row: the position among the kept samples.

    Args:
        shard: its files.
        root: the store.
        image_size_px: side of the images; None leaves images alone.
        captions: whether captions are wanted.
        vectors: whether embeddings are wanted.
        cache: where files of a remote store are kept; None reads them anew every time.

    Raises:
        IntegrityError: if a file differs from its record, or a selected key is missing from one of the files.
        StorageError: if the store cannot be read.
    """

    def __init__(
        self,
        shard: TrainingShard,
        root: str,
        *,
        image_size_px: int | None,
        captions: bool,
        vectors: bool,
        cache: DiskCache | None = None,
    ) -> None:
        self._root = root
        self._cache = None if storage.is_local(root) else cache
        self._side = image_size_px
        self._images: dict[int, np.ndarray] = {}
        self._bad: dict[int, str] = {}
        self._keeping = threading.Lock()
        self._stack = contextlib.ExitStack()
        self.vectors: Mapping[str, np.ndarray] = {}
        self._captions: Sequence[str] | None = None
        self._tar: _Tar | None = None
        self.keys = kept_keys(table_from_bytes(self._read(shard.selection), ["key", "kept"]))
        if len(self.keys) != shard.num_kept:
            raise IntegrityError(
                f"{shard.selection.path}: selects {len(self.keys)} samples, its record says {shard.num_kept}; "
                "run curate again"
            )
        self.keys = held_out_last(self.keys, shard.num_held_out)
        self.num_bytes = _ROW_BYTES * len(self.keys)
        if shard.embeddings is not None and (vectors or captions):
            self._join_embeddings(shard.embeddings, vectors)
        if shard.images is not None and (image_size_px is not None or (captions and self._captions is None)):
            self._join_images(shard.images, captions and self._captions is None)

    def image(self, row: int, *, keep: bool) -> np.ndarray:
        """Decode an image; uint8 ``(S, S, 3)``. Any number of threads may ask at once.

        Args:
            row: of the sample.
            keep: whether to keep it in memory for the next epoch.

        Raises:
            BadSampleError: if it cannot be decoded.
        """
        found = self._images.get(row)
        if found is None:
            assert self._tar is not None and self._side is not None
            if row in self._bad:
                raise BadSampleError(self._bad[row])
            try:
                place = f"{self._tar.name}: sample {self.keys[row]}"
                found = decode_image(self._tar.image(self.keys[row]), self._side, place)
            except BadSampleError as error:
                self._bad[row] = str(error)
                raise
            if keep:
                self._keep(row, found)
        return found

    def _keep(self, row: int, image: np.ndarray) -> None:
        """Keep an image in memory; two threads may have decoded the same one, where a batch holds a sample twice."""
        with self._keeping:
            if row not in self._images:
                self._images[row] = image
                self.num_bytes += image.nbytes

    def caption(self, row: int) -> str:
        """Return a caption."""
        assert self._captions is not None
        return self._captions[row]

    def close(self) -> None:
        """Release the tar."""
        self._stack.close()

    def _join_embeddings(self, file: File, vectors: bool) -> None:
        names = ["image_embedding", "text_embedding"] if vectors else []
        table = table_from_bytes(self._read(file), ["key", "caption", *names])
        rows = _rows_of(self.keys, table, file)
        self._captions = table["caption"].take(pa.array(rows)).to_pylist()
        # Kept in half precision, as they are stored; batches turn them into float32.
        self.vectors = {name: embeddings_of(table, name)[rows].astype(np.float16) for name in names}
        self.num_bytes += sum(values.nbytes for values in self.vectors.values())

    def _join_images(self, file: File, captions: bool) -> None:
        self._tar = self._open_tar(file)
        if missing := next((key for key in self.keys if key not in self._tar.places), None):
            self.close()
            raise IntegrityError(f"{file.path}: holds no sample {missing}, which is selected; run download again")
        if captions:
            self._captions = [self._tar.caption(key) for key in self.keys]
        if not storage.is_local(self._root):
            self.num_bytes += file.num_bytes

    def _read(self, file: File) -> bytes:
        if self._cache is None:
            return _retried(lambda: file.read(self._root))
        with contextlib.ExitStack() as stack:
            return self._cached(self._cache, file, stack).read_bytes()

    def _cached(self, cache: DiskCache, file: File, stack: contextlib.ExitStack) -> Path:
        return _retried(lambda: stack.enter_context(cache.local(file, self._root)))

    def _open_tar(self, file: File) -> _Tar:
        """Open a tar where it is, or a copy if the store is remote, once its checksum is right."""
        try:
            if self._cache is not None:
                path = self._cached(self._cache, file, self._stack)
            else:
                uri = storage.join(self._root, file.path)
                path = _retried(lambda: self._stack.enter_context(storage.local_copy(uri)))
                if path.stat().st_size != file.num_bytes or storage.sha256_of(path) != file.sha256:
                    raise IntegrityError(f"{uri}: differs from its record, it is damaged; run `unclip repair`")
            return self._stack.enter_context(contextlib.closing(_Tar(path, file.path)))
        except tarfile.TarError as error:
            self._stack.close()
            raise IntegrityError(f"{file.path}: not a tar ({error}); run `unclip repair`") from error
        except BaseException:
            self._stack.close()
            raise


def sample_number(key: str) -> int:
    """Hash a sample's key to 63 bits: the sample's place in line for being held out, and its randomness there."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def held_out_last(keys: Sequence[str], num_held_out: int) -> list[str]:
    """Put the keys with the smallest hashes behind the others, which stay in their order."""
    if num_held_out == 0:
        return list(keys)
    held_out = sorted(keys, key=lambda key: (sample_number(key), key))[:num_held_out]
    out = set(held_out)
    return [key for key in keys if key not in out] + held_out


def decode_image(data: bytes, side_px: int, place: str) -> np.ndarray:
    """Decode an image file, cut its central square and resize that; uint8 ``(side_px, side_px, 3)``.

    Raises:
        BadSampleError: if the image cannot be decoded; names ``place``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            # A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size; twice the side is left for
            # the filter below.
            image.draft("RGB", (2 * side_px, 2 * side_px))
            decoded = to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # of what is wrong with a file, Pillow tells in exceptions of any class
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise BadSampleError(f"{place}: cannot decode the image ({reason})") from error
    width, height = decoded.size
    if (width, height) != (side_px, side_px):
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        decoded = decoded.resize((side_px, side_px), Image.Resampling.BICUBIC, box=box)
    return np.asarray(decoded)


class _Tar:
    """A tar on disk with the places of its members."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.places: dict[str, tuple[int, int]] = {}
        self._captions: dict[str, tuple[int, int]] = {}
        for name, place in members_of(path):
            key, _, extension = name.partition(".")
            if extension in IMAGE_EXTENSIONS:
                self.places[key] = place
            elif extension == "txt":
                self._captions[key] = place
        self._descriptor = os.open(path, os.O_RDONLY)

    def image(self, key: str) -> bytes:
        """Read an image file; any number of threads may."""
        return self._read(self.places[key])

    def caption(self, key: str) -> str:
        """Read a caption."""
        if key not in self._captions:
            raise IntegrityError(f"{self.name}: sample {key} has no caption; run download again")
        return self._read(self._captions[key]).decode()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _read(self, place: tuple[int, int]) -> bytes:
        offset, size = place
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise StorageError(f"{self.name}: cannot read from the disk ({error}); check the disk") from error


def _rows_of(keys: Sequence[str], table: pa.Table, file: File) -> np.ndarray:
    """Find the rows of ``keys`` in a table."""
    positions = {key: row for row, key in enumerate(table["key"].to_pylist())}
    if missing := next((key for key in keys if key not in positions), None):
        raise IntegrityError(f"{file.path}: holds no sample {missing}, which is selected; run embed again")
    return np.array([positions[key] for key in keys], dtype=np.int64)


def _retried(action: Callable[[], T]) -> T:
    """Try again when the store fails for a moment: a training of days must not stop at a lost connection."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return action()
        except NotFoundError as error:
            raise NotFoundError(f"{error}; run `unclip repair`, which has it made again") from error
        except StorageError:
            time.sleep(_BACKOFF_S * 2**attempt)
    return action()
