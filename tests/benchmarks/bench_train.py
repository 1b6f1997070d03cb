"""Our training loop against a bare PyTorch loop and dalle2-pytorch's trainers, and what a checkpoint costs it.

``python -m tests.benchmarks.bench_train`` prints two tables:

* samples per second of the loop that the stages run (``stages/training.py``: stream of shards, agreement of the ranks,
  guards, watchdog, log) under plain torch and DeepSpeed ZeRO, on one rank, over those of a bare loop on the same model
  and data, whose batches lie in memory; and, where ``--dalle2-python`` names the interpreter of an environment as for
  ``bench_models``, over those of ``DiffusionPriorTrainer`` and ``DecoderTrainer`` on networks of equal size;
* what asynchronous checkpoints take from the steps, and what they would take if the steps waited for the store.

Each loop has a process of its own and the two of a comparison take turns, as in ``bench_models``; a control compares
the bare loop with itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.benchmarks.bench_loader import write_shards
from tests.benchmarks.bench_models import REPOSITORY, Row, Worker, cpu_model, measure, merged
from tests.benchmarks.model_sizes import SIZES, Task
from tests.benchmarks.save_stall import Stall

Comparison = tuple[str, str, str, int]
# (model, rival, our engine, batch); what DeepSpeed adds to a step is the same whatever the batch, which therefore is a
# quarter of what a rank of the paper's prior has.
COMPARISONS: tuple[Comparison, ...] = (
    ("prior", "bare", "torch", 8),
    ("decoder", "bare", "torch", 2),
    ("upsampler", "bare", "torch", 2),
    ("prior", "dalle2", "torch", 8),
    ("decoder", "dalle2", "torch", 2),
    ("prior", "bare", "bare", 8),
    ("prior", "bare", "zero 1", 64),
    ("prior", "bare", "zero 2", 64),
    ("prior", "bare", "zero 3", 64),
)
SAVING_BATCH = 8
THEIR_NAMES = {
    ("prior", "dalle2"): "dalle2-pytorch DiffusionPriorTrainer",
    ("decoder", "dalle2"): "dalle2-pytorch DecoderTrainer",
}
SAVE_EVERY_S = 60.0


def with_batch(task: Task, model: str, batch: int) -> Task:
    """Choose the model of a task, and its batch."""
    return replace(task, model=model, sizes=replace(task.sizes, batch={model: batch}))


@contextlib.contextmanager
def prepared(template: Task, num_shards: int, num_samples: int) -> Iterator[Task]:
    """Write weights and data into a folder, and fill it in."""
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder:
        task = replace(template, folder=folder)
        export = [sys.executable, "-m", "tests.benchmarks.our_worker", task.to_json()]
        subprocess.run(export, cwd=REPOSITORY, check=True)
        data = Path(folder, "data")
        data.mkdir()
        write_shards(str(data), num_shards, num_samples, num_pictures=64, embedding_dim=task.sizes.embedding_dim)
        yield task


def compare_loops(
    template: Task,
    dalle2_python: str | None,
    num_repetitions: int,
    num_rounds: int,
    comparisons: Sequence[Comparison] = COMPARISONS,
) -> Iterator[Row]:
    """Measure the loops in turns; those of dalle2-pytorch only if its interpreter is given."""
    programs = {"ours": ("loop_worker", sys.executable), "bare": ("loop_worker", sys.executable)}
    if dalle2_python is not None:
        programs["dalle2"] = ("dalle2_worker", dalle2_python)
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, (module, python) in programs.items():
            workers[name] = Worker(module, python, template.num_threads, Path(template.folder) / f"{name}.log")
            stack.callback(workers[name].close)
        for model, rival, engine, batch in comparisons:
            if rival in workers:
                task = replace(with_batch(template, model, batch), rival=rival, operation="loop", engine=engine)
                both = (workers["ours"], workers[rival])
                yield merged([measure(task, both, num_repetitions, number % 2) for number in range(num_rounds)])


def measure_stalls(template: Task, num_saves: int, window: int) -> list[Stall]:
    """Measure the saves of the prior's training beside the steps, and then waiting for the store."""
    task = replace(with_batch(template, "prior", SAVING_BATCH), operation="loop", side="ours")
    stalls = []
    for way in ("background", "foreground"):
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.save_stall",
            task.to_json(),
            str(num_saves),
            str(window),
            way,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(task.num_threads)}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the measurement of checkpoints failed:\n{done.stderr[-2000:]}")
        stalls.append(Stall(**json.loads(done.stdout.splitlines()[-1])))
    return stalls


# ---- report ---------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], stalls: Sequence[Stall]) -> str:
    """Write the tables in Markdown, and under which conditions they arose."""
    parts = [_loop_table(rows)] if rows else []
    parts += [_stall_table(stalls)] if stalls else []
    return "\n\n".join(parts)


def _loop_table(rows: Sequence[Row]) -> str:
    columns = ["our loop", "against", "batch", "ours, samples/s", "theirs, samples/s"]
    columns += [
        "samples/s, ours / theirs",
        "the same per CPU second",
        "ms a step more than theirs",
        "GFLOP a step, both",
    ]
    lines = [columns, ["---"] * len(columns), *(_cells(row) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    task, sizes = rows[0].task, rows[0].task.sizes
    return (
        f"{table}\n\nRatios: median (least-most) of {len(rows[0].ours.wall_s)} alternating pairs of repetitions of "
        f"{task.min_seconds:g} s. {cpu_model()}, {task.num_threads} thread(s) of torch, one rank; torch "
        f"{rows[0].ours.torch}; {datetime.date.today().isoformat()}. Prior: width {sizes.embedding_dim}, "
        f"{sizes.prior_layers} layers, {sizes.context_length} tokens; U-Nets: {sizes.channels} x {sizes.channel_mult} "
        f"channels, {sizes.decoder_px} and {sizes.upsampler_px} px."
    )


def _cells(row: Row) -> list[str]:
    task, sides = row.task, (row.ours, row.theirs)
    theirs = THEIR_NAMES.get((task.model, task.rival), "bare loop")
    ours = "control: bare loop" if task.engine == "bare" else f"{task.model}, {task.engine}"
    more_s = statistics.median(ours - theirs for ours, theirs in zip(row.ours.wall_s, row.theirs.wall_s, strict=True))
    return [
        f"{ours} ({row.ours.num_parameters / 1e6:.1f}M)",
        f"{theirs} ({row.theirs.num_parameters / 1e6:.1f}M)",
        str(task.batch_size),
        *(f"{task.batch_size / side.median_s:.2f}" for side in sides),
        *(f"**{statistics.median(r):.3f}** ({min(r):.2f}-{max(r):.2f})" for r in (row.wall_ratios, row.cpu_ratios)),
        f"{more_s * 1e3:+.1f}",
        " / ".join(f"{side.flop / 1e9:.0f}" for side in sides),
    ]


def _stall_table(stalls: Sequence[Stall]) -> str:
    columns = ["checkpoints of the prior", "MiB", "saves", "an ordinary step, s", "longest wait of a step, s"]
    columns += ["lost to a save, s", f"lost at one save in {SAVE_EVERY_S:g} s"]
    lines = [columns, ["---"] * len(columns)]
    for stall in stalls:
        lines.append(
            [
                "written beside the steps" if stall.in_background else "waited for",
                f"{stall.state_bytes / 2**20:.0f}",
                str(len(stall.lost_s)),
                f"{stall.step_s:.3f}",
                f"{statistics.median(stall.waited_s):.2f}",
                f"{statistics.median(stall.lost_s):.2f} ({min(stall.lost_s):.2f} to {max(stall.lost_s):.2f})",
                f"**{stall.fraction(SAVE_EVERY_S):.2%}**",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, print the tables, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dalle2-python", help="interpreter of an environment with dalle2-pytorch")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides; leave a core to the loader")
    parser.add_argument("--repetitions", type=int, default=3, help="of each round")
    parser.add_argument("--rounds", type=int, default=2, help="each in new processes")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a repetition")
    parser.add_argument("--saves", type=int, default=6, help="to measure; 0 for none")
    parser.add_argument("--window", type=int, default=10, help="steps around a save")
    parser.add_argument("--only", help="compare these alone: words of `MODEL RIVAL ENGINE`, such as `decoder dalle2`")
    parser.add_argument("--sizes", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--json", type=Path, help="write every repetition here")
    args = parser.parse_args()
    chosen = [names for names in COMPARISONS if args.only is None or args.only in " ".join(names[:3])]
    template = Task(
        model="",
        rival="",
        operation="",
        side="",
        folder="",
        sizes=SIZES[args.sizes],
        num_threads=args.threads,
        min_seconds=args.seconds,
    )
    rows: list[Row] = []
    stalls: list[Stall] = []

    def keep() -> None:
        if args.json is not None:
            found = {"loops": [asdict(row) for row in rows], "checkpoints": [asdict(stall) for stall in stalls]}
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    with prepared(template, num_shards=8, num_samples=500) as task:
        for row in compare_loops(task, args.dalle2_python, args.repetitions, args.rounds, chosen):
            rows.append(row)
            keep()
            print(f"{row.task.model}, {row.task.engine}, {row.task.rival}: done", file=sys.stderr)
        if args.saves:
            stalls += measure_stalls(task, args.saves, args.window)
            keep()
    print(report(rows, stalls))


if __name__ == "__main__":
    main()
