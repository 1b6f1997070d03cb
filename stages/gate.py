"""The gate before production: rules on the metrics of a version, alone and beside the version in production.

``evaluate.gate`` judges one run by itself and belongs to that run's result. The section ``gate`` is asked at promotion,
knows what is in production, and changes no fingerprint. A promotion needs both to pass.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from stages.base import setting
from stages.distances import ManifoldScores
from stages.evaluate import QUESTIONS

_OF_IMAGES = (
    "frechet_distance",
    "kernel_distance",
    "kernel_distance_error",
    "clip_score",
    "clip_score_error",
    *(f.name for f in fields(ManifoldScores)),
    "diversity",
    "effective_number",
    "diversity_within_captions",
    "num_checked",
    *(f"caption_accuracy_{question}{end}" for question in QUESTIONS for end in ("", "_low", "_high")),
)
LOSSES = tuple(f"{training}_validation_loss" for training in ("prior", "decoder", "upsampler_256", "upsampler_1024"))
METRICS = (
    *("num_generated", "num_reference", "num_control"),
    *_OF_IMAGES,
    *(f"real_{name}" for name in _OF_IMAGES),
    *LOSSES,
)


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """Bounds of one metric; those that are null are not checked."""

    min: float | None = setting(None, "smallest value", affects="nothing")
    max: float | None = setting(None, "largest value", affects="nothing")
    max_drop: float | None = setting(None, "how far it may be below the version in production", affects="nothing")
    max_rise: float | None = setting(None, "how far it may be above the version in production", affects="nothing")

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            raise ValueError("min: no bound is given; write min, max, max_drop or max_rise")
        for name, value in given.items():
            if not math.isfinite(value) or (name.startswith("max_") and value < 0):
                raise ValueError(f"{name}: {value:g} is no bound; write a finite number, for {name} 0 or more")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min:g} is above max {self.max:g}; nothing could pass")

    def thresholds(self, production: float | None) -> Iterator[tuple[str, float | None]]:
        """Yield each bound with the value to hold against; None where it needs a value of production that is missing.

        Args:
            production: the metric of the version in production.
        """
        for name, bound in asdict(self).items():
            if bound is not None and name in ("min", "max"):
                yield name, bound
            elif bound is not None and production is None:
                yield name, None
            elif bound is not None and production is not None:
                yield name, production - bound if name == "max_drop" else production + bound


@dataclass(frozen=True, kw_only=True)
class PromotionGateConfig:
    """What a version must fulfil to be put into production; asked by `unclip promote`."""

    rules: Mapping[str, GateRule] = setting(
        factory=dict,
        help="metric, or <training>_validation_loss -> min, max; max_drop, max_rise beside the version in production",
        affects="nothing",
    )

    def __post_init__(self) -> None:
        for name in self.rules:
            if name not in METRICS:
                close = difflib.get_close_matches(name, METRICS, n=1)
                known = ", ".join(name for name in METRICS if not name.startswith("real_"))
                hint = f"did you mean '{close[0]}'? known" if close else "known"
                raise ValueError(f"rules.{name}: no such metric; {hint}: {known}; those of images also as real_...")


@dataclass(frozen=True, kw_only=True)
class CheckedRule:
    """What became of one bound.

    Attributes:
        metric: its name; ``evaluate.gate`` for the verdict of the evaluate stage.
        bound: ``min``, ``max``, ``max_drop`` or ``max_rise``.
        setting: the bound as configured.
        threshold: the value that had to be met; None if it could not be told.
        value: of the version; None if it was not measured.
        production: of the version in production; None if there is none, or it was not measured.
        passed: whether it is met.
        reason: why, in words.
    """

    metric: str
    bound: str
    setting: float
    threshold: float | None
    value: float | None
    production: float | None
    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The answer of the gate.

    Attributes:
        compared_with: number of the version in production; None if there was none.
        rules: every bound, passed or not.
    """

    compared_with: int | None
    rules: tuple[CheckedRule, ...]

    @property
    def passed(self) -> bool:
        """Whether every bound is met."""
        return all(rule.passed for rule in self.rules)

    @property
    def failures(self) -> list[str]:
        """One line for each bound that is not met."""
        return [rule.reason for rule in self.rules if not rule.passed]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"passed": self.passed, **asdict(self), "rules": [asdict(rule) for rule in self.rules]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Decision:
        """Rebuild a decision from ``to_json``."""
        return cls(compared_with=value["compared_with"], rules=tuple(CheckedRule(**rule) for rule in value["rules"]))


def decide(
    gate: PromotionGateConfig,
    metrics: Mapping[str, Any],
    *,
    production: Mapping[str, Any] | None = None,
    compared_with: int | None = None,
) -> Decision:
    """Hold metrics against the rules.

    What was not measured meets no bound. A bound beside production is met where nothing is in production, and not met
    where the version in production did not measure the metric: then nothing is known of a drop.

    Args:
        gate: the rules.
        metrics: of the evaluate stage, with its own verdict under ``gate``.
        production: those of the version in production; None if there is none.
        compared_with: its number.
    """
    checked = list(_own_verdict(metrics.get("gate")))
    for name, rule in gate.rules.items():
        value, before = _number(metrics.get(name)), _number((production or {}).get(name))
        for bound, threshold in rule.thresholds(before):
            passed, reason = _hold(name, bound, value, threshold, is_first=production is None)
            checked.append(
                CheckedRule(
                    metric=name,
                    bound=bound,
                    setting=getattr(rule, bound),
                    threshold=threshold,
                    value=value,
                    production=before,
                    passed=passed,
                    reason=reason,
                )
            )
    return Decision(compared_with=compared_with, rules=tuple(checked))


def _own_verdict(verdict: Mapping[str, Any] | None) -> Iterator[CheckedRule]:
    """Carry over what the evaluate stage has said of its thresholds, if it had any."""
    if verdict and verdict["num_checked"]:
        count, failed = int(verdict["num_checked"]), list(verdict["reasons"])
        yield CheckedRule(
            metric="evaluate.gate",
            bound="min",
            setting=count,
            threshold=count,
            value=count - len(failed),
            production=None,
            passed=bool(verdict["passed"]),
            reason=f"evaluate.gate: {'; '.join(failed) or f'all {count} thresholds are met'}",
        )


def _number(value: Any) -> float | None:
    """Return a finite number; None for anything else: NaN is above and below nothing."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def _hold(name: str, bound: str, value: float | None, threshold: float | None, *, is_first: bool) -> tuple[bool, str]:
    if value is None:
        return False, f"{name} was not measured ({bound} is set)"
    if threshold is None and is_first:
        return True, f"{name} {value:.4g}: nothing is in production to compare with ({bound})"
    if threshold is None:
        return False, f"{name} {value:.4g}: the version in production did not measure it ({bound} is set)"
    is_lower_bound = bound in ("min", "max_drop")
    passed = value >= threshold if is_lower_bound else value <= threshold
    side = ("at least" if is_lower_bound else "at most") if passed else ("below" if is_lower_bound else "above")
    return passed, f"{name} {value:.4g} is {side} {threshold:.4g} ({bound})"
