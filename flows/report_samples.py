"""The report's part on the samples: where they went, what they look like, and how CLIP sees them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from flows.charts import Series, histogram, line_chart
from flows.report_data import Probe, bins, clip_scores, distributions, fetching, probe_clip, spectrum
from flows.report_html import bar, card, cards, duration, legend, number, soft, table
from stages.ledger import DATA_STAGES
from stages.manifest import Manifest

NARROW_PX = 330  # of charts in three columns
CLIP_FACTS = {
    "origin": "weights",
    "num_parameters": "parameters",
    "embedding_dim": "embedding dimension",
    "image_size_px": "image side, px",
    "context_length": "caption tokens",
    "quick_gelu": "QuickGELU",
    "golden_fingerprint": "golden fingerprint",
}
LEGEND_DATA = legend([("strong", "kept"), ("faint", "all")])


def funnel_section(manifests: Mapping[str, Manifest]) -> str:
    """Show how many samples every data stage left, and why the others went."""
    names = [name for name in DATA_STAGES if name in manifests]
    if not names:
        return ""
    total = max(manifests[names[0]].num_in, 1)
    rows = []
    for name in names:
        m = manifests[name]
        reasons = "".join(f"<span>{escape(reason)}: {count:,}</span>" for reason, count in m.dropped.items())
        quarantined = f"<span class='bad'>{len(m.quarantined)} shards given up</span>" if m.quarantined else ""
        rows.append(
            [
                escape(name),
                number(m.num_in),
                number(m.num_kept),
                bar(m.num_kept / total) + f'<small class="soft">{m.num_kept / total:.1%} of the rows</small>',
                f'<div class="reasons">{reasons or "nothing dropped"}{quarantined}</div>',
            ]
        )
    text = (
        "<p class='soft'>Every row ends in exactly one place: kept, or dropped for the first reason that applied.</p>"
    )
    network = _fetching_text(manifests["download"]) if "download" in manifests else ""
    return text + table(["stage", "#in", "#kept", "left of all rows", "dropped"], rows) + network


def _fetching_text(download: Manifest) -> str:
    """Say how hosts and name resolution did; a network that fails shows here before it shows in the samples."""
    found = fetching(download)
    if found is None:
        return ""
    names = (
        f"{found.failed_lookups:,} of {found.lookups:,} lookups failed; they took {found.median_lookup_s:.3f} s "
        f"(median), {found.worst_lookup_s:.1f} s at most"
        if found.lookups
        else "every host was given as an address"
    )
    return soft(
        f"Network: {found.attempts:,} attempts, {found.retries:,} of them retries. Hosts, shard by shard: "
        f"{found.hosts:,}, given up {found.hosts_down:,} that could not be reached and {found.hosts_busy:,} that asked "
        f"for too long pauses; pauses granted: {duration(found.pauses_s)}. Name resolution: {names}."
    )


def data_section(manifests: Mapping[str, Manifest]) -> str:
    """Show caption lengths, image sizes and CLIP scores, of all samples and of those kept."""
    found, parts = distributions(manifests), []
    if found is not None and len(found.sides[0]):
        for title, label, groups in (
            ("Caption length", "characters", found.caption_lengths),
            ("Image size", "shorter side of the served image, px", found.sides),
        ):
            edges, counts = bins(groups, whole=True)
            named = list(zip(("downloaded", "kept"), counts, strict=True))
            parts.append(
                card(title, histogram(edges, named, label=title, x_label=label, width=NARROW_PX) + LEGEND_DATA)
            )
    scores = clip_scores(manifests)
    if scores is not None and len(scores[0]):
        edges, counts = bins(scores)
        named = list(zip(("embedded", "kept"), counts, strict=True))
        chart = histogram(
            edges, named, label="CLIP score", x_label="cosine of image and caption embedding", width=NARROW_PX
        )
        parts.append(card("CLIP score", chart + LEGEND_DATA))
    if not parts:
        return ""
    sampled = ""
    if found is not None and found.num_shards < found.num_all_shards:
        sampled = soft(f"Taken from {found.num_shards} of {found.num_all_shards} shards, evenly spread.")
    return sampled + cards(parts)


def clip_section(manifests: Mapping[str, Manifest]) -> str:
    """Describe the CLIP: what it is, how well it matches captions, and how many dimensions its embeddings use."""
    parts: list[str] = []
    if "clip" in manifests:
        facts = manifests["clip"].metrics
        rows = [[title, number(facts[name])] for name, title in CLIP_FACTS.items() if name in facts]
        parts += [card("Model", table([], rows))] if rows else []
    probe = probe_clip(manifests)
    if probe is not None:
        chart = _probe_chart(probe)
        text = soft(
            f"{probe.num_pairs} kept pairs with different captions: the own caption is the closest for "
            f"{probe.recall_at_1:.0%} of the images and among the five closest for {probe.recall_at_5:.0%} "
            f"(by chance {1 / probe.num_pairs:.1%} and {5 / probe.num_pairs:.1%})."
        )
        parts.append(card("Probe: matching captions", chart + text))
    if "pca" in manifests:
        parts.append(card("Principal components", _spectrum_chart(manifests["pca"])))
    return cards(parts) if parts else ""


def _probe_chart(probe: Probe) -> str:
    edges, counts = bins((probe.mismatched, probe.matched))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    shares = [[count / max(sum(group), 1) for count in group] for group in counts]
    lines = [
        Series(name=name, points=list(zip(middles, share, strict=True)), style=style)
        for name, share, style in zip(("other captions", "own caption"), shares, ("other", "strong"), strict=True)
    ]
    chart = line_chart(lines, label="CLIP probe", x_label="cosine of image and caption embedding", width=NARROW_PX)
    return chart + legend([("strong", "own caption"), ("other", "other captions")])


def _spectrum_chart(pca: Manifest) -> str:
    shares = spectrum(pca)
    metrics = pca.metrics
    k = int(metrics.get("num_components", len(shares)))
    rule = (float(k), f"k = {k}")
    points = [(i + 1.0, float(share)) for i, share in enumerate(shares) if share > 1e-9]
    chart = line_chart(
        [Series(name="share of variance", points=points)],
        label="Spectrum of the principal components",
        x_label="component: share of the variance",
        log_y=len(points) > 1,
        rule=rule,
        width=NARROW_PX,
    )
    total = line_chart(
        [Series(name="variance explained", points=[(i + 1.0, float(x)) for i, x in enumerate(np.cumsum(shares))])],
        label="Cumulative explained variance",
        x_label="components: share of the variance, together",
        rule=rule,
        width=NARROW_PX,
    )
    dim = int(metrics.get("embedding_dim", len(shares)))
    known = f"{dim}" if dim == len(shares) else f"first {len(shares)} of {dim}"
    facts = [f"Share of the image embeddings' variance of each of the {known} components; {k} are kept"]
    facts.append(f"with {float(shares[:k].sum()):.1%} of the variance")
    if metrics.get("effective_rank") is not None:
        facts.append(f"effective rank {float(metrics['effective_rank']):.1f}")
    return chart + total + soft(", ".join(facts) + "." + _errors(metrics))


def _errors(metrics: Mapping[str, Any]) -> str:
    """Say what keeping k components and rounding them to buckets costs, in mean squared distance."""
    if "quantisation_mse" not in metrics:
        return ""
    lost, rounded = float(metrics["reconstruction_mse"]), float(metrics["quantisation_mse"])
    text = f" Mean squared error: {lost:.3g} from the components left out"
    if "reconstruction_mse_measured" in metrics:
        samples = f"{int(metrics['num_edge_samples']):,} samples"
        text += f" (measured on {samples}: {float(metrics['reconstruction_mse_measured']):.3g})"
    share = (lost + rounded) / float(metrics["total_variance"])
    return f"{text}, {rounded:.3g} from rounding to buckets; together {share:.2%} of the variance."
