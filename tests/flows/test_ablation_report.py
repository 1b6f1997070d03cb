"""Means and intervals over seeds, and claims held against them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.ablation_report import DIVERSITY, Findings, estimate, findings_json
from flows.cli import main
from stages.ablation import AblationConfig, Claim, GuidanceSweep, Trial
from stages.errors import ConfigError

TINY = Path(__file__).parents[1] / "tiny.yaml"
CONFIG = AblationConfig(
    base="base.yaml",
    seeds=(0, 1, 2),
    variants={"full": {}, "bare": {}},
    claims=(Claim(better="full", worse="bare"), Claim(better="bare", worse="full", metric="clip_score")),
    guidance=GuidanceSweep(scales=(1.0, 4.0), variants=("full", "bare")),
)


def _findings(bare: tuple[float, ...] = (2.0, 2.1, 2.2), loss: float = 0.5) -> Findings:
    trials = {}
    for seed in CONFIG.seeds:
        for variant, distance in (("full", 1.0 + 0.1 * seed), ("bare", bare[seed])):
            metrics = {"frechet_distance": distance, "clip_score": 0.3 + 0.01 * seed, "gate": {"passed": True}}
            trials[Trial(variant=variant, seed=seed, guidance_scale=None, overrides=())] = metrics
            for scale in (1.0, 4.0):
                kept = 1.0 if scale == 1.0 else 0.9 if variant == "full" else 1 - loss - 0.01 * seed
                swept = {DIVERSITY: kept * (1 + 0.1 * seed), "frechet_distance": distance * scale, "clip_score": 0.3}
                trials[Trial(variant=variant, seed=seed, guidance_scale=scale, overrides=("x=1",))] = swept
    return Findings(CONFIG, trials)


def test_intervals_are_students() -> None:
    """Of 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.303."""
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    assert estimate([0.5] * 40).half == 0.0
    with pytest.raises(ValueError, match="needs two values"):
        estimate([1.0])


def test_claims_are_judged_by_paired_differences() -> None:
    """The spread between seeds is shared by both variants, so the difference is certain although the means overlap."""
    first, second, _ = _findings().verdicts()
    assert first.outcome == "holds" and first.difference.mean == pytest.approx(1.0)
    assert second.outcome == "not resolved" and second.difference.mean == 0.0
    assert _findings(bare=(0.5, 0.6, 0.7)).verdicts()[0].outcome == "does not hold"
    assert _findings(bare=(0.5, 2.0, 1.1)).verdicts()[0].outcome == "not resolved"


def test_the_sweep_compares_shares_of_diversity_lost() -> None:
    verdict = _findings().verdicts()[2]
    assert verdict.outcome == "holds" and verdict.difference.mean == pytest.approx(0.5 + 0.01 - 0.1)
    assert _findings(loss=0.0).verdicts()[2].outcome == "does not hold"


def test_everything_is_written() -> None:
    findings = _findings()
    markdown = findings.to_markdown()
    assert "| full | 1.1 ± 0.25 | 0.31 ± 0.025 | - |" in markdown
    assert "**holds**" in markdown and "| diversity within captions | 1 | 4 |" in markdown
    page = findings.to_html("a <b>title</b>")
    assert page.count("<svg") == 3 and "<b>title" not in page
    plain = json.loads(findings_json(findings))
    assert len(plain["trials"]) == 18 and "gate" not in plain["trials"][0]["metrics"]


def test_metrics_that_were_not_measured_are_named() -> None:
    findings = _findings()
    trials = {trial: {"clip_score": 1.0} for trial in findings.trials}
    with pytest.raises(ConfigError, match="frechet_distance was not measured"):
        Findings(CONFIG, trials).verdict(CONFIG.claims[0])
    with pytest.raises(ConfigError, match=r"set generate\.images_per_caption"):
        Findings(CONFIG, trials).diversity_verdicts()


ABLATION = """
base: {base}
seeds: [0, 1]
set: {{root: {root}}}
variants: {{full: {{}}, bare: {{generate.use_prior: false}}}}
claims: [{{better: full, worse: bare, metric: clip_score}}]
guidance: {{scales: [1, 3], variants: [bare], set: {{generate.images_per_caption: 2}}}}
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("clip_score", "clip_scor", "claims: clip_scor: is no metric of the evaluate stage; did you mean 'clip_score'"),
        ("clip_score", "prior_validation_loss", "claims: prior_validation_loss: is no metric"),
        ("per_caption: 2", "per_caption: 1", "guidance: bare has generate.images_per_caption 1"),
        ("set: {root:", "set: {cluster.submit: 'http://head:8265', root:", "-s cluster.submit=null, and cluster.addr"),
    ],
)
def test_a_mistake_is_said_before_any_work(
    tmp_path: Path, old: str, new: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ABLATION.format(base=TINY, root=tmp_path / "store")
    assert text.count(old) == 1
    (tmp_path / "a.yaml").write_text(text.replace(old, new))
    assert main(["ablate", str(tmp_path / "a.yaml")]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "store").exists()
