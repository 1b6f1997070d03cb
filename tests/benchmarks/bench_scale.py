"""What a row costs in every data stage, and by that a list of any length: the numbers of ``docs/scale.md``.

``python -m tests.benchmarks.bench_scale --plan 250e6 5e9`` downloads JPEGs of 320 px from a loopback server and runs
the data stages over them in one process, one worker after another. Cost is the CPU time of the process over all its
threads, which adds up over workers; the CLIP is tiny and of random weights, so ``embed`` stands for all but the model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stages.manifest import Manifest
from stages.pca import Pca, PcaConfig
from tests.benchmarks.bench_download import TOP, urls_of
from tests.benchmarks.bench_models import cpu_model
from tests.conftest import free_port
from tests.stages.data_run import stages_of, write_list
from tests.stages.small_store import run

_WORDS = ("dog", "cat", "river", "wooden", "table", "evening", "light", "street", "yellow", "mountain", "old", "glass")

_FILTER = {"near_duplicate_bits": 4}


@dataclass(frozen=True)
class Cost:
    """What one stage took.

    Attributes:
        cpu_s: CPU time.
        num_bytes: stored.
        num_objects: stored: files of shards and their records.
        num_shards: that were made.
    """

    cpu_s: float
    num_bytes: int
    num_objects: int
    num_shards: int


@contextmanager
def served(side_px: int, num_pictures: int) -> Iterator[int]:
    """Run the loopback server; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.loopback_server", str(port), str(side_px), str(num_pictures)]
    with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            yield port
        finally:
            server.terminate()


def caption(row: int) -> str:
    """Make a caption of ten words, another for every row."""
    return " ".join(_WORDS[(row // len(_WORDS) ** place + place) % len(_WORDS)] for place in range(10))


def measure(num_rows: int, rows_per_shard: int, root: Path) -> dict[str, Cost]:
    """Run the data stages over a list and return what each took."""
    root.mkdir()
    found: dict[str, Manifest] = {}
    costs: dict[str, Cost] = {}
    with served(320, num_rows) as port:
        lists = root / "lists" / "list.jsonl"
        write_list(lists, [(url, caption(row)) for row, url in enumerate(urls_of("good", num_rows, port))])
        stored = {"image_format": "jpg", "image_quality": 95, "keep_encoded": False, "image_size_px": 256}
        settings = {"source": {"rows_per_shard": rows_per_shard}, "download": stored, "filter": _FILTER}
        stages = stages_of(str(root / "store"), lists, **settings)
        stages["pca"] = Pca(PcaConfig(), root=str(root / "store"))
        for name, stage in stages.items():
            stage.setup()
            began = time.process_time()
            found[name] = run(stage, {upstream: found[upstream] for upstream in stage.upstream})
            costs[name] = _cost(found[name], time.process_time() - began)
    return costs


def _cost(manifest: Manifest, cpu_s: float) -> Cost:
    files = [file for record in manifest.records for file in record.files.values()]
    return Cost(
        cpu_s=cpu_s,
        num_bytes=sum(file.num_bytes for file in files),
        num_objects=len(files) + len(manifest.records),
        num_shards=len(manifest.records),
    )


def main() -> None:
    """Print the table of what a row costs, then one for every list asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rows-per-shard", type=int, default=1000)
    parser.add_argument("--plan", type=float, nargs="*", default=[250e6, 5e9], help="rows to plan for")
    parser.add_argument("--plan-rows-per-shard", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder:
        measure(200, 100, Path(folder) / "warm")  # imports and caches
        costs = measure(args.rows, args.rows_per_shard, Path(folder) / "run")
    del costs["clip"]  # the same for any list
    print(f"{os.cpu_count()} cores ({cpu_model()}), load {os.getloadavg()[0]:.1f}, {args.rows} rows")
    print(f"{'stage':10} {'CPU ms/row':>10} {'bytes/row':>10} {'objects/shard':>14}")
    for name, cost in costs.items():
        ms, num_bytes = 1000 * cost.cpu_s / args.rows, cost.num_bytes / args.rows
        print(f"{name:10} {ms:10.3f} {num_bytes:10.0f} {cost.num_objects / max(1, cost.num_shards):14.1f}")
    for num_rows in args.plan:
        num_shards, times = num_rows / args.plan_rows_per_shard, num_rows / args.rows
        print(f"\n{num_rows:,.0f} rows in {num_shards:,.0f} shards of {args.plan_rows_per_shard:,}")
        print(f"{'stage':10} {'core hours':>11} {'TB':>8} {'objects':>12}")
        for name, cost in costs.items():
            objects = num_shards * cost.num_objects / max(1, cost.num_shards)
            print(f"{name:10} {times * cost.cpu_s / 3600:11,.0f} {times * cost.num_bytes / 1e12:8.2f} {objects:12,.0f}")


if __name__ == "__main__":
    main()
