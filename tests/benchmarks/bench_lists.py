"""Measure what a large URL list costs the process that plans it, and the one that reads its rows.

    python -m tests.benchmarks.bench_lists [--mib 200] [--root FOLDER]

Every number comes from a process of its own, which plans the list and then writes 20 shards from its middle. Peaks are
those of the whole process, imports included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.large_lists import write_large_list

TOP = Path(__file__).parents[2]


def main(mib: int, root: Path) -> None:
    for extension in ("parquet", "csv", "jsonl"):
        path = root / f"large.{extension}"
        num_rows = write_large_list(path, mib)
        command = [sys.executable, "-m", "tests.large_lists", f"{root}/store-{extension}", str(path), "20"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=TOP).stdout)
        print(
            f"{extension}, {num_rows:,} rows, {path.stat().st_size / 2**20:,.0f} MiB: plan {found['plan_s']:.1f} s, "
            f"peak {found['plan_mib']:,.0f} MiB ({found['at_rest_mib']:,.0f} at rest); "
            f"20 shards {found['read_s']:.1f} s, peak {found['peak_mib']:,.0f} MiB",
            flush=True,
        )
        path.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--root", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-lists-") as folder:
        main(given.mib, given.root or Path(folder))
