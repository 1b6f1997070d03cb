"""Download: URLs to webdataset shards, and a table of all rows with what became of each.

img2dataset does the work - reading, threads, resizing, encoding, writing - in a scratch folder, one source shard at a
time, in this process. Two of its parts are replaced: the fetch function, by the guarded one of ``stages/fetch.py``,
and its printing, by logging. What it wrote is not trusted: the tar, the table and the statistics must agree, sample by
sample. Then it is rewritten so that equal images give equal bytes: in row order, with keys derived from the rows, and
published.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import logging
import os
import tempfile
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stages import shapes
from stages.base import Progress, Resources, Result, Shard, Stage, setting
from stages.errors import InputError, ShardError, StageError
from stages.fetch import FetchError, FetchLimits, fetch_image, is_transient
from stages.manifest import Manifest, ShardRecord
from stages.samples import Sample, read_tar, table_from_bytes, table_to_bytes, write_tar

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.5
_MAX_QUALITY = {"jpg": 100, "png": 9, "webp": 100}
# What img2dataset's resizer says -> our reason code; anything else it says is about decoding.
_RESIZE_REASONS = {"image too small": "too_small", "image area too large": "too_many_pixels"}


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Fetching the images, and how they are stored."""

    image_size_px: int = setting(256, "size that `resize_mode` brings images to, pixels")
    resize_mode: Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"] = setting(
        "keep_ratio", "img2dataset's: `keep_ratio` (shorter side), `center_crop`, `border`, `keep_ratio_largest`, `no`"
    )
    resize_only_if_bigger: bool = setting(True, "leave images smaller than `image_size_px` as they are")
    image_format: Literal["jpg", "png", "webp"] = setting("jpg", "format of the stored images")
    image_quality: int = setting(95, "of jpg and webp 1 to 100; of png the compression 0 to 9")
    keep_encoded: bool = setting(
        False, "store images of `image_format` that need no resizing as served (camera rotation not applied)"
    )
    num_threads: int = setting(16, "connections at once", affects="nothing")
    timeout_s: float = setting(10.0, "seconds for one attempt at one image, redirects included", affects="nothing")
    retries: int = setting(2, "further attempts after a failure that can pass", affects="nothing")
    backoff_s: float = setting(0.5, "seconds before the second attempt; doubles each time", affects="nothing")
    max_bytes: int = setting(20 << 20, "largest file, bytes")
    max_pixels: int = setting(50_000_000, "largest image, width x height")
    max_redirects: int = setting(5, "redirects followed")
    user_agent: str = setting("unclip-pipeline", "sent to servers; opt-outs may address it by this name")
    opt_out_directives: tuple[str, ...] = setting(
        ("noai", "noimageai", "noindex", "noimageindex"), "X-Robots-Tag directives that are obeyed"
    )
    allowed_networks: tuple[str, ...] = setting(
        (), "networks that may be fetched from although they are not public, such as 10.1.0.0/16"
    )
    max_transient_fraction: float = setting(
        0.5,
        "share of a shard's rows that may fail for reasons that pass before the shard is tried again",
        affects="nothing",
    )

    def __post_init__(self) -> None:
        for name in ("image_size_px", "num_threads", "max_bytes", "max_pixels", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")
        for name in ("retries", "backoff_s", "max_redirects"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        highest = _MAX_QUALITY[self.image_format]
        if not 0 <= self.image_quality <= highest:
            raise ValueError(
                f"image_quality: {self.image_quality} is not between 0 and {highest}, the range of {self.image_format}"
            )
        if not 0 <= self.max_transient_fraction <= 1:
            raise ValueError(f"max_transient_fraction: {self.max_transient_fraction} is not between 0 and 1")
        for network in self.allowed_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"allowed_networks: {error}; write for example 10.1.0.0/16") from None

    def limits(self, allowed_endpoints: frozenset[tuple[str, int]] = frozenset()) -> FetchLimits:
        """Return the limits of the guarded fetch."""
        return FetchLimits(
            timeout_s=self.timeout_s,
            retries=self.retries,
            backoff_s=self.backoff_s,
            max_bytes=self.max_bytes,
            max_pixels=self.max_pixels,
            max_redirects=self.max_redirects,
            user_agent=self.user_agent,
            opt_out_directives=self.opt_out_directives,
            allowed_networks=self.allowed_networks,
            allowed_endpoints=allowed_endpoints,
        )


@dataclass(frozen=True)
class _Row:
    """What img2dataset made of one row.

    Attributes:
        reason: why there is no image, or None.
        image: the encoded image, or None.
        facts: width, height, original_width, original_height, sha256 (of the served file) where there is an image.
    """

    reason: str | None
    image: bytes | None
    facts: Mapping[str, Any]


class Download(Stage[DownloadConfig]):
    """Downloads the rows of every source shard; see the module's docstring."""

    name: ClassVar[str] = "download"
    counts: ClassVar[str | None] = "source"

    @property
    def upstream(self) -> tuple[str, ...]:
        """It reads the rows of ``source``."""
        return ("source",)

    @property
    def resources(self) -> Resources:
        """One core: resizing is single-threaded, the connections wait."""
        return Resources(num_cpus=1.0)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Make one shard of every source shard.

        Raises:
            InputError: if the source is empty.
        """
        records = inputs["source"].records
        if not records:
            raise InputError("download: the source has no rows; check source.lists")
        # Procedural shapes are the one service on this machine that may be fetched from without asking.
        served = _served_shapes(inputs["source"])
        params = {"served_port": served.port} if served else {}
        return [
            self.shard(index, inputs={"urls": record.files["urls"]}, **params) for index, record in enumerate(records)
        ]

    def service(self, inputs: Mapping[str, Manifest]) -> AbstractContextManager[None]:
        """Serve the shapes while they are downloaded, if that is what the source is."""
        served = _served_shapes(inputs["source"])
        return shapes.serve(served) if served else contextlib.nullcontext()

    def setup(self) -> None:
        """Load img2dataset (and, through it, torch)."""
        _load_img2dataset()

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Download one shard.

        Raises:
            ShardError: retryable, if img2dataset's output does not verify or too many rows failed for reasons that
                pass (no network, no name resolution).
        """
        started_at = time.monotonic()
        urls = table_from_bytes(shard.inputs["urls"].read(self.root))
        port = shard.params.get("served_port")
        endpoints = frozenset({(shapes.HOST, int(port))}) if port else frozenset()
        with tempfile.TemporaryDirectory(prefix="unclip-download-") as scratch:
            rows = _download(urls, self.config, self.config.limits(endpoints), Path(scratch), self.report)
        dropped = Counter(row.reason for row in rows if row.reason is not None)
        self._refuse_outage(dropped, len(rows))
        keys = row_keys(shard.inputs["urls"].sha256, len(rows))
        return self.commit(
            shard,
            output,
            {
                "images": ("tar", write_tar(_samples(urls, keys, rows, self.config.image_format))),
                "table": ("parquet", table_to_bytes(_table(urls, keys, rows))),
            },
            started_at=started_at,
            num_in=len(rows),
            num_kept=len(rows) - dropped.total(),
            dropped=dropped,
        )

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Check that there is a data set.

        Raises:
            StageError: if not a single image arrived.
        """
        if not any(record.num_kept for record in records):
            reasons: Counter[str] = Counter()
            for record in records:
                reasons.update(record.dropped)
            raise StageError(
                f"download: none of {reasons.total()} rows gave an image ({_listed(reasons)}); {_hint(reasons)}, "
                "then run again with --force download"
            )
        return Result(records=records)

    def _refuse_outage(self, dropped: Mapping[str, int], num_rows: int) -> None:
        transient = {reason: count for reason, count in dropped.items() if is_transient(reason)}
        num_transient = sum(transient.values())
        if num_transient > self.config.max_transient_fraction * num_rows:
            raise ShardError(
                f"{num_transient} of {num_rows} rows failed for reasons that pass ({_listed(transient)}), more than "
                f"download.max_transient_fraction: {self.config.max_transient_fraction:g} allows; {_hint(transient)}",
                retryable=True,
            )


def row_keys(urls_sha256: str, num_rows: int) -> list[str]:
    """Return the keys of a shard's samples: they name the rows by content and sort in row order."""
    return [f"{urls_sha256[:10]}{position:06d}" for position in range(num_rows)]


def _served_shapes(source: Manifest) -> shapes.ShapesConfig | None:
    settings = source.metrics.get("shapes")
    return shapes.ShapesConfig(**settings) if settings else None


def _listed(reasons: Mapping[str, int]) -> str:
    most = Counter(reasons).most_common(4)
    return ", ".join(f"{reason}: {count}" for reason, count in most)


def _hint(reasons: Mapping[str, int]) -> str:
    """Say what to do about the most frequent reason."""
    reason = max(reasons, key=lambda name: reasons[name], default="")
    if reason == "dns":
        return "host names cannot be resolved: check the network and the resolver of the workers"
    if reason in ("connect", "timeout"):
        return (
            "the servers cannot be reached: check the network and firewall of the workers, or raise download.timeout_s"
        )
    if reason == "blocked_address":
        return "the hosts are in a private network: list it in download.allowed_networks if that is intended"
    if reason in ("scheme", "invalid_url"):
        return "the URLs are not http(s) URLs: check source.url_column"
    return "check some of the URLs by hand"


# ---- output ---------------------------------------------------------------------------------------------------------


def _samples(urls: pa.Table, keys: Sequence[str], rows: Sequence[_Row], extension: str) -> list[Sample]:
    origins = urls.select(["list", "row", "url"]).to_pylist()
    captions = urls["caption"].to_pylist()
    return [
        Sample(key=key, image=row.image, extension=extension, caption=caption or "", metadata={**origin, **row.facts})
        for key, row, caption, origin in zip(keys, rows, captions, origins, strict=True)
        if row.image is not None
    ]


_FACTS = {
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "sha256": pa.string(),
}


def _table(urls: pa.Table, keys: Sequence[str], rows: Sequence[_Row]) -> pa.Table:
    columns: dict[str, Any] = {
        "key": pa.array(keys, pa.string()),
        **{name: urls[name] for name in urls.column_names},
        "status": pa.array(["success" if row.reason is None else "failed" for row in rows], pa.string()),
        "reason": pa.array([row.reason for row in rows], pa.string()),
    }
    columns |= {name: pa.array([row.facts.get(name) for row in rows], kind) for name, kind in _FACTS.items()}
    return pa.table(columns)


# ---- img2dataset ----------------------------------------------------------------------------------------------------


def _load_img2dataset() -> tuple[Any, Any, Any, Any]:
    """Import img2dataset's modules: reader, downloader, resizer, writer."""
    # Read at import by its dependency, which otherwise asks the network for updates.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    with warnings.catch_warnings():
        # It imports `imghdr`, deprecated in Python 3.11.
        warnings.simplefilter("ignore")
        from img2dataset import downloader, reader, resizer, writer
    return reader, downloader, resizer, writer


def _rebound(function: Any, **replacements: Any) -> Any:
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


def _download(
    urls: pa.Table, config: DownloadConfig, limits: FetchLimits, scratch: Path, report: Callable[[Progress], None]
) -> list[_Row]:
    """Let img2dataset download the rows into ``scratch`` and return what became of each, in row order."""
    reader, downloader, resizer, writer = _load_img2dataset()
    url_list = scratch / "urls.parquet"
    # Only what it needs: a column that cannot be written as JSON would cost it the sample.
    pq.write_table(urls.select(["url", "caption"]), url_list)
    quiet = {"print": _log_instead_of_print}
    tracing = types.SimpleNamespace(print_exc=lambda: logger.debug("img2dataset", exc_info=True))
    read_shards = _rebound(reader.Reader.__iter__, **quiet)
    fetch = _fetch_function(limits, urls.num_rows, report)
    run = _rebound(downloader.Downloader.download_shard, download_image_with_retry=fetch, traceback=tracing, **quiet)
    work = downloader.Downloader(
        sample_writer_class=writer.WebDatasetSampleWriter,
        resizer=_resizer(resizer, config),
        thread_count=config.num_threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(scratch),
        column_list=["caption", "url"],
        timeout=limits.timeout_s,
        number_sample_per_shard=urls.num_rows,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=config.image_format,
        retries=limits.retries,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    whole = reader.Reader(
        str(url_list), "parquet", "url", "caption", None, None, None, urls.num_rows, set(), str(scratch)
    )
    for unit in read_shards(whole):
        run(work, unit)
    return _verified(scratch, urls)


def _resizer(module: Any, config: DownloadConfig) -> Callable[..., Any]:
    """Build img2dataset's resizer."""
    resize = module.Resizer(
        image_size=config.image_size_px,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=config.resize_only_if_bigger,
        encode_format=config.image_format,
        encode_quality=config.image_quality,
        skip_reencode=config.keep_encoded,
    )
    call = _rebound(
        module.Resizer.__call__,
        cv2=types.SimpleNamespace(**{**vars(cv2), "imdecode": _decode_as_stored if config.keep_encoded else _decode}),
        # It would point file descriptors 1 and 2 of the whole process elsewhere during every resize: other threads'
        # progress bars and logs would vanish.
        SuppressStdoutStderr=contextlib.nullcontext,
    )
    return lambda stream, boxes=None: call(resize, stream, boxes)


def _decode(buffer: npt.NDArray[np.uint8], flags: int) -> Any:
    """Decode for img2dataset, which by itself ignores the rotation that cameras note in JPEG files."""
    is_jpeg = buffer[:2].tobytes() == b"\xff\xd8"
    return _decode_as_stored(buffer, cv2.IMREAD_ANYCOLOR if is_jpeg else flags)


def _decode_as_stored(buffer: npt.NDArray[np.uint8], flags: int) -> Any:
    """Decode for img2dataset, which by itself clips images of 16 bits per channel to white."""
    image = cv2.imdecode(buffer, flags)
    if image is not None and image.dtype == np.uint16:
        return np.right_shift(image, 8).astype(np.uint8)
    return image


def _fetch_function(limits: FetchLimits, total: int, report: Callable[[Progress], None]) -> Callable[..., Any]:
    """Build the guarded replacement of img2dataset's fetch function, which also reports progress."""
    lock = threading.Lock()
    done, reported_at = 0, time.monotonic()

    def fetch(row: tuple[int, str | None], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        nonlocal done, reported_at
        position, url = row
        try:
            answer: tuple[int, io.BytesIO | None, str | None] = (position, io.BytesIO(fetch_image(url, limits)), None)
        except FetchError as error:
            logger.debug("%s: %s", url, error)
            answer = (position, None, error.reason)
        with lock:
            done += 1
            if time.monotonic() - reported_at > _REPORT_EVERY_S or done == total:
                reported_at = time.monotonic()
                report(Progress(done=done, total=total, unit="images"))
        return answer

    return fetch


def _verified(scratch: Path, urls: pa.Table) -> list[_Row]:
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


def _row(row: Mapping[str, Any], sample: Sample | None) -> _Row:
    if sample is not None:
        return _Row(None, sample.image, {name: row[name] for name in _FACTS})
    message = row["error_message"] or ""
    if row["status"] == "failed_to_download":
        return _Row(message, None, {})
    return _Row(_RESIZE_REASONS.get(message, "decode"), None, {})
