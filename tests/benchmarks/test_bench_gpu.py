"""The benchmark for GPUs, as far as a CPU can tell: the same functions on the quickstart's models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import load_config
from stages.out_of_memory import is_out_of_memory
from tests.benchmarks import gpu_step
from tests.benchmarks.bench_gpu import PAPER, REPOSITORY, ZERO, Card, Measurement, jobs, measurement_of, report, run
from tests.benchmarks.gpu_job import MODEL_WORK, Found, Job, Trial, found_from_json, next_size
from tests.benchmarks.gpu_step import (
    CONFIG_TYPES,
    breakdown,
    kind_of,
    measure,
    measured_peak_tflops,
    model_config,
    settings_of,
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
    return Job(config=str(path), model="prior", device="cpu", micro_batch=2, largest=2, min_seconds=0.0)


@pytest.fixture(scope="module")
def found(tiny: Job) -> Found:
    """What is found of it."""
    return list(measure(tiny))[-1]


@pytest.mark.parametrize("model", CONFIG_TYPES)
def test_the_models_are_those_of_the_config(model: str) -> None:
    job = Job(config=str(PAPER), model=model)
    assert model_config(job) == getattr(load_config(PAPER), model).model


@pytest.mark.slow
@pytest.mark.parametrize("model", CONFIG_TYPES)
def test_every_model_is_measured_and_profiled(model: str, tiny: Job) -> None:
    *_, found = measure(replace(tiny, model=model))
    assert found.num_parameters > 1000 and found.flop_per_sample > 0 and found.best.peak_gib > 0
    assert found.planned_gib is not None and found.planned_gib > 16 * found.num_parameters / (1 << 30)
    assert len(found.best.step_s) >= 3 and min(found.best.step_s) > 0
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert any(found.shares.get(kind, 0.0) > 0.01 for kind in MODEL_WORK)
    assert found.shares["optimizer"] > 0
    assert found_from_json(asdict(found)) == found


@pytest.mark.slow
def test_zero_is_measured_in_a_process_of_its_own_in_growing_micro_batches(tiny: Job) -> None:
    measured = run(replace(tiny, engine="zero 3, all offloaded", micro_batch=1, largest=4))
    assert measured.found is not None and not measured.problem and measured.samples_per_s > 0
    assert [trial.micro_batch for trial in measured.found.trials] == [1, 4]
    assert measured.found.end in ("the largest", "no faster")
    assert measured.found.planned_gib is not None


def test_a_job_that_fails_is_told_and_ends_nothing(tiny: Job) -> None:
    measured = run(replace(tiny, engine="zero 7"))
    assert measured.found is None
    assert measured.problem.startswith("failed: ") and measured.samples_per_s == 0.0


def test_a_job_that_takes_too_long_is_ended_and_what_it_found_counts(tiny: Job, found: Found) -> None:
    measured = run(replace(tiny, limit_s=0.2))
    assert measured.found is None and measured.problem == "took longer than 0 s"
    line = json.dumps(asdict(found))
    measured = measurement_of(tiny, f"{line}\n{line[:50]}", "took longer than 90 s")
    assert measured.found == found and measured.problem == "took longer than 90 s"
    assert measurement_of(tiny, '{"out_of_memory": "CUDA"}\n').problem == "does not fit"


def test_micro_batches_grow_while_they_get_faster_and_there_is_time(tiny: Job) -> None:
    def after(*speeds: tuple[int, float]) -> tuple[int | None, str]:
        trials = [
            Trial(micro_batch=size, step_s=[size / speed], peak_gib=1.0, reserved_gib=1.0) for size, speed in speeds
        ]
        return next_size(trials, 64)

    assert after((1, 10)) == (4, "") and after((1, 10), (4, 20)) == (8, "") and after((4, 10), (8, 20)) == (16, "")
    assert after((16, 10), (32, 20)) == (64, "") and after((32, 10), (64, 20)) == (None, "the largest")
    assert after((4, 10), (16, 10.1)) == (None, "no faster")
    hurried = list(measure(replace(tiny, micro_batch=1, largest=64, limit_s=0.0)))
    assert [len(found.trials) for found in hurried] == [1, 1] and hurried[-1].end == "out of time"
    assert hurried[0].planned_gib is None and hurried[1].planned_gib is not None


def test_memory_that_ends_ends_the_search_alone(tiny: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is asked for and cannot be made stands for a step that does not fit."""
    make = gpu_step.batch_of

    def batch_of(config: Any, micro_batch: int, device: torch.device) -> dict[str, torch.Tensor]:
        torch.empty(1 << 60 if micro_batch > 1 else 1, dtype=torch.uint8)
        return make(config, micro_batch, device)

    monkeypatch.setattr(gpu_step, "batch_of", batch_of)
    *_, found = measure(replace(tiny, micro_batch=1, largest=64))
    assert [trial.micro_batch for trial in found.trials] == [1] and found.end == "4 does not fit"
    with pytest.raises(RuntimeError) as error:
        next(measure(replace(tiny, micro_batch=2)))
    assert is_out_of_memory(error.value)


def test_every_model_has_a_row_before_any_has_two(tiny: Job, found: Found) -> None:
    templates = [replace(tiny, model=model, micro_batch=1, largest=64) for model in CONFIG_TYPES]
    done: list[Measurement] = []
    for job in jobs(templates, ZERO, done):
        done.append(Measurement(job=job, found=found if job.model != "decoder" else None))
    rows = [measured.job for measured in done]
    assert rows[:4] == templates and [job.engine for job in rows[:28:4]] == ["torch", *ZERO]
    options = {(job.model, job.options) for job in rows[28:]}
    assert all(job.micro_batch == job.largest == found.best.micro_batch for job in rows[28:])
    assert options == {("prior", "compile")} | {
        (model, way)
        for model in ("upsampler_256", "upsampler_1024")
        for way in ("channels_last", "channels_last compile")
    }


def test_engines_are_what_their_names_say(tiny: Job) -> None:
    found = {}
    for engine in ZERO:
        settings = settings_of(replace(tiny, engine=engine), 8)
        found[engine] = (settings.zero_stage, settings.offload_optimizer, settings.offload_parameters)
        assert settings.micro_batch_size == 8 and settings.precision == "bf16"
    assert found == {
        **{f"zero {stage}": (stage, "none", "none") for stage in (1, 2, 3)},
        **{f"zero {stage}, offloaded": (stage, "cpu", "none") for stage in (2, 3)},
        "zero 3, all offloaded": (3, "cpu", "cpu"),
    }


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
    mfu = found.flop_per_sample * found.best.samples_per_s / 1e12 / CARD.measured_tflops
    assert f"| {mfu:.1%} |" in text
    assert found.planned_gib is not None
    assert (
        f"| {found.best.peak_gib:.1f} | {found.planned_gib:.1f} ({found.planned_gib / found.best.peak_gib:.2f}) |"
        in text
    )
    assert "| prior | torch | 4 | does not fit |" in text
    assert f"prior, torch: 2: {found.best.samples_per_s:.2f} img/s" in text and "; the largest." in text
    assert "| operation | kind | share of a step |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("bench_gpu: torch sees no CUDA device here")
    assert not (tmp_path / "out").exists()
