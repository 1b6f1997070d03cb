"""The report's part on the results: the images, the metrics beside those of real images, and the gate."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from flows.charts import Interval, interval_chart
from flows.report_data import MAX_IMAGES, ShownImage, page_image, shown_images
from flows.report_html import card, data_uri, legend, soft, table, tile, with_error
from stages.manifest import Manifest

_SMALL_PX = 128  # images up to this side are enlarged without smoothing


class Metric(NamedTuple):
    """A row of the table of metrics: its name in the manifest, its title, which way is better, what it says."""

    name: str
    title: str
    better: str
    meaning: str


METRICS = (
    Metric("frechet_distance", "Fréchet distance", "lower", "between Gaussians fitted to CLIP features"),
    Metric("kernel_distance", "Kernel distance (KID)", "lower", "unbiased; with its standard error"),
    Metric("clip_score", "CLIP score", "higher", "mean cosine of image and caption"),
    Metric("precision", "Precision", "higher", "generated images that lie among the real ones"),
    Metric("recall", "Recall", "higher", "real images that lie among the generated ones"),
    Metric("density", "Density", "higher", "real neighbourhoods a generated image lies in"),
    Metric("coverage", "Coverage", "higher", "real images with a generated one nearby"),
    Metric("diversity", "Diversity", "near real", "mean of 1 - cosine over pairs of images"),
    Metric(
        "diversity_within_captions", "Diversity within captions", "near real", "over pairs of images of one caption"
    ),
    Metric("effective_number", "Effective number", "near real", "how many entirely different images the set is worth"),
)
QUESTIONS = {
    "all": "everything",
    "foreground": "shape's colour",
    "background": "background",
    "colours": "both colours",
    "shape": "shape",
}


def headline(manifests: Mapping[str, Manifest]) -> list[str]:
    """Return the tiles of the most telling metrics."""
    if "evaluate" not in manifests:
        return []
    m = manifests["evaluate"].metrics
    found = []
    if "caption_accuracy_all" in m:
        ceiling = f"real: {m['real_caption_accuracy_all']:.0%}, " if "real_caption_accuracy_all" in m else ""
        found.append(tile("caption accuracy", f"{m['caption_accuracy_all']:.0%}", f"{ceiling}n = {m['num_checked']}"))
    for name, title in (("frechet_distance", "Fréchet distance"), ("clip_score", "CLIP score")):
        if name in m:
            found.append(tile(title, f"{m[name]:.3g}", f"real: {m[f'real_{name}']:.3g}, n = {m['num_generated']}"))
    return found


def verdict_badge(manifests: Mapping[str, Manifest]) -> str:
    """Return the verdict of the gate as a badge; empty if there is none."""
    gate = _gate(manifests)
    if not gate or not gate["num_checked"]:
        return ""
    style, word = ("good", "passed") if gate["passed"] else ("bad", "failed")
    return f'<span class="badge {style}">gate {word}</span>'


def _gate(manifests: Mapping[str, Manifest]) -> Mapping[str, Any]:
    return dict(manifests["evaluate"].metrics.get("gate", {})) if "evaluate" in manifests else {}


def images_section(manifests: Mapping[str, Manifest]) -> str:
    """Show generated images with their captions, and what the pixel check sees in them."""
    shown = shown_images(manifests)
    if not shown:
        return ""
    total = manifests["generate"].num_kept
    words = [f"{len(shown)} of {total:,} images, evenly taken." if total > MAX_IMAGES else f"All {total} images."]
    words.append("None was chosen by hand.")
    if any(image.judged and image.judged["right_all"] is not None for image in shown):
        words.append(
            "The mark says whether colours and shape, read from the pixels alone by a check that knows nothing of the "
            "models, are those of the caption; where they are not, it says what was read instead."
        )
    figures = "".join(_figure(image) for image in shown)
    return soft(" ".join(words)) + f'<div class="images">{figures}</div>'


def _figure(image: ShownImage) -> str:
    data, media_type, side = page_image(image.sample.image)
    source = data_uri(media_type, data)
    pixels = ' class="pixels"' if side <= _SMALL_PX else ""
    caption = escape(image.sample.caption)
    seed = image.sample.metadata.get("seed")
    tip = escape(f"{image.sample.caption} (seed {seed})" if seed is not None else image.sample.caption)
    mark, seen = _reading(image.judged)
    return (
        f'<figure><img{pixels} src="{source}" alt="{caption}" title="{tip}" loading="lazy">'
        f"<figcaption>{mark}{caption}{seen}</figcaption></figure>"
    )


def _reading(judged: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the mark before a caption, and what the check saw where that is not what was asked."""
    if judged is None or judged["right_all"] is None:
        return "", ""
    if judged["right_all"]:
        return '<span class="good" title="as its caption says">✓ </span>', ""
    shown = {word: escape(judged[f"shown_{word}"]) for word in ("foreground", "shape", "background")}
    for word, right in {word: judged[f"right_{word}"] for word in shown}.items():
        if not right:
            shown[word] = f"<b>{shown[word]}</b>"
    seen = f"read: {shown['foreground']} {shown['shape']} on {shown['background']}"
    return '<span class="bad" title="not as its caption says">✗ </span>', f'<span class="seen">{seen}</span>'


def quality_section(manifests: Mapping[str, Manifest]) -> str:
    """Show the metrics, each beside that of real images, the caption accuracy, and the gate."""
    if "evaluate" not in manifests:
        return ""
    m = manifests["evaluate"].metrics
    text = soft(
        f"{m['num_generated']:,} generated images are compared with {m['num_reference']:,} real ones. The column of "
        f"real images gives the same number for {m['num_control']:,} other real images: what a perfect generator would "
        "reach. With few images all numbers are rough, and the Fréchet distance is too high in both columns alike."
    )
    rows = []
    for metric in METRICS:
        if metric.name in m:
            title = f"{escape(metric.title)}<small>{escape(metric.meaning)}</small>"
            rows.append([title, _cell(m, metric.name), _cell(m, f"real_{metric.name}"), escape(metric.better)])
    accuracy = card("Caption accuracy, read from pixels", _accuracy_chart(m)) if "caption_accuracy_all" in m else ""
    return text + accuracy + table(["metric", "#generated", "#real images", "better"], rows) + _gate_text(manifests)


def _cell(metrics: Mapping[str, Any], name: str) -> str:
    if name not in metrics:
        return "-"
    error = metrics.get(f"{name}_error")
    return f"{metrics[name]:.3g}" if error is None else with_error(metrics[name], error)


def _accuracy_chart(metrics: Mapping[str, Any]) -> str:
    rows = []
    for question, title in QUESTIONS.items():
        intervals = []
        for prefix, style, name in (("", "strong", "generated"), ("real_", "other", "real images")):
            metric = f"{prefix}caption_accuracy_{question}"
            if metric in metrics:
                low, high = metrics[f"{metric}_low"], metrics[f"{metric}_high"]
                intervals.append(Interval(value=metrics[metric], low=low, high=high, style=style, name=name))
        rows.append((title, intervals))
    ceiling = f", n = {metrics['real_num_checked']}" if "real_num_checked" in metrics else ""
    key = legend(
        [
            ("strong", f"generated, n = {metrics['num_checked']}"),
            ("other", f"real images{ceiling}: the ceiling"),
            ("", "bars: 95% intervals"),
        ]
    )
    return interval_chart(rows, label="Caption accuracy by question") + key


def _gate_text(manifests: Mapping[str, Manifest]) -> str:
    gate = _gate(manifests)
    if not gate:
        return ""
    if not gate["num_checked"]:
        return soft("No gate: evaluate.gate sets no threshold.")
    if gate["passed"]:
        return f"<p><span class='good'>The gate passed:</span> all {gate['num_checked']} thresholds are met.</p>"
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in gate["reasons"])
    return f"<p><span class='bad'>The gate failed</span> ({gate['num_checked']} thresholds):</p><ul>{reasons}</ul>"
