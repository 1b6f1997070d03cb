"""What the decisions over a whole data set cost: time and memory of ``finish`` of filter and curate, per row.

``python -m tests.benchmarks.bench_decisions`` makes the tables that a download, a filter and an embed of so many rows
would have left, a twentieth of them near duplicates and a twentieth copies, then has filter and curate finish, each in
a process of its own. Memory is the peak of the process above what it held before it read a table. The medians of
several repetitions are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.curate import Curate, CurateConfig
from stages.filter import Filter, FilterConfig
from stages.image_hash import NUM_TONES
from stages.manifest import File, ShardRecord
from stages.samples import table_to_bytes
from tests.benchmarks.bench_models import cpu_model
from tests.benchmarks.bench_near_duplicates import planted
from tests.benchmarks.own_process import medians
from tests.resident import resident_mib

_COPIES = 0.05


def _publish(root: Path, name: str, table: pa.Table) -> File:
    data = table_to_bytes(table)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
    return File(name, hashlib.sha256(data).hexdigest(), len(data))


def _tables(num_rows: int, rows_per_shard: int, root: Path) -> tuple[list[ShardRecord], list[ShardRecord]]:
    """Write the tables; return the records that filter and curate are to finish."""
    rng = np.random.default_rng(0)
    hashes, _, _, _ = planted(num_rows, 0.05, 4, seed=0)
    copy_of = np.arange(num_rows)
    copies = rng.choice(num_rows - 1, int(_COPIES * num_rows), replace=False) + 1
    copy_of[copies] = rng.integers(0, copies)
    hashes = hashes[copy_of]
    of_filter, of_curate = [], []
    for index, start in enumerate(range(0, num_rows, rows_per_shard)):
        rows = np.arange(start, min(start + rows_per_shard, num_rows))
        keys = [f"{index:010d}{row - start:06d}" for row in rows]
        origin = {"key": keys, "list": ["lists/part.parquet"] * len(rows), "row": rows}
        facts = pa.table(
            {
                **origin,
                "url": [f"https://host{row % 997}.example.com/pictures/of/the/year/{row:012d}.jpg" for row in rows],
                "caption": [f"a photo of thing number {row} beside another one, in the evening light" for row in rows],
                "status": ["success"] * len(rows),
                "sha256": [hashlib.sha256(str(row).encode()).hexdigest() for row in copy_of[rows]],
                "original_width": pa.array(rng.integers(200, 2000, len(rows)), pa.int32()),
                "original_height": pa.array(rng.integers(200, 2000, len(rows)), pa.int32()),
            }
        )
        tones = np.full((len(rows), NUM_TONES), 128, np.uint8)
        measured = pa.table(
            {
                "key": keys,
                "perceptual_hash": hashes[rows],
                "tones": pa.array([line.tobytes() for line in tones], pa.binary(NUM_TONES)),
                "language": ["en"] * len(rows),
                "language_probability": pa.array(rng.random(len(rows)), pa.float32()),
            }
        )
        scores = pa.table({**origin, "clip_score": pa.array(rng.random(len(rows)), pa.float32())})
        table = _publish(root, f"tables/{index}.parquet", facts)
        for records, made in ((of_filter, measured), (of_curate, scores)):
            name = "filter" if records is of_filter else "curate"
            records.append(
                ShardRecord(
                    shard_id=f"{name}{index:06d}",
                    inputs={"table": table, "images": File("", "0" * 64, 0)},
                    files={"scores": _publish(root, f"{name}/{index}.parquet", made)},
                    num_in=len(rows),
                    num_kept=len(rows),
                    dropped={},
                )
            )
    return of_filter, of_curate


def _finish(name: str, root: str, records: list[ShardRecord]) -> tuple[float, ...]:
    """Finish one stage; return seconds, CPU seconds, MiB, and how many are kept."""
    stage: Filter | Curate
    if name == "filter":
        stage = Filter(FilterConfig(max_aspect=20.0), root=root)
    else:
        stage = Curate(CurateConfig(clip_score_min=0.2, keep_fraction=0.5), root=root)
    before, wall, cpu = resident_mib("VmHWM"), time.perf_counter(), time.process_time()
    final = stage.finish(records, f"{root}/out", {})
    took = time.perf_counter() - wall, time.process_time() - cpu
    return (*took, resident_mib("VmHWM") - before, sum(record.num_kept for record in final.records))


def main() -> None:
    """Measure both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--rows-per-shard", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores ({cpu_model()}), load {os.getloadavg()[0]:.1f}")
    for num_rows in args.rows:
        with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder:
            records = dict(zip(("filter", "curate"), _tables(num_rows, args.rows_per_shard, Path(folder)), strict=True))
            for name, own in records.items():
                wall, cpu, mib, kept = medians(_finish, name, folder, own, repetitions=args.repetitions)
                print(
                    f"{name:7} {num_rows:12,} rows  {wall:7.1f} s  {cpu:7.1f} s of CPU  {mib:7.0f} MiB  "
                    f"{mib * 2**20 / num_rows:6.0f} bytes a row  {kept:,.0f} kept",
                    flush=True,
                )


if __name__ == "__main__":
    main()
