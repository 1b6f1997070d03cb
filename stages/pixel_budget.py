"""How much may be decoded at once: what an image takes in memory has nothing to do with the size of its file."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator


class PixelBudget:
    """Lets threads decode as long as their images together stay within a number of pixels; a larger one goes alone.

    Args:
        num_pixels: width x height of all images that are decoded at the same time.
    """

    def __init__(self, num_pixels: int) -> None:
        self._total = num_pixels
        self._free = num_pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def spend(self, num_pixels: int) -> Iterator[None]:
        """Wait until an image of this size may be decoded, and count it in while it is."""
        share = min(num_pixels, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= share)
            self._free -= share
        is_large = num_pixels > self._total // 4
        if is_large:
            _give_back_memory()
        try:
            yield
        finally:
            if is_large:
                _give_back_memory()
            with self._changed:
                self._free += share
                self._changed.notify_all()


def _give_back_memory() -> None:
    """Return freed memory to the system: by itself every thread's heap keeps that of the largest image it decoded."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
