"""The Ray executor does what the local one does, and survives what the local one cannot."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.board import Board
from cluster.connection import connect
from cluster.ray_executor import RayExecutor
from cluster.worker_pool import _pool_size
from stages.base import Progress, Resources, Result, Shard, Stage
from stages.errors import ConfigError, InputError, StageError
from stages.executor import ClusterConfig, Executor, LocalExecutor, ShardFailure
from stages.manifest import Manifest, ShardRecord
from stages.runner import output_uri, run_stage
from tests.cluster.conftest import CLUSTER
from tests.conftest import free_port
from tests.stages.toy_stages import Numbers, NumbersConfig, Squares, SquaresConfig

pytestmark = pytest.mark.slow
COUNTS = (3, 4, 5, 2, 1)


def run(executor: Executor, root: str, seen: list[Any] | None = None, **settings: Any) -> Manifest:
    """Run both toy stages."""
    numbers = Numbers(NumbersConfig(counts=COUNTS), root=root)
    first = run_stage(numbers, numbers.fingerprint({}), {}, LocalExecutor(), CLUSTER)
    squares = Squares(SquaresConfig(**settings), root=root)
    inputs = {"numbers": first}
    fingerprint = squares.fingerprint({"numbers": first.fingerprint})
    on_progress = (lambda progress: None) if seen is None else seen.append
    return run_stage(squares, fingerprint, inputs, executor, CLUSTER, on_progress=on_progress)


@pytest.fixture(params=["fixed", "growing"])
def any_executor(ray_executor: RayExecutor, request: pytest.FixtureRequest) -> RayExecutor:
    """As on this machine, and as on a cluster that nodes may join: with more workers than there is room for."""
    return ray_executor if request.param == "fixed" else RayExecutor(grows=True)


def test_equals_the_local_executor(ray_executor: RayExecutor, tmp_path: Path) -> None:
    seen: list[Any] = []
    local = run(LocalExecutor(), str(tmp_path / "local"))
    distributed = run(ray_executor, str(tmp_path / "ray"), seen)
    assert distributed.digest == local.digest
    assert distributed.metrics == local.metrics
    assert any(progress.inner is not None and progress.inner.unit == "numbers" for progress in seen)


@pytest.mark.parametrize("how", ["flaky", "bug", "dies"])
def test_a_failure_that_passes_changes_nothing(any_executor: RayExecutor, tmp_path: Path, how: str) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    wanted = run(LocalExecutor(), str(tmp_path / "local")).digest
    misbehave = {"10": how, "30": how}
    found = run(any_executor, str(tmp_path / "ray"), misbehave=misbehave, scratch=str(scratch), num_workers=5)
    assert found.digest == wanted and not found.quarantined
    assert {path.read_text() for path in scratch.iterdir()} == {"2"}


@pytest.mark.parametrize("how", ["corrupt", "always", "fatal"])
def test_failures_are_judged_as_locally(ray_executor: RayExecutor, tmp_path: Path, how: str) -> None:
    messages = []
    for name, executor in (("local", LocalExecutor()), ("ray", ray_executor)):
        scratch = tmp_path / f"scratch-{name}"
        scratch.mkdir()
        with pytest.raises((StageError, InputError)) as caught:
            run(executor, str(tmp_path / name), misbehave={"20": how}, scratch=str(scratch))
        messages.append((type(caught.value), str(caught.value), (scratch / "20").read_text()))
    assert messages[0] == messages[1]


class Deadly(Stage[NumbersConfig]):
    """Every shard kills its worker."""

    name = "deadly"

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        return [self.shard(0)]

    def process(self, shard: Shard, output: str) -> ShardRecord:
        os._exit(7)


class Unloadable(Deadly):
    """Its workers die while they start."""

    name = "unloadable"

    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(7)


def test_a_shard_that_keeps_killing_workers_is_given_up(any_executor: RayExecutor, tmp_path: Path) -> None:
    stage = Deadly(NumbersConfig(), root=str(tmp_path))
    (outcome,) = any_executor.map(stage, stage.plan({}), str(tmp_path), lambda progress: None)
    assert isinstance(outcome, ShardFailure) and outcome.kind == "retryable"
    assert "its worker died 3 times" in str(outcome.error)


def test_workers_that_cannot_start_end_the_stage(any_executor: RayExecutor, tmp_path: Path) -> None:
    stage = Unloadable(NumbersConfig(), root=str(tmp_path))
    with pytest.raises(StageError, match="unloadable: workers die as they start"):
        list(any_executor.map(stage, stage.plan({}), str(tmp_path), lambda progress: None))


class Unlucky(Squares):
    """Its first workers die while they start, two at the same moment and one after them: a machine went with them."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for number in range(3):
            with contextlib.suppress(FileExistsError), (Path(self.root) / f"death{number}").open("x"):
                deadline = time.monotonic() + 60
                while not (Path(self.root) / "death1").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                os._exit(7)


def test_workers_that_die_together_are_one_failure(any_executor: RayExecutor, tmp_path: Path) -> None:
    numbers = Numbers(NumbersConfig(counts=COUNTS), root=str(tmp_path))
    first = run_stage(numbers, numbers.fingerprint({}), {}, LocalExecutor(), CLUSTER)
    unlucky = Unlucky(SquaresConfig(num_workers=5), root=str(tmp_path))
    outcomes = list(any_executor.map(unlucky, unlucky.plan({"numbers": first}), str(tmp_path), lambda progress: None))
    assert len(outcomes) == len(COUNTS) and all(isinstance(outcome, ShardRecord) for outcome in outcomes)
    assert len(list(tmp_path.glob("death?"))) == 3


class Finisher(Deadly):
    """Its ``finish`` fails or tells where it ran."""

    name = "finisher"

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        if self.config.counts == (0,):
            raise InputError("finisher: nothing to combine")
        return Result(records=records, metrics={"pid": os.getpid()})


def test_finish_runs_on_a_worker_and_its_errors_arrive(ray_executor: RayExecutor, tmp_path: Path) -> None:
    result = ray_executor.finish(Finisher(NumbersConfig(), root=str(tmp_path)), [], str(tmp_path), {})
    assert result.metrics["pid"] != os.getpid()
    with pytest.raises(InputError, match="nothing to combine"):
        ray_executor.finish(Finisher(NumbersConfig(counts=(0,)), root=str(tmp_path)), [], str(tmp_path), {})


def test_an_abandoned_map_gives_its_cores_back(any_executor: RayExecutor, tmp_path: Path) -> None:
    import ray

    numbers = Numbers(NumbersConfig(counts=COUNTS), root=str(tmp_path))
    outcomes = any_executor.map(numbers, numbers.plan({}), str(tmp_path), lambda progress: None)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    for _ in range(100):
        if ray.available_resources().get("CPU") == CLUSTER.num_cpus:
            return
        time.sleep(0.1)
    raise AssertionError(ray.available_resources())


class Demanding(Numbers):
    """Needs a GPU."""

    name = "demanding"
    resources = Resources(num_gpus=1)


def test_workers_for_which_there_never_is_room_are_refused_or_awaited(
    ray_executor: RayExecutor, tmp_path: Path
) -> None:
    """Where no node can join, at once; where one may, after a time."""
    stage = Demanding(NumbersConfig(counts=COUNTS), root=str(tmp_path))
    needs = re.escape("demanding: a worker needs 1 CPU, 1 GPU; the cluster's nodes (1: 2 CPU, 0 GPU) do not offer that")

    def outcomes(executor: RayExecutor) -> list[Any]:
        return list(executor.map(stage, stage.plan({}), str(tmp_path), lambda progress: None))

    with pytest.raises(ConfigError, match=needs + ", and none can join .* give Ray more of this machine"):
        outcomes(ray_executor)
    with pytest.raises(
        StageError, match=needs + ", and none that does has joined within 1 s; add such nodes, raise clus"
    ):
        outcomes(RayExecutor(grows=True, wait_for_nodes_s=1.0))


def test_pool_size() -> None:
    available = {"CPU": 8.0, "GPU": 2.0}

    def size(num_shards: int, **resources: Any) -> int:
        stage = Deadly(NumbersConfig(), root="")
        kind = type("Some", (Deadly,), {"resources": Resources(**resources)})
        return _pool_size(kind(stage.config, root=""), num_shards, available)

    assert size(100) == 8
    assert size(3) == 3
    assert size(100, num_cpus=3) == 2
    assert size(100, num_gpus=0.5) == 4
    assert size(100, num_gpus=1, max_workers=1) == 1
    assert size(100, num_cpus=64) == 1  # waits for a larger machine
    assert size(0) == 0


def test_the_board_keeps_the_latest_and_passes_on_the_wish_to_stop() -> None:
    board = Board()
    first, second = (Progress(done=done, total=9, unit="steps") for done in (1, 2))
    assert not board.report("a", first)
    board.report("a", second)
    board.report("b", None)
    assert board.take("a") == second
    assert board.take("a") is None and board.take("b") is None
    board.stop()
    assert board.report("a", None)


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nobody_listens_is_refused(address: str) -> None:
    wrong = address.format(free_port())
    with pytest.raises(ConfigError, match=rf"cluster.address: '{wrong}': .*refused.*; start that cluster, correct"):
        connect(ClusterConfig(address=wrong))


class Hungry(Squares):
    """Decides over all samples in more memory than there is, or in what there is."""

    needed = 1 << 60

    def finish_bytes(self, records: Sequence[ShardRecord]) -> int:
        return self.needed


class Painted(Squares):
    """Wants a GPU for its shards, which are all done."""

    @property
    def resources(self) -> Resources:
        return Resources(num_cpus=1, num_gpus=1)


def test_what_combines_shards_needs_no_gpu(ray_executor: RayExecutor, tmp_path: Path) -> None:
    """The nodes that made them may be gone, and nobody else would bring one."""
    numbers = Numbers(NumbersConfig(counts=COUNTS), root=str(tmp_path))
    first = run_stage(numbers, numbers.fingerprint({}), {}, LocalExecutor(), CLUSTER)
    painted = Painted(SquaresConfig(), root=str(tmp_path))
    painted.setup()
    shards = painted.plan({"numbers": first})
    records = [painted.process(shard, output_uri(painted)) for shard in shards]
    found = ray_executor.finish(painted, records, f"{tmp_path}/squares/result", {"numbers": first})
    assert found.metrics == run(LocalExecutor(), str(tmp_path / "local")).metrics


def test_a_finish_is_given_the_memory_it_needs(
    ray_executor: RayExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = Numbers(NumbersConfig(counts=COUNTS), root=str(tmp_path))
    first = run_stage(numbers, numbers.fingerprint({}), {}, LocalExecutor(), CLUSTER)
    hungry = Hungry(SquaresConfig(), root=str(tmp_path))
    refused = r"squares: to decide over all samples a worker needs 1073741824\.0 GiB of memory, and the node .* has \d"
    for executor in (ray_executor, RayExecutor(grows=True, wait_for_nodes_s=0.6)):
        with pytest.raises(StageError, match=refused):
            run_stage(hungry, "f" * 16, {"numbers": first}, executor, CLUSTER)
    assert "waiting for such a node" in caplog.text
    hungry.needed = 1 << 30
    found = run_stage(hungry, "f" * 16, {"numbers": first}, ray_executor, CLUSTER)
    assert found.metrics == run(LocalExecutor(), str(tmp_path / "local")).metrics
