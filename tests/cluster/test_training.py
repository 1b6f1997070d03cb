"""Gang stages on Ray Train: the same weights as alone, restarts, errors that arrive as they were raised."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from cluster.board import Board
from cluster.ray_executor import RayExecutor
from cluster.training import _is_stopping
from stages import storage
from stages.base import Progress, Resources, Shard, Stage, setting
from stages.engine import EngineFactory, TorchEngine
from stages.errors import ConfigError, InputError, StageError
from stages.executor import LocalExecutor, ShardFailure
from stages.manifest import Manifest, ShardRecord
from stages.training import train
from stages.training_config import TrainingConfig, gang_resources
from stages.watchdog import read_reports, suspects
from tests.stages.training_data import TinyModel, VectorStream

# Ray Data warns of its own settings when it is imported.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]


@dataclass(frozen=True, kw_only=True)
class TinyConfig(TrainingConfig):
    """A short training, which on request meets an accident at step 6 of its first attempt."""

    num_steps: int = setting(12, "steps")
    global_batch_size: int = setting(8, "samples")
    learning_rate: float = setting(1e-2, "peak")
    num_streams: int = setting(4, "streams")
    checkpoint_every_steps: int = setting(4, "steps", affects="nothing")
    # An accident two fast steps later must find it written.
    checkpoint_in_background: bool = setting(False, "wait for them", affects="nothing")
    log_every_steps: int = setting(4, "steps", affects="nothing")
    cpus_per_rank: float = setting(0.5, "cores", affects="nothing")
    tensorboard: bool = setting(False, "none", affects="nothing")
    accident: Literal["none", "dies", "stops", "always_dies", "input"] = setting(
        "none", "what happens", affects="nothing"
    )
    marker: str = setting("", "file that says it has happened", affects="nothing")


class AccidentalStream(VectorStream):
    """A stream with an accident on the last rank."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self._config = config

    def batches(self, first_step: int, rank: int, world_size: int) -> Any:
        for batch in super().batches(first_step, rank, world_size):
            if batch.step == 6 and rank == world_size - 1:
                self._meet_accident()
            yield batch

    def _meet_accident(self) -> None:
        marker = Path(self._config.marker)
        if self._config.accident == "input":
            raise InputError("tiny: the data is wrong; mend it")
        if self._config.accident == "always_dies" or (self._config.accident == "dies" and not marker.exists()):
            with marker.open("a") as file:
                file.write("x")
            os._exit(1)
        if self._config.accident == "stops" and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)


def huge_pages_of_a_tensor() -> int:
    """Return how many KiB of huge pages come with a tensor of 32 MiB."""

    def held() -> int:
        found = re.search(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0

    before = held()
    tensor = torch.ones(8 << 20)
    return held() - before if len(tensor) else 0


class Tiny(Stage[TinyConfig]):
    """A training stage over the tiny model."""

    name = "tiny"
    uses_seed = True
    gang = True

    @property
    def resources(self) -> Resources:
        return gang_resources(self.config)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        return [self.shard(0)]

    def process(
        self,
        shard: Shard,
        output: str,
        make_engine: EngineFactory = TorchEngine,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ShardRecord:
        trained = train(
            TinyModel(dropout=0.1),
            AccidentalStream(self.config),
            self.config,
            make_engine=make_engine,
            seed=self.seed,
            folder=storage.join(output, shard.id),
            place=self.name,
            report=self.report,
            should_stop=should_stop,
        )
        files = {}
        if trained.weights is not None:
            flat = torch.cat([tensor.reshape(-1) for _, tensor in sorted(trained.weights.items())])
            files["weights"] = ("bin", flat.numpy().tobytes())
            files["huge_kib"] = ("txt", str(huge_pages_of_a_tensor()).encode())
            self.commit(shard, output, files, started_at=0.0)
        if dist.is_initialized():
            dist.barrier()
        return ShardRecord.from_json(storage.read_json(storage.join(output, f"{shard.id}.json")))


def run(executor: Any, root: Path, seen: list[Progress] | None = None, **settings: Any) -> Any:
    """Run the stage; return its outcome."""
    stage = Tiny(TinyConfig(**settings), root=str(root))
    on_progress = (lambda progress: None) if seen is None else seen.append
    (outcome,) = executor.map(stage, stage.plan({}), str(root), on_progress)
    return outcome


def weights(outcome: Any, root: Path) -> torch.Tensor:
    assert isinstance(outcome, ShardRecord), outcome.error
    return torch.frombuffer(bytearray(outcome.files["weights"].read(str(root))), dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The weights that a run in this process gives."""
    root = tmp_path_factory.mktemp("alone")
    return weights(run(LocalExecutor(), root), root)


def test_groups_at_once_each_meet_their_own_end(
    ray_executor: RayExecutor, tmp_path: Path, alone: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of one equals a run in this process. A group of one and a group of two meet an error, in the latter the
    other rank fails too, for want of a peer: what arrives is the error, as it was raised. Stores are relative paths."""
    monkeypatch.chdir(tmp_path)
    seen: list[Progress] = []

    def fail(num_ranks: int) -> Any:
        return run(ray_executor, Path(str(num_ranks)), accident="input", engine="torch", num_ranks=num_ranks)

    with ThreadPoolExecutor(3) as pool:
        calm = pool.submit(run, ray_executor, Path("calm"), seen)
        outcomes = list(pool.map(fail, (1, 2)))
    assert torch.allclose(weights(calm.result(), tmp_path / "calm"), alone, atol=1e-5)
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (12, 12, "steps")
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        record = calm.result()
        assert int(record.files["huge_kib"].read(str(tmp_path / "calm"))) > 0
    for outcome in outcomes:
        assert isinstance(outcome, ShardFailure) and outcome.kind == "fatal"
        assert type(outcome.error) is InputError and str(outcome.error) == "tiny: the data is wrong; mend it"


def test_a_board_that_is_gone_stops_nothing(ray_executor: RayExecutor) -> None:
    import ray

    board = ray.remote(num_cpus=0)(Board).remote()
    ray.kill(board)
    assert not _is_stopping(board, "tiny")


@pytest.mark.chaos
def test_two_gangs_at_once_are_each_what_they_are_alone(ray_executor: RayExecutor, tmp_path: Path) -> None:
    """Two groups of two ranks, of different data order, rate and engine, at once on one cluster and one after another;
    each is told to run where a resource of this node and its label are."""
    node = next(node for node in ray.nodes() if node["Alive"])
    here = next(name for name in node["Resources"] if name.startswith("node:") and name != "node:__internal_head__")
    where = {"resources_per_rank": {here: 0.001}, "node_labels": {"ray.io/node-id": node["NodeID"]}}
    gangs: dict[str, dict[str, Any]] = {
        "first": {"num_ranks": 2, "learning_rate": 1e-2, **where},
        "second": {"num_ranks": 2, "learning_rate": 3e-3, "zero_stage": 2, "num_steps": 16, **where},
    }
    with ThreadPoolExecutor(2) as pool:
        together = dict(
            zip(
                gangs,
                pool.map(lambda name: run(ray_executor, tmp_path / "both" / name, **gangs[name]), gangs),
                strict=True,
            )
        )
    for name, options in gangs.items():
        alone = run(ray_executor, tmp_path / "alone" / name, **options)
        found = weights(together[name], tmp_path / "both" / name)
        assert torch.equal(found, weights(alone, tmp_path / "alone" / name))
    assert not torch.equal(*(weights(together[name], tmp_path / "both" / name) for name in gangs))


def test_a_gang_that_fits_no_node_is_refused_or_waits_its_time(
    ray_executor: RayExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no node can join, at once; where one may, after a time in which an autoscaler can see what is missing."""
    needs = "tiny: each rank needs 0.5 CPU, 1 fast_disk; the cluster's nodes (1: 2 CPU, 0 GPU) do not offer that"
    wanted = {"resources_per_rank": {"fast_disk": 1.0}}
    with pytest.raises(
        ConfigError, match=re.escape(needs) + ".*fits: -s tiny.resources_per_rank={}, or run it on a cl"
    ):
        run(ray_executor, tmp_path, **wanted)
    caplog.clear()
    outcome = run(RayExecutor(grows=True, wait_for_nodes_s=1.0), tmp_path, **wanted)
    assert isinstance(outcome, ShardFailure) and outcome.kind == "fatal" and type(outcome.error) is StageError
    assert f"{needs}, and none that does has joined within 1 s; add such nodes" in str(outcome.error)
    assert f"{needs}; the training waits for nodes for at most 1 s" in caplog.text
    groups: dict[str, Any] = ray.util.placement_group_table()
    assert {group["state"] for group in groups.values()} == {"REMOVED"}  # asked for while it waited, and no longer


@pytest.mark.chaos
def test_a_rank_that_dies_is_replaced_and_the_training_resumes(ray_executor: RayExecutor, tmp_path: Path) -> None:
    """Two ranks; the second dies once. The weights are bit for bit those of an undisturbed group."""
    marker = tmp_path / "marker"

    def outcome(accident: str) -> Any:
        return run(ray_executor, tmp_path / accident, num_ranks=2, accident=accident, marker=str(marker))

    with ThreadPoolExecutor(2) as pool:
        calm, stormy = pool.map(outcome, ("none", "dies"))
    assert marker.read_text() == "x"
    assert torch.equal(weights(calm, tmp_path / "none"), weights(stormy, tmp_path / "dies"))


@pytest.mark.chaos
def test_a_rank_that_stands_still_is_named_and_the_group_started_again(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    """Two ranks; the second is stopped. The weights are bit for bit those of an undisturbed group."""
    marker = tmp_path / "marker"

    def outcome(accident: str) -> Any:
        options = {"num_ranks": 2, "hang_timeout_s": 8.0, "marker": str(marker)}
        return run(ray_executor, tmp_path / accident, accident=accident, **options)

    with ThreadPoolExecutor(2) as pool:
        calm, stormy = pool.map(outcome, ("none", "stops"))
    assert torch.equal(weights(calm, tmp_path / "none"), weights(stormy, tmp_path / "stops"))
    (folder,) = (tmp_path / "stops").glob("*/hangs/*")
    reports = read_reports(str(folder))
    assert suspects(reports, 2) == [1]  # the other one reported that it waits in a collective
    assert (reports[0].step, reports[0].phase, reports[0].in_collective) == (6, "step", True)
    assert not psutil.pid_exists(int(marker.read_text()))


@pytest.mark.chaos
def test_a_group_that_keeps_dying_is_given_up(
    ray_executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.training._MAX_STARTS_WITHOUT_PROGRESS", 1)
    marker = tmp_path / "marker"
    outcome = run(ray_executor, tmp_path, accident="always_dies", marker=str(marker), engine="torch")
    assert isinstance(outcome, ShardFailure) and outcome.kind == "retryable"
    assert "died 1 times without getting past step 4" in str(outcome.error)
    assert marker.read_text() == "xx"  # the first start got to step 4, the second not further
