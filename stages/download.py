"""Download: URLs to webdataset shards, and a table of all rows with what became of each.

img2dataset does the work - reading, threads, resizing, encoding, writing - in a scratch folder, one source shard at a
time, in this process (``stages/img2dataset_unit.py``). The fetching is ours: guarded (``stages/fetch.py``) and polite
(``stages/politeness.py``). What img2dataset wrote is verified, then rewritten so that equal images give equal bytes: in
row order, with keys derived from the rows, and published. Why a row has no image is one of the codes of
``stages/failure_codes.py``.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import math
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
from PIL import Image

from stages import shapes, storage
from stages.base import Resources, Result, Shard, Stage, record_uri, setting
from stages.errors import ConfigError, InputError, ShardError, StageError
from stages.failure_codes import is_transient, remedy_of
from stages.fetch import FetchLimits
from stages.img2dataset_unit import FACTS, Resize, UnitRow, load_img2dataset, rebound, run_unit
from stages.manifest import Manifest, ShardRecord
from stages.politeness import Courtesy
from stages.retries import settled, with_retries, withdraw
from stages.row_fetcher import ExpectedHashes, RowFetcher
from stages.samples import Sample, row_keys, table_from_bytes, table_to_bytes, write_tar
from stages.tombstones import REASON as TAKEDOWN
from stages.tombstones import Tombstones, forget_rows, read_tombstones

_ROWS_AT_ONCE_PX = 1 << 18
_MAX_QUALITY = {"jpg": 100, "png": 9, "webp": 100}


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
    hash_column: str | None = setting(
        None,
        "extra column with the hash of every file; files that differ are dropped, rows without hash are not checked",
    )
    hash_algorithm: Literal["md5", "sha256"] = setting("md5", "of `hash_column`")
    num_threads: int = setting(16, "connections at once", affects="nothing")
    connections_per_host: int = setting(
        4, "connections of one shard to one host (name and port) at once; each worker does one shard", affects="nothing"
    )
    circuit_breaker_failures: int = setting(
        10,
        "failures to reach a host in a row after which the shard's other rows of it fail at once (host_down); 0: off",
        affects="nothing",
    )
    max_host_pause_s: float = setting(
        60.0,
        "seconds that a host may ask to be left alone (429, Retry-After), in all, before the shard's other rows of it "
        "fail (host_busy); also the longest Retry-After, of any status, that a row waits for",
        affects="nothing",
    )
    obey_robots_txt: bool = setting(False, "ask every host for its robots.txt first, and obey it")
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
        for name in ("image_size_px", "num_threads", "connections_per_host", "max_bytes", "max_pixels", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")
        for name in ("retries", "backoff_s", "max_redirects", "circuit_breaker_failures", "max_host_pause_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative")
        for name in ("timeout_s", "backoff_s", "max_host_pause_s"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)} is not a number of seconds")
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
            max_bytes=self.max_bytes,
            max_pixels=self.max_pixels,
            max_redirects=self.max_redirects,
            user_agent=self.user_agent,
            opt_out_directives=self.opt_out_directives,
            allowed_networks=self.allowed_networks,
            allowed_endpoints=allowed_endpoints,
        )

    def courtesy(self) -> Courtesy:
        """Return what the hosts are spared."""
        return Courtesy(
            connections_per_host=self.connections_per_host,
            retries=self.retries,
            backoff_s=self.backoff_s,
            max_host_pause_s=self.max_host_pause_s,
            circuit_breaker_failures=self.circuit_breaker_failures,
            obey_robots_txt=self.obey_robots_txt,
        )


class Download(Stage[DownloadConfig]):
    """Downloads the rows of every source shard; see the module's docstring."""

    name: ClassVar[str] = "download"
    repeatable: ClassVar[bool] = False
    version: ClassVar[int] = 2
    counts: ClassVar[str | None] = "source"
    _served: shapes.ShapesConfig | None = None  # known while the service is up, and travels to the workers

    @property
    def upstream(self) -> tuple[str, ...]:
        """It reads the rows of ``source``."""
        return ("source",)

    @property
    def resources(self) -> Resources:
        """One core: most of the time, connections wait."""
        return Resources(num_cpus=1.0)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Make one shard of every source shard.

        Raises:
            InputError: if the source is empty.
            ConfigError: if the source has no column ``hash_column``.
        """
        records = inputs["source"].records
        if not records:
            raise InputError("download: the source has no rows; check source.lists")
        self._require_hashes(inputs["source"].config.get("extra_columns", ()))
        # Procedural shapes are the one service on this machine that may be fetched from without asking.
        served = _served_shapes(inputs["source"])
        params = {"served_port": served.port} if served else {}
        shards = [
            self.shard(index, inputs={"urls": record.files["urls"]}, **params) for index, record in enumerate(records)
        ]
        return with_retries(self.root, shards, self._again)

    def _again(self, shard: Shard, rows: Sequence[int]) -> Shard:
        """Build the shard that tries some rows of another one again."""
        same = {name: value for name, value in shard.params.items() if name == "served_port"}
        return self.shard(0, inputs=shard.inputs, **same, rows=rows, retry_of=shard.id)

    def service(self, inputs: Mapping[str, Manifest]) -> AbstractContextManager[None]:
        """Serve the shapes while they are downloaded, if that is what the source is."""
        self._served = _served_shapes(inputs["source"])
        return shapes.serve(self._served) if self._served else contextlib.nullcontext()

    def setup(self) -> None:
        """Load img2dataset; serve the shapes where the driver's cannot be reached."""
        load_img2dataset()
        if self._served is not None:
            shapes.serve_on_this_machine(self._served)

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Download one shard.

        Raises:
            ShardError: retryable, if img2dataset's output does not verify or too many rows failed for reasons that
                pass (no network, no name resolution).
        """
        started_at = time.monotonic()
        withdraw(self.root, output, shard, self._again)
        urls = table_from_bytes(shard.inputs["urls"].read(self.root))
        keys = row_keys(shard.inputs["urls"].sha256, urls.num_rows)
        chosen = shard.params.get("rows")
        if chosen is not None:
            urls, keys = urls.take(pa.array(chosen, pa.int64())), [keys[position] for position in chosen]
        tombstones = read_tombstones(self.root)
        rows, metrics = self._rows_without(tombstones, shard, urls, keys)
        while True:
            left = _taken_down(tombstones, urls, keys, rows)
            record = self._commit_rows(shard, output, urls, keys, left, metrics, started_at)
            # A takedown puts its tombstones up, then looks at what is committed: it saw this shard, or is seen now.
            before, tombstones = tombstones, read_tombstones(self.root)
            if tombstones == before:
                return record

    def _commit_rows(
        self,
        shard: Shard,
        output: str,
        urls: pa.Table,
        keys: Sequence[str],
        rows: Sequence[UnitRow],
        metrics: Mapping[str, float],
        started_at: float,
    ) -> ShardRecord:
        dropped = Counter(row.reason for row in rows if row.reason is not None)
        if shard.params.get("rows") is None:  # of rows that are tried again, any number may fail again
            self.refuse_outage(dropped, len(rows), metrics)
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
            metrics=metrics,
        )

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Check that there is a data set, and count rows that were tried again where they were tried last.

        Raises:
            StageError: if not a single image arrived.
        """
        planned = {shard.id: shard for shard in self.plan(inputs)}
        for record in records:
            if record.shard_id not in planned:  # the shard that it retried was done anew in this run
                storage.delete(record_uri(storage.join(self.root, self.name, "shards"), record.shard_id))
        records = [record for record in records if record.shard_id in planned]
        if not any(record.num_kept for record in records):
            reasons: Counter[str] = Counter()
            for record in records:
                reasons.update(record.dropped)
            hint = _hint(reasons, [record.metrics for record in records])
            raise StageError(
                f"download: none of {reasons.total()} rows gave an image ({_listed(reasons)}); {hint}, "
                "then run again with --force download"
            )
        retry_of = {s.params["retry_of"]: s.id for s in planned.values() if "retry_of" in s.params}
        return Result(records=settled(self.root, records, retry_of))

    def _rows_without(
        self, tombstones: Tombstones, shard: Shard, urls: pa.Table, keys: Sequence[str]
    ) -> tuple[list[UnitRow], dict[str, float]]:
        """Make the rows; the servers of those that are known to be taken down are not asked."""
        column = urls["url"].to_pylist()
        # A row without a URL is asked for nowhere.
        wanted = [
            None if tombstones.names({"key": key, "url": url}) else url for key, url in zip(keys, column, strict=True)
        ]
        place = urls.column_names.index("url")
        return self.rows_of(shard, urls.set_column(place, "url", pa.array(wanted, pa.string())))

    def rows_of(self, shard: Shard, urls: pa.Table) -> tuple[list[UnitRow], dict[str, float]]:
        """Return what became of every row, and how the hosts and the name resolution did."""
        served_port = shard.params.get("served_port")
        endpoints = frozenset({(shapes.HOST, int(served_port))}) if served_port else frozenset()
        fetcher = RowFetcher(
            urls["url"].to_pylist(), self.config.limits(endpoints), self.config.courtesy(), hashes=self._hashes(urls)
        )
        scratch = tempfile.TemporaryDirectory(prefix="unclip-download-")
        with contextlib.closing(fetcher), scratch as folder:
            rows = run_unit(
                urls,
                fetcher,
                _resizer(load_img2dataset()[2], self.config),
                image_format=self.config.image_format,
                num_threads=self.config.num_threads,
                scratch=Path(folder),
                report=self.report,
            )
        return rows, fetcher.summary()

    def _require_hashes(self, columns: Sequence[str]) -> None:
        name = self.config.hash_column
        if name is not None and name not in columns:
            listed = ", ".join(columns) or "none"
            raise ConfigError(
                f"download.hash_column: '{name}' is not one of the extra columns of the source ({listed}); add it to "
                "source.extra_columns"
            )

    def _hashes(self, urls: pa.Table) -> ExpectedHashes | None:
        name = self.config.hash_column
        if name is None:
            return None
        self._require_hashes(urls.column_names)
        if not pa.types.is_string(urls[name].type) and not pa.types.is_large_string(urls[name].type):
            raise ConfigError(
                f"download.hash_column: '{name}' holds {urls[name].type}, not hexadecimal text; name another column"
            )
        return ExpectedHashes(self.config.hash_algorithm, urls[name].to_pylist())

    def refuse_outage(self, dropped: Mapping[str, int], num_rows: int, metrics: Mapping[str, float]) -> None:
        """Refuse to commit a shard most of whose rows failed for reasons that pass.

        Raises:
            ShardError: retryable.
        """
        transient = {reason: count for reason, count in dropped.items() if is_transient(reason)}
        num_transient = sum(transient.values())
        if num_transient > self.config.max_transient_fraction * num_rows:
            raise ShardError(
                f"{num_transient} of {num_rows} rows failed for reasons that pass ({_listed(transient)}), more than "
                f"download.max_transient_fraction: {self.config.max_transient_fraction:g} allows; "
                f"{_hint(transient, [metrics])}",
                retryable=True,
            )


def _served_shapes(source: Manifest) -> shapes.ShapesConfig | None:
    settings = source.metrics.get("shapes")
    return shapes.ShapesConfig(**settings) if settings else None


def _listed(reasons: Mapping[str, int]) -> str:
    most = Counter(reasons).most_common(4)
    return ", ".join(f"{reason}: {count}" for reason, count in most)


def _hint(reasons: Mapping[str, int], metrics: Sequence[Mapping[str, float]]) -> str:
    """Say what to do about the most frequent reason, and how the name resolution did if it failed."""
    lookups, failures = (int(sum(shard.get(name, 0) for shard in metrics)) for name in ("dns_lookups", "dns_failures"))
    if not failures:
        return remedy_of(reasons)
    worst_s = max(shard.get("dns_worst_s", 0.0) for shard in metrics)
    return (
        f"{remedy_of(reasons)} (name resolution: {failures} of {lookups} lookups failed, the slowest {worst_s:.1f} s)"
    )


# ---- output ---------------------------------------------------------------------------------------------------------


def _taken_down(
    tombstones: Tombstones, urls: pa.Table, keys: Sequence[str], rows: Sequence[UnitRow]
) -> Sequence[UnitRow]:
    """Empty the rows that have a tombstone."""
    gone = UnitRow(TAKEDOWN, None, {})
    return [
        gone if tombstones.names({"key": key, "url": url, **row.facts}) else row
        for key, url, row in zip(keys, urls["url"].to_pylist(), rows, strict=True)
    ]


def _samples(urls: pa.Table, keys: Sequence[str], rows: Sequence[UnitRow], extension: str) -> list[Sample]:
    origins = urls.select(["list", "row", "url"]).to_pylist()
    captions = urls["caption"].to_pylist()
    return [
        Sample(key=key, image=row.image, extension=extension, caption=caption or "", metadata={**origin, **row.facts})
        for key, row, caption, origin in zip(keys, rows, captions, origins, strict=True)
        if row.image is not None
    ]


def _table(urls: pa.Table, keys: Sequence[str], rows: Sequence[UnitRow]) -> pa.Table:
    columns: dict[str, Any] = {
        "key": pa.array(keys, pa.string()),
        **{name: urls[name] for name in urls.column_names},
        "status": pa.array(["success" if row.reason is None else "failed" for row in rows], pa.string()),
        "reason": pa.array([row.reason for row in rows], pa.string()),
    }
    for name in FACTS:
        kind = pa.string() if name == "sha256" else pa.int32()
        columns[name] = pa.array([row.facts.get(name) for row in rows], kind)
    return forget_rows(pa.table(columns), [row.reason == TAKEDOWN for row in rows])


# ---- resizing ----


def _resizer(module: Any, config: DownloadConfig) -> Resize:
    """Build img2dataset's resizer."""
    resize = module.Resizer(
        image_size=config.image_size_px,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=config.resize_only_if_bigger,
        encode_format=config.image_format,
        encode_quality=config.image_quality,
        skip_reencode=config.keep_encoded,
        max_aspect_ratio=_max_aspect_ratio(config),
    )
    decode = _decode_as_stored if config.keep_encoded else _decode
    cv2.setNumThreads(1)  # as img2dataset does for every image, which costs as much as a small image's decoding
    call = rebound(
        module.Resizer.__call__,
        A=_lasting_transforms(module.A),
        cv2=types.SimpleNamespace(**{**vars(cv2), "imdecode": decode, "setNumThreads": lambda _: None}),
        # It would point file descriptors 1 and 2 of the whole process elsewhere during every resize: other threads'
        # progress bars and logs would vanish.
        SuppressStdoutStderr=contextlib.nullcontext,
    )
    return lambda stream, boxes=None: call(resize, stream, boxes)


def _max_aspect_ratio(config: DownloadConfig) -> float:
    """Return the ratio of sides above which an image is refused: a strip of one pixel would become gigabytes large."""
    enlarges_shorter_side = config.resize_mode in ("keep_ratio", "center_crop") and not config.resize_only_if_bigger
    return max(config.max_pixels / config.image_size_px**2, 10.0) if enlarges_shorter_side else math.inf


def _lasting_transforms(albumentations: Any) -> Any:
    """Return the transforms that img2dataset's resizer uses, built once per thread instead of once per image."""
    names = ("SmallestMaxSize", "LongestMaxSize", "CenterCrop", "PadIfNeeded")

    def lasting(build: Callable[..., Any]) -> Callable[..., Any]:
        of_thread = threading.local()  # a transform keeps what it was last applied to

        def find(**settings: Any) -> Any:
            built = vars(of_thread)
            key = repr(sorted(settings.items()))
            if key not in built:
                with warnings.catch_warnings():
                    # img2dataset uses a name of `border` that is on its way out.
                    warnings.simplefilter("ignore")
                    built[key] = build(**settings)
            return built[key]

        return find

    return types.SimpleNamespace(**{name: lasting(getattr(albumentations, name)) for name in names})


def _decode(buffer: npt.NDArray[np.uint8], flags: int) -> Any:
    """Decode for img2dataset, which by itself ignores the rotation that cameras note in JPEG files."""
    is_jpeg = buffer[:2].tobytes() == b"\xff\xd8"
    if buffer[:8].tobytes() == b"\x89PNG\r\n\x1a\n" and buffer[24:26].tobytes() == b"\x08\x06":
        return _transparent_png_on_white(buffer)
    image = _decode_as_stored(buffer, cv2.IMREAD_ANYCOLOR if is_jpeg else flags)
    return _on_white(image) if image is not None and image.ndim == 3 and image.shape[2] == 4 else image


def _transparent_png_on_white(buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Decode a PNG of 8-bit RGBA, laid on white; OpenCV takes twice the memory for it.

    Returns:
        uint8 ``(H, W, 3)``, BGR.
    """
    with Image.open(io.BytesIO(buffer.tobytes())) as image:
        width, height = image.size
        laid = np.empty((height, width, 3), np.uint8)
        step = max(1, _ROWS_AT_ONCE_PX // width)
        for top in range(0, height, step):
            rows = np.asarray(image.crop((0, top, width, min(top + step, height))))[..., [2, 1, 0, 3]]
            laid[top : top + step] = _on_white(np.ascontiguousarray(rows))
    return laid


def _on_white(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Lay an image with transparency on white, as img2dataset does, whose floats take 24 times the memory at once.

    Args:
        image: uint8 ``(H, W, 4)``; its memory is used for the result.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    height, width = image.shape[:2]
    laid = image.reshape(-1)[: height * width * 3].reshape(height, width, 3)
    step = max(1, _ROWS_AT_ONCE_PX // width)
    for top in range(0, height, step):
        rows = image[top : top + step]
        alpha = rows[..., 3:]
        # What is written ends before the rows that are still to be read.
        laid[top : top + step] = np.rint((alpha / 255 * rows[..., :3] + 255 - alpha).clip(0, 255))
    return laid


def _decode_as_stored(buffer: npt.NDArray[np.uint8], flags: int) -> Any:
    """Decode for img2dataset, which by itself clips images of 16 bits per channel to white."""
    image = cv2.imdecode(buffer, flags)
    if image is not None and image.dtype == np.uint16:
        return np.right_shift(image, 8).astype(np.uint8)
    return image
