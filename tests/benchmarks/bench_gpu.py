"""The real sizes on one CUDA device: images per second, share of its peak, memory, and the next bottleneck.

``python -m tests.benchmarks.bench_gpu --out FOLDER`` trains the models of ``configs/paper.yaml`` (1.3B prior, 3.6B
decoder, 0.7B and 0.3B upsamplers) in bfloat16 on random batches, in micro batches that double until the card is full,
and then, at the fastest of these, with channels-last and compiled networks. It writes ``results.json`` after every
measurement and ``results.md`` at the end. Torch, numpy, safetensors and PyYAML are enough; where DeepSpeed is
installed, ZeRO 1 to 3 and an optimizer offloaded to the CPU are measured too.

MFU is counted FLOPs per second over what a large bfloat16 matrix product reaches on the same card in the same run;
what activation checkpointing computes twice is not counted, so it bounds the MFU at about three quarters.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from stages.hardware import peak_tflops
from stages.units import GIB
from tests.benchmarks.gpu_step import (
    CONFIG_TYPES,
    Found,
    Job,
    found_from_json,
    measured_peak_tflops,
)

REPOSITORY = Path(__file__).parents[2]
PAPER = REPOSITORY / "configs" / "paper.yaml"
ZERO = ("zero 1", "zero 2", "zero 3", "zero 2, offloaded")
_LARGEST = {"prior": 512, "decoder": 128, "upsampler_256": 256, "upsampler_1024": 128}
_PEAK_SIDE = 16384
_TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A job and what came of it; without anything found, why."""

    job: Job
    found: Found | None
    problem: str = ""

    @property
    def samples_per_s(self) -> float:
        """Return the speed; 0 where it did not fit."""
        return self.found.samples_per_s(self.job.micro_batch) if self.found is not None else 0.0


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
    """Measure a job in a process of its own, which may fail: the others are worth measuring all the same."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu_step", json.dumps(asdict(job))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{job} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        last_words = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return Measurement(job=job, found=None, problem=f"failed: {last_words}")
    values = json.loads(done.stdout.splitlines()[-1])
    if "out_of_memory" in values:
        return Measurement(job=job, found=None, problem="does not fit")
    return Measurement(job=job, found=found_from_json(values))


def measure_model(template: Job, engines: Sequence[str], largest: int) -> Iterator[Measurement]:
    """Measure one model: growing micro batches under plain torch, options at the fastest, then other engines there.

    Args:
        template: the model, where and how long.
        engines: beside plain torch.
        largest: micro batch to end with.
    """
    best: Measurement | None = None
    micro_batch = 1
    while micro_batch <= largest:
        measured = run(replace(template, micro_batch=micro_batch))
        yield measured
        if measured.found is None:
            break
        best = measured if best is None or measured.samples_per_s > best.samples_per_s else best
        micro_batch *= 4 if micro_batch < 16 else 2
    at = best.job.micro_batch if best is not None else 1
    is_unet = template.model != "prior"
    for options in ("channels_last", "channels_last compile") if is_unet else ("compile",):
        if best is not None:
            yield run(replace(template, micro_batch=at, options=options))
    for engine in engines:
        yield run(replace(template, micro_batch=at, engine=engine))


def report(on: Card, measurements: Sequence[Measurement]) -> str:
    """Write the table in Markdown, and the largest operations of the fastest way of every model."""
    published = f", {on.published_tflops:.0f} published" if on.published_tflops else ""
    columns = ["model", "engine", "micro batch", "img/s", "ms a step", "TFLOP/s", "MFU", "peak GiB", "next bottleneck"]
    lines = [columns, ["---"] * len(columns), *(_cells(on, measured) for measured in measurements)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    conditions = (
        f"{on.name}, {on.memory_gib:.0f} GiB, torch {on.torch}, {on.date}; bfloat16 autocast, FLOPs of the model "
        f"alone; peak of the card: {on.measured_tflops:.0f} TFLOP/s measured by a product of {_PEAK_SIDE} x "
        f"{_PEAK_SIDE} matrices{published}."
    )
    return "\n\n".join([table, conditions, *_profiles(measurements)]) + "\n"


def _cells(on: Card, measured: Measurement) -> list[str]:
    job, found = measured.job, measured.found
    ways = ", ".join([job.engine, *job.options.split()])
    if found is None:
        return [job.model, ways, str(job.micro_batch), measured.problem.replace("|", "/"), "", "", "", "", ""]
    tflops = found.flop_per_sample * measured.samples_per_s / _TERA
    return [
        f"{job.model} ({found.num_parameters / 1e9:.2f}B)",
        ways,
        str(job.micro_batch),
        f"{measured.samples_per_s:.2f}",
        f"{1e3 * job.micro_batch / measured.samples_per_s:.0f}",
        f"{tflops:.0f}",
        f"{tflops / on.measured_tflops:.1%}",
        f"{found.peak_gib:.1f}",
        found.bottleneck,
    ]


def _profiles(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yield the profile of the fastest way of every model."""
    for model in dict.fromkeys(measured.job.model for measured in measurements):
        best = max((m for m in measurements if m.job.model == model), key=lambda m: m.samples_per_s)
        if best.found is None:
            continue
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in best.found.shares.items() if share >= 0.005)
        rows = [f"| {one.name} | {one.kind} | {one.share:.1%} |" for one in best.found.operations]
        table = "\n".join(["| operation | kind | share of a step |", "| --- | --- | --- |", *rows])
        yield f"{model}, {best.job.engine}, micro batch {best.job.micro_batch}: {shares}.\n\n{table}"


def main() -> None:
    """Measure what fits into the time, and write it down as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and results.md")
    parser.add_argument("--config", type=Path, default=PAPER, help="sizes of the models")
    parser.add_argument("--models", nargs="+", choices=list(CONFIG_TYPES), default=list(CONFIG_TYPES))
    parser.add_argument("--seconds", type=float, default=5.0, help="of steps, per measurement")
    parser.add_argument("--minutes", type=float, default=60.0, help="no measurement begins after so many")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu: torch sees no CUDA device here; nothing was measured. Run it on a machine with one.")
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.minutes * 60
    engines = ZERO if importlib.util.find_spec("deepspeed") else ()
    on, measurements = card(), list[Measurement]()
    for model in args.models:
        template = Job(config=str(args.config.resolve()), model=model, min_seconds=args.seconds)
        jobs = measure_model(template, engines, _LARGEST[model])
        while time.monotonic() < until and (measured := next(jobs, None)) is not None:
            measurements.append(measured)
            values = {"card": asdict(on), "measurements": [asdict(one) for one in measurements]}
            (args.out / "results.json").write_text(json.dumps(values, indent=1) + "\n")
            (args.out / "results.md").write_text(report(on, measurements))
            print(" | ".join(_cells(on, measured)), flush=True)


if __name__ == "__main__":
    main()
