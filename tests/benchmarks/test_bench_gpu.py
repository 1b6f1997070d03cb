"""The benchmark for GPUs, as far as a CPU can tell: the same functions on the quickstart's models."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from stages.config import load_config
from tests.benchmarks.bench_gpu import PAPER, REPOSITORY, Card, Measurement, report, run
from tests.benchmarks.gpu_step import (
    CONFIG_TYPES,
    MODEL_WORK,
    Found,
    Job,
    breakdown,
    found_from_json,
    kind_of,
    measure,
    measured_peak_tflops,
    model_config,
)

QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"
CARD = Card(name="a card", memory_gib=80, measured_tflops=0.1, published_tflops=None, torch="2", date="2026-11-26")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A step of the quickstart's prior on the CPU; the file has its settings written out, as ``paper.yaml`` has."""
    config = load_config(QUICKSTART)
    models = {name: {"model": asdict(getattr(config, name).model)} for name in CONFIG_TYPES}
    path = tmp_path_factory.mktemp("config") / "models.yaml"
    path.write_text(json.dumps(models))
    return Job(config=str(path), model="prior", device="cpu", micro_batch=2, min_seconds=0.0)


@pytest.fixture(scope="module")
def found(tiny: Job) -> Found:
    """What is found of it."""
    return measure(tiny)


@pytest.mark.parametrize("model", CONFIG_TYPES)
def test_the_models_are_those_of_the_config(model: str) -> None:
    job = Job(config=str(PAPER), model=model)
    assert model_config(job) == getattr(load_config(PAPER), model).model


@pytest.mark.slow
@pytest.mark.parametrize("model", CONFIG_TYPES)
def test_every_model_is_measured_and_profiled(model: str, tiny: Job) -> None:
    found = measure(replace(tiny, model=model))
    assert found.num_parameters > 1000 and found.flop_per_sample > 0 and found.peak_gib > 0
    assert len(found.step_s) >= 3 and min(found.step_s) > 0
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert any(found.shares.get(kind, 0.0) > 0.01 for kind in MODEL_WORK)
    assert found.shares["optimizer"] > 0
    assert found_from_json(asdict(found)) == found


@pytest.mark.slow
def test_zero_is_measured_in_a_process_of_its_own(tiny: Job) -> None:
    measured = run(replace(tiny, engine="zero 2, offloaded"))
    assert measured.found is not None and measured.samples_per_s > 0


def test_a_job_that_fails_is_told_and_ends_nothing(tiny: Job) -> None:
    measured = run(replace(tiny, engine="zero 7"))
    assert measured.found is None
    assert measured.problem.startswith("failed: ") and measured.samples_per_s == 0.0


def test_kinds_of_operations() -> None:
    kinds = {
        "aten::mm": "matrix product",
        "aten::addmm": "matrix product",
        "aten::convolution_backward": "convolution",
        "aten::_scaled_dot_product_flash_attention_backward": "attention",
        "aten::native_group_norm": "normalisation",
        "aten::linalg_vector_norm": "optimizer",
        "aten::_fused_adamw_": "optimizer",
        "aten::_foreach_lerp_": "optimizer",
        "aten::copy_": "copies and casts",
        "aten::silu": "elementwise and reductions",
        "aten::mul": "elementwise and reductions",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


def test_what_no_operation_took_is_idle_and_the_bottleneck_is_the_largest_overhead(found: Found) -> None:
    shares, operations = breakdown({"aten::mm": 0.5, "aten::silu": 0.1, "aten::mul": 0.05, "aten::copy_": 0.125}, 1.0)
    assert shares == pytest.approx(
        {"matrix product": 0.5, "idle": 0.225, "elementwise and reductions": 0.15, "copies and casts": 0.125}
    )
    assert list(shares)[:2] == ["matrix product", "idle"]
    assert [one.name for one in operations] == ["aten::mm", "aten::copy_", "aten::silu", "aten::mul"]
    found = replace(found, shares=shares, operations=operations)
    assert found.bottleneck == "idle 22%"
    busy = {kind: share for kind, share in shares.items() if kind != "idle"}
    assert replace(found, shares=busy).bottleneck == "elementwise and reductions 15% (aten::silu)"


def test_the_peak_is_that_of_a_matrix_product() -> None:
    assert 1e-4 < measured_peak_tflops(torch.device("cpu"), 256, 2) < 100


def test_the_report_computes_mfu_from_the_measured_peak(tiny: Job, found: Found) -> None:
    fits = Measurement(job=tiny, found=found)
    text = report(CARD, [fits, Measurement(job=replace(tiny, micro_batch=4), found=None, problem="does not fit")])
    mfu = found.flop_per_sample * 2 / statistics.median(found.step_s) / 1e12 / CARD.measured_tflops
    assert f"| {mfu:.1%} |" in text
    assert "| prior | torch | 4 | does not fit |" in text
    assert "| operation | kind | share of a step |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("bench_gpu: torch sees no CUDA device here")
    assert not (tmp_path / "out").exists()
