"""How much may be decoded at once: what an image takes in memory has nothing to do with the size of its file."""

from __future__ import annotations

import contextlib
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
        try:
            yield
        finally:
            with self._changed:
                self._free += share
                self._changed.notify_all()
