"""What a run leaves in Prefect to look at: the funnel as a table, a link to the report, sample images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact

from flows.report_data import learning
from flows.report_html import data_uri
from flows.report_style import DRAWING_STYLE
from flows.report_training import TRAININGS, loss_chart
from stages.manifest import Manifest
from stages.redaction import hide_secrets
from stages.samples import read_tar
from stages.storage import is_local

_NUM_IMAGES = 12
_NUM_COLUMNS = 4
_TILE_PX = 96
_CURVE_PX = 560
_NOTES = {
    "cost": "Samples and work of every stage, planned and actual",
    "gate": "What the gate says of this run beside the version in production",
}


def publish(
    manifests: Mapping[str, Manifest], *, root: str, funnel: str, report_uri: str, notes: Mapping[str, str]
) -> None:
    """Create the artifacts of a run; must be called inside a Prefect flow or task.

    Args:
        manifests: the finished stages.
        root: the store.
        funnel: table of the samples in and out of every stage, in markdown.
        report_uri: where the report is.
        notes: further tables in markdown, by their keys.
    """
    create_markdown_artifact(hide_secrets(funnel), key="funnel", description="Samples in and out of every stage")
    for key, text in notes.items():
        create_markdown_artifact(hide_secrets(text), key=key, description=_NOTES.get(key, ""))
    # The place itself: a browser opens no file, and no object of a store, from a page of Prefect's.
    place = hide_secrets(report_uri)
    create_link_artifact(browsable(report_uri), key="report", link_text=place, description="The whole run, one page")
    samples = sample_sheet(manifests["generate"], root) if "generate" in manifests else None
    if samples is not None:
        _show_image("samples", "image/png", samples, f"{_NUM_IMAGES} of the generated images")
    for name, title in TRAININGS.items():
        learned = learning(manifests[name]) if name in manifests else None
        if learned is None:
            continue
        key = name.replace("_", "-")
        if learned.loss:
            drawing = standalone(loss_chart(learned, title, _CURVE_PX)).encode()
            _show_image(f"curve-{key}", "image/svg+xml", drawing, f"{title}: loss by step")
        if learned.picture is not None:
            step, png = learned.picture
            _show_image(f"drawn-{key}", "image/png", png, f"{title}: held-out samples drawn after step {step:,}")


def _show_image(key: str, kind: str, content: bytes, description: str) -> None:
    create_image_artifact(data_uri(kind, content), key=key, description=description)


def standalone(svg: str) -> str:
    """Turn a drawing of the report into one that needs no page around it."""
    start = svg.index(">")
    return f'{svg[:start]} xmlns="http://www.w3.org/2000/svg"><style>{DRAWING_STYLE}</style>{svg[start + 1 :]}'


def browsable(uri: str) -> str:
    """Turn the URI of an object into something a browser can open, where there is such a thing."""
    return Path(uri).resolve().as_uri() if is_local(uri) else uri


def sample_sheet(manifest: Manifest, root: str) -> bytes | None:
    """Draw the first generated images side by side.

    Args:
        manifest: of the stage ``generate``.
        root: the store.

    Returns:
        A PNG of at most ``_NUM_COLUMNS`` tiles a row; ``None`` if nothing was generated.
    """
    from PIL import Image

    tiles: list[Image.Image] = []
    for record in manifest.records:
        for sample in read_tar(record.files["images"].read(root)):
            if len(tiles) < _NUM_IMAGES:
                picture = Image.open(io.BytesIO(sample.image)).convert("RGB")
                tiles.append(picture.resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS))
        if len(tiles) >= _NUM_IMAGES:
            break
    if not tiles:
        return None
    num_columns = min(_NUM_COLUMNS, len(tiles))
    num_rows = -(-len(tiles) // num_columns)
    sheet = Image.new("RGB", (num_columns * _TILE_PX, num_rows * _TILE_PX), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % num_columns * _TILE_PX, i // num_columns * _TILE_PX))
    sink = io.BytesIO()
    sheet.save(sink, format="PNG", optimize=True)
    return sink.getvalue()
