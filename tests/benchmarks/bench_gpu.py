"""The real sizes on one CUDA device: images per second, share of its peak, memory, and the next bottleneck.

``python -m tests.benchmarks.bench_gpu --out FOLDER`` trains the models of ``configs/paper.yaml`` (1.3B prior, 3.6B
decoder, 0.7B and 0.3B upsamplers) in bfloat16 on random batches, under plain torch and, where DeepSpeed is installed,
ZeRO 1 to 3 with and without offload: each in micro batches that grow until the card is full or they get no faster. At
plain torch's fastest micro batch channels-last and compiled networks follow. A row takes ``--row-seconds`` at most; the
rows that tell most come first, of all models, so that any session leaves a table: ``results.json`` and ``results.md``
are written after every row. Torch, numpy, safetensors and PyYAML are enough.

MFU is counted FLOPs per second over what a large bfloat16 matrix product reaches on the same card in the same run;
what activation checkpointing computes twice is not counted, so it bounds the MFU at about three quarters. Beside the
peak memory stands what the planner (``unclip plan --cost``) expects.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stages.hardware import peak_tflops
from stages.units import GIB
from tests.benchmarks.gpu_job import Found, Job, found_from_json
from tests.benchmarks.gpu_step import CONFIG_TYPES, measured_peak_tflops

REPOSITORY = Path(__file__).parents[2]
PAPER = REPOSITORY / "configs" / "paper.yaml"
ZERO = ("zero 1", "zero 2", "zero 3", "zero 2, offloaded", "zero 3, offloaded", "zero 3, all offloaded")
_LARGEST = {"prior": 512, "decoder": 128, "upsampler_256": 256, "upsampler_1024": 128}
_PEAK_SIDE = 16384
_LEAST_S = 20.0  # for less a row is not begun
_TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A job and what came of it; without anything found, or not all, why."""

    job: Job
    found: Found | None
    problem: str = ""

    @property
    def samples_per_s(self) -> float:
        """Return the speed; 0 where it did not fit."""
        return self.found.best.samples_per_s if self.found is not None else 0.0


@dataclass(frozen=True, kw_only=True)
class Card:
    """The device: its name, memory, measured and published bfloat16 peak (TFLOP/s), and the software."""

    name: str
    memory_gib: float
    measured_tflops: float
    published_tflops: float | None
    torch: str
    date: str


def card() -> Card:
    """Look at the device, and measure its peak."""
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    return Card(
        name=name,
        memory_gib=torch.cuda.get_device_properties(device).total_memory / GIB,
        measured_tflops=measured_peak_tflops(device, _PEAK_SIDE),
        published_tflops=peak_tflops(name, "bf16"),
        torch=torch.__version__,
        date=datetime.date.today().isoformat(),
    )


def run(job: Job) -> Measurement:
    """Measure a job in a process of its own, which may fail or take too long: what it had found by then counts."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu_step", json.dumps(asdict(job))]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, **pipes)
    problem = ""
    try:
        said, complaints = process.communicate(timeout=job.limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compiler's own processes, which hold the pipes too
        said, complaints = process.communicate()
        problem = f"took longer than {job.limit_s:.0f} s"
    if process.returncode and not problem:
        print(f"{job} failed:\n{complaints[-2000:]}", file=sys.stderr)
        last_words = (complaints.strip() or f"exit code {process.returncode}").splitlines()[-1]
        problem = f"failed: {last_words}"
    return measurement_of(job, said, problem)


def measurement_of(job: Job, said: str, problem: str = "") -> Measurement:
    """Read the last whole line that a job's process said."""
    lines = [line for line in said.split("\n")[:-1] if line.startswith("{")]
    if not lines:
        return Measurement(job=job, found=None, problem=problem or "said nothing")
    values = json.loads(lines[-1])
    if "out_of_memory" in values:
        return Measurement(job=job, found=None, problem="does not fit")
    return Measurement(job=job, found=found_from_json(values), problem=problem)


def jobs(templates: Sequence[Job], engines: Sequence[str], done: Sequence[Measurement]) -> Iterator[Job]:
    """Yield what to measure, the rows that tell most first: plain torch, then other engines, then options.

    Args:
        templates: one for every model.
        engines: beside plain torch.
        done: what has been measured so far; it grows meanwhile.
    """
    yield from templates
    for engine in engines:
        yield from (replace(template, engine=engine) for template in templates)
    for options in ("compile", "channels_last", "channels_last compile"):
        for template in templates:
            plain = next((m for m in done if m.job == template and m.found is not None), None)
            if plain is not None and plain.found is not None and (template.model == "prior") == (options == "compile"):
                # One micro batch alone: to compile takes longer than everything else, for each size anew.
                at = plain.found.best.micro_batch
                yield replace(template, options=options, micro_batch=at, largest=at)


def report(on: Card, measurements: Sequence[Measurement]) -> str:
    """Write the table in Markdown, all micro batches, and the largest operations of the fastest way of every model."""
    published = f", {on.published_tflops:.0f} published" if on.published_tflops else ""
    columns = ["model", "engine", "micro batch", "img/s", "ms a step", "TFLOP/s", "MFU"]
    columns += ["peak GiB", "planned GiB", "next bottleneck"]
    lines = [columns, ["---"] * len(columns), *(_cells(on, measured) for measured in measurements)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    conditions = (
        f"{on.name}, {on.memory_gib:.0f} GiB, torch {on.torch}, {on.date}; bfloat16 autocast, FLOPs of the model "
        f"alone; peak of the card: {on.measured_tflops:.0f} TFLOP/s measured by a product of {_PEAK_SIDE} x "
        f"{_PEAK_SIDE} matrices{published}. Of every row the fastest micro batch; in brackets what "
        "the planner expects over what was measured."
    )
    return "\n\n".join([table, conditions, *_searches(measurements), *_profiles(measurements)]) + "\n"


def _ways(job: Job) -> str:
    return ", ".join([job.engine, *job.options.split()])


def _cells(on: Card, measured: Measurement) -> list[str]:
    job, found = measured.job, measured.found
    if found is None:
        problem = measured.problem.replace("|", "/")
        return [job.model, _ways(job), str(job.micro_batch), problem, "", "", "", "", "", ""]
    best, planned = found.best, found.planned_gib
    tflops = found.flop_per_sample * best.samples_per_s / _TERA
    return [
        f"{job.model} ({found.num_parameters / 1e9:.2f}B)",
        _ways(job),
        str(best.micro_batch),
        f"{best.samples_per_s:.2f}",
        f"{1e3 * best.micro_batch / best.samples_per_s:.0f}",
        f"{tflops:.0f}",
        f"{tflops / on.measured_tflops:.1%}",
        f"{best.peak_gib:.1f}",
        f"{planned:.1f} ({planned / best.peak_gib:.2f})" if planned is not None else "",
        found.bottleneck,
    ]


def _searches(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yield the micro batches that were tried in every row, and why no larger one was."""
    for measured in measurements:
        if measured.found is None:
            continue
        tried = "; ".join(
            f"{one.micro_batch}: {one.samples_per_s:.2f} img/s, {one.peak_gib:.1f} GiB" for one in measured.found.trials
        )
        end = measured.problem or measured.found.end
        yield f"{measured.job.model}, {_ways(measured.job)}: {tried}" + (f"; {end}." if end else ".")


def _profiles(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yield the profile of the fastest way of every model."""
    for model in dict.fromkeys(measured.job.model for measured in measurements):
        best = max((m for m in measurements if m.job.model == model), key=lambda m: m.samples_per_s)
        if best.found is None:
            continue
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in best.found.shares.items() if share >= 0.005)
        rows = [f"| {one.name} | {one.kind} | {one.share:.1%} |" for one in best.found.operations]
        table = "\n".join(["| operation | kind | share of a step |", "| --- | --- | --- |", *rows])
        yield f"{model}, {_ways(best.job)}, micro batch {best.found.best.micro_batch}: {shares}.\n\n{table}"


def main() -> None:
    """Measure what fits into the time, and write it down as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and results.md")
    parser.add_argument("--config", type=Path, default=PAPER, help="sizes of the models")
    parser.add_argument("--models", nargs="+", choices=list(CONFIG_TYPES), default=list(CONFIG_TYPES))
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps, per micro batch")
    parser.add_argument("--row-seconds", type=float, default=90.0, help="no row takes longer")
    parser.add_argument("--minutes", type=float, default=60.0, help="the whole session")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu: torch sees no CUDA device here; nothing was measured. Run it on a machine with one.")
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.minutes * 60
    engines = ZERO if importlib.util.find_spec("deepspeed") else ()
    config = str(args.config.resolve())
    templates = [
        Job(config=config, model=model, largest=_LARGEST[model], min_seconds=args.seconds, limit_s=args.row_seconds)
        for model in args.models
    ]
    on, measurements = card(), list[Measurement]()
    for job in jobs(templates, engines, measurements):
        left_s = until - time.monotonic()
        if left_s < _LEAST_S:
            break
        measured = run(replace(job, limit_s=min(job.limit_s, left_s)))
        measurements.append(replace(measured, job=job))
        values = {"card": asdict(on), "measurements": [asdict(one) for one in measurements]}
        (args.out / "results.json").write_text(json.dumps(values, indent=1) + "\n")
        (args.out / "results.md").write_text(report(on, measurements))
        print(" | ".join(_cells(on, measured)), flush=True)


if __name__ == "__main__":
    main()
