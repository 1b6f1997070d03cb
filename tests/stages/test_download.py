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
from stages.download import Download, DownloadConfig, _load_img2dataset, _resizer, row_keys
from stages.errors import InputError, ShardError, StageError
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import File, Manifest, ShardRecord
from stages.runner import run_stage
from stages.samples import Sample, read_tar, table_from_bytes, table_to_bytes
from stages.shapes import ShapesConfig
from stages.source import Source, SourceConfig

NUM_ROWS = 60
FAST = {"backoff_s": 0.0, "timeout_s": 5.0, "num_threads": 8}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def img2dataset() -> Any:
    return _load_img2dataset()


@pytest.fixture(scope="module")
def pictures() -> ShapesConfig:
    return ShapesConfig(
        num_images=NUM_ROWS, port=free_port(), missing_fraction=0.15, broken_fraction=0.1, tiny_fraction=0.1
    )


def run(stage: Any, inputs: dict[str, Manifest]) -> Manifest:
    fingerprint = stage.fingerprint({name: m.fingerprint for name, m in inputs.items()})
    cluster = ClusterConfig(executor="local", max_attempts=2, backoff_s=0.0)
    return run_stage(stage, fingerprint, inputs, LocalExecutor(), cluster)


def download_shapes(root: Path, pictures: ShapesConfig, **config: Any) -> Manifest:
    source = Source(SourceConfig(kind="shapes", rows_per_shard=40, shapes=pictures), root=str(root))
    return run(Download(DownloadConfig(**(FAST | config)), root=str(root)), {"source": run(source, {})})


def source_of(root: Path, rows: pa.Table, **metrics: Any) -> Manifest:
    """Publish a source of one shard."""
    data = table_to_bytes(rows)
    storage.write_bytes(f"{root}/urls.parquet", data)
    file = File("urls.parquet", hashlib.sha256(data).hexdigest(), len(data))
    record = ShardRecord(shard_id="s0", files={"urls": file}, num_in=rows.num_rows, num_kept=rows.num_rows)
    return Manifest(
        root=str(root), stage="source", version=1, fingerprint="0" * 16, config={}, inputs={}, records=[record],
        metrics=metrics,
    )  # fmt: skip


def rows_of(urls: list[str | None], captions: list[str | None] | None = None, **extra: Any) -> pa.Table:
    return pa.table(
        {
            "list": ["l"] * len(urls),
            "row": pa.array(range(len(urls)), pa.int64()),
            "url": pa.array(urls, pa.string()),
            "caption": pa.array(captions or ["c"] * len(urls), pa.string()),
            **extra,
        }
    )


def samples_of(manifest: Manifest) -> list[Sample]:
    return [sample for r in manifest.records for sample in read_tar(r.files["images"].read(manifest.root))]


def table_of(manifest: Manifest) -> list[dict[str, Any]]:
    tables = [table_from_bytes(r.files["table"].read(manifest.root)) for r in manifest.records]
    return list(pa.concat_tables(tables).to_pylist())


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
        ({"resize_mode": "no"}, 64),
    ],
)
def test_sizes(tmp_path: Path, config: dict[str, Any], side: int) -> None:
    pictures = ShapesConfig(num_images=4, port=free_port(), tiny_fraction=0)
    manifest = download_shapes(tmp_path, pictures, **config)
    assert manifest.num_kept > 0
    assert {pixels_of(sample.image).shape for sample in samples_of(manifest)} == {(side, side, 3)}


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, image_format, **options)
    return sink.getvalue()


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
    stage = Download(DownloadConfig(**FAST, retries=0), root=str(tmp_path))
    shard = stage.plan(inputs)[0]
    with pytest.raises(ShardError, match=r"40 of 40 rows failed .* \(connect: 40\).*cannot be reached") as caught:
        stage.process(shard, f"{tmp_path}/download/shards")
    assert caught.value.retryable
    assert not storage.list_files(f"{tmp_path}/download")
    with stage.service(inputs):
        assert stage.process(shard, f"{tmp_path}/download/shards").num_kept > 0


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
    slow = Download(DownloadConfig(num_threads=1, timeout_s=99, retries=9), root="r")
    fast = Download(DownloadConfig(), root="r")
    other = Download(DownloadConfig(image_quality=90), root="r")
    assert slow.plan(inputs)[0].id == fast.plan(inputs)[0].id != other.plan(inputs)[0].id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_format": "png"}, "image_quality: 95 is not between 0 and 9"),
        ({"num_threads": 0}, "num_threads"),
        ({"retries": -1}, "retries"),
        ({"allowed_networks": ("10.0.0.1/8",)}, "allowed_networks.*host bits"),
        ({"max_transient_fraction": 2.0}, "max_transient_fraction"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DownloadConfig(**settings)
