"""Measure what the framework costs at many shards: time and memory of a resume decision, and overhead per shard.

    python -m tests.benchmarks.bench_resume [--shards 10000 100000] [--overhead-shards 10000] [--repetitions 3]

Every number comes from a process of its own; of what may be repeated, the median of several is printed. The stores of
the resume rows are written with fsync switched off, which changes nothing that a resume reads; the overhead is measured
with it. The peak is that of the whole driver process, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages import runner, storage
from stages.base import Shard, Stage, setting
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import File, Manifest, ShardRecord
from tests.resident import resident_mib

TOP = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    num_shards: int = setting(1000, "shards")


class Rows(Stage[PlainConfig]):
    """The first stage: shards that hold nothing but a name."""

    name = "rows"

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        return [self.shard(i, start=i) for i in range(self.config.num_shards)]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        file = File(path=f"rows/shards/{shard.id}.parquet", sha256=shard.id * 4, num_bytes=1)
        return self.commit(shard, "", {"urls": file}, started_at=time.monotonic(), num_in=10, num_kept=10)


class Empty(Stage[PlainConfig]):
    """A stage that does nothing to each shard of the first."""

    name = "empty"
    counts = "rows"
    with_file = False

    @property
    def upstream(self) -> tuple[str, ...]:
        return ("rows",)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        return [self.shard(i, inputs={"urls": r.files["urls"]}) for i, r in enumerate(inputs["rows"].records)]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        files = {"table": ("bin", b"0")} if self.with_file else {}
        return self.commit(
            shard,
            output,
            files,
            started_at=time.monotonic(),
            num_in=10,
            num_kept=7,
            dropped={"http_404": 2, "timeout": 1},
            metrics={"x": 0.5},
        )


class EmptyWithFile(Empty):
    """The same, with one file per shard."""

    name = "empty"
    with_file = True


def first_stage(root: str, num_shards: int) -> Manifest:
    """Publish the manifest of the first stage without its shards: nobody reads those."""
    stage = Rows(PlainConfig(num_shards=num_shards), root=root)
    files = (File(path=f"rows/shards/{s.id}.parquet", sha256=s.id * 4, num_bytes=1) for s in stage.plan({}))
    records = [ShardRecord(shard_id=file.sha256[:16], files={"urls": file}, num_in=10, num_kept=10) for file in files]
    fields = {"version": 1, "fingerprint": "f" * 16, "config": {}, "inputs": {}}
    manifest = Manifest(root=root, stage="rows", records=tuple(records), **fields)  # type: ignore[arg-type]
    manifest.write()
    return manifest


def build(root: str, num_shards: int) -> dict[str, float]:
    """Commit every shard of the second stage and stop before its manifest; no fsync."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    stage = EmptyWithFile(PlainConfig(), root=root)
    inputs = {"rows": first_stage(root, num_shards)}
    started_at = time.monotonic()
    try:
        runner.run_stage(stage, "e" * 16, inputs, _StopsBeforeFinish(), ClusterConfig())
    except KeyboardInterrupt:
        return {"build_s": time.monotonic() - started_at}
    raise AssertionError("the run went past its last shard")


class _StopsBeforeFinish(LocalExecutor):
    def finish(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
        raise KeyboardInterrupt


def resume(root: str, num_shards: int) -> dict[str, float]:
    """Decide what is left to do, as a new driver does."""
    imports_mib = resident_mib("VmHWM")
    started_at, cpu_at = time.monotonic(), time.process_time()
    rows = Manifest.read(root, "rows", "f" * 16)
    assert rows is not None
    manifest_s = time.monotonic() - started_at
    stage = EmptyWithFile(PlainConfig(), root=root)
    shards = stage.plan({"rows": rows})
    plan_s = time.monotonic() - started_at - manifest_s
    records = runner.committed_records(stage, shards)
    total_s = time.monotonic() - started_at
    assert len(records) == len(shards) == num_shards
    return {
        "manifest_s": manifest_s,
        "plan_s": plan_s,
        "records_s": total_s - manifest_s - plan_s,
        "total_s": total_s,
        "cpu_s": time.process_time() - cpu_at,
        "imports_mib": imports_mib,
        "peak_mib": resident_mib("VmHWM"),
    }


def without_segments(root: str, num_shards: int) -> dict[str, float]:
    """The same with every record read one by one."""
    for name in storage.list_files(f"{root}/empty/shards/_segments"):
        storage.delete(f"{root}/empty/shards/_segments/{name}")
    return resume(root, num_shards)


def finish(root: str, num_shards: int) -> dict[str, float]:
    """Bring the interrupted stage to its manifest, then read that."""
    rows = Manifest.read(root, "rows", "f" * 16)
    assert rows is not None
    stage = EmptyWithFile(PlainConfig(), root=root)
    started_at = time.monotonic()
    runner.run_stage(stage, "e" * 16, {"rows": rows}, LocalExecutor(), ClusterConfig())
    run_s = time.monotonic() - started_at
    return {"run_s": run_s, "peak_mib": resident_mib("VmHWM")}


def read(root: str, num_shards: int) -> dict[str, float]:
    """Read a finished manifest."""
    before = resident_mib("VmHWM")
    started_at = time.monotonic()
    manifest = Manifest.read(root, "empty", "e" * 16)
    assert manifest is not None and len(manifest.records) == num_shards
    return {"read_s": time.monotonic() - started_at, "imports_mib": before, "peak_mib": resident_mib("VmHWM")}


def overhead(root: str, num_shards: int) -> dict[str, float]:
    """Run the empty stage from nothing to its manifest, fsync included; the disk's own share is measured beside it."""
    inputs = {"rows": first_stage(root, num_shards)}
    found: dict[str, float] = {}
    for kind in (Empty, EmptyWithFile):
        stage = kind(PlainConfig(), root=f"{root}/{kind.__name__}")
        started_at, cpu_at = time.monotonic(), time.process_time()
        runner.run_stage(stage, "e" * 16, inputs, LocalExecutor(), ClusterConfig())
        label = "with_file" if kind.with_file else "record_only"
        found[f"{label}_ms"] = 1000 * (time.monotonic() - started_at) / num_shards
        found[f"{label}_cpu_ms"] = 1000 * (time.process_time() - cpu_at) / num_shards
    found["fsync_ms"] = _fsync_ms(Path(root))
    return found


def _fsync_ms(folder: Path) -> float:
    """Write, fsync, rename, fsync the folder: what one durable small file costs on this disk, at the least."""
    count = 500
    started_at = time.monotonic()
    descriptor = os.open(folder, os.O_RDONLY)
    for i in range(count):
        with (folder / "probe.tmp").open("wb") as file:
            file.write(b"0" * 600)
            file.flush()
            os.fsync(file.fileno())
        (folder / "probe.tmp").replace(folder / f"probe-{i}")
        os.fsync(descriptor)
    os.close(descriptor)
    return 1000 * (time.monotonic() - started_at) / count


PHASES = {f.__name__: f for f in (build, resume, without_segments, finish, read, overhead)}
REPEATABLE = ("resume", "read", "overhead")


def measure(phase: str, root: str, num_shards: int, repetitions: int) -> dict[str, float]:
    """Run one phase in processes of its own; return the median of each number."""
    found = [
        _measured(phase, f"{root}/{number}" if phase == "overhead" else root, num_shards)
        for number in range(repetitions if phase in REPEATABLE else 1)
    ]
    return {name: round(statistics.median(numbers[name] for numbers in found), 3) for name in found[0]}


def _measured(phase: str, root: str, num_shards: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.bench_resume",
        "--phase",
        phase,
        "--root",
        root,
        "--shards",
        str(num_shards),
    ]
    answer = subprocess.run(command, cwd=TOP, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--overhead-shards", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--root", help="folder for the stores; a temporary one if not given")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(PHASES[args.phase](args.root, args.shards[0])))
        return
    with tempfile.TemporaryDirectory(dir=args.root) as folder:
        for num_shards in args.shards:
            for phase in ("build", "resume", "finish", "read", "without_segments"):
                found = measure(phase, f"{folder}/{num_shards}", num_shards, args.repetitions)
                print(num_shards, phase, found, flush=True)
        if args.overhead_shards:
            found = measure("overhead", f"{folder}/o", args.overhead_shards, args.repetitions)
            print(args.overhead_shards, "overhead", found, flush=True)


if __name__ == "__main__":
    main()
