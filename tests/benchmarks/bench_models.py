"""Our models against diffusers' and dalle2-pytorch's: time and peak memory of forward, training step and sampling.

``python -m tests.benchmarks.bench_models`` prints a table of ratios, theirs over ours. diffusers computes the same
function with the same weights, which the benchmark checks. dalle2-pytorch has networks of its own, here of about as
many parameters, and lives in an environment of its own::

    uv venv --python 3.11 /tmp/dalle2-venv
    uv pip install --python /tmp/dalle2-venv/bin/python dalle2-pytorch==1.15.6 torch==2.14.1 torchvision==0.29.1
    python -m tests.benchmarks.bench_models --dalle2-python /tmp/dalle2-venv/bin/python

Each operation of each side has a process of its own, and the two take turns, so that whatever else the machine does
falls upon both. On a machine that is not idle take ``--threads 1`` and believe the CPU time: threads that wait for each
other measure the scheduler. ``--gpu`` takes larger sizes and computes in bfloat16 by autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.model_sizes import SIZES, Task

REPOSITORY = Path(__file__).parents[2]
SAME_OUTPUT_FRACTION = {"cpu": 1e-3, "cuda": 0.05}
# (model, rival, operations)
COMPARISONS = (
    ("prior", "diffusers", ("forward", "train", "sample")),
    ("decoder", "diffusers", ("forward", "train")),
    ("upsampler", "diffusers", ("forward", "train")),
    ("prior", "dalle2", ("forward", "train", "sample")),
    ("decoder", "dalle2", ("forward", "train", "sample")),
    ("prior", "ours", ("forward",)),
    ("decoder", "ours", ("forward",)),
)
NAMES = {
    ("prior", "diffusers"): ("DiffusionPrior", "diffusers PriorTransformer"),
    ("decoder", "diffusers"): ("decoder's UNet", "diffusers UNet2DConditionModel"),
    ("upsampler", "diffusers"): ("upsampler's UNet", "diffusers UNet2DModel"),
    ("prior", "dalle2"): ("DiffusionPrior", "dalle2-pytorch DiffusionPrior"),
    ("decoder", "dalle2"): ("Decoder", "dalle2-pytorch Decoder"),
    ("prior", "ours"): ("DiffusionPrior", "control: itself"),
    ("decoder", "ours"): ("decoder's UNet", "control: itself"),
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """What was measured of one side: seconds per call in every repetition, and what the process said of itself."""

    wall_s: list[float]
    cpu_s: list[float]
    peak_mib: float
    num_parameters: int
    flop: int
    output: float
    torch: str
    device: str

    @property
    def median_s(self) -> float:
        """Seconds per call, by the clock."""
        return statistics.median(self.wall_s)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operation, measured on both sides."""

    task: Task
    ours: Side
    theirs: Side

    @property
    def wall_ratios(self) -> list[float]:
        """Theirs over ours by the clock, repetition by repetition."""
        return [theirs / ours for ours, theirs in zip(self.ours.wall_s, self.theirs.wall_s, strict=True)]

    @property
    def cpu_ratios(self) -> list[float]:
        """Theirs over ours in CPU time, repetition by repetition."""
        return [theirs / ours for ours, theirs in zip(self.ours.cpu_s, self.theirs.cpu_s, strict=True)]

    @property
    def memory_ratio(self) -> float:
        """Theirs over ours."""
        return self.theirs.peak_mib / self.ours.peak_mib


class Worker:
    """A process that measures one side, task by task."""

    def __init__(self, module: str, python: str, num_threads: int, log: Path) -> None:
        self._log = log
        settings = {"OMP_NUM_THREADS": str(num_threads), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", f"tests.benchmarks.{module}"],
                cwd=REPOSITORY,
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, line: str) -> None:
        """Send a line: a task, anything for a repetition, or nothing for the end of the task."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer.

        Raises:
            RuntimeError: if the process has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker of the benchmark failed; its last words:\n{self._log.read_text()[-2000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Let the process end, or end it if it does not wait for a task."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def measure(task: Task, workers: Sequence[Worker], num_repetitions: int, first: int = 0) -> Row:
    """Run one operation on both sides, in turns, each of which begins with the other side; ``first`` is built first."""
    facts: list[dict[str, Any]] = [{}, {}]
    for turn in (first, 1 - first):
        workers[turn].ask(replace(task, side=("ours", "theirs")[turn]).to_json())
        facts[turn] = workers[turn].answer()
    times: list[dict[str, list[float]]] = [{"wall_s": [], "cpu_s": []} for _ in workers]
    for repetition in range(num_repetitions):
        for turn in (0, 1) if (repetition + first) % 2 else (1, 0):
            workers[turn].ask("again")
            for clock, seconds in workers[turn].answer().items():
                times[turn][clock].append(seconds)
    for worker in workers:
        worker.ask("")
    ours, theirs = (Side(**{**times[turn], **facts[turn], **workers[turn].answer()}) for turn in (0, 1))
    row = Row(task=task, ours=ours, theirs=theirs)
    if task.rival == "diffusers" and task.operation != "sample":
        _check_same_output(row)
    return row


def merged(rows: Sequence[Row]) -> Row:
    """Join the rounds of one operation: all repetitions, and the median of the peaks."""

    def joined(sides: Sequence[Side]) -> Side:
        return replace(
            sides[0],
            wall_s=[seconds for side in sides for seconds in side.wall_s],
            cpu_s=[seconds for side in sides for seconds in side.cpu_s],
            peak_mib=statistics.median(side.peak_mib for side in sides),
        )

    return Row(task=rows[0].task, ours=joined([row.ours for row in rows]), theirs=joined([row.theirs for row in rows]))


def _check_same_output(row: Row) -> None:
    ours, theirs = row.ours.output, row.theirs.output
    if abs(ours - theirs) > SAME_OUTPUT_FRACTION[row.task.device] * abs(ours):
        raise RuntimeError(f"{row.task.model}, {row.task.operation}: mean output {ours} here, {theirs} in diffusers")


def run(template: Task, dalle2_python: str | None, num_repetitions: int, num_rounds: int) -> Iterator[Row]:
    """Measure all comparisons, those with dalle2-pytorch only if its interpreter is given.

    A process keeps the speed that its memory's layout gives it; so every round has processes of its own.
    """
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder, contextlib.ExitStack() as stack:
        template = replace(template, folder=folder)
        export = [sys.executable, "-m", "tests.benchmarks.our_worker", template.to_json()]
        subprocess.run(export, cwd=REPOSITORY, check=True)
        workers = {}
        for name, (module, python) in _programs(dalle2_python).items():
            workers[name] = Worker(module, python, template.num_threads, Path(folder) / f"{name}.log")
            stack.callback(workers[name].close)
        for model, rival, operations in COMPARISONS:
            for operation in operations if rival in workers else ():
                task = replace(template, model=model, rival=rival, operation=operation)
                both = (workers["first"], workers[rival])
                yield merged([measure(task, both, num_repetitions, number % 2) for number in range(num_rounds)])


def _programs(dalle2_python: str | None) -> dict[str, tuple[str, str]]:
    """Name module and interpreter of our side, ``first``, and of every rival."""
    programs = {
        "first": ("our_worker", sys.executable),
        "ours": ("our_worker", sys.executable),
        "diffusers": ("diffusers_worker", sys.executable),
    }
    return programs | ({} if dalle2_python is None else {"dalle2": ("dalle2_worker", dalle2_python)})


# ---- report ---------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], peak_tflops: float | None) -> str:
    """Write a table in Markdown, and under which conditions it arose."""
    on_gpu = rows[0].task.device == "cuda"
    columns = ["ours", "theirs", "operation", "ours, ms", "theirs, ms", "time ratio", "CPU time ratio", "ours, MiB"]
    columns += ["theirs, MiB", "memory ratio", "GFLOP ratio"] + (["per s, both", "MFU, both"] if on_gpu else [])
    lines = [columns, ["---"] * len(columns)]
    lines += [_cells(row) + (_gpu_cells(row, peak_tflops) if on_gpu else []) for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{conditions(rows)}"


def _cells(row: Row) -> list[str]:
    sides = (row.ours, row.theirs)
    return [
        *(f"{name} ({s.num_parameters / 1e6:.1f}M)" for name, s in zip(_names(row), sides, strict=True)),
        _operation(row.task),
        *(f"{s.median_s * 1e3:.0f} ({min(s.wall_s) * 1e3:.0f}-{max(s.wall_s) * 1e3:.0f})" for s in sides),
        *(f"**{statistics.median(r):.2f}** ({min(r):.2f}-{max(r):.2f})" for r in (row.wall_ratios, row.cpu_ratios)),
        *(f"{s.peak_mib:.0f}" for s in sides),
        f"**{row.memory_ratio:.2f}**",
        f"{row.theirs.flop / row.ours.flop:.2f}",
    ]


def _gpu_cells(row: Row, peak_tflops: float | None) -> list[str]:
    """Give throughput, and of training steps the share of the device's peak that the counted operations reach."""
    sides = (row.ours, row.theirs)
    rates = " / ".join(f"{row.task.batch_size / side.median_s:.1f}" for side in sides)
    if peak_tflops is None or row.task.operation != "train":
        return [rates, ""]
    return [rates, " / ".join(f"{side.flop / side.median_s / peak_tflops / 1e12:.1%}" for side in sides)]


def _names(row: Row) -> tuple[str, str]:
    return NAMES[row.task.model, row.task.rival]


def _operation(task: Task) -> str:
    if task.operation == "sample":
        return f"sample, {task.sizes.steps[task.model]} guided steps, batch {task.batch_size}"
    return f"{'training step' if task.operation == 'train' else task.operation}, batch {task.batch_size}"


def conditions(rows: Sequence[Row]) -> str:
    """Say on what, when and how it was measured, and what the numbers mean."""
    task, sizes = rows[0].task, rows[0].task.sizes
    rivals = {row.task.rival: row.theirs.torch for row in rows if row.task.rival != "ours"}
    torch_versions = ", ".join(f"{version} ({rival})" for rival, version in rivals.items())
    device = cpu_model() if task.device == "cpu" else f"{rows[0].ours.device}, bfloat16 autocast"
    return (
        f"Ratios are theirs over ours: above 1, ours is faster or leaner; the control rows show how far chance moves "
        f"them. Times: median (least-most) of {len(rows[0].ours.wall_s)} alternating repetitions; the ratio is the "
        f"median of the pairs'. Memory: the weights and whatever the process's peak added to them. Training steps: "
        f"forward, backward, fused AdamW. {device}, {task.num_threads} thread(s); torch {rows[0].ours.torch} (ours), "
        f"{torch_versions}; {datetime.date.today().isoformat()}. Prior: width {sizes.embedding_dim}, "
        f"{sizes.prior_layers} layers, {sizes.context_length} tokens. U-Nets: {sizes.channels} x "
        f"{sizes.channel_mult} channels, {sizes.num_res_blocks} blocks per level; decoder {sizes.decoder_px} px with "
        f"attention at {sizes.attention_px} px, upsampler {sizes.upsampler_px} px."
    )


def cpu_model() -> str:
    """Name the processor as the kernel does."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else platform.machine()} ({os.cpu_count()} cores)"


def main() -> None:
    """Measure, print the table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dalle2-python", help="interpreter of an environment with dalle2-pytorch")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, on both sides")
    parser.add_argument("--repetitions", type=int, default=3, help="of each round")
    parser.add_argument("--rounds", type=int, default=2, help="each in new processes")
    parser.add_argument("--gpu", action="store_true", help="measure on CUDA, at larger sizes")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of the GPU, for the MFU (H100 SXM: 989)")
    parser.add_argument("--sizes", choices=sorted(SIZES), help="default: gpu with --gpu, else cpu")
    parser.add_argument("--json", type=Path, help="write every repetition here")
    args = parser.parse_args()
    template = Task(
        model="",
        rival="",
        operation="",
        side="",
        folder="",
        sizes=SIZES[args.sizes or ("gpu" if args.gpu else "cpu")],
        num_threads=args.threads,
        device="cuda" if args.gpu else "cpu",
    )
    rows = []
    for row in run(template, args.dalle2_python, args.repetitions, args.rounds):
        rows.append(row)
        if args.json is not None:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(f"{_operation(row.task)} of {' and '.join(_names(row))}: done", file=sys.stderr)
    print(report(rows, args.peak_tflops))


if __name__ == "__main__":
    main()
