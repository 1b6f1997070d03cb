"""The download by the real img2dataset from a real loopback server: complete, verified, the same bytes every time."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import socket
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from stages import shapes, storage
from stages.base import Progress
from stages.download import Download, DownloadConfig, _resizer, row_keys
from stages.errors import ConfigError, InputError, ShardError, StageError
from stages.img2dataset_unit import load_img2dataset
from stages.manifest import Manifest
from stages.shapes import ShapesConfig
from stages.source import Source, SourceConfig
from tests.stages.download_data import rows_of, run, samples_of, source_of, table_of
from tests.stages.hostile_server import encoded, serve

NUM_ROWS = 60
FAST = {"backoff_s": 0.0, "timeout_s": 5.0, "num_threads": 8}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def img2dataset() -> Any:
    return load_img2dataset()


@pytest.fixture(scope="module")
def pictures() -> ShapesConfig:
    return ShapesConfig(
        num_images=NUM_ROWS, port=free_port(), missing_fraction=0.15, broken_fraction=0.1, tiny_fraction=0.1
    )


def download_shapes(root: Path, pictures: ShapesConfig, **config: Any) -> Manifest:
    source = Source(SourceConfig(kind="shapes", rows_per_shard=40, shapes=pictures), root=str(root))
    return run(Download(DownloadConfig(**(FAST | config)), root=str(root)), {"source": run(source, {})})


def pixels_of(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_every_row_ends_where_it_should(tmp_path: Path, pictures: ShapesConfig, capfd: Any) -> None:
    manifest = download_shapes(tmp_path, pictures, image_format="png", image_quality=1)
    defects = [shapes.picture_of(pictures, index).defect for index in range(NUM_ROWS)]
    # A copy of an earlier row has no defect of its own.
    expected = [{"missing": "http_404", "broken": "decode"}.get(str(defect)) for defect in defects]
    table = table_of(manifest)
    assert [row["reason"] for row in table] == expected
    assert [row["row"] for row in table] == list(range(NUM_ROWS))
    assert [row["status"] for row in table] == ["failed" if reason else "success" for reason in expected]
    assert manifest.num_in == NUM_ROWS
    assert manifest.dropped == dict(Counter(reason for reason in expected if reason).most_common())

    samples = samples_of(manifest)
    assert [s.key for s in samples] == [row["key"] for row in table if row["reason"] is None]
    by_key = {row["key"]: row for row in table}
    for sample in samples:
        row = by_key[sample.key]
        served = shapes.image_bytes(pictures, row["row"]) or b""
        assert sample.caption == row["caption"] == shapes.picture_of(pictures, row["row"]).caption
        assert sample.metadata["sha256"] == row["sha256"] == hashlib.sha256(served).hexdigest()
        assert sample.metadata["url"] == row["url"]
        assert (pixels_of(sample.image) == pixels_of(served)).all(), "png keeps every pixel"
        assert pixels_of(sample.image).shape[:2] == (row["height"], row["width"])
        assert row["original_width"] == (8 if defects[row["row"]] == "tiny" else 64)
    out, err = capfd.readouterr()
    assert out == "" and err == "", "img2dataset prints nothing of its own"


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, pictures: ShapesConfig, image_format: str) -> None:
    config = {"image_format": image_format, "image_quality": 5}
    first = download_shapes(tmp_path / "a", pictures, num_threads=8, **config)
    second = download_shapes(tmp_path / "b", pictures, num_threads=1, **config)
    assert first.digest == second.digest
    assert {s.extension for s in samples_of(first)} == {image_format}


def test_keys_are_unique_and_in_row_order() -> None:
    keys = row_keys("ab" * 32, 1000) + row_keys("cd" * 32, 1000)
    assert len(set(keys)) == 2000 and keys == sorted(keys)
    assert keys[0] == "ababababab000000"


def test_served_bytes_can_be_kept(tmp_path: Path, pictures: ShapesConfig) -> None:
    manifest = download_shapes(tmp_path, pictures, image_format="png", image_quality=9, keep_encoded=True)
    for sample in samples_of(manifest):
        assert hashlib.sha256(sample.image).hexdigest() == sample.metadata["sha256"]


@pytest.mark.parametrize(
    ("config", "side"),
    [
        ({"resize_mode": "center_crop", "image_size_px": 32}, 32),
        ({"resize_mode": "keep_ratio", "image_size_px": 100, "resize_only_if_bigger": False}, 100),
        ({"resize_mode": "border", "image_size_px": 32}, 32),
        ({"resize_mode": "no"}, 64),
    ],
)
def test_sizes(tmp_path: Path, config: dict[str, Any], side: int) -> None:
    pictures = ShapesConfig(num_images=4, port=free_port(), tiny_fraction=0)
    manifest = download_shapes(tmp_path, pictures, **config)
    assert manifest.num_kept > 0
    assert {pixels_of(sample.image).shape for sample in samples_of(manifest)} == {(side, side, 3)}


@pytest.mark.parametrize("stored", [("jpg", 95), ("png", 1)])
def test_unusual_images_keep_their_look(img2dataset: Any, stored: tuple[str, int]) -> None:
    """16 bits per channel, and the rotation that cameras note: img2dataset alone stores white, and lying, images."""
    resize = _resizer(img2dataset[2], DownloadConfig(resize_mode="no", image_format=stored[0], image_quality=stored[1]))
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (40, 1))

    deep = encoded(Image.fromarray(ramp.astype(np.uint16) * 257), "PNG")
    image, width, height, *_, error = resize(io.BytesIO(deep))
    assert (width, height, error) == (64, 40, None)
    assert np.abs(pixels_of(image)[..., 0].astype(int) - ramp).max() <= 4

    rotation = Image.Exif()
    rotation[0x0112] = 6
    turned = encoded(Image.fromarray(ramp), "JPEG", exif=rotation, quality=95)
    image, width, height, *_, error = resize(io.BytesIO(turned))
    assert (width, height, error) == (40, 64, None)
    assert np.abs(pixels_of(image)[..., 0].astype(int) - np.rot90(ramp, -1)).max() <= 8

    glass = Image.fromarray(np.full((20, 20, 4), (255, 0, 0, 0), np.uint8))
    image, *_ = resize(io.BytesIO(encoded(glass, "PNG")))
    assert pixels_of(image).min() >= 250, "transparent is white"


@pytest.mark.parametrize("mode", ["keep_ratio", "center_crop", "border", "keep_ratio_largest", "no"])
@pytest.mark.parametrize("only_if_bigger", [True, False])
def test_a_strip_is_not_blown_up(img2dataset: Any, mode: Any, only_if_bigger: bool) -> None:
    """One pixel high and 20,000 wide: with its height brought to 256, it would take four gigabytes."""
    config = DownloadConfig(resize_mode=mode, resize_only_if_bigger=only_if_bigger)
    strip = encoded(Image.new("RGB", (20_000, 1)), "PNG")
    image, width, height, *_, error = _resizer(img2dataset[2], config)(io.BytesIO(strip))
    if mode in ("keep_ratio", "center_crop") and not only_if_bigger:
        assert (image, error) == (None, "aspect ratio too large")
    else:
        assert error is None and width * height <= 20_000 * 256
        assert pixels_of(image).shape == (height, width, 3)


def test_what_cannot_be_stored_has_a_reason(tmp_path: Path) -> None:
    """WebP holds no more than 16,383 pixels in a row; an image refused by its sides is one of too many pixels."""
    with serve() as server:
        source = source_of(tmp_path, rows_of([f"{server.url}/special/strip.png", f"{server.url}/image"]))
        for settings, reason in (
            ({"resize_mode": "no", "image_format": "webp"}, "resize"),
            ({"resize_only_if_bigger": False}, "too_many_pixels"),
        ):
            config = DownloadConfig(**FAST, allowed_networks=("127.0.0.0/8",), **settings)
            manifest = run(Download(config, root=str(tmp_path)), {"source": source})
            assert [row["reason"] for row in table_of(manifest)] == [reason, None]


def test_transparency_is_laid_on_white_as_img2dataset_does(img2dataset: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 700, 4), dtype=np.uint8)
    file = encoded(Image.fromarray(pixels), "PNG")
    config = DownloadConfig(resize_mode="no", image_format="png", image_quality=1)
    ours, *_ = _resizer(img2dataset[2], config)(io.BytesIO(file))
    bare = img2dataset[2].Resizer(256, "no", False, encode_format="png", encode_quality=1)
    theirs, *_ = bare(io.BytesIO(file))
    assert (pixels_of(ours) == pixels_of(theirs)).all()


def test_a_repeated_shard_is_the_same_and_progress_is_reported(tmp_path: Path, pictures: ShapesConfig) -> None:
    manifest = download_shapes(tmp_path, pictures)
    source = Source(SourceConfig(kind="shapes", rows_per_shard=40, shapes=pictures), root=str(tmp_path))
    inputs = {"source": run(source, {})}
    stage = Download(DownloadConfig(**FAST), root=str(tmp_path))
    seen: list[Progress] = []
    stage.report = seen.append
    with stage.service(inputs):
        record = stage.process(stage.plan(inputs)[0], f"{tmp_path}/again")
    assert record.identity == manifest.records[0].identity
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (40, 40, "images")


def test_odd_rows_survive(tmp_path: Path) -> None:
    """Captions and extra columns that are hard to write as text or JSON; a URL that is none."""
    pictures = ShapesConfig(num_images=10, port=free_port(), missing_fraction=0, broken_fraction=0)
    urls: list[str | None] = [shapes.url_of(pictures, index) for index in range(4)]
    days = pa.array([datetime.date(2020, 1, 1 + i) for i in range(5)])
    captions = ["ünïcode 猫\n\ttab", None, "", "x" * 5000, "c"]
    source = source_of(tmp_path, rows_of([*urls, None], captions, taken=days), shapes=vars(pictures))
    manifest = run(Download(DownloadConfig(**FAST), root=str(tmp_path)), {"source": source})
    table = table_of(manifest)
    assert [row["reason"] for row in table] == [None] * 4 + ["invalid_url"]
    assert [row["caption"] for row in table] == captions
    assert [row["taken"] for row in table] == days.to_pylist()
    assert [sample.caption for sample in samples_of(manifest)] == [c or "" for c in captions[:4]]


def test_one_row(tmp_path: Path) -> None:
    pictures = ShapesConfig(num_images=1, port=free_port(), missing_fraction=0, broken_fraction=0)
    manifest = download_shapes(tmp_path, pictures)
    assert len(samples_of(manifest)) == 1


def test_a_sample_that_img2dataset_loses_is_noticed(
    tmp_path: Path, pictures: ShapesConfig, monkeypatch: pytest.MonkeyPatch, img2dataset: Any
) -> None:
    """Its writer's errors are swallowed after the success was counted."""
    writer = img2dataset[3].WebDatasetSampleWriter
    write = writer.write

    def lossy(self: Any, image: Any, key: str, caption: Any, meta: Any) -> None:
        if key.endswith("07"):
            raise OSError("no space left on device")
        write(self, image, key, caption, meta)

    monkeypatch.setattr(writer, "write", lossy)
    source = Source(SourceConfig(kind="shapes", rows_per_shard=40, shapes=pictures), root=str(tmp_path))
    inputs = {"source": run(source, {})}
    stage = Download(DownloadConfig(**FAST), root=str(tmp_path))
    with stage.service(inputs), pytest.raises(ShardError, match="does not verify: 40 rows") as caught:
        stage.process(stage.plan(inputs)[0], f"{tmp_path}/download/shards")
    assert caught.value.retryable
    assert not storage.list_files(f"{tmp_path}/download")
    monkeypatch.undo()
    assert run(stage, inputs).num_in == NUM_ROWS, "the same command succeeds later"


def test_an_outage_commits_nothing_and_passes(tmp_path: Path, pictures: ShapesConfig) -> None:
    source = Source(SourceConfig(kind="shapes", rows_per_shard=40, shapes=pictures), root=str(tmp_path))
    inputs = {"source": run(source, {})}
    stage = Download(DownloadConfig(**FAST, retries=0, circuit_breaker_failures=0), root=str(tmp_path))
    shard = stage.plan(inputs)[0]
    with pytest.raises(ShardError, match=r"40 of 40 rows failed .* \(connect: 40\).*cannot be reached") as caught:
        stage.process(shard, f"{tmp_path}/download/shards")
    assert caught.value.retryable
    assert not storage.list_files(f"{tmp_path}/download")
    with stage.service(inputs):
        assert stage.process(shard, f"{tmp_path}/download/shards").num_kept > 0


def test_a_dead_host_is_given_up_and_the_record_says_so(tmp_path: Path) -> None:
    pictures = ShapesConfig(num_images=20, port=free_port(), missing_fraction=0, broken_fraction=0)
    port = free_port()
    dead = [f"http://127.0.0.1:{port}/{row}" for row in range(19)]
    urls = [shapes.url_of(pictures, index) for index in range(20)] + dead + ["http://no.invalid/a.jpg"]
    source = source_of(tmp_path, rows_of(urls), shapes=vars(pictures))
    config = DownloadConfig(
        **FAST, retries=0, connections_per_host=1, circuit_breaker_failures=4, allowed_networks=("127.0.0.0/8",)
    )
    manifest = run(Download(config, root=str(tmp_path)), {"source": source})
    assert manifest.dropped == {"host_down": 15, "connect": 4, "dns": 1}
    metrics = manifest.records[0].metrics
    expected = {"hosts": 3, "hosts_down": 1, "hosts_busy": 0, "attempts": 25, "retries": 0, "dns_lookups": 1}
    assert expected.items() <= metrics.items()
    assert metrics["dns_failures"] == 1 and 0 < metrics["dns_median_s"] == metrics["dns_worst_s"]


def test_an_outage_of_the_name_resolution_names_its_health(tmp_path: Path) -> None:
    source = source_of(tmp_path, rows_of([f"http://h{row}.invalid/a.jpg" for row in range(5)]))
    stage = Download(DownloadConfig(**FAST, retries=0), root=str(tmp_path))
    with pytest.raises(ShardError, match=r"dns: 5.*\(name resolution: 5 of 5 lookups failed, the slowest \d+\.\d s\)"):
        stage.process(stage.plan({"source": source})[0], f"{tmp_path}/download/shards")


def test_files_are_checked_against_the_hashes_of_the_list(tmp_path: Path) -> None:
    pictures = ShapesConfig(num_images=4, port=free_port(), missing_fraction=0, broken_fraction=0)
    files = [shapes.image_bytes(pictures, index) or b"" for index in range(4)]
    digests = [hashlib.md5(data).hexdigest() for data in files[:2]] + ["0" * 32, None]
    rows = rows_of([shapes.url_of(pictures, index) for index in range(4)], md5=pa.array(digests, pa.string()))
    source = source_of(tmp_path, rows, config={"extra_columns": ["md5"]}, shapes=vars(pictures))
    manifest = run(Download(DownloadConfig(**FAST, hash_column="md5"), root=str(tmp_path)), {"source": source})
    assert [row["reason"] for row in table_of(manifest)] == [None, None, "hash_mismatch", None]
    assert [row["md5"] for row in table_of(manifest)] == digests
    other = Download(DownloadConfig(**FAST, hash_column="md5", hash_algorithm="sha256"), root=str(tmp_path))
    manifest = run(other, {"source": source})
    assert [row["reason"] for row in table_of(manifest)] == ["hash_mismatch"] * 3 + [None]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"extra_columns": ["licence"]},
            r"download.hash_column: 'md5' is not one .*\(licence\); add it to source.extra",
        ),
        ({}, r"download.hash_column: 'md5' is not one .*\(none\)"),
    ],
)
def test_a_missing_hash_column_is_refused_before_any_work(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    source = source_of(tmp_path, rows_of(["http://a/1"]), config=config)
    with pytest.raises(ConfigError, match=message):
        Download(DownloadConfig(hash_column="md5"), root=str(tmp_path)).plan({"source": source})


def test_hashes_are_text(tmp_path: Path) -> None:
    source = source_of(tmp_path, rows_of(["http://a/1"], md5=pa.array([7])), config={"extra_columns": ["md5"]})
    with pytest.raises(ConfigError, match=r"download.hash_column: 'md5' holds int64, not hexadecimal text"):
        run(Download(DownloadConfig(hash_column="md5"), root=str(tmp_path)), {"source": source})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://{name}.invalid/a.jpg", r"\(dns: 3\).*names cannot be resolved"),
        ("http://127.0.0.1:1/a.jpg", r"\(blocked_address: 3\).*download.allowed_networks"),
        ("/only/a/path.jpg", r"\(invalid_url: 3\).*source.url_column"),
    ],
)
def test_a_data_set_without_a_single_image_is_an_error(tmp_path: Path, url: str, message: str) -> None:
    inputs = {"source": source_of(tmp_path, rows_of([url.format(name=i) for i in range(3)]))}
    stage = Download(DownloadConfig(**FAST, retries=0), root=str(tmp_path))
    with pytest.raises(StageError, match=message):
        run(stage, inputs)


def test_loopback_is_open_for_the_shapes_only(tmp_path: Path) -> None:
    pictures = ShapesConfig(num_images=3, port=free_port(), missing_fraction=0, broken_fraction=0)
    other = ShapesConfig(num_images=3, port=free_port(), missing_fraction=0, broken_fraction=0)
    urls: list[str | None] = [shapes.url_of(pictures, 0), shapes.url_of(other, 1)]
    source = source_of(tmp_path, rows_of(urls), shapes=vars(pictures))
    with shapes.serve(other):
        manifest = run(Download(DownloadConfig(**FAST), root=str(tmp_path)), {"source": source})
        assert [row["reason"] for row in table_of(manifest)] == [None, "blocked_address"]
        allowed = Download(DownloadConfig(**FAST, allowed_networks=("127.0.0.0/8",)), root=str(tmp_path))
        manifest = run(allowed, {"source": source})
        assert [row["reason"] for row in table_of(manifest)] == [None, None]


def test_nothing_is_served_for_ordinary_lists(tmp_path: Path) -> None:
    port = free_port()
    stage = Download(DownloadConfig(), root=str(tmp_path))
    plain = {"source": source_of(tmp_path, rows_of(["http://a/1"]))}
    with stage.service(plain), pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1)
    assert "served_port" not in stage.plan(plain)[0].params


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, rows_of(["http://a/1"]))
    empty = dataclasses.replace(source, records=())
    with pytest.raises(InputError, match="source has no rows"):
        Download(DownloadConfig(), root=str(tmp_path)).plan({"source": empty})


def test_speed_settings_do_not_change_the_identity(tmp_path: Path) -> None:
    inputs = {"source": source_of(tmp_path, rows_of(["http://a/1"]))}
    polite = {"connections_per_host": 1, "circuit_breaker_failures": 3, "max_host_pause_s": 600.0}
    slow = Download(DownloadConfig(num_threads=1, timeout_s=99, retries=9, **polite), root="r")
    fast = Download(DownloadConfig(), root="r")
    other = Download(DownloadConfig(image_quality=90), root="r")
    assert slow.plan(inputs)[0].id == fast.plan(inputs)[0].id != other.plan(inputs)[0].id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_format": "png"}, "image_quality: 95 is not between 0 and 9"),
        ({"num_threads": 0}, "num_threads"),
        ({"retries": -1}, "retries"),
        ({"connections_per_host": 0}, "connections_per_host: 0 is not above 0"),
        ({"circuit_breaker_failures": -1}, "circuit_breaker_failures: -1 is negative"),
        ({"max_host_pause_s": -1.0}, "max_host_pause_s"),
        ({"max_host_pause_s": float("inf")}, "max_host_pause_s: inf is not a number of seconds"),
        ({"timeout_s": float("nan")}, "timeout_s: nan is not a number of seconds"),
        ({"allowed_networks": ("10.0.0.1/8",)}, "allowed_networks.*host bits"),
        ({"max_transient_fraction": 2.0}, "max_transient_fraction"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DownloadConfig(**settings)
