"""The data stages for real, from URL lists to the curated selection: a loopback server, img2dataset, a small CLIP."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from stages import shapes
from stages.base import Stage
from stages.clip import Clip, ClipConfig
from stages.curate import Curate, CurateConfig
from stages.download import Download, DownloadConfig
from stages.embed import Embed, EmbedConfig
from stages.filter import Filter, FilterConfig
from stages.ledger import Ledger, LedgerConfig
from stages.manifest import Manifest
from stages.source import Source, SourceConfig
from tests.stages.small_store import IMAGE_SIZE_PX, SHAPES, run, small_clip


def picture(index: int) -> bytes:
    """Render a shape as a PNG file."""
    sink = io.BytesIO()
    shape = shapes.picture_of(SHAPES, index)
    Image.fromarray(shapes.render(shape, IMAGE_SIZE_PX, SHAPES.noise_levels)).save(sink, "PNG")
    return sink.getvalue()


class Pictures(http.server.ThreadingHTTPServer):
    """Serves ``/<index>.png``; anything else is not found.

    Attributes:
        failing: paths that answer 503.
        num_requests: how often each path was asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.failing: set[str] = set()
        self.num_requests: dict[str, int] = {}

    def url(self, name: object) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}.png"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Pictures

    def do_GET(self) -> None:
        self.server.num_requests[self.path] = self.server.num_requests.get(self.path, 0) + 1
        stem = self.path.strip("/").partition(".")[0]
        body = picture(int(stem)) if stem.isdecimal() else b""
        self.send_response(503 if self.path in self.server.failing else 200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


@contextmanager
def serving() -> Iterator[Pictures]:
    """Run the server for the length of a ``with`` block."""
    with Pictures() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def write_list(path: Path, rows: Sequence[tuple[str, str | None]]) -> None:
    """Write a list of URLs and captions."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"url": url, "caption": caption}) + "\n" for url, caption in rows))


def stages_of(root: str, lists: Path, **settings: Mapping[str, Any]) -> dict[str, Stage[Any]]:
    """Build the data stages; settings by stage."""
    given = {name: dict(settings.get(name, {})) for name in ("source", "download", "filter", "embed", "curate")}
    allowed = {"allowed_networks": ("127.0.0.0/8",), "backoff_s": 0.0, "retries": 0, "max_transient_fraction": 1.0}
    stored = {"image_format": "png", "image_quality": 1, "keep_encoded": True}
    weights = lists.with_name("clip.safetensors")
    if not weights.exists():
        small_clip().save(weights)
    stages: list[Stage[Any]] = [
        Clip(ClipConfig(kind="pretrained", name=str(weights)), root=root),
        Source(SourceConfig(**{"lists": (str(lists),), "rows_per_shard": 8} | given["source"]), root=root),
        Download(DownloadConfig(**allowed | stored | given["download"]), root=root),
        Filter(FilterConfig(**{"near_duplicate_bits": None} | given["filter"]), root=root),
        Embed(EmbedConfig(**given["embed"]), root=root),
        Curate(CurateConfig(**given["curate"]), root=root),
        Ledger(LedgerConfig(), root=root),
    ]
    return {stage.name: stage for stage in stages}


def run_data(root: str, lists: Path, **settings: Mapping[str, Any]) -> dict[str, Manifest]:
    """Bring the data stages to their end; settings by stage."""
    found: dict[str, Manifest] = {}
    for name, stage in stages_of(root, lists, **settings).items():
        found[name] = run(stage, {upstream: found[upstream] for upstream in stage.upstream})
    return found
