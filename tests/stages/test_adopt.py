"""Adopting a real output of img2dataset: what it has is taken over and checked, what it lost is downloaded."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.adopt import Adoption, _reason_of, check_adoptable
from stages.download import Download, DownloadConfig
from stages.errors import ConfigError, InputError, StageError
from stages.failure_codes import failure_code, is_transient
from stages.manifest import Manifest
from stages.retries import request_retries
from stages.samples import read_tar, table_from_bytes
from stages.source import Source, SourceConfig
from tests.stages.data_run import Pictures, serving
from tests.stages.small_store import run

NUM_ROWS = 12
MAKE = """
import sys
from img2dataset import download
download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format="parquet", url_col="url", caption_col="caption",
         output_format="webdataset", number_sample_per_shard=8, processes_count=1, thread_count=4, image_size=32,
         resize_mode="no", encode_format="png", encode_quality=1, enable_wandb=False, timeout=5, retries=0,
         compute_hash="sha256")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Pictures]:
    with serving() as found:
        found.failing = {"/5.png"}
        yield found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: Pictures) -> Path:
    """Let img2dataset itself download twelve rows, of which one is missing and one fails for now."""
    folder = tmp_path_factory.mktemp("img2dataset")
    urls = [server.url(i) for i in range(NUM_ROWS)]
    urls[3] = server.url("missing")
    captions = [f"picture {i}" for i in range(NUM_ROWS)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), folder / "list.parquet")
    command = [sys.executable, "-c", MAKE, str(folder / "list.parquet"), str(folder / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "out"


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """Copy it, for a test to damage."""
    copy = tmp_path / "out"
    copy.mkdir()
    for path in made.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


CONFIG = DownloadConfig(
    image_format="png", image_quality=1, allowed_networks=("127.0.0.0/8",), retries=0, backoff_s=0.0
)


def source_of(root: Path, output: Path) -> Manifest:
    return run(Source(SourceConfig(lists=(str(output),), rows_per_shard=5), root=str(root)), {})


def adopt(root: Path, output: Path, config: DownloadConfig = CONFIG) -> Manifest:
    stage = Adoption(config, root=str(root), folder=str(output))
    return run(stage, {"source": source_of(root, output)})


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    return [row for r in manifest.records for row in table_from_bytes(r.files["table"].read(manifest.root)).to_pylist()]


def images_of(manifest: Manifest) -> dict[str, bytes]:
    return {s.caption: s.image for r in manifest.records for s in read_tar(r.files["images"].read(manifest.root))}


@pytest.mark.slow
def test_everything_is_taken_over_and_nothing_fetched(output: Path, server: Pictures, tmp_path: Path) -> None:
    server.num_requests.clear()
    manifest = adopt(tmp_path / "store", output)
    assert server.num_requests == {}
    assert (manifest.num_in, manifest.num_kept, manifest.dropped) == (NUM_ROWS, 10, {"http_404": 1, "http_503": 1})
    originals = [path for path in sorted(output.iterdir()) if path.suffix == ".tar"]
    expected = {sample.caption: sample.image for path in originals for sample in read_tar(path.read_bytes())}
    assert images_of(manifest) == expected and len(expected) == 10
    kept = [row for row in rows_of(manifest) if row["status"] == "success"]
    assert all(row["width"] == row["original_height"] == 32 and len(row["sha256"]) == 64 for row in kept)
    # The download itself would have got the same identity: a later run finds it done.
    stage = Adoption(CONFIG, root=str(tmp_path / "store"), folder=str(output))
    assert Manifest.read(stage.root, "download", manifest.fingerprint) == manifest


@pytest.mark.slow
def test_what_it_lost_is_named_and_downloaded(output: Path, server: Pictures, tmp_path: Path) -> None:
    rewrite(output / "00000.tar", lost={"picture 1"}, damaged={"picture 2"})
    (output / "00001.tar").write_bytes((output / "00001.tar").read_bytes()[:1000])
    manifest = adopt(tmp_path / "store", output)
    assert manifest.dropped == {"http_404": 1, "http_503": 1, "lost": 6}
    request_retries(manifest, is_transient)
    server.failing = set()
    again = run(Download(CONFIG, root=manifest.root), {"source": source_of(tmp_path / "store", output)})
    server.failing = {"/5.png"}
    assert again.dropped == {"http_404": 1} and again.num_kept == NUM_ROWS - 1


def rewrite(path: Path, *, lost: set[str], damaged: set[str]) -> None:
    """Write a tar anew without some samples, and with half of the image of others."""
    samples = list(read_tar(path.read_bytes()))
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for sample in samples:
            if sample.caption in lost:
                continue
            image = sample.image[: len(sample.image) // 2] if sample.caption in damaged else sample.image
            for extension, content in (("json", b"{}"), ("png", image), ("txt", sample.caption.encode())):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    path.write_bytes(sink.getvalue())


@pytest.mark.slow
def test_another_format_is_refused(output: Path, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, StageError), match=r"download.image_format is jpg; set it to png"):
        adopt(tmp_path / "store", output, DownloadConfig(allowed_networks=("127.0.0.0/8",)))


def test_a_folder_must_be_an_output_and_the_list(tmp_path: Path) -> None:
    lists = SourceConfig(lists=(str(tmp_path),))
    with pytest.raises(InputError, match=r"holds no \.parquet tables"):
        check_adoptable(str(tmp_path), lists)
    (tmp_path / "00000.parquet").write_bytes(b"")
    assert check_adoptable(str(tmp_path) + "/", lists) == 1
    with pytest.raises(ConfigError, match=r"source\.lists does not name"):
        check_adoptable(str(tmp_path), SourceConfig(lists=("elsewhere",)))
    (tmp_path / "00001.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"00001.tar has no table beside it"):
        check_adoptable(str(tmp_path), lists)


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        ("failed_to_download", "HTTP Error 404: Not Found", "http_404"),
        ("failed_to_download", "<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("failed_to_download", "<urlopen error timed out>", "timeout"),
        ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive", "opt_out"),
        ("failed_to_download", "<urlopen error [Errno 111] Connection refused>", "connect"),
        ("failed_to_resize", "Image decoding error", "decode"),
        ("failed_to_resize", "image too small", "resize"),
    ],
)
def test_messages_become_reason_codes(status: str, message: str, reason: str) -> None:
    assert _reason_of({"status": status, "error_message": message}) == reason
    assert failure_code(reason)
