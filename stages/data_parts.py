"""The parts of making a batch, how long each takes, and what helps where one is too slow."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

OPENING, DECODING, PREPARING, TOKENISING = "opening", "decoding", "preparing", "tokenising"
PARTS = (OPENING, DECODING, PREPARING, TOKENISING)

# What to change when most of the time goes there; the braces are filled with the setting's present value.
REMEDIES = {
    OPENING: "shards are opened anew: raise {place}.cache_gib (now {cache_gib:g}), and for a remote store set "
    "{place}.shard_cache_dir",
    DECODING: "raise {place}.num_decode_threads (now {num_decode_threads}; {num_cores} cores here) and "
    "{place}.cpus_per_rank, or {place}.cache_gib (now {cache_gib:g}) if the decoded images fit",
    PREPARING: "raise {place}.num_decode_threads (now {num_decode_threads}; {num_cores} cores here) and "
    "{place}.cpus_per_rank",
    TOKENISING: "it runs in one thread per rank: raise {place}.num_ranks (now {num_ranks})",
}


class PartTimes:
    """A clock for every part of one batch; threads may share it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the length of a ``with`` block to a part."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - started_at
            with self._lock:
                self.seconds[part] = self.seconds.get(part, 0.0) + elapsed_s

    @contextlib.contextmanager
    def of_threads(self, *parts: str) -> Iterator[None]:
        """Turn what threads added to these parts in a ``with`` block into shares of the length of the block."""
        started_at = time.perf_counter()
        yield
        elapsed_s = time.perf_counter() - started_at
        total_s = sum(self.seconds.get(part, 0.0) for part in parts)
        for part in parts:
            if part in self.seconds:
                self.seconds[part] *= elapsed_s / max(total_s, 1e-9)
