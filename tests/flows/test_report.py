"""The report: whole or partial, self-contained, and true to the manifests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from flows.report import busy_s, funnel_markdown, render, write_report
from flows.report_data import bins, distributions, fetching, probe_clip, shown_images
from flows.report_html import duration, number, with_error
from stages import storage
from stages.config import Config, check_config
from stages.download import Download, DownloadConfig
from stages.evaluate import Evaluate, EvaluateConfig, GateConfig
from stages.graph import STAGE_NAMES
from stages.manifest import Manifest
from tests.stages.download_data import rows_of, source_of
from tests.stages.hostile_server import serve
from tests.stages.small_store import (
    Given,
    loss_curve,
    publish_data,
    publish_generated,
    publish_pca,
    publish_weights,
    run,
    sample_of,
)

TOP = Path(__file__).parents[2]
VOID = {"meta", "link", "img", "br", "line", "circle", "rect", "polyline"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs") / "a <b> store")


@pytest.fixture(scope="module")
def config(root: str) -> Config:
    unet = {"model_channels": 8}
    training = {"num_steps": 10, "global_batch_size": 8}
    upsampler = {"unet": unet, "crop_fraction": 1.0}
    return check_config(
        {
            "root": root,
            "source": {"kind": "shapes"},
            "clip": {"kind": "train"},
            "prior": {**training, "model": {"kind": "diffusion", "embedding_dim": 16}},
            "decoder": {**training, "model": {"image_size": 16, "embedding_dim": 16, "unet": unet}},
            "upsampler_256": {**training, "model": {**upsampler, "image_size": 32, "input_size": 16}},
            "upsampler_1024": {**training, "model": {**upsampler, "image_size": 64, "input_size": 32}},
        }
    )


@pytest.fixture(scope="module")
def manifests(root: str) -> dict[str, Manifest]:
    """Publish a whole run in which every fifth generated image shows something else than its caption."""
    found = publish_data(root)
    source = Given("source", root)
    record = source.record(0, {"urls": ("parquet", b"-")}, {}, num_in=44, num_kept=44)
    found = {
        "source": source.manifest([record]),
        **found,
        **publish_weights(root, loss_curve(), {"decoder": sample_of(0).image}),
        "pca": publish_pca(root),
    }
    samples = [sample_of(500 + i) for i in range(15)]
    for i in range(0, 15, 5):
        samples[i] = dataclasses.replace(samples[i], caption=samples[i + 1].caption)
    found["generate"] = publish_generated(root, samples)
    gate = GateConfig(min_caption_accuracy=0.99)
    found["evaluate"] = run(Evaluate(EvaluateConfig(num_neighbours=2, gate=gate), root=root), found)
    return found


class Page(HTMLParser):
    """What a page links to and shows; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.lines: dict[str, list[str]] = {}  # chart -> the points of its lines
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script" and not any(name.startswith("on") for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "svg":
            self._chart = self.lines.setdefault(dict(attrs)["aria-label"] or "", [])
        if tag == "polyline":
            self._chart.append(dict(attrs)["points"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_whole_report(manifests: Mapping[str, Manifest], config: Config) -> None:
    html = render(manifests, config)
    page = Page(html)
    assert page.ids == ["images", "quality", "training", "funnel", "data", "CLIP", "lineage", "configuration"]
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert sum(link.startswith("data:image/png") for link in page.links) == 15 + 1  # one of the decoder's training
    assert "Decoder, step 7" in page.text and "held-out loss" in page.text
    assert page.text.count(f"{loss_curve()[-1]['validation_loss']:.4g}") == 4  # of every generator, none of the CLIP
    assert "url(" not in html and "@import" not in html and "http://" not in page.text.replace("http://127", "")
    assert "a <b> store" in page.text and "<b> store" not in html
    accuracy = manifests["evaluate"].metrics["caption_accuracy_all"]
    assert f"caption accuracy{accuracy:.0%}" in page.text and "gate failed" in page.text
    assert page.text.count("✗") == 15 - round(15 * accuracy) >= 3
    for manifest in manifests.values():
        assert manifest.fingerprint in page.text and manifest.digest[:12] in page.text
    for part in ("http_404: 2", "low_clip_score: 8", "k = 6", "effective rank 3.1", "own caption is the closest"):
        assert part in page.text


def test_principal_components_whose_spectrum_is_known_in_part(
    manifests: Mapping[str, Manifest], config: Config
) -> None:
    metrics = {
        "embedding_dim": 8192,
        "num_components": 2,
        "effective_rank": None,
        "spectrum": [0.5, 0.25],
        "total_variance": 0.4,
        "reconstruction_mse": 0.1,
        "reconstruction_mse_measured": 0.11,
        "quantisation_mse": 0.02,
        "num_edge_samples": 1000,
    }
    page = Page(render({"pca": dataclasses.replace(manifests["pca"], metrics=metrics)}, config))
    text = page.text
    for chart, rises in (("Spectrum of the principal components", False), ("Cumulative explained variance", True)):
        (line,) = page.lines[chart]
        (first_x, first_y), (last_x, last_y) = (map(float, point.split(",")) for point in line.split())
        assert first_x < last_x and (last_y < first_y) == rises  # of an SVG, y grows downwards
    for part in (
        "each of the first 2 of 8192 components; 2 are kept, with 75.0% of the variance.",
        "Mean squared error: 0.1 from the components left out (measured on 1,000 samples: 0.11), 0.02 from rounding",
        "together 30.00% of the variance",
    ):
        assert part in text
    assert "effective rank" not in text


def test_every_prefix_of_a_run_has_a_report(manifests: Mapping[str, Manifest], config: Config) -> None:
    names = list(manifests)
    for count in range(len(names)):
        page = Page(render({name: manifests[name] for name in names[:count]}, config))
        assert f"{count} of {len(STAGE_NAMES)} stages finished" in page.text
        assert names[count] in page.text.split("Not finished yet: ")[1].split(". This page")[0]


@pytest.mark.parametrize("name", ["evaluate", "generate", "curate", "pca", "prior", "download"])
def test_any_single_stage_has_a_report(manifests: Mapping[str, Manifest], config: Config, name: str) -> None:
    assert manifests[name].fingerprint in Page(render({name: manifests[name]}, config)).text


def test_a_file_that_is_gone_is_said_and_the_rest_stands(
    manifests: Mapping[str, Manifest], config: Config, root: str
) -> None:
    uri = storage.join(root, manifests["pca"].files["pca"].path)
    content = storage.read_bytes(uri)
    storage.delete(uri)
    try:
        page = Page(render(manifests, config))
    finally:
        storage.write_bytes(uri, content)
    assert "This part could not be made: cannot read" in page.text
    assert {"images", "CLIP", "lineage"} <= set(page.ids)


def test_captions_are_text_not_markup(manifests: Mapping[str, Manifest], config: Config, root: str) -> None:
    evil = dataclasses.replace(sample_of(1), caption='"><script>alert(1)</script>')
    page = Page(render({"generate": publish_generated(root, [evil])}, config))
    assert "<script>" in page.text


def test_write_report_publishes_the_page(manifests: Mapping[str, Manifest], config: Config, tmp_path: Path) -> None:
    uri = str(tmp_path / "new" / "report.html")
    assert write_report(manifests, config, uri) == uri
    assert Path(uri).read_text() == render(manifests, config)


def test_the_funnel_balances(manifests: Mapping[str, Manifest]) -> None:
    lines = funnel_markdown(manifests).splitlines()
    assert lines[0].startswith("| stage | in | kept |") and len(lines) == 2 + 5
    assert lines[3] == "| download | 44 | 40 | 4 | http_404: 2, timeout: 2 |"
    assert lines[6] == "| curate | 40 | 32 | 8 | low_clip_score: 8 |"
    assert funnel_markdown({}).count("\n") == 2


def test_the_network_is_reported_as_it_was(tmp_path: Path, config: Config) -> None:
    config = dataclasses.replace(config, root=str(tmp_path))
    with serve() as server:
        urls = [f"{server.url}/image/{row}" for row in range(9)]
        source = source_of(tmp_path, rows_of([*urls, f"{server.url}/recovers?1,500", "http://name.invalid/a.jpg"]))
        settings = DownloadConfig(retries=1, backoff_s=0.01, allowed_networks=("127.0.0.1/32",))
        download = run(Download(settings, root=str(tmp_path)), {"source": source})
    page = Page(render({"download": download}, config))
    assert download.dropped == {"dns": 1}
    found = fetching(download)
    assert found is not None and found.attempts == 11 + found.retries and found.retries >= 1
    assert f"Network: {found.attempts} attempts, {found.retries} of them retries." in page.text
    assert f"Name resolution: {found.failed_lookups} of {found.lookups} lookups failed" in page.text
    assert 1 <= found.failed_lookups == found.lookups and found.median_lookup_s <= found.worst_lookup_s
    assert fetching(dataclasses.replace(download, records=())) is None


def test_distributions_are_of_what_was_downloaded_and_kept(manifests: Mapping[str, Manifest]) -> None:
    found = distributions(manifests)
    assert found is not None
    assert [len(values) for values in found.sides] == [40, 32]
    assert set(found.sides[0]) == {32.0}
    assert found.caption_lengths[0].min() >= len("a red ring on a red background")
    before_curation = distributions({name: manifests[name] for name in ("download", "filter")})
    assert before_curation is not None and len(before_curation.sides[1]) == 40
    assert distributions({}) is None


def test_the_probe_compares_different_captions(manifests: Mapping[str, Manifest]) -> None:
    probe = probe_clip(manifests)
    assert probe is not None and probe.num_pairs <= 32
    assert len(probe.mismatched) == probe.num_pairs * (probe.num_pairs - 1)
    assert 0 <= probe.recall_at_1 <= probe.recall_at_5 <= 1


def test_shown_images_carry_their_verdict(manifests: Mapping[str, Manifest]) -> None:
    shown = shown_images(manifests)
    assert [image.sample.key for image in shown] == [f"{i:08d}" for i in range(15)]
    assert all(image.judged and image.judged["caption"] == image.sample.caption for image in shown)
    assert not shown[0].judged["right_all"]  # type: ignore[index]


def test_bins_count_every_value() -> None:
    for groups, whole in (((np.array([5.0]),), True), ((np.arange(100.0), np.arange(50.0)), True)):
        edges, counts = bins(groups, whole=whole)
        assert [sum(count) for count in counts] == [len(group) for group in groups]
        assert all(edge % 1 == 0.5 for edge in edges)
    edges, counts = bins((np.array([0.1, 0.1]),))
    assert sum(counts[0]) == 2 and edges[0] < 0.1 < edges[-1]


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3599.6, 3661, 90000)] == [
        "0.4 s",
        "59 s",
        "1 min 01 s",
        "1 h 00 min",
        "1 h 01 min",
        "25 h 00 min",
    ]
    assert [number(x) for x in (1234567, 0.123456, "<b>", True)] == ["1,234,567", "0.1235", "&lt;b&gt;", "yes"]
    assert with_error(0.43561, 0.0114) == "0.436 ± 0.011"
    assert with_error(-0.0000836, 0.00037) == "-0.00008 ± 0.00037"
    assert with_error(123.4, 20.0) == "123 ± 20"


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([], 0.0),
        ([("12:00:10", 10.0)], 10.0),
        ([("12:00:10", 10.0), ("12:00:30", 10.0)], 20.0),  # apart
        ([("12:00:30", 30.0), ("12:00:20", 10.0), ("12:00:40", 20.0)], 40.0),  # within, and overlapping
    ],
)
def test_busy_time_counts_what_overlaps_once(
    manifests: Mapping[str, Manifest], runs: list[tuple[str, float]], expected: float
) -> None:
    made = [
        dataclasses.replace(manifests["source"], created_at=f"2026-01-01T{end}+00:00", wall_time_s=wall)
        for end, wall in runs
    ]
    assert busy_s(made) == pytest.approx(expected)
