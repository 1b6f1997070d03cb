"""The gate at promotion: each bound on each side, alone and beside production; and it changes no fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.config import load_config
from stages.errors import ConfigError
from stages.evaluate import QUESTIONS, ImageSet, PixelReading, caption_accuracy, measure
from stages.gate import LOSSES, METRICS, Decision, GateRule, PromotionGateConfig, decide
from stages.generator_training import Training
from stages.graph import STAGES, build_stages, fingerprints
from stages.pixel_check import UNKNOWN, Reading
from stages.validation_config import LOSS

TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.mark.parametrize(
    ("rule", "value", "production", "passed", "threshold"),
    [
        ({"min": 0.5}, 0.5, None, True, 0.5),
        ({"min": 0.5}, 0.25, None, False, 0.5),
        ({"max": 0.5}, 0.5, {"recall": 9.0}, True, 0.5),
        ({"max": 0.5}, 0.75, {"recall": 9.0}, False, 0.5),
        ({"max_drop": 0.25}, 0.5, {"recall": 0.75}, True, 0.5),
        ({"max_drop": 0.25}, 0.375, {"recall": 0.75}, False, 0.5),
        ({"max_drop": 0.25}, 9.0, {"recall": 0.75}, True, 0.5),
        ({"max_rise": 0.25}, 1.0, {"recall": 0.75}, True, 1.0),
        ({"max_rise": 0.25}, 1.125, {"recall": 0.75}, False, 1.0),
        ({"max_rise": 0.0}, 0.125, {"recall": 0.75}, True, 0.75),
        ({"max_drop": 0.25}, 0.0, None, True, None),  # nothing in production
        ({"max_drop": 0.25}, 0.5, {}, False, None),  # not measured there
        ({"max_drop": 0.25}, 0.5, {"recall": float("nan")}, False, None),
        ({"min": 0.0}, None, None, False, 0.0),  # not measured here
        ({"max": 1.0}, float("nan"), None, False, 1.0),
        ({"max_drop": 1.0}, None, None, False, None),
    ],
)
def test_a_bound(
    rule: dict[str, float], value: float | None, production: dict[str, Any] | None, passed: bool, threshold: float
) -> None:
    gate = PromotionGateConfig(rules={"recall": GateRule(**rule)})
    number = None if production is None else 3
    decision = decide(gate, {"recall": value}, production=production, compared_with=number)
    (checked,) = decision.rules
    assert (checked.passed, checked.threshold, decision.passed) == (passed, threshold, passed)
    assert checked.metric == "recall" and {checked.bound: checked.setting} == rule and "recall" in checked.reason
    assert decision.failures == ([] if passed else [checked.reason])
    assert Decision.from_json(decision.to_json()) == decision and decision.compared_with == number


def test_all_bounds_of_all_rules_must_be_met() -> None:
    rules = {"recall": GateRule(min=0.5, max_drop=0.25), "frechet_distance": GateRule(max=10, max_rise=1)}
    gate, production = PromotionGateConfig(rules=rules), {"recall": 0.75, "frechet_distance": 8.0}
    assert decide(gate, {"recall": 0.5, "frechet_distance": 9.0}, production=production).passed
    decision = decide(gate, {"recall": 0.5, "frechet_distance": 9.5}, production=production)
    assert [rule.passed for rule in decision.rules] == [True, True, True, False] and not decision.passed
    assert decision.failures == ["frechet_distance 9.5 is above 9 (max_rise)"]


def test_the_verdict_of_evaluate_counts() -> None:
    verdict = {"passed": False, "num_checked": 3, "reasons": ["recall 0.1 is below min_recall 0.2"]}
    decision = decide(PromotionGateConfig(), {"gate": verdict})
    assert decision.failures == ["evaluate.gate: recall 0.1 is below min_recall 0.2"]
    assert (decision.rules[0].value, decision.rules[0].threshold) == (2, 3)
    assert decide(PromotionGateConfig(), {"gate": {"passed": True, "num_checked": 0, "reasons": []}}).rules == ()
    assert decide(PromotionGateConfig(), {"gate": {"passed": True, "num_checked": 1, "reasons": []}}).passed


def test_the_known_metrics_are_those_that_evaluate_measures() -> None:
    random = np.random.default_rng(0)

    def images(num: int) -> ImageSet:
        keys = [str(i) for i in range(num)]
        return ImageSet(
            keys=keys,
            captions=["a circle"] * num,
            features=random.normal(size=(num, 4)),
            clip_scores=random.normal(size=num),
        )

    measured = measure(images(20), images(8), images(8), num_neighbours=2)
    shown = Reading(foreground=UNKNOWN, background=UNKNOWN, shape=UNKNOWN)
    accuracy = caption_accuracy([PixelReading(shown=shown, right=dict.fromkeys(QUESTIONS, True))])
    assert set(METRICS) == {*measured, *accuracy, *(f"real_{name}" for name in accuracy), *LOSSES}
    trainings = {stage.name for stage in STAGES if issubclass(stage, Training)}
    assert set(LOSSES) == {f"{name}_{LOSS}" for name in trainings}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gate.rules.frechet_distanc.max=1", "did you mean 'frechet_distance'? known: num_generated,"),
        ("gate.rules.clip_score.maxi=1", "gate.rules.clip_score.maxi: unknown key"),
        ("gate.rules.clip_score={}", "gate.rules.clip_score.min: no bound is given"),
        ("gate.rules.clip_score.max_drop=-1", "max_drop: -1 is no bound"),
        ("gate.rules.clip_score={min: 2, max: 1}", "min: 2 is above max 1"),
        ("gate.rules.clip_score.max=many", "gate.rules.clip_score.max: "),
    ],
)
def test_a_wrong_gate_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [setting])
    assert message in str(caught.value)


def test_a_gate_changes_no_fingerprint() -> None:
    plain = load_config(TINY)
    gated = load_config(TINY, ["gate.rules.clip_score.max_drop=0.01"])
    assert gated.gate.rules["clip_score"] == GateRule(max_drop=0.01)
    assert fingerprints(build_stages(gated)) == fingerprints(build_stages(plain))
