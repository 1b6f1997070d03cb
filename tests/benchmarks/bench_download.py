"""How fast the Download stage is beside bare img2dataset, on the same loopback server and with the same settings.

``python -m tests.benchmarks.bench_download`` (Linux) prints a table for each of two lists of URLs:

* ``good``: every host answers at once. What the guards cost.
* ``mixed``: some hosts are slow, some accept connections and never answer. What the order of rows, the limits per host
  and the circuit breaker bring.

Both sides work in one process with the same number of threads, and take turns. Bare img2dataset is its own ``download``
function with ``processes_count=1``; its time is the one that it notes itself for its shards, from the first URL to the
last byte written, without starting its processes. Ours is the time of the shards as their records note it, from reading
the rows to the published record.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.download import Download, DownloadConfig
from tests.benchmarks.loopback_server import SLOW_S, behaviour
from tests.conftest import free_port
from tests.stages.download_data import rows_of, run, source_of

TOP = Path(__file__).parents[2]
SYSTEMS = ("ours", "bare")
_RESULT = "result: "
HOSTS = {
    "good": range(1, 33),
    "mixed": (*range(1, 23), *range(100, 105), *range(150, 155)),
}
SETTINGS: dict[str, Any] = {"image_size": 256, "num_threads": 16, "retries": 1, "quality": 95}


def urls_of(hosts: str, count: int, port: int) -> list[str]:
    """Deal rows to the hosts in turn."""
    bytes_ = tuple(HOSTS[hosts])
    return [f"http://127.0.0.{bytes_[row % len(bytes_)]}:{port}/{row}.jpg" for row in range(count)]


# ---- the measured processes -----------------------------------------------------------------------


def measure_ours(job: dict[str, Any], folder: Path) -> tuple[float, int]:
    """Return the seconds of the shard and its images."""
    config = DownloadConfig(
        image_size_px=SETTINGS["image_size"],
        image_quality=SETTINGS["quality"],
        num_threads=SETTINGS["num_threads"],
        retries=SETTINGS["retries"],
        timeout_s=job["timeout_s"],
        max_transient_fraction=1.0,
        allowed_networks=("127.0.0.0/8",),
    )
    stage = Download(config, root=str(folder))
    stage.setup()
    manifest = run(stage, {"source": source_of(folder, rows_of(job["urls"]))})
    return sum(record.wall_time_s for record in manifest.records), manifest.num_kept


def measure_bare(job: dict[str, Any], folder: Path) -> tuple[float, int]:
    """Return the seconds of the shard and its images, as img2dataset notes them."""
    import img2dataset  # here, where the environment keeps it from asking the network for updates

    pq.write_table(rows_of(job["urls"]), folder / "urls.parquet")
    img2dataset.download(
        url_list=str(folder / "urls.parquet"),
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        output_folder=str(folder / "out"),
        output_format="webdataset",
        processes_count=1,
        thread_count=SETTINGS["num_threads"],
        number_sample_per_shard=len(job["urls"]),
        image_size=SETTINGS["image_size"],
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_format="jpg",
        encode_quality=SETTINGS["quality"],
        extract_exif=False,
        compute_hash="sha256",
        timeout=job["timeout_s"],
        retries=SETTINGS["retries"],
    )
    stats = [json.loads(path.read_bytes()) for path in (folder / "out").glob("*_stats.json")]
    return sum(s["end_time"] - s["start_time"] for s in stats), sum(s["successes"] for s in stats)


class Measured:
    """One of the systems in a process of its own, kept from turn to turn."""

    def __init__(self, system: str) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.bench_download", "--measure", system]
        environment = os.environ | {"PYTHONPATH": str(TOP), "PYTHONWARNINGS": "ignore", "NO_ALBUMENTATIONS_UPDATE": "1"}
        self._process = subprocess.Popen(
            command, cwd=TOP, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, job: dict[str, Any]) -> tuple[float, int]:
        """Do a job; seconds, images."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_RESULT):  # img2dataset prints too
                seconds, images = json.loads(line.removeprefix(_RESULT))
                return float(seconds), int(images)
        raise RuntimeError("the measured process ended")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure_jobs(system: str) -> None:
    """Do the jobs that come in, a line of JSON each."""
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="unclip-bench-") as folder:
            result = (measure_ours if system == "ours" else measure_bare)(json.loads(line), Path(folder))
        print(_RESULT + json.dumps(result), flush=True)


# ---- the tables -----------------------------------------------------------------------------------------------------


def bench(hosts: str, job: dict[str, Any], num_rounds: int, systems: dict[str, Measured]) -> None:
    """Measure both systems in turns and print the medians."""
    kinds = [behaviour(last_byte) for last_byte in HOSTS[hosts]]
    listed = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("good", "slow", "mute") if kind in kinds)
    print(f"{hosts}: {len(job['urls'])} rows on {len(kinds)} hosts ({listed}), time-out {job['timeout_s']} s")
    found: dict[str, list[tuple[float, int]]] = {system: [] for system in systems}
    for turn in range(num_rounds):
        for system in systems if turn % 2 else reversed(systems):
            found[system].append(systems[system].run(job))
    for system, values in found.items():
        rates = [images / seconds for seconds, images in values]
        print(
            f"  {system:5} {statistics.median(rates):7.1f} images/s (from {min(rates):.1f} to {max(rates):.1f}), "
            f"{statistics.median(seconds for seconds, _ in values):6.2f} s, {values[0][1]} images"
        )
    ratios = [bare[0] / ours[0] for ours, bare in zip(found["ours"], found["bare"], strict=True)]
    print(f"  ours is {statistics.median(ratios):.2f} times as fast (from {min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Run the benchmark, or one measurement of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--mixed-rows", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side-px", type=int, default=320, help="of the pictures")
    parser.add_argument("--hosts", nargs="*", choices=sorted(HOSTS), default=list(HOSTS))
    parser.add_argument("--measure", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_jobs(args.measure)
        return
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.loopback_server", str(port), str(args.side_px)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True))
        stack.callback(server.terminate)
        systems = {system: stack.enter_context(contextlib.closing(Measured(system))) for system in SYSTEMS}
        assert server.stdout is not None
        num_bytes = int(server.stdout.readline())
        print(
            f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}, {args.rounds} rounds; JPEG "
            f"of {args.side_px} px and {num_bytes} bytes; {SETTINGS}; slow hosts answer after {SLOW_S} s"
        )
        for system in systems.values():  # imports and caches
            system.run({"urls": urls_of("good", 50, port), "timeout_s": 10})
        for hosts, count, timeout_s in (("good", args.rows, 10), ("mixed", args.mixed_rows, 1)):
            if hosts in args.hosts:
                bench(hosts, {"urls": urls_of(hosts, count, port), "timeout_s": timeout_s}, args.rounds, systems)


if __name__ == "__main__":
    main()
