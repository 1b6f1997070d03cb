"""The flow on a real Prefect server: order, cached stages, failures that stay local, retries, forcing, artifacts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterName
from prefect.logging.handlers import APILogHandler

from flows.interrupt import Cancelled
from flows.pipeline import run_pipeline
from flows.prefect_server import PrivateServer, prefect_api
from flows.progress import LogDisplay, Outcome
from flows.selection import Selection
from flows.tasks import Run, worth_retrying
from stages import storage
from stages.base import Shard, Stage
from stages.engine import TorchEngine
from stages.errors import ConfigError, InputError, ShardError, StageError, StorageError
from stages.executor import ClusterConfig, LocalExecutor
from stages.manifest import Manifest, ShardRecord
from stages.orchestration import PrefectConfig
from stages.runner import StageProgress, StageState, inspect_stage
from stages.training import train
from stages.training_config import TrainingConfig
from tests.stages.toy_stages import Numbers, NumbersConfig, Squares, SquaresConfig
from tests.stages.training_data import Disturbed, TinyModel

PLANTED, PLANTED_URL = "planted-secret-token", "http://ann:planted-in-a-url@127.0.0.1:1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    with PrivateServer(tmp_path_factory.mktemp("prefect")) as private:
        private.wait()
        yield private


class Other(Numbers):
    """A second branch of the graph, independent of numbers and squares."""

    name = "other"


class Last(Squares):
    """Needs both branches."""

    name = "last"

    @property
    def upstream(self) -> tuple[str, ...]:
        return ("numbers", "squares", "other")


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.updates: list[StageProgress] = []
        self.ends: list[Outcome] = []

    def update(self, progress: StageProgress) -> None:
        self.updates.append(progress)

    def end(self, outcome: Outcome) -> None:
        self.ends.append(outcome)


def graph(root: str, squares: SquaresConfig | None = None) -> dict[str, Stage[Any]]:
    stages: list[Stage[Any]] = [
        Numbers(NumbersConfig(), root=root),
        Squares(squares or SquaresConfig(), root=root),
        Other(NumbersConfig(counts=(2,)), root=root),
        Last(SquaresConfig(), root=root),
    ]
    return {stage.name: stage for stage in stages}


def new_run(root: str, stages: dict[str, Stage[Any]], *, only: Sequence[str] = (), force: Sequence[str] = ()) -> Run:
    names: dict[str, str] = {}
    states: dict[str, StageState] = {}
    for name, stage in stages.items():
        names[name] = stage.fingerprint(names)
        found = {up: states[up].manifest for up in stage.upstream}
        inputs = {up: manifest for up, manifest in found.items() if manifest is not None}
        if len(inputs) == len(found):
            states[name] = inspect_stage(stage, names[name], inputs)
        else:
            states[name] = StageState(name=name, fingerprint=names[name], status="pending", reason="")

    def write_report(manifests: Mapping[str, Manifest]) -> str:
        path = Path(root) / "report.html"
        path.write_text(" ".join(manifests))
        return str(path)

    return Run(
        root=root,
        stages=stages,
        states=states,
        selection=Selection(tuple(only or stages), frozenset(force)),
        executor=LocalExecutor(),
        cluster=ClusterConfig(executor="local", max_attempts=1),
        display=Recorder(),
        write_report=write_report,
        funnel=lambda manifests: "| stage |\n" + "\n".join(manifests),
    )


def ends(run: Run) -> dict[str, str]:
    return {name: outcome.status for name, outcome in run.outcomes.items()}


def task_states(server: PrivateServer, flow_run_name: str) -> dict[str, str]:
    """Ask Prefect how the tasks of the newest flow run of that name ended."""
    with prefect_api(server), get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name])))
        newest = max(runs, key=lambda found: found.created)
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [newest.id]}))
        # A task that never became ready has kept its default name, `<task>-<id>`.
        return {task.name.partition("-")[0]: task.state_name for task in tasks} | {"flow": newest.state_name}


def test_runs_then_shows_cached(tmp_path: Path, server: PrivateServer) -> None:
    root = str(tmp_path)
    run = new_run(root, graph(root))
    assert run_pipeline(run, name="first", server=server) is None
    assert ends(run) == dict.fromkeys(("numbers", "squares", "other", "last"), "done")
    assert (tmp_path / "report.html").read_text() == "numbers squares other last" and run.report_uri
    again = new_run(root, graph(root))
    assert run_pipeline(again, name="second", server=server) is None
    assert ends(again) == dict.fromkeys(ends(run), "cached")
    assert again.manifests() == run.manifests()
    expected = dict.fromkeys(ends(run), "Completed") | {"report": "Completed", "flow": "Completed"}
    assert task_states(server, "first") == expected
    assert task_states(server, "second") == expected | dict.fromkeys(ends(run), "Cached")


class Endless(Numbers):
    """Has more shards than anybody waits for, and counts tries and shards."""

    def __init__(self, config: NumbersConfig, *, root: str, seed: int = 0) -> None:
        super().__init__(config, root=root, seed=seed)
        self.num_tries = 0
        self.begun: list[str] = []

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        self.num_tries += 1
        return super().plan(inputs)

    def process(self, shard: Shard, output: str) -> ShardRecord:
        self.begun.append(shard.id)
        time.sleep(0.05)
        return super().process(shard, output)


def test_a_stage_that_takes_too_long_is_stopped_and_tried_again(tmp_path: Path, server: PrivateServer) -> None:
    stage = Endless(NumbersConfig(counts=(1,) * 30), root=str(tmp_path))
    run = new_run(str(tmp_path), {"numbers": stage})
    limits: Any = {"numbers": 0.6}
    run.prefect = PrefectConfig(stage_timeouts_s=limits, retry_delay_s=0.1)
    error = run_pipeline(run, name="too long", server=server)
    assert isinstance(error, StageError) and "numbers: not done after 0.6 s" in str(error)
    assert task_states(server, "too long")["numbers"] == "TimedOut"
    assert stage.num_tries == 2
    assert 0 < len(set(stage.begun)) < 30
    assert len(stage.begun) - len(set(stage.begun)) <= 1, "the second try goes on where the first one stopped"
    run = new_run(str(tmp_path), {"numbers": stage})
    assert run_pipeline(run, name="with time", server=server) is None
    assert ends(run) == {"numbers": "done"}


def test_a_failure_stays_local(tmp_path: Path, server: PrivateServer) -> None:
    root = str(tmp_path)
    squares = SquaresConfig(misbehave={"0": "corrupt"}, scratch=root)
    run = new_run(root, graph(root, squares))
    error = run_pipeline(run, name="local failure", server=server)
    assert ends(run) == {"numbers": "done", "squares": "failed", "other": "done", "last": "not ready"}
    assert isinstance(error, StageError) and "beyond repair" in str(error)
    assert [outcome.stage for outcome in run.failures()] == ["squares"]
    assert (tmp_path / "report.html").read_text() == "numbers other"
    states = task_states(server, "local failure")
    assert states["squares"] == "Failed" and states["last"] == "NotReady" and states["other"] == "Completed"
    assert states["flow"] == "Failed"
    # The cause is gone: the same command goes on.
    again = new_run(root, graph(root, SquaresConfig()))
    assert run_pipeline(again, name="repaired", server=server) is None
    assert ends(again) == {"numbers": "cached", "squares": "done", "other": "cached", "last": "done"}


class Lost(Numbers):
    """Fails as a lost connection does, a given number of times."""

    failures = 0

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        if self.failures > 0:
            self.failures -= 1
            raise StorageError("the connection is lost")
        return super().plan(inputs)


@pytest.mark.parametrize(("failures", "status"), [(1, "done"), (2, "failed")])
def test_a_lost_connection_is_tried_once_more(
    tmp_path: Path, server: PrivateServer, failures: int, status: str
) -> None:
    stage = Lost(NumbersConfig(), root=str(tmp_path))
    stage.failures = failures
    run = new_run(str(tmp_path), {"numbers": stage})
    run_pipeline(run, name="lost", server=server)
    assert ends(run) == {"numbers": status} and stage.failures == 0


class Telling(Numbers):
    """Says secrets in lines of its log and in what it raises, of a shard or of the whole stage."""

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        logging.getLogger("stages.telling").warning("asked with %s", PLANTED, stack_info=True)
        if self.name == "other":
            raise OSError(5, "refused", PLANTED_URL) from ValueError(f"{PLANTED} is wrong")
        return super().plan(inputs)

    def process(self, shard: Shard, output: str) -> ShardRecord:
        if shard.index:
            raise ShardError(f"cannot read {PLANTED_URL}/x with {PLANTED}")
        return super().process(shard, output)


class TellingOther(Telling):
    """Fails before its first shard."""

    name = "other"


def everything_told(client: SyncPrefectClient) -> dict[str, str]:
    """Return all that a server has of its runs, by what kind of thing it is."""
    tasks, flows = client.read_task_runs(), client.read_flow_runs()
    states = [state for run in tasks for state in client.read_task_run_states(run.id)]
    states += [state for run in flows for state in client.read_flow_run_states(run.id)]
    return {
        "logs": "\n".join(log.message for log in client.read_logs()),
        "states": "\n".join(state.model_dump_json() for state in states),
        "artifacts": "\n".join(f"{found.description} {found.data}" for found in client.read_artifacts()),
        "runs": "\n".join(run.model_dump_json() for run in [*tasks, *flows]),
    }


def test_no_secret_reaches_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRILL_TOKEN", PLANTED)
    root, ours = str(tmp_path / "store"), logging.getLogger("stages")
    stages: list[Stage[Any]] = [cls(NumbersConfig(), root=root) for cls in (Telling, TellingOther)]
    run = new_run(root, {stage.name: stage for stage in stages})
    run.prefect = PrefectConfig(retry_delay_s=0.1)
    run.notes = lambda manifests: {"cost": f"| paid with {PLANTED} |"}
    handler = APILogHandler()  # Prefect attaches one to the loggers it is told of when it is imported
    ours.addHandler(handler)
    try:
        with PrivateServer(tmp_path / "prefect") as private, prefect_api(private):
            # Taken for a server of the user's, since a private one is shown no progress.
            error = run_pipeline(run, name="telling", server=None)
            APILogHandler.flush(handler)
            with get_client(sync_client=True) as client:
                told = everything_told(client)
    finally:
        ours.removeHandler(handler)
    assert ends(run) == {"numbers": "failed", "other": "failed"}
    assert PLANTED not in str(error) and all("planted" not in (o.message or "") for o in run.failures())
    assert {kind: "planted" in text for kind, text in told.items()} == dict.fromkeys(told, False)
    # It was all told, but for the secrets.
    assert "asked with ***" in told["logs"] and "cannot read http://***@127.0.0.1:1/x with ***" in told["logs"]
    assert "ValueError: *** is wrong" in told["logs"], "Prefect's own account of the failure"
    assert "first: shard" in told["states"] and "[Errno 5] refused: 'http://***@127.0.0.1:1'" in told["states"]
    assert "failed: numbers: 2 of 3 shards failed" in told["artifacts"] and "paid with ***" in told["artifacts"]
    assert "AwaitingRetry" in told["states"], "an error keeps its type, by which it is tried again"


class Training(Numbers):
    """A real training of twelve steps, which calls functions before some of them."""

    calls: Mapping[str, Callable[[], None]] = {}

    def process(self, shard: Shard, output: str) -> ShardRecord:
        config = TrainingConfig(num_steps=12, global_batch_size=8, tensorboard=False)
        trained = train(
            TinyModel(),
            Disturbed(**self.calls),
            config,
            make_engine=TorchEngine,
            seed=1,
            folder=storage.join(output, shard.id),
            place=self.name,
            report=self.report,
        )
        return self.commit(shard, output, {"metrics": ("jsonl", trained.metrics_log)}, started_at=0.0)


def test_a_training_is_seen_to_move(tmp_path: Path, server: PrivateServer, caplog: pytest.LogCaptureFixture) -> None:
    """The training stands still until Prefect's page shows how far it has come, goes on, and does so again; without a
    terminal, lines of the log tell the same."""
    caplog.set_level(logging.INFO, "flows.progress")
    now = 0.0
    shown: list[tuple[float, str]] = []

    def bar() -> tuple[float, str]:
        with get_client(sync_client=True) as client:
            key = ArtifactFilter(key=ArtifactFilterKey(any_=["progress-numbers"]))
            found = client.read_artifacts(artifact_filter=key, flow_run_filter=FlowRunFilter(name={"any_": ["moves"]}))
            return (float(found[0].data), found[0].description or "") if found else (0.0, "")

    def last_for_a_while() -> None:
        nonlocal now
        now += 61
        time.sleep(0.6)  # signs of life come twice a second

    def wait_for_the_bar() -> None:
        before, deadline = shown[-1][0] if shown else 0.0, time.monotonic() + 30
        while (state := bar())[0] <= before and time.monotonic() < deadline:
            time.sleep(0.1)
        shown.append(state)

    stage = Training(NumbersConfig(counts=(1,)), root=str(tmp_path))
    stage.calls = {"at_2": last_for_a_while, "at_3": wait_for_the_bar}
    stage.calls |= {"at_6": last_for_a_while, "at_7": wait_for_the_bar, "at_8": last_for_a_while}
    run = new_run(str(tmp_path), {"numbers": stage})
    run.display = LogDisplay(lambda: now)
    with prefect_api(server):
        assert run_pipeline(run, name="moves", server=None) is None  # taken for the user's, with pages to look at
        shown.append(bar())
    percents = [percent for percent, _ in shown]
    assert 0 < percents[0] < percents[1] < percents[2] == 100.0
    for percent, text in shown[:2]:
        assert text.startswith(f"{percent * 12 / 100:.0f}/12 steps") and "loss " in text
    lines = [record.getMessage() for record in caplog.records if record.name == "flows.progress"]
    assert len(lines) == 4 and lines[0] == "started: 1 shard" and lines[3].startswith("done in")
    assert lines[1].startswith("running for 1:01: 3/12 steps") and "loss " in lines[1]
    # The next line waits for two minutes more, which are over after the third stop.
    assert lines[2].startswith("running for 3:03: 9/12 steps") and ", left " in lines[2]


def test_what_is_worth_retrying() -> None:
    assert worth_retrying(StorageError("")) and worth_retrying(RuntimeError("a worker died"))
    for error in (ConfigError(""), InputError(""), StageError(""), KeyboardInterrupt(), Cancelled()):
        assert not worth_retrying(error)


def test_force_runs_anew_and_leaves_the_rest(tmp_path: Path, server: PrivateServer) -> None:
    root = str(tmp_path)
    run_pipeline(new_run(root, graph(root)), name="before", server=server)
    record = next((tmp_path / "squares" / "shards").glob("*.json"))
    written_at = record.stat().st_mtime_ns
    run = new_run(root, graph(root), force=["squares"])
    assert run_pipeline(run, name="forced", server=server) is None
    assert ends(run) == {"numbers": "cached", "squares": "done", "other": "cached", "last": "cached"}
    assert record.stat().st_mtime_ns > written_at


def test_only_reads_what_is_there(tmp_path: Path, server: PrivateServer) -> None:
    root = str(tmp_path)
    run_pipeline(new_run(root, graph(root)), name="all", server=server)
    changed = graph(root, SquaresConfig(keep_even=False))
    run = new_run(root, changed, only=["squares"])
    assert run_pipeline(run, name="only", server=server) is None
    assert ends(run) == {"squares": "done"}
    # `last` was made from the other squares: the report must not show it beside these.
    assert (tmp_path / "report.html").read_text() == "numbers squares other"


def test_a_cancelled_run_breaks_out_of_its_stage(tmp_path: Path, server: PrivateServer) -> None:
    run = new_run(str(tmp_path), graph(str(tmp_path)))
    run.interrupt.cancelled.set()
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(run, name="cancelled", server=server)
    assert ends(run)["numbers"] == "cancelled" and "done" not in ends(run).values()
