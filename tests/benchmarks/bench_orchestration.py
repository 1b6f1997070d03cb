"""Measure what orchestration costs: the whole flow with empty stages, beside a plain script that makes the same calls.

    python -m tests.benchmarks.bench_orchestration [--repeats 3] [--shards 100000] [--root FOLDER]

Every number is the wall time of a process of its own, from its start to its end, imports included:

    plain          the stages one after another through ``run_stage``: no Prefect
    with_server    the flow against a Prefect server that runs already
    with_none      the flow with no server set: a private one is started for it
    server_alone   a private server from its launch to its first answer: Prefect's own start-up
    finished       the flow once more over a finished pipeline whose two stages have so many shards each
    answered       the same without Prefect, which is what ``unclip run`` does when nothing is to do

``over_plain`` is what Prefect adds. Blank stages need no torch, so none of these processes loads it.
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
from pathlib import Path
from typing import Any

from stages.base import Shard, Stage
from stages.executor import ClusterConfig, LocalExecutor
from stages.lease import hold
from stages.manifest import Manifest, ShardRecord
from stages.runner import StageState, inspect_stage, run_stage
from tests.benchmarks.bench_resume import EmptyWithFile, PlainConfig, Rows, build, first_stage

TOP = Path(__file__).parents[2]


class Blank(Stage[PlainConfig]):
    """A stage of one shard that holds nothing."""

    reads: tuple[str, ...] = ()

    @property
    def upstream(self) -> tuple[str, ...]:
        return self.reads

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        return [self.shard(0)]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        return self.commit(shard, output, {}, started_at=time.monotonic())


def blank_stages(root: str) -> dict[str, Stage[Any]]:
    """The pipeline's graph, every stage of it blank."""
    from stages.config import load_config
    from stages.graph import build_stages

    real = build_stages(load_config(TOP / "configs" / "quickstart.yaml", [f"root={root}"]))
    stages: dict[str, Stage[Any]] = {}
    for name, stage in real.items():
        reads = tuple(f"blank_{up}" for up in stage.upstream)
        kind = type(name, (Blank,), {"name": f"blank_{name}", "reads": reads})
        stages[f"blank_{name}"] = kind(PlainConfig(), root=root)
    return stages


def inspected(stages: Mapping[str, Stage[Any]], names: Mapping[str, str]) -> dict[str, StageState]:
    states: dict[str, StageState] = {}
    for name, stage in stages.items():
        found = {up: states[up].manifest for up in stage.upstream}
        inputs = {up: manifest for up, manifest in found.items() if manifest is not None}
        if len(inputs) < len(found):
            states[name] = StageState(name=name, fingerprint=names[name], status="pending", reason="")
        else:
            states[name] = inspect_stage(stage, names[name], inputs)
    return states


def named(stages: Mapping[str, Stage[Any]]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, stage in stages.items():
        names[name] = stage.fingerprint(names)
    return names


def plain(root: str, num_shards: int) -> None:
    """Make the calls of the flow without it."""
    stages = blank_stages(root)
    names, cluster = named(stages), ClusterConfig(executor="local")
    states, made = inspected(stages, names), {}
    for name, stage in stages.items():
        inputs = {up: made[up] for up in stage.upstream}
        with hold(root, name, states[name].fingerprint, ttl_s=cluster.lease_ttl_s) as lease:
            made[name] = run_stage(stage, names[name], inputs, LocalExecutor(), cluster, lease=lease)


def flow(root: str, num_shards: int) -> None:
    """Run the flow over blank stages, as ``unclip run`` does."""
    stages = blank_stages(root)
    run_flow(root, stages, inspected(stages, named(stages)), status="done")


def finished(root: str, num_shards: int) -> None:
    """Run the flow over a finished pipeline of many shards."""
    stages, names = many(root, num_shards)
    run_flow(root, stages, inspected(stages, names), status="cached")


def answered(root: str, num_shards: int) -> None:
    """Find out that nothing is to do."""
    assert all(state.status == "done" for state in inspected(*many(root, num_shards)).values())


def many(root: str, num_shards: int) -> tuple[dict[str, Stage[Any]], dict[str, str]]:
    stages = (Rows(PlainConfig(num_shards=num_shards), root=root), EmptyWithFile(PlainConfig(), root=root))
    return {stage.name: stage for stage in stages}, {"rows": "f" * 16, "empty": "e" * 16}


def run_flow(root: str, stages: Mapping[str, Stage[Any]], states: Mapping[str, StageState], *, status: str) -> None:
    from flows.console import open_console
    from flows.logs import configure_logging
    from flows.prefect_server import PrivateServer, user_api_url
    from flows.progress import LogDisplay
    from flows.selection import Selection

    configure_logging(open_console(sys.stderr), debug=False)
    server = None if user_api_url() else PrivateServer()
    if server is not None:
        server.start()
    from flows.pipeline import run_pipeline
    from flows.tasks import Run

    run = Run(
        root=root,
        stages=stages,
        states=states,
        selection=Selection(tuple(stages)),
        executor=LocalExecutor(),
        cluster=ClusterConfig(executor="local"),
        display=LogDisplay(),
        write_report=lambda manifests: f"{root}/report.html",
        funnel=lambda manifests: "none",
    )
    error = run_pipeline(run, name="empty", server=server)
    assert error is None, error
    assert {outcome.status for outcome in run.outcomes.values()} == {status}


def server_alone(root: str, num_shards: int) -> None:
    """Start a private server and wait for its first answer."""
    from flows.prefect_server import PrivateServer

    with PrivateServer() as server:
        server.wait()


def finish(root: str, num_shards: int) -> None:
    """Build a finished pipeline of two stages of many shards each."""
    build(root, num_shards)
    rows = first_stage(root, num_shards)
    stage = EmptyWithFile(PlainConfig(), root=root)
    run_stage(stage, "e" * 16, {"rows": rows}, LocalExecutor(), ClusterConfig())


PHASES = {f.__name__: f for f in (plain, flow, finished, answered, server_alone, finish)}


def measure(phase: str, root: str, num_shards: int, environment: Mapping[str, str]) -> float:
    """Run one phase in a process of its own; return its wall time in seconds."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_orchestration", "--phase", phase, "--root", root]
    started_at = time.monotonic()
    done = subprocess.run(
        [*command, "--shards", str(num_shards)], cwd=TOP, env=dict(environment), capture_output=True, text=True
    )
    took_s = time.monotonic() - started_at
    assert done.returncode == 0, done.stderr
    time.sleep(2.5)  # a private server goes a moment after its last user
    return took_s


def main() -> None:
    from tests.flows.prefect_setup import environment, running_server

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--root", help="folder for the stores; a temporary one if not given")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        PHASES[args.phase](args.root, args.shards)
        return
    with tempfile.TemporaryDirectory(dir=args.root) as text:
        folder = Path(text)
        without = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        without |= {"XDG_STATE_HOME": f"{folder}/state", "HOME": str(folder)}
        times: dict[str, list[float]] = {}

        def note(label: str, phase: str, place: str, environment: Mapping[str, str]) -> None:
            times.setdefault(label, []).append(measure(phase, f"{folder}/{place}", args.shards, environment))

        measure("server_alone", text, 0, without)  # its database is made once
        for i in range(args.repeats):
            note("plain", "plain", f"plain-{i}", without)
            note("server_alone", "server_alone", "none", without)
            note("with_none", "flow", f"none-{i}", without)
        with running_server(folder) as url:
            using = environment(folder, url) | {"HOME": str(folder)}
            for i in range(args.repeats):
                note("with_server", "flow", f"server-{i}", using)
            measure("finish", f"{folder}/many", args.shards, without)
            for _ in range(args.repeats):
                note("finished", "finished", "many", using)
                note("answered", "answered", "many", without)
    medians = {label: statistics.median(found) for label, found in times.items()}
    for label, found in times.items():
        line = {"what": label, "median_s": round(medians[label], 2), "all_s": [round(seconds, 2) for seconds in found]}
        if label.startswith("with_"):
            line["over_plain_s"] = round(medians[label] - medians["plain"], 2)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
