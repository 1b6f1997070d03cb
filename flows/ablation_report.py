"""What an ablation found: means with confidence intervals over seeds, claims held against them, a page and a table."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from flows.charts import Series, line_chart
from flows.report_html import card, cards, legend, note, table
from flows.report_style import STYLE
from stages.ablation import AblationConfig, Claim, Trial
from stages.config import load_config
from stages.errors import ConfigError
from stages.gate import LOSSES, METRICS

Metrics = Mapping[str, Any]
COLUMNS = (
    ("frechet_distance", "Fréchet distance", "lower"),
    ("clip_score", "CLIP score", "higher"),
    ("caption_accuracy_all", "caption accuracy", "higher"),
    ("precision", "precision", "higher"),
    ("recall", "recall", "higher"),
    ("diversity", "diversity", "near real"),
)
DIVERSITY = "diversity_within_captions"
_LOWER_IS_BETTER = ("frechet_distance", "kernel_distance")
# Two-sided 95% quantiles of Student's t, for n - 1 degrees of freedom.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with half the width of its 95% interval (Student's t), and the number of seeds."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half:.2g}"


@dataclass(frozen=True)
class Verdict:
    """What came of a claim: ``holds``, ``does not hold`` or ``not resolved`` by as many seeds."""

    text: str
    difference: Estimate
    outcome: str


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of what the seeds gave.

    Raises:
        ValueError: for fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs two values or more, not {n}")
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = _T_95[n - 2] if n - 2 < len(_T_95) else 1.96
    return Estimate(mean, quantile * deviation / math.sqrt(n), n)


def refuse_what_is_not_measured(config: AblationConfig, base: Path, trials: Sequence[Trial]) -> None:
    """Refuse claims and sweeps whose metrics no trial will have; before the hours of work, not after them.

    Args:
        config: the ablation.
        base: the config file that its variants are of.
        trials: from ``stages.config.load_ablation``.

    Raises:
        ConfigError: with the metric that is meant, or the setting that is missing.
    """
    known = [name for name in METRICS if name not in LOSSES]
    for claim in config.claims:
        if claim.metric not in known:
            near = difflib.get_close_matches(claim.metric, known, 1)
            what = f"did you mean '{near[0]}'" if near else f"name one of {', '.join(known)}"
            raise ConfigError(f"claims: {claim.metric}: is no metric of the evaluate stage; {what}")
    for trial in trials:
        if trial.guidance_scale is None or trial.seed != config.seeds[0]:
            continue
        if (num := load_config(base, trial.overrides).generate.images_per_caption) < 2:
            raise ConfigError(
                f"guidance: {trial.variant} has generate.images_per_caption {num}, which shows no {DIVERSITY}; set it "
                "to 2 or more in guidance.set"
            )


@dataclass(frozen=True)
class Findings:
    """The metrics of every trial, and what follows from them."""

    config: AblationConfig
    trials: Mapping[Trial, Metrics]

    def values(self, variant: str, metric: str, scale: float | None = None) -> list[float] | None:
        """Return a metric of a variant, one value per seed; None if it was not measured."""
        by_seed = {t.seed: m for t, m in self.trials.items() if t.variant == variant and t.guidance_scale == scale}
        if any(metric not in metrics for metrics in by_seed.values()):
            return None
        return [float(by_seed[seed][metric]) for seed in self.config.seeds]

    def verdict(self, claim: Claim) -> Verdict:
        """Hold a claim against the differences, seed by seed."""
        better, worse = (self.values(variant, claim.metric) for variant in (claim.better, claim.worse))
        if better is None or worse is None:
            raise ConfigError(f"claims: {claim.metric} was not measured; name a metric of the evaluate stage")
        sign = 1 if claim.metric in _LOWER_IS_BETTER else -1
        text = f"{claim.better} has the better {claim.metric} than {claim.worse}"
        return _judge(text, [sign * (w - b) for b, w in zip(better, worse, strict=True)])

    def diversity_verdicts(self) -> list[Verdict]:
        """Say whether the first variant of the sweep loses the smallest share of its diversity."""
        sweep = self.config.guidance
        if sweep is None:
            return []
        first, *others = sweep.variants
        losses = {variant: self._diversity_loss(variant) for variant in sweep.variants}
        ends = f"from guidance {sweep.scales[0]:g} to {sweep.scales[-1]:g}"
        return [
            _judge(
                f"{first} loses a smaller share of its diversity than {other} {ends}",
                [theirs - own for own, theirs in zip(losses[first], losses[other], strict=True)],
            )
            for other in others
        ]

    def _diversity_loss(self, variant: str) -> list[float]:
        assert self.config.guidance is not None
        scales = self.config.guidance.scales
        start, end = (self.values(variant, DIVERSITY, scale) for scale in (scales[0], scales[-1]))
        if start is None or end is None:
            raise ConfigError(f"guidance: {DIVERSITY} was not measured; set generate.images_per_caption to 2 or more")
        return [1 - last / first for first, last in zip(start, end, strict=True)]

    def verdicts(self) -> list[Verdict]:
        """Return what came of every claim, those of the sweep last."""
        return [*(self.verdict(claim) for claim in self.config.claims), *self.diversity_verdicts()]

    # ---- writing ----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        rows = [
            {
                "variant": trial.variant,
                "seed": trial.seed,
                "guidance_scale": trial.guidance_scale,
                "overrides": list(trial.overrides),
                "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
            }
            for trial, metrics in self.trials.items()
        ]
        verdicts = [
            {"claim": v.text, "outcome": v.outcome, "difference": v.difference.mean, "half_width": v.difference.half}
            for v in self.verdicts()
        ]
        return {"trials": rows, "verdicts": verdicts}

    def to_markdown(self) -> str:
        """Return the table of the variants, that of the sweep, and the claims."""
        lines = ["| variant | " + " | ".join(title for _, title, _ in COLUMNS) + " |"]
        lines.append("| --- |" + " ---: |" * len(COLUMNS))
        for variant in self.config.variants:
            lines.append(f"| {variant} | " + " | ".join(self._cell(variant, name) for name, _, _ in COLUMNS) + " |")
        lines += [f"\nMean ± half of the 95% interval over {len(self.config.seeds)} seeds.\n"]
        if sweep := self.config.guidance:
            lines.append("| diversity within captions | " + " | ".join(f"{s:g}" for s in sweep.scales) + " |")
            lines.append("| --- |" + " ---: |" * len(sweep.scales))
            for variant in sweep.variants:
                cells = [self._cell(variant, DIVERSITY, scale) for scale in sweep.scales]
                lines.append(f"| {variant} | " + " | ".join(cells) + " |")
            lines.append("\nColumns: guidance scale of the decoder.\n")
        lines += [f"- {v.text}: **{v.outcome}** (difference {v.difference})" for v in self.verdicts()]
        return "\n".join(lines) + "\n"

    def to_html(self, title: str) -> str:
        """Return a self-contained page: the tables, the claims, and the curves of the sweep."""
        header = ["variant", *(f"#{name} ({better})" for _, name, better in COLUMNS)]
        rows = [
            [escape(variant), *(escape(self._cell(variant, name)) for name, _, _ in COLUMNS)]
            for variant in self.config.variants
        ]
        claims = [[escape(v.text), escape(v.outcome), escape(str(v.difference))] for v in self.verdicts()]
        body = table(header, rows) + note(f"Mean ± half of the 95% interval over {len(self.config.seeds)} seeds.")
        body += "<h2>Claims</h2>" + table(["claim", "outcome", "#difference"], claims)
        if self.config.guidance:
            charts = [self._curves(DIVERSITY, "Diversity within captions")]
            charts += [self._curves(name, name_shown) for name, name_shown, _ in COLUMNS[:2]]
            body += "<h2>Rising guidance</h2>" + cards(charts, wide=True)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>{body}"
            f"</main></body></html>\n"
        )

    def _curves(self, metric: str, title: str) -> str:
        assert self.config.guidance is not None
        styles = ("strong", "other", "faint")
        series = []
        for style, variant in zip(styles, self.config.guidance.variants, strict=False):
            points, bounds = [], []
            for scale in self.config.guidance.scales:
                values = self.values(variant, metric, scale)
                if values is not None:
                    found = estimate(values)
                    points.append((scale, found.mean))
                    bounds.append((found.mean - found.half, found.mean + found.half))
            series.append(Series(name=variant, points=points, style=style, bounds=bounds))
        chart = line_chart(series, x_label="guidance scale", label=f"{title} against guidance scale")
        return card(title, chart + legend([(one.style, one.name) for one in series]))

    def _cell(self, variant: str, metric: str, scale: float | None = None) -> str:
        values = self.values(variant, metric, scale)
        return "-" if values is None else str(estimate(values))


def _judge(text: str, differences: Sequence[float]) -> Verdict:
    found = estimate(differences)
    if found.mean - found.half > 0:
        return Verdict(text, found, "holds")
    return Verdict(text, found, "does not hold" if found.mean + found.half < 0 else "not resolved")


def findings_json(findings: Findings) -> str:
    """Return the findings as JSON text."""
    return json.dumps(findings.to_json(), indent=1) + "\n"
