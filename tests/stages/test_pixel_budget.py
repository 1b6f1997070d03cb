"""How much is decoded at once."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.pixel_budget import PixelBudget


def test_images_together_stay_within_the_budget_and_a_larger_one_goes_alone() -> None:
    budget, lock = PixelBudget(100), threading.Lock()
    active: list[int] = []
    seen: list[tuple[int, ...]] = []

    def decode(num_pixels: int) -> None:
        with budget.spend(num_pixels):
            with lock:
                active.append(num_pixels)
                seen.append(tuple(active))
            time.sleep(0.001)
            with lock:
                active.remove(num_pixels)

    sizes = random.Random(0).choices([10, 30, 60, 100, 500], k=80)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, sizes))
    assert len(seen) == len(sizes)
    assert all(len(together) == 1 or sum(together) <= 100 for together in seen)
    assert max(map(len, seen)) > 1


def test_a_failed_image_gives_its_share_back() -> None:
    budget = PixelBudget(100)
    for _ in range(3):
        with pytest.raises(ValueError, match="damaged"), budget.spend(100):
            raise ValueError("damaged")
