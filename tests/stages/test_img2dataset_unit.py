"""A unit of img2dataset whose work cannot go on: it ends, with the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.fetch import FetchLimits
from stages.img2dataset_unit import run_unit
from stages.politeness import Courtesy
from stages.row_fetcher import RowFetcher
from tests.stages.hostile_server import serve

NUM_ROWS = 60


def fail(_: Any) -> Any:
    raise MemoryError("none left")


@pytest.fixture
def server() -> Iterator[str]:
    with serve() as running:
        yield running.url


@pytest.mark.timeout(60)
@pytest.mark.parametrize("who", ["resize", "report"])
def test_what_is_nobodys_fault_ends_the_unit(server: str, tmp_path: Path, who: str) -> None:
    """img2dataset itself would wait for ever for a thread that has ended, the worker with it."""
    urls = pa.table({"url": [f"{server}/image?{row}" for row in range(NUM_ROWS)], "caption": ["x"] * NUM_ROWS})
    limits = FetchLimits(allowed_networks=("127.0.0.0/8",))
    acts: dict[str, Callable[[Any], Any]] = {"resize": lambda _: (b"", 1, 1, 1, 1, None), "report": lambda _: None}
    acts[who] = fail
    with contextlib.closing(RowFetcher(urls["url"].to_pylist(), limits, Courtesy())) as fetcher:
        options: dict[str, Any] = {"image_format": "png", "num_threads": 2, "scratch": tmp_path}
        with pytest.raises(MemoryError, match="none left"):
            run_unit(urls, fetcher, acts["resize"], report=acts["report"], **options)
