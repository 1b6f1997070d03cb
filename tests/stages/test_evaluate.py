"""Evaluation: a perfect generator is told from a wrong one, few images from many, and the gate from the stage."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from stages.errors import InputError
from stages.evaluate import (
    Evaluate,
    EvaluateConfig,
    GateConfig,
    ImageSet,
    caption_accuracy,
    judge,
    measure,
    read_all,
    wilson_interval,
)
from stages.manifest import Manifest
from stages.samples import Sample, table_from_bytes
from tests.stages.small_store import publish_data, publish_generated, publish_weights, run, sample_of

CONFIG = EvaluateConfig(num_real=24, num_neighbours=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Manifest]]:
    root = str(tmp_path_factory.mktemp("store"))
    return root, {"clip": publish_weights(root)["clip"], **publish_data(root)}


def evaluated(
    store: tuple[str, dict[str, Manifest]], samples: list[Sample], config: EvaluateConfig = CONFIG
) -> Manifest:
    root, inputs = store
    return run(Evaluate(config, root=root), inputs | {"generate": publish_generated(root, samples)})


def fresh(num: int) -> list[Sample]:
    """Render pictures that the data set does not hold."""
    return [sample_of(1000 + i) for i in range(num)]


def test_a_perfect_generator_is_about_as_good_as_real_images(store: tuple[str, dict[str, Manifest]]) -> None:
    root, _ = store
    found = evaluated(store, fresh(12))
    m = found.metrics
    assert (m["num_generated"], m["num_reference"], m["num_control"]) == (12, 12, 12)
    assert m["num_checked"] == 12 and m["caption_accuracy_all"] > 0.8
    assert m["real_caption_accuracy_all"] > 0.7
    assert m["caption_accuracy_all_low"] < m["caption_accuracy_all"] <= m["caption_accuracy_all_high"]
    assert abs(m["kernel_distance"] - m["real_kernel_distance"]) < 5 * m["kernel_distance_error"]
    assert m["gate"] == {"passed": True, "num_checked": 0, "reasons": []}
    record = found.records[0]
    stored = json.loads(record.files["metrics"].read(root))
    assert stored == {name: value for name, value in m.items() if name != "gate"}
    table = table_from_bytes(record.files["table"].read(root)).to_pylist()
    assert [row["set"] for row in table] == ["generated"] * 12 + ["real"] * 12
    rights = [row["right_all"] for row in table if row["set"] == "generated"]
    assert np.mean(rights) == m["caption_accuracy_all"]
    assert all(row["nearest_key"] for row in table)


def test_wrong_captions_and_wrong_images_show(store: tuple[str, dict[str, Manifest]]) -> None:
    perfect = evaluated(store, fresh(12)).metrics
    samples = fresh(12)
    swapped = [dataclasses.replace(sample, caption=samples[i - 1].caption) for i, sample in enumerate(samples)]
    wrong = evaluated(store, swapped).metrics
    assert wrong["caption_accuracy_all"] < 0.3
    assert wrong["frechet_distance"] == pytest.approx(perfect["frechet_distance"], rel=1e-6)  # the same images
    collapsed = evaluated(store, [samples[0]] * 12).metrics
    assert collapsed["frechet_distance"] > 2 * perfect["frechet_distance"]
    assert collapsed["effective_number"] == pytest.approx(1.0, abs=1e-3)
    assert collapsed["diversity"] == pytest.approx(0.0, abs=1e-3)
    assert collapsed["recall"] < 0.2


def test_captions_of_other_things_are_not_checked(store: tuple[str, dict[str, Manifest]]) -> None:
    samples = [dataclasses.replace(sample, caption="a corgi wearing a bow tie") for sample in fresh(6)]
    found = evaluated(store, samples).metrics
    assert not any("accuracy" in name for name in found)
    samples[0] = fresh(1)[0]
    assert evaluated(store, samples).metrics["num_checked"] == 1


def test_the_gate_reports_and_does_not_fail_the_stage_or_repeat_its_work(
    store: tuple[str, dict[str, Manifest]],
) -> None:
    open_gate = evaluated(store, fresh(8))
    strict = dataclasses.replace(CONFIG, gate=GateConfig(max_frechet_distance=0.0, min_caption_accuracy=0.1))
    shut = evaluated(store, fresh(8), strict)
    assert shut.fingerprint != open_gate.fingerprint
    assert shut.records == open_gate.records
    gate = shut.metrics["gate"]
    assert (gate["passed"], gate["num_checked"]) == (False, 2)
    assert len(gate["reasons"]) == 1 and "frechet_distance" in gate["reasons"][0]


def test_the_sets_are_disjoint_and_drawn_by_the_seed(store: tuple[str, dict[str, Manifest]]) -> None:
    root, inputs = store
    stages = [Evaluate(CONFIG, root=root, seed=seed) for seed in (0, 0, 1)]
    generated = inputs | {"generate": publish_generated(root, fresh(12))}
    sets = [stage._real(stage.plan(generated)[0], num_generated=9) for stage in stages]
    assert [s.keys for s in sets[0]] == [s.keys for s in sets[1]] != [s.keys for s in sets[2]]
    reference, control = sets[0]
    assert (len(reference.keys), len(control.keys)) == (15, 9)
    assert not set(reference.keys) & set(control.keys)


def test_too_few_images_are_refused(store: tuple[str, dict[str, Manifest]]) -> None:
    with pytest.raises(InputError, match=r"evaluate: 2 generated images, 3 are needed; raise generate\.num_samples"):
        evaluated(store, fresh(2))
    root, inputs = store
    few = dataclasses.replace(inputs["curate"], records=inputs["curate"].records[:1])
    stage = Evaluate(EvaluateConfig(num_neighbours=9), root=root)
    with pytest.raises(InputError, match="curate kept 16 samples, 20 are needed"):
        stage.plan(inputs | {"curate": few, "generate": publish_generated(root, fresh(12))})


def image_set(seed: int, num: int, shift: float = 0.0) -> ImageSet:
    features = np.random.default_rng(seed).normal(shift, 1.0, (num, 4))
    return ImageSet(
        keys=[f"{i}" for i in range(num)], captions=["x"] * num, features=features, clip_scores=features[:, 0]
    )


def test_measure_compares_both_sets_with_the_reference() -> None:
    metrics = measure(image_set(0, 200), image_set(1, 50), image_set(2, 40, shift=1.0), num_neighbours=3)
    assert metrics["frechet_distance"] > 3 > metrics["real_frechet_distance"]
    assert metrics["clip_score"] == pytest.approx(1.0, abs=0.5) and metrics["real_clip_score"] < 0.5
    assert metrics["clip_score_error"] == pytest.approx(1 / np.sqrt(40), rel=0.4)
    assert metrics["real_precision"] > metrics["precision"]


def test_readings_need_parseable_captions() -> None:
    sample = sample_of(3)
    images = ImageSet(keys=["a", "b"], captions=[sample.caption, "?"], features=np.ones((2, 2)), clip_scores=np.ones(2))
    blank = np.zeros((16, 16, 3), np.uint8)
    readings = read_all(images, {"a": blank, "b": blank})
    assert list(readings) == ["a"] and not readings["a"].right["all"]
    assert caption_accuracy([]) == {}


@pytest.mark.parametrize(
    ("num_right", "num", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_against_published_values(num_right: int, num: int, low: float, high: float) -> None:
    assert wilson_interval(num_right, num) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_covers_the_truth() -> None:
    drawn = np.random.default_rng(0).binomial(40, 0.9, 4000)
    intervals = [wilson_interval(int(num_right), 40) for num_right in drawn]
    assert np.mean([low <= 0.9 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_the_verdict_names_what_is_missed_or_missing() -> None:
    gate = GateConfig(max_frechet_distance=1.0, min_clip_score=0.3, min_caption_accuracy=0.5, min_recall=0.1)
    verdict = judge({"frechet_distance": 1.0, "clip_score": 0.2, "recall": float("nan")}, gate)
    assert verdict == {
        "passed": False,
        "num_checked": 4,
        "reasons": [
            "clip_score 0.2 is below min_clip_score 0.3",
            "recall nan is below min_recall 0.1",
            "caption_accuracy was not measured (min_caption_accuracy is 0.5)",
        ],
    }
    assert judge({"frechet_distance": 0.5}, GateConfig(max_frechet_distance=0.5))["passed"]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"num_neighbours": 0}, "num_neighbours: 0"), ({"num_real": 5}, "num_real: 5"), ({"batch_size": 0}, "batch_size")],
)
def test_bad_settings_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**values)
