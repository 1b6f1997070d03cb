"""One unit of the download: img2dataset run over a table of rows in a scratch folder, and what it wrote, checked.

Two of its parts are replaced: the fetch function, by turns of a ``RowFetcher``, and its printing, by logging. What it
wrote is not trusted: the tar, the table and the statistics must agree, sample by sample.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.base import Progress
from stages.errors import ShardError
from stages.row_fetcher import RowFetcher
from stages.samples import Sample, read_tar

logger = logging.getLogger(__name__)

FACTS = ("width", "height", "original_width", "original_height", "sha256")
_REPORT_EVERY_S = 0.5
# What img2dataset's resizer says -> our reason code; anything else is about resizing and encoding.
_RESIZER_REASONS = {"Image decoding error": "decode", "aspect ratio too large": "too_many_pixels"}

Resize = Callable[..., Any]


@dataclass(frozen=True)
class UnitRow:
    """What img2dataset made of one row.

    Attributes:
        reason: why there is no image, or None.
        image: the encoded image, or None.
        facts: width, height, original_width, original_height, sha256 (of the served file) where there is an image.
    """

    reason: str | None
    image: bytes | None
    facts: Mapping[str, Any]


@functools.cache
def load_img2dataset() -> tuple[Any, Any, Any, Any]:
    """Import img2dataset's modules: reader, downloader, resizer, writer."""
    # Read at import by its dependency, which otherwise asks the network for updates.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    with warnings.catch_warnings(), _without_torch():
        # It imports `imghdr`, deprecated in Python 3.11.
        warnings.simplefilter("ignore")
        from img2dataset import downloader, reader, resizer, writer
    return reader, downloader, resizer, writer


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Let webdataset be imported as where there is no torch: its tar writer needs none, and it takes 600 MiB a worker.

    Where torch is loaded already nothing is gained, and nothing done.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import then raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules["torch"]
        # img2dataset keeps this one; whoever else asks for webdataset gets the whole of it.
        for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
            del sys.modules[name]


def rebound(function: Any, **replacements: Any) -> Any:
    """Copy a function so that some names of its module mean something else in the copy, and only there."""
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **replacements},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _log_instead_of_print(*parts: object) -> None:
    logger.debug("img2dataset: %s", " ".join(map(str, parts)))


def run_unit(
    urls: pa.Table,
    fetcher: RowFetcher,
    resize: Resize,
    *,
    image_format: str,
    num_threads: int,
    scratch: Path,
    report: Callable[[Progress], None],
) -> list[UnitRow]:
    """Let img2dataset download the rows and return what became of each, in row order.

    Args:
        urls: table of ``url`` and ``caption``.
        fetcher: of the same rows.
        resize: called with the stream of a file as img2dataset calls its ``Resizer``, from several threads.
        image_format: of the stored images.
        num_threads: that fetch.
        scratch: an empty folder.
        report: called now and then with the progress.

    Raises:
        ShardError: retryable, if the output does not verify.
        BaseException: what ``fetcher``, ``resize`` or ``report`` raised.
    """
    reader, downloader, _, writer = load_img2dataset()
    url_list = scratch / "urls.parquet"
    # Only what it needs: a column that cannot be written as JSON would cost it the sample.
    pq.write_table(urls.select(["url", "caption"]), url_list)
    quiet = {"print": _log_instead_of_print}
    tracing = types.SimpleNamespace(print_exc=lambda: logger.debug("img2dataset", exc_info=True))
    read_shards = rebound(reader.Reader.__iter__, **quiet)
    fetch = _Fetch(fetcher, resize, urls.num_rows, report)
    run = rebound(downloader.Downloader.download_shard, download_image_with_retry=fetch, traceback=tracing, **quiet)
    work = downloader.Downloader(
        sample_writer_class=_plain_writer(writer),
        resizer=lambda file, _boxes=None: file.resized,
        thread_count=num_threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(scratch),
        column_list=["caption", "url"],
        timeout=0,  # this and the retries are the fetcher's
        number_sample_per_shard=urls.num_rows,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=image_format,
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    whole = reader.Reader(
        str(url_list), "parquet", "url", "caption", None, None, None, urls.num_rows, set(), str(scratch)
    )
    for unit in read_shards(whole):
        run(work, unit)
    if fetch.error is not None:
        raise fetch.error
    return _verified(scratch, urls)


def _plain_writer(module: Any) -> Any:
    """Return img2dataset's writer, without the fractions of seconds whose extra headers double the size of the work."""
    base = module.WebDatasetSampleWriter
    webdataset = types.SimpleNamespace(TarWriter=functools.partial(module.wds.TarWriter, mtime=0))
    return type(base.__name__, (base,), {"__init__": rebound(base.__init__, wds=webdataset)})


class _ResizedFile(io.BytesIO):
    """A file as it was served, with what img2dataset's resizer made of it."""

    resized: Any


class _Fetch:
    """The replacement of img2dataset's fetch function, which also resizes and reports progress.

    img2dataset calls it once per row and takes the rows in whatever order they come back, so a call is a turn: it
    returns the next row that is finished, whichever that is. By itself img2dataset resizes in the one thread that
    writes, which then is what everything waits for.

    Attributes:
        error: the first exception; img2dataset would wait for ever for the thread that it ends. No row is fetched
            after it.
    """

    def __init__(self, fetcher: RowFetcher, resize: Resize, total: int, report: Callable[[Progress], None]) -> None:
        self.error: BaseException | None = None
        self._fetcher = fetcher
        self._resize = resize
        self._total = total
        self._report = report
        self._lock = threading.Lock()
        self._done, self._reported_at = 0, time.monotonic()

    def __call__(self, row: tuple[int, str | None], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        """Take a turn."""
        if self.error is None:
            try:
                return self._turn()
            except BaseException as error:
                self.error = self.error or error
        return row[0], None, "unexpected"

    def _turn(self) -> tuple[int, io.BytesIO | None, str | None]:
        fetched = self._fetcher.next_row()
        file = None
        if fetched.data is not None:
            file = _ResizedFile(fetched.data)
            with self._fetcher.budget.spend(fetched.num_pixels):
                file.resized = self._resize(file)
        with self._lock:
            self._done += 1
            if time.monotonic() - self._reported_at > _REPORT_EVERY_S or self._done == self._total:
                self._reported_at = time.monotonic()
                self._report(Progress(done=self._done, total=self._total, unit="images"))
        return fetched.row, file, fetched.reason


def _verified(scratch: Path, urls: pa.Table) -> list[UnitRow]:
    """Read what img2dataset wrote and check that its tar, table and statistics tell the same story.

    Raises:
        ShardError: retryable, if they do not.
    """
    try:
        stats = json.loads((scratch / "00000_stats.json").read_bytes())
        table = pq.read_table(scratch / "00000.parquet").to_pylist()
        # Its keys are the row numbers, padded.
        samples = {int(sample.key): sample for sample in read_tar((scratch / "00000.tar").read_bytes())}
    except (OSError, ValueError, pa.ArrowException, ShardError) as error:
        raise ShardError(f"img2dataset's output cannot be read: {error}", retryable=True) from error
    by_row = {int(row["key"]): row for row in table}
    succeeded = {position for position, row in by_row.items() if row["status"] == "success"}
    counts = {
        "rows": urls.num_rows,
        "rows in its statistics": stats["count"],
        "rows in its table": len(by_row) if len(by_row) == len(table) else -1,
    }
    images = {
        "successes in its statistics": stats["successes"],
        "successes in its table": len(succeeded),
        "samples in its tar": len(samples) if set(samples) == succeeded else -1,
    }
    for numbers in (counts, images):
        if len(set(numbers.values())) != 1:
            listed = ", ".join(f"{count} {name}" for name, count in numbers.items())
            raise ShardError(f"img2dataset's output does not verify: {listed}", retryable=True)
    captions = urls["caption"].to_pylist()
    for position, sample in samples.items():
        if sample.caption != (captions[position] or "") or not sample.image:
            raise ShardError(
                f"img2dataset's output does not verify: row {position} holds another sample", retryable=True
            )
    return [_row(by_row[position], samples.get(position)) for position in range(urls.num_rows)]


def _row(row: Mapping[str, Any], sample: Sample | None) -> UnitRow:
    if sample is not None:
        return UnitRow(None, sample.image, {name: row[name] for name in FACTS})
    if row["status"] == "failed_to_download":
        return UnitRow(row["error_message"], None, {})
    return UnitRow(_RESIZER_REASONS.get(row["error_message"], "resize"), None, {})
