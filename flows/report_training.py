"""The report's part on the trainings: losses, the last samples drawn, and what was trained for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flows.charts import Series, line_chart, short_number, smooth
from flows.report_data import Learning, learning
from flows.report_html import card, cards, data_uri, legend, number, soft, table
from stages.manifest import Manifest

TRAININGS = {
    "clip": "CLIP",
    "prior": "Prior",
    "decoder": "Decoder",
    "upsampler_256": "Upsampler 1",
    "upsampler_1024": "Upsampler 2",
}
_MIN_WINDOW = 3  # logged steps; a shorter curve is shown as it is
_LOG_RATIO = 6.0  # a loss that falls by more than this is shown on a logarithmic axis


def training_section(manifests: Mapping[str, Manifest]) -> str:
    """Show the losses of every training, what it drew last, and a table of the models."""
    trainings = {name: manifests[name] for name in TRAININGS if name in manifests}
    if not trainings:
        return ""
    learned = {TRAININGS[name]: found for name, manifest in trainings.items() if (found := learning(manifest))}
    curves = {title: found for title, found in learned.items() if found.loss}
    wide = len(curves) in (1, 2, 4)  # in two columns, else in three
    charts = [card(title, loss_chart(found, title, 440 if wide else 330)) for title, found in curves.items()]
    entries = [
        ("faint", "as logged"),
        ("strong", "averaged over a tenth of the training; as logged where that is short"),
    ]
    if any(found.validation_loss for found in curves.values()):
        entries.append(("other", "of samples held out, averaged weights, fixed noise"))
    grids = [_grid(title, *found.picture) for title, found in learned.items() if found.picture is not None]
    rows = [_row(name, manifest, learned.get(TRAININGS[name])) for name, manifest in trainings.items()]
    models = table(
        ["model", "what", "#parameters", "#steps x samples", "#last loss", "#held-out loss", "#samples/s"], rows
    )
    return (cards(charts, wide=wide) + legend(entries) if charts else "") + models + _gallery(grids)


def _gallery(grids: Sequence[str]) -> str:
    if not grids:
        return ""
    text = (
        "What each training drew last, with its averaged weights, of samples held out of it: a column per sample. "
        "A decoder draws from the true embedding and caption: the true image is above, the drawn one below. An "
        "upsampler draws from the shrunk true image: that is above, then the drawn and the true one."
    )
    return soft(text) + cards(grids, wide=True)


def _grid(title: str, step: int, png: bytes) -> str:
    label = escape(f"{title}: samples drawn after step {step:,}")
    image = f'<img class="grid" src="{data_uri("image/png", png)}" alt="{label}" loading="lazy">'
    return card(f"{title}, step {step:,}", image)


def loss_chart(found: Learning, title: str, width: float) -> str:
    """Draw one training's losses as SVG, in the classes of the report's style."""
    curve = found.loss
    window = len(curve) // 10
    values = [loss for _, loss in (*curve, *found.validation_loss)]
    falls_far = min(values) > 0 and max(values) / min(values) > _LOG_RATIO
    lines = [Series(name="as logged", points=curve, style="faint" if window >= _MIN_WINDOW else "strong")]
    if window >= _MIN_WINDOW:
        lines.append(Series(name="averaged", points=smooth(curve, window)))
    if found.validation_loss:
        lines.append(Series(name="held out", points=found.validation_loss, style="other"))
    label = f"{title}: loss over {len(curve)} logged steps"
    return line_chart(lines, label=label, x_label="step", log_y=falls_far, width=width, height=200)


def _row(name: str, manifest: Manifest, learned: Learning | None) -> list[str]:
    metrics = {**(manifest.records[0].metrics if manifest.records else {}), **manifest.metrics}
    config = manifest.config
    is_trained = any("metrics" in record.files for record in manifest.records)
    steps = (
        f"{config['num_steps']:,} x {config['global_batch_size']:,}" if is_trained and "num_steps" in config else "-"
    )
    return [
        escape(TRAININGS[name]),
        escape(_describe(name, config, metrics)),
        short_number(float(metrics["num_parameters"])) if "num_parameters" in metrics else "-",
        steps,
        number(float(metrics["loss"])) if is_trained and metrics.get("loss") is not None else "-",
        number(learned.validation_loss[-1][1]) if learned is not None and learned.validation_loss else "-",
        short_number(float(metrics["samples_per_s"])) if is_trained and "samples_per_s" in metrics else "-",
    ]


def _describe(name: str, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Say in a few words what the model is."""
    model: Mapping[str, Any] = config.get("model") or {}
    if name == "clip":
        side = metrics.get("image_size_px")
        words = [str(metrics.get("origin", "")), f"{side} px" if side else "", f"D = {metrics.get('embedding_dim')}"]
    elif name == "prior":
        words = [str(model.get("kind", "")), f"{model.get('layers')} layers of width {model.get('width')}"]
    elif name == "decoder":
        words = [f"{model.get('image_size')} px"]
    else:
        words = [f"{model.get('input_size')} to {model.get('image_size')} px", str(model.get("degradation", ""))]
    return ", ".join(word for word in words if word and "None" not in word) or "-"
