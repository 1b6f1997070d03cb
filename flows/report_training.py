"""The report's part on the trainings: loss curves, and what was trained for how long."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from flows.charts import Series, line_chart, short_number, smooth
from flows.report_data import loss_curve
from flows.report_html import card, cards, legend, number, table
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
    """Show the loss of every training, and a table of the models."""
    found = {title: loss_curve(manifests[name]) for name, title in TRAININGS.items() if name in manifests}
    curves = {title: curve for title, curve in found.items() if curve}
    wide = len(curves) in (1, 2, 4)  # in two columns, else in three
    charts = [card(title, loss_chart(curve, title, 440 if wide else 330)) for title, curve in curves.items()]
    rows = [_row(name, manifests[name]) for name in TRAININGS if name in manifests]
    if not rows:
        return ""
    key = legend(
        [("faint", "as logged"), ("strong", "averaged over a tenth of the training; as logged where that is short")]
    )
    models = table(["model", "what", "#parameters", "#steps x samples", "#last loss", "#samples/s"], rows)
    return (cards(charts, wide=wide) + key if charts else "") + models


def loss_chart(curve: list[tuple[float, float]], title: str, width: float) -> str:
    """Draw one training's loss as SVG, in the classes of the report's style."""
    window = len(curve) // 10
    values = [loss for _, loss in curve]
    falls_far = min(values) > 0 and max(values) / min(values) > _LOG_RATIO
    lines = [Series(name="as logged", points=curve, style="faint" if window >= _MIN_WINDOW else "strong")]
    if window >= _MIN_WINDOW:
        lines.append(Series(name="averaged", points=smooth(curve, window)))
    label = f"{title}: loss over {len(curve)} logged steps"
    return line_chart(lines, label=label, x_label="step", log_y=falls_far, width=width, height=200)


def _row(name: str, manifest: Manifest) -> list[str]:
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
