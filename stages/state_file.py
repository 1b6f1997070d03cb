"""Files of a training's state, one per rank: written at once, read in one pass and checked on the way.

They are safetensors, so reading one executes nothing: a head in JSON, then float32 numbers. Names say which stretch of
which parameter these are, ``<kind>/<parameter>/<first element>``. A file is as large as a rank's weights, moving
averages and moments together; so it is never copied anywhere to be read, however far away it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stages import storage
from stages.errors import IntegrityError
from stages.storage import Written

RANK_FILE = re.compile(r"rank-\d{4}\.safetensors")
_SIZE_BYTES, _MOST_OF_A_HEAD = 8, 100_000_000  # of safetensors: the size of the head in front of it, and its limit
_ELEMENT_BYTES = 4
_PIECE_BYTES, _NUM_AHEAD = 1 << 24, 4  # read at once, and how many of them while others are used: 80 MiB of memory

# Takes a part of a stretch (kind, parameter, first element, numbers) and says how many of the numbers were wanted.
Take = Callable[[str, str, int, Tensor], int]


def rank_file(rank: int) -> str:
    """Return the name of a rank's state file."""
    return f"rank-{rank:04d}.safetensors"


def write_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state file.

    Args:
        path: a local file.
        tensors: ``<kind>/<parameter>/<first element>`` -> float32 stretch.
        metadata: what else is to be kept.
    """
    save_file(dict(tensors), path, metadata=dict(metadata))


@dataclass(frozen=True)
class Stretch:
    """Numbers of a parameter that lie side by side in a file; ``begin`` and ``end`` count the file's numbers."""

    kind: str
    name: str
    start: int
    begin: int
    end: int


@dataclass(frozen=True)
class _Head:
    content: bytes
    stretches: Sequence[Stretch]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class StateFile:
    """A state file in the store.

    Attributes:
        uri: where it is.
        written: its size and checksum, from the record of its checkpoint.
    """

    uri: str
    written: Written

    def stretches(self) -> Sequence[Stretch]:
        """Read from the head, and nothing else of the file, what it holds, in its order.

        Raises:
            IntegrityError: if that is no head of a state file.
            StorageError: if it cannot be read.
        """
        return self._head().stretches

    def read(self, take: Take) -> tuple[int, Mapping[str, str]]:
        """Read the whole file, and compare it with its record.

        Args:
            take: is given everything in it, piece by piece. What it was given counts only if this returns: a file that
                was spoiled on its way is read a second time from its beginning, and a damaged one is known at its end.

        Returns:
            The sum of what ``take`` returned, and the file's metadata.

        Raises:
            IntegrityError: if it differs from its record.
            StorageError: if it cannot be read.
        """
        for _ in range(1 if storage.is_local(self.uri) else 2):
            if (found := self._read_once(take)) is not None:
                return found
        raise IntegrityError(f"{self.uri}: differs from its record, it is damaged")

    def _read_once(self, take: Take) -> tuple[int, Mapping[str, str]] | None:
        try:
            head = self._head()
        except IntegrityError:
            return None
        checksum = hashlib.sha256(head.content)
        num_bytes, num_taken = len(head.content), 0
        position = 0  # counted in the file's numbers, as those of its stretches are
        waiting = iter(head.stretches)
        stretch = next(waiting, None)
        for piece in self._pieces(num_bytes):
            checksum.update(piece)
            num_bytes += len(piece)
            if len(piece) % _ELEMENT_BYTES:
                return None
            values = torch.frombuffer(piece, dtype=torch.float32) if piece else torch.empty(0)
            end = position + len(values)
            while stretch is not None and stretch.begin < end:
                first, last = max(stretch.begin, position), min(stretch.end, end)
                part = values[first - position : last - position]
                num_taken += take(stretch.kind, stretch.name, stretch.start + first - stretch.begin, part)
                if stretch.end > end:
                    break
                stretch = next(waiting, None)
            position = end
        if Written(sha256=checksum.hexdigest(), num_bytes=num_bytes) != self.written:
            return None
        return num_taken, head.metadata

    def _pieces(self, start: int) -> Iterator[bytearray]:
        """Give the bytes from ``start`` to the recorded end in order, the next ones under way meanwhile."""

        def fetch(first: int) -> bytearray:
            return bytearray(storage.read_range(self.uri, first, min(first + _PIECE_BYTES, self.written.num_bytes)))

        with ThreadPoolExecutor(_NUM_AHEAD, thread_name_prefix="unclip-state") as pool:
            starts = iter(range(start, self.written.num_bytes, _PIECE_BYTES))
            under_way = [pool.submit(fetch, first) for first in itertools.islice(starts, _NUM_AHEAD)]
            try:
                while under_way:
                    piece = under_way.pop(0).result()
                    under_way += [pool.submit(fetch, first) for first in itertools.islice(starts, 1)]
                    yield piece
            finally:
                for other in under_way:
                    other.cancel()

    def _head(self) -> _Head:
        size = storage.read_range(self.uri, 0, _SIZE_BYTES)
        num_bytes = int.from_bytes(size, "little")
        try:
            if num_bytes > _MOST_OF_A_HEAD:
                raise ValueError(f"of {num_bytes} bytes")
            content = storage.read_range(self.uri, _SIZE_BYTES, _SIZE_BYTES + num_bytes)
            entries = json.loads(content)
            metadata = entries.pop("__metadata__", {})
            stretches = sorted((_stretch(key, entry) for key, entry in entries.items()), key=lambda found: found.begin)
            return _Head(size + content, stretches, metadata)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise IntegrityError(f"{self.uri}: not the head of a state file ({error})") from error


def _stretch(key: str, entry: Mapping[str, Sequence[int]]) -> Stretch:
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("/")
    first, last = entry["data_offsets"]
    if not (int(start) >= 0 and 0 <= first <= last):
        raise ValueError(f"{key} at {first} to {last}")
    return Stretch(kind, name, int(start), first // _ELEMENT_BYTES, last // _ELEMENT_BYTES)
