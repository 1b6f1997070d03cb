"""Deployments on a real Prefect server with a real worker: schedules, retries, cancelling, lists, notices."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.events.schemas.automations import EventTrigger
from prefect.events.schemas.events import Resource
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.templating import apply_values
from ray.job_submission import JobSubmissionClient

from flows.cli import main
from stages.code_version import code_version
from stages.config import load_config
from stages.executor import LocalExecutor
from stages.graph import build_stages, fingerprints
from stages.lease import read_lease
from stages.runner import run_stage
from stages.storage import TEMPORARY_SUFFIX
from tests.cluster.machines import machines
from tests.conftest import free_port
from tests.flows.prefect_setup import (
    TOP,
    end,
    environment,
    eventually,
    listening_webhook,
    marked,
    running_database,
    running_server,
    running_worker,
)

pytestmark = pytest.mark.chaos
MARK = "UNCLIP_DRILL"
AUTH = "PREFECT_API_AUTH_STRING"
PROGRESS_OF_CLIP = ArtifactFilter.model_validate({"key": {"any_": ["progress-clip"]}})


@dataclass(frozen=True)
class Place:
    """A server that asks for a password, with a worker.

    Attributes:
        home: their folder.
        url: of the API.
        client: of it.
        mark: what processes of runs have in their environment as ``UNCLIP_DRILL``.
        auth: user and password, which whoever talks to the server has in its environment, and nobody tells.
    """

    home: Path
    url: str
    client: SyncPrefectClient
    mark: str
    auth: str

    @property
    def environment(self) -> dict[str, str]:
        """That of a user's commands."""
        return environment(self.home, self.url) | {AUTH: self.auth}

    def deploy(self, config: Path, *arguments: str) -> dict[str, Any]:
        """Deploy a config; return what the command says."""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["deploy", str(config), "--json", *arguments]) == 0, said.getvalue()
        return dict(json.loads(said.getvalue()))

    def refused(self, config: Path, change: str) -> str:
        """Deploy a config with a mistake; return the error."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert main(["deploy", str(config), "-s", change]) == 2
        return said.getvalue()

    def start(self, deployment: str, **parameters: Any) -> Any:
        """Have a deployment run now."""
        found = self.client.read_deployment_by_name(deployment)
        return self.client.create_flow_run_from_deployment(found.id, parameters=parameters)

    def runs(self, deployment: str, *states: str) -> list[Any]:
        """Return the flow runs of a deployment that are in one of these states."""
        found = self.client.read_deployment_by_name(deployment)
        chosen = FlowRunFilter.model_validate({"deployment_id": {"any_": [found.id]}})
        runs = self.client.read_flow_runs(flow_run_filter=chosen)
        return [run for run in runs if not states or run.state_name in states]

    def quieten(self, deployment: str, timeout_s: float = 120) -> None:
        """Delete the runs that a deployment's clock has set, and wait for those under way."""

        def is_quiet() -> bool:
            # Again and again: the server may be setting a hundred of them just as it is told to pause.
            for run in self.runs(deployment, "Scheduled", "Late"):
                with contextlib.suppress(ObjectNotFound):
                    self.client.delete_flow_run(run.id)
            return all(run.state.is_final() for run in self.runs(deployment))

        eventually(is_quiet, timeout_s, f"{deployment} is quiet")

    def tasks(self, run: Any) -> dict[str, str]:
        """Return the states of the tasks of a flow run."""
        chosen = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
        return {task.name: task.state_name for task in self.client.read_task_runs(flow_run_filter=chosen)}

    def artifacts(self, run: Any) -> list[Any]:
        """Return what a flow run has left to look at."""
        chosen = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
        return list(self.client.read_artifacts(artifact_filter=chosen))

    def said(self) -> str:
        """Return the end of what the worker and the processes of runs have said."""
        return (self.home / "worker.log").read_text(errors="replace")[-4000:]

    def until_over(self, run: Any, timeout_s: float = 90) -> str:
        """Wait for the end of a flow run; return how it ended."""

        def over() -> str | None:
            state = self.client.read_flow_run(run.id).state
            return state.name if state is not None and state.is_final() else None

        return str(eventually(over, timeout_s, f"{run.name} in {self.home}"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("prefect")
    mark, auth = uuid.uuid4().hex, f"drill:{uuid.uuid4().hex}"
    asks = {"PREFECT_SERVER_API_AUTH_STRING": auth, AUTH: auth}
    with (
        pytest.MonkeyPatch.context() as patch,
        running_database() as database,
        running_server(home, **database, **asks) as url,
        temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: auth}),
        get_client(sync_client=True) as client,
    ):
        patch.setenv("PREFECT_API_URL", url)
        patch.setenv(AUTH, auth)
        with running_worker(home, url, "drill", **{MARK: mark, AUTH: auth}):
            yield Place(home, url, client, mark, auth)
            assert where_told(home, auth) == []


@pytest.fixture(autouse=True)
def _none_stays(place: Place, tmp_path: Path) -> Iterator[None]:
    """Delete what a test has deployed, and the runs that its clock has planned: the worker would try each of them.

    And look whether anything of what it has left tells the server's password: manifests, records, logs, pages.
    """
    yield
    assert where_told(tmp_path, place.auth) == []
    for deployment in place.client.read_deployments():
        place.client.delete_deployment(deployment.id)
    planned = FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}})
    while runs := place.client.read_flow_runs(flow_run_filter=planned):
        for run in runs:
            place.client.delete_flow_run(run.id)


def where_told(folder: Path, auth: str) -> list[str]:
    """Return the files below a folder in which a password stands, as it is or as it travels."""
    password = auth.partition(":")[2]
    secrets = [password.encode(), base64.b64encode(auth.encode())]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if any(secret in path.read_bytes() for secret in secrets)]


def written(folder: Path, name: str, **sections: Any) -> Path:
    path = folder / f"{name}.yaml"
    values = {"extends": str(TOP / "tests" / "tiny.yaml"), "root": str(folder / "store"), **sections}
    values["prefect"] = {"pool": "drill", **sections.get("prefect", {})}
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def test_a_scheduled_run_fails_is_tried_again_and_ends(place: Place, tmp_path: Path) -> None:
    config = written(
        tmp_path,
        "nightly",
        cluster={"executor": "local"},
        source={"shapes": {"num_images": 16, "port": free_port()}, "rows_per_shard": 8},
        prefect={"interval_s": 4, "when_busy": "skip", "stage_retries": 3, "retry_delay_s": 1.0},
    )
    # The store of one stage is unusable until somebody mends it.
    obstacle = tmp_path / "store" / "download" / "shards"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    deployed = place.deploy(config, "--until", "download")
    name = deployed["name"]
    assert name == "unclip/nightly"

    def waiting() -> Any:
        return next((run for run in place.runs(name) if place.tasks(run).get("download") == "AwaitingRetry"), None)

    run = eventually(waiting, 60, "a stage that waits for its next try")
    assert place.tasks(run)["source"] == "Completed"
    obstacle.unlink()
    assert place.until_over(run) == "Completed"
    assert place.tasks(run) == {"source": "Completed", "download": "Completed", "report": "Completed"}
    shown = {artifact.key: artifact for artifact in place.artifacts(run)}
    assert {"progress-source", "progress-download", "funnel", "cost", "report"} <= set(shown)
    assert shown["progress-download"].data == 100.0 and "2 shards" in shown["progress-download"].description
    log = eventually(lambda: logged(place, run, "done in"), 30, "the end of the log")
    assert "trying again in about" in log
    # The next one by the clock finds all of it done.
    later = eventually(lambda: [r for r in place.runs(name, "Completed") if r.id != run.id], 60, "the next run")[0]
    assert place.tasks(later)["download"] == "Cached"
    deployment = place.client.read_deployment_by_name(name)
    place.client.pause_deployment(deployment.id)


def test_cancelling_stops_ray_and_leaves_the_store_clean(place: Place, tmp_path: Path) -> None:
    config = written(
        tmp_path,
        "long",
        cluster={"executor": "ray", "num_cpus": 1},
        source={"shapes": {"num_images": 300_000, "port": free_port()}, "rows_per_shard": 25_000},
    )
    name = place.deploy(config, "--until", "source")["name"]
    run = place.start(name)
    shards = tmp_path / "store" / "source" / "shards"
    eventually(lambda: len(committed(shards)) >= 2, 120, "two committed shards")
    assert place.client.read_flow_run(run.id).state_name == "Running"
    assert any("raylet" in words[0] for words in of_runs(place))
    place.client.set_flow_run_state(run.id, Cancelling())
    asked_at = time.monotonic()
    eventually(lambda: not of_runs(place), 10, "the end of Ray and of the run's process")
    took_s = time.monotonic() - asked_at
    assert place.until_over(run, 30) == "Cancelled"
    done = check_stopped_in_the_middle(tmp_path / "store")
    print(f"cancelled in {took_s:.1f} s")
    again = place.start(name)
    assert place.until_over(again, 120) == "Completed"
    after = committed(shards)
    assert len(after) == 12 and {path: after[path] for path in done} == done, "the finished shards were not done again"


def test_a_run_that_is_interrupted_does_not_count_as_completed(place: Place, tmp_path: Path) -> None:
    """By SIGINT to its process, of which Prefect's worker knows nothing."""
    config = written(
        tmp_path,
        "interrupted",
        cluster={"executor": "local"},
        source={"shapes": {"num_images": 3_000_000, "port": free_port()}, "rows_per_shard": 25_000},
    )
    run = place.start(place.deploy(config, "--until", "source")["name"])
    eventually(lambda: len(committed(tmp_path / "store" / "source" / "shards")) >= 2, 120, "two committed shards")
    (engine,) = [process for process in marked(MARK, place.mark) if "prefect.engine" in words_of(process)]
    engine.send_signal(signal.SIGINT)
    assert place.until_over(run) == "Crashed", place.said()
    check_cancelled(tmp_path / "store")


def test_cancelling_stops_a_training_in_a_ray_job_before_the_run_is_over(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run only follows: its work is on a cluster, in a job that would go on without it."""
    monkeypatch.setenv("UNCLIP_TEST_MACHINES", "processes")  # with this network, where the server is
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # the server, the worker and the run are on these cores, too
    with machines() as cluster:
        cluster.add(num_cpus=1)
        monkeypatch.setenv("no_proxy", f"127.0.0.1,localhost,{cluster.head.address}")
        given = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "no_proxy")}
        jobs = JobSubmissionClient(cluster.dashboard)
        # None of its own accord: a checkpoint that is there has been written because the training was to end.
        steps = {"num_steps": 20_000, "checkpoint_every_steps": 100_000, "global_batch_size": 16, "engine": "torch"}
        # For once the cluster is on this machine, where the server is; jobs get neither by themselves.
        config = written(
            tmp_path,
            "far",
            cluster={"submit": cluster.dashboard, "pass_env": ["PREFECT_API_URL", AUTH]},
            source={"shapes": {"num_images": 64, "port": free_port()}, "rows_per_shard": 32},
            clip=steps,
            prefect={"job_variables": {"env": given}},
        )
        do_here(config, "source", "download", "filter")
        name = place.deploy(config, "--until", "clip")["name"]
        run = place.start(name)

        def at_work() -> list[psutil.Process]:
            driver = [p for p in cluster.head.processes() if "flows.cli" in words_of(p)]
            ranks = [p for machine in cluster.others for p in machine.find("ray::RayTrainWorker")]
            return driver + ranks + [p for machine in cluster.others for p in machine.find("ray::TrainController")]

        def ended() -> bool:
            state, busy = place.client.read_flow_run(run.id).state_name, at_work()
            assert state != "Cancelled" or not busy, "the run counts as cancelled while its job works"
            return not busy

        def steps_shown(least: int) -> bool:
            shown = place.client.read_artifacts(artifact_filter=PROGRESS_OF_CLIP)
            return any(artifact.data >= 100 * least / steps["num_steps"] for artifact in shown)

        eventually(lambda: steps_shown(1), 180, "steps of the training")
        (job,) = jobs.list_jobs()
        assert (len(at_work()) > 1, job.status) == (True, "RUNNING")
        place.client.set_flow_run_state(run.id, Cancelling())
        asked_at = time.monotonic()
        eventually(ended, 10, "the end of the job's driver and of the training's ranks")
        took_s = time.monotonic() - asked_at
        assert place.until_over(run, 30) == "Cancelled"
        assert jobs.get_job_status(job.submission_id) == "STOPPED" and not at_work()
        print(f"a training in a Ray Job cancelled in {took_s:.1f} s")
        reached, curve = check_training_stopped(tmp_path / "store")
        # The job shows its stages in a flow run of its own, which nobody will end any more.
        (shown,) = [r for r in place.client.read_flow_runs() if r.deployment_id is None and str(tmp_path) in r.name]
        assert place.until_over(shown, 30) in ("Cancelled", "Crashed")
        again = place.start(name)
        eventually(lambda: steps_shown(reached + 1), 180, f"steps after {reached}")
        place.client.set_flow_run_state(again.id, Cancelling())
        assert place.until_over(again, 30) == "Cancelled"
        assert [jobs.get_job_status(found.submission_id) for found in jobs.list_jobs()] == ["STOPPED"] * 2
        # It went on from the step that it was stopped at: the lines before, which tell its speed, too, are the same.
        _, longer = check_training_stopped(tmp_path / "store")
        assert longer.startswith(curve) and len(longer) > len(curve) > 0, reached


def do_here(config: Path, *stages: str) -> None:
    """Do stages in this process, without Prefect and Ray."""
    settings = load_config(config)
    graph, manifests = build_stages(settings), {}
    names = fingerprints(graph)
    for name in stages:
        inputs = {upstream: manifests[upstream] for upstream in graph[name].upstream}
        manifests[name] = run_stage(graph[name], names[name], inputs, LocalExecutor(), settings.cluster)


def check_training_stopped(store: Path) -> tuple[int, bytes]:
    """Hold a store to what a cancelled training leaves; return the step of its last checkpoint, and its metrics."""
    (lease,) = (store / "clip").glob("*/lease.json")
    holding = read_lease(str(lease))
    assert holding is not None and holding.is_free, holding
    records = [json.loads(path.read_text()) for path in (store / "runs").glob("*.json")]
    assert {record["status"] for record in records} == {"cancelled"}
    assert not list(lease.parent.glob("manifest.json")) and not list((store / "clip" / "shards").glob("*.json"))
    assert not [path for path in (store / "clip").rglob("*") if path.name.endswith(TEMPORARY_SUFFIX)]
    folders = sorted(store.glob("clip/shards/*/checkpoints/step-*"))
    assert all((folder / "checkpoint.json").exists() for folder in folders), "every checkpoint is whole"
    return int(folders[-1].name.removeprefix("step-")), (folders[-1] / "metrics.jsonl").read_bytes()


def words_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def logged(place: Place, run: Any, words: str) -> str:
    """Return the log of a run; empty until these words are in it, which may be after the run's end."""
    lines = place.client.read_logs(LogFilter(flow_run_id={"any_": [run.id]}))
    text = "\n".join(line.message for line in lines)
    return text if words in text else ""


def check_stopped_in_the_middle(store: Path) -> dict[str, int]:
    """Hold a store to what a cancelled run of 12 source shards leaves; return the shards that are done."""
    done = committed(store / "source" / "shards")
    assert 2 <= len(done) < 12, "it was stopped in the middle"
    check_cancelled(store)
    left = {path.name for path in (store / "source" / "shards").iterdir() if path.is_file()}
    assert {name for name in left if name.partition(".")[0] not in {n.partition(".")[0] for n in done}} == set()
    return done


def check_cancelled(store: Path) -> None:
    """Hold a store to what is left of a run that was stopped in its source."""
    (lease,) = (store / "source").glob("*/lease.json")
    holding = read_lease(str(lease))
    assert holding is not None and holding.is_free, holding
    (record,) = [json.loads(path.read_text()) for path in (store / "runs").glob("*.json")]
    assert record["status"] == "cancelled"
    assert not list(lease.parent.glob("manifest.json"))


def committed(shards: Path) -> dict[str, int]:
    """Return the records of finished shards with the times of their writing."""
    return {path.name: path.stat().st_mtime_ns for path in shards.glob("*.json")}


def of_runs(place: Place) -> Sequence[Sequence[str]]:
    """Return the command lines of the processes of runs, Ray's among them; the worker is not one."""
    found = []
    for process in marked(MARK, place.mark):
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            found.append(process.cmdline())
    return [words for words in found if words and "worker" not in words]


def test_new_lists_start_a_run_and_its_end_is_told(place: Place, tmp_path: Path) -> None:
    from prefect.blocks.webhook import Webhook

    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "monday.txt").write_text("http://127.0.0.1:9/a.png\n")
    with listening_webhook() as (address, seen):
        Webhook(method="POST", url=address).save("drill-ends", overwrite=True)
        config = written(
            tmp_path,
            "lists",
            cluster={"executor": "local"},
            source={"kind": "urls", "lists": [str(lists)], "caption_column": None},
            prefect={"watch_lists_s": 3600, "notify": ["webhook/drill-ends"], "notify_on": ["completed"]},
        )
        deployed = place.deploy(config, "--until", "source")
        assert place.deploy(config, "--until", "source") == deployed, "deploying again makes nothing twice"
        name, watcher = deployed["name"], deployed["watch"]
        assert place.until_over(place.start(watcher)) == "Completed"
        eventually(lambda: len(place.runs(name, "Completed")) == 1, 60, "the run of the first lists")
        eventually(lambda: seen, 30, "the notice")
        assert seen[0]["state"] == "Completed" and seen[0]["deployment"] == "lists"
        assert place.until_over(place.start(watcher)) == "Completed"
        (lists / "tuesday.txt").write_text("http://127.0.0.1:9/b.png\n")
        assert place.until_over(place.start(watcher)) == "Completed"
        eventually(lambda: len(place.runs(name, "Completed")) == 2, 60, "the run of the second lists")
        assert len(place.runs(name)) == 2, "a look that found nothing new has started nothing"
    manifests = list((tmp_path / "store" / "source").glob("*/manifest.json"))
    assert len(manifests) == 2


SHORT = {"num_steps": 2, "warmup_steps": 1, "checkpoint_every_steps": 2, "engine": "torch", "tensorboard": False}
TRAININGS = ("prior", "decoder", "upsampler_256", "upsampler_1024")


def test_retraining_by_the_clock_promotes_or_is_refused(place: Place, tmp_path: Path) -> None:
    """What the gate decides is seen on the server: as the state of the run, as a notice, as an artifact."""
    from prefect.blocks.webhook import Webhook

    store = tmp_path / "store"
    # Written out, since a section of a config takes the place of the one it extends only where it is of another kind.
    sections: dict[str, Any] = {
        **{name: {**SHORT, "init_from": {"version": "production"}} for name in TRAININGS},
        "clip": SHORT,
        "cluster": {"executor": "local"},
        "source": {"shapes": {"num_images": 48, "port": free_port()}, "rows_per_shard": 24},
        "generate": {"num_samples": 5, "until": "decoder"},
        "gate": {"rules": {"num_generated": {"min": 5}}},
    }
    prefect: dict[str, Any] = {"interval_s": 20, "when_busy": "skip", "notify": ["webhook/drill-refused"]}
    with listening_webhook() as (address, seen):
        Webhook(method="POST", url=address).save("drill-refused", overwrite=True)
        config = written(tmp_path, "weekly", prefect=prefect, **sections)
        # A plain run, without a clock; deployed again, it is another one.
        deployed = place.deploy(config, "--until", "source", "-s", "prefect.interval_s=null")
        name = place.deploy(config, "--retrain")["name"]
        assert name == deployed["name"] == "unclip/weekly"
        deployment = place.client.read_deployment_by_name(name)
        assert deployment.entrypoint == "flows.deployed.retrain" and deployment.parameters["promote"] is True
        assert "until" not in deployment.parameters and deployment.version == code_version()

        # Paused while it runs: the clock would set another between its end and any later word.
        eventually(lambda: place.runs(name, "Running"), 120, "a run by the clock")
        place.client.pause_deployment(deployment.id)
        place.quieten(name, timeout_s=300)
        (first,) = place.runs(name, "Completed", "Failed", "Crashed")
        assert first.state_name == "Completed", f"{first.state.message}\n{place.said()}"
        assert first.state.message == "version 1 is in production"
        shown = {artifact.key: artifact for artifact in place.artifacts(first)}
        curves = {f"curve-{training.replace('_', '-')}" for training in TRAININGS}
        assert {"funnel", "samples", "cost", "gate", "report", "promotion", *curves} <= set(shown)
        assert "| source | 48 |" in shown["funnel"].data and "| prior |" in shown["cost"].data
        assert all(shown[key].data.startswith("data:image/svg+xml;base64,") for key in curves)
        assert shown["samples"].data.startswith("data:image/png;base64,")
        assert "num_generated 5 is at least 5" in shown["promotion"].data
        assert "promote 1 (before: nothing)" in shown["promotion"].data
        before = (store / "registry" / "production.json").read_bytes()

        # The same with other samples, and a bound that they do not meet.
        sections["generate"]["num_samples"] = 4
        written(tmp_path, "weekly", prefect=prefect | {"interval_s": None}, **sections)
        assert place.deploy(config, "--retrain")["name"] == name
        assert place.client.read_deployment_by_name(name).schedules == []
        place.client.resume_deployment(deployment.id)
        place.quieten(name)  # the server may have set a run just as it was told to pause
        by_hand = place.start(name)
        assert place.until_over(by_hand) == "Refused", place.said()
        refused = place.client.read_flow_run(by_hand.id)
        why = "num_generated 4 is below 5 (min)"
        assert why in refused.state.message and refused.state.is_completed()
        assert place.tasks(refused)["prior"] == "Cached"
        (decided,) = [artifact for artifact in place.artifacts(refused) if artifact.key == "promotion"]
        assert "**not met**" in decided.data and why in decided.data
        assert (store / "registry" / "production.json").read_bytes() == before
        eventually(lambda: seen, 30, "the notice")
        assert seen[0]["state"] == "Refused" and why in seen[0]["message"]

    # By hand: the commands tell the same server.
    assert main(["promote", str(config), "--version", "2", "--force-reason", "seen by Ann"]) == 0
    assert main(["rollback", str(config)]) == 0
    chosen = ArtifactFilter.model_validate({"key": {"any_": ["promotion"]}})
    of_no_deployment = FlowRunFilter.model_validate({"deployment_id": {"is_null_": True}})
    runs = {run.id: run.name for run in place.client.read_flow_runs(flow_run_filter=of_no_deployment)}
    found = [a for a in place.client.read_artifacts(artifact_filter=chosen) if a.flow_run_id in runs]
    told = sorted(artifact.data.splitlines()[0] for artifact in found if str(store) in artifact.data)
    assert told == [
        f"**version 1 is in production again (before: version 2)** (`{store}`)",
        f"**version 2 is in production (before: version 1), forced past the gate: seen by Ann** (`{store}`)",
    ]


def test_serve_deploys_and_takes_the_runs(place: Place, tmp_path: Path) -> None:
    config = written(
        tmp_path,
        "served",
        cluster={"executor": "local"},
        source={"shapes": {"num_images": 8, "port": free_port()}, "rows_per_shard": 8},
        prefect={"pool": "served"},
    )
    command = [sys.executable, "-m", "flows.cli", "serve", str(config), "--until", "source"]
    given = place.environment
    with (tmp_path / "said").open("wb") as said:
        server = subprocess.Popen(command, cwd=tmp_path, env=given, stdout=said, stderr=said, preexec_fn=_take_ctrl_c)
    try:
        name = "unclip/served"
        eventually(lambda: f"deployed {name} (run, code" in (tmp_path / "said").read_text(), 60, "the deployment")
        run = place.start(name)
        assert place.until_over(run) == "Completed", (tmp_path / "said").read_text()
        assert place.tasks(run) == {"source": "Completed", "report": "Completed"}
        assert len(list((tmp_path / "store" / "source").glob("*/manifest.json"))) == 1
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    finally:
        end(server)


def _take_ctrl_c() -> None:
    """Let a child have it although the tests themselves may run where it is ignored, in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_server_refuses_wrong_settings(place: Place, tmp_path: Path) -> None:
    from stages.config import load_config, to_values

    config = written(tmp_path, "form")
    name = place.deploy(config)["name"]
    values = to_values(load_config(config))
    for change in ({"seed": "three"}, {"decoder": {**values["decoder"], "learning_rat": 1}}, {"filter": None}):
        with pytest.raises(PrefectHTTPStatusError) as refused:
            place.start(name, config=values | change)
        assert refused.value.response.status_code in (409, 422)
    with pytest.raises(PrefectHTTPStatusError):
        place.start(name, until="upsampler-256")
    assert not place.runs(name)


def test_clock_and_limits_stand_on_the_server_as_the_config_says(place: Place, tmp_path: Path) -> None:
    wanted = {"pool": "limited", "pool_limit": 3, "cron": "0 3 * * 1", "timezone": "Europe/Berlin"}
    config = written(tmp_path, "clock", prefect=wanted | {"concurrency": 2, "when_busy": "skip"})
    name = place.deploy(config, "--until", "source")["name"]
    pool, deployment = place.client.read_work_pool("limited"), place.client.read_deployment_by_name(name)
    assert (pool.type, pool.concurrency_limit) == ("process", 3)
    (clock,) = deployment.schedules
    assert clock.active and isinstance(clock.schedule, CronSchedule)
    assert (clock.schedule.cron, clock.schedule.timezone) == ("0 3 * * 1", "Europe/Berlin")
    assert limits(deployment) == (2, "CANCEL_NEW")
    # The server's own scheduler reads it as that hour of that place, in summer and in winter.
    planned = eventually(lambda: place.runs(name, "Scheduled"), 30, "runs by the clock")
    at = [run.expected_start_time.astimezone(ZoneInfo("Europe/Berlin")) for run in planned]
    assert {(when.hour, when.minute, when.isoweekday()) for when in at} == {(3, 0, 1)}

    written(tmp_path, "clock", prefect=wanted | {"cron": None, "interval_s": 900, "pool_limit": 5})
    place.deploy(config, "--until", "source")
    deployment = place.client.read_deployment_by_name(name)
    (clock,) = deployment.schedules
    assert isinstance(clock.schedule, IntervalSchedule) and clock.schedule.interval.total_seconds() == 900
    assert limits(deployment) == (1, "ENQUEUE")
    assert place.client.read_work_pool("limited").concurrency_limit == 3, "a pool that exists is used as it is"


def limits(deployment: Any) -> tuple[int, str]:
    """Return how many runs of a deployment there may be at a time, and what becomes of more."""
    return deployment.global_concurrency_limit.limit, deployment.concurrency_options.collision_strategy.value


def test_a_secret_comes_from_a_block_and_is_told_to_nobody(place: Place, tmp_path: Path) -> None:
    """The worker reads it from the server for the run's environment; what the run then says of it is stars."""
    from prefect.blocks.system import Secret

    # A word that this run cannot avoid: the folder that it cannot write.
    Secret(value="download/shards").save("drill-token", overwrite=True)
    config = written(
        tmp_path,
        "secretive",
        cluster={"executor": "local"},
        source={"shapes": {"num_images": 8, "port": free_port()}, "rows_per_shard": 8},
        prefect={"job_variables": {"env": {"DRILL_TOKEN": "{{ prefect.blocks.secret.drill-token }}"}}},
    )
    obstacle = tmp_path / "store" / "download" / "shards"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    name = place.deploy(config, "--until", "download", "-s", "prefect.stage_retries=0")["name"]
    stored = place.client.read_deployment_by_name(name).model_dump_json()
    assert "drill-token" in stored and "download/shards" not in stored, "the deployment only names it"
    run = place.start(name)
    assert place.until_over(run) == "Failed", place.said()
    chosen = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
    states = [*place.client.read_flow_run_states(run.id)]
    for task in place.client.read_task_runs(flow_run_filter=chosen):
        states += place.client.read_task_run_states(task.id)
    told = {
        "states": "\n".join(state.model_dump_json() for state in states),
        "logs": eventually(lambda: logged(place, run, f"{tmp_path}/store/"), 30, "the end of the log"),
        "artifacts": "\n".join(f"{found.description} {found.data}" for found in place.artifacts(run)),
    }
    assert {kind: "download/shards" in text for kind, text in told.items()} == dict.fromkeys(told, False)
    assert {kind: f"{tmp_path}/store/***" in text for kind, text in told.items()} == dict.fromkeys(told, True)


def test_a_run_by_prefects_own_command(place: Place, tmp_path: Path) -> None:
    config = written(
        tmp_path,
        "by-hand",
        cluster={"executor": "local"},
        source={"shapes": {"num_images": 16, "port": free_port()}, "rows_per_shard": 16},
    )
    name = place.deploy(config)["name"]
    command = ["prefect", "deployment", "run", name, "--param", 'overrides=["source.rows_per_shard=8"]']
    command = [sys.executable, "-m", *command, "--param", "until=source"]
    said = subprocess.run(command, env=place.environment, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    run = eventually(lambda: place.runs(name), 30, "the run")[0]
    assert place.until_over(run) == "Completed", place.said()
    assert place.tasks(run) == {"source": "Completed", "report": "Completed"}
    assert len(committed(tmp_path / "store" / "source" / "shards")) == 2, "rows_per_shard as the command says"


def test_a_kubernetes_pool(place: Place, tmp_path: Path) -> None:
    """What stands on the server afterwards makes the pod that the config describes."""
    config = written(
        tmp_path,
        "pods",
        kubernetes={
            **{"image": "registry.example/unclip:1", "namespace": "ml", "service_account": "runner"},
            **{"keep_finished_s": 600, "head": {"num_cpus": 3, "memory_gib": 5}},
            **{"secrets": ["store-keys"], "store_claim": "store"},
        },
        prefect={"pool": "pods", "pool_kind": "kubernetes", "job_variables": {"image_pull_policy": "Always"}},
    )
    name = place.deploy(config, "--until", "source")["name"]
    deployment, pool = place.client.read_deployment_by_name(name), place.client.read_work_pool("pods")
    assert (pool.type, deployment.work_pool_name) == ("kubernetes", "pods")
    assert deployment.version == code_version()
    given, template = deployment.job_variables, pool.base_job_template
    validate(given, template["variables"], raise_on_error=True, preprocess=False)
    defaults = {name: known.get("default") for name, known in template["variables"]["properties"].items()}
    job = apply_values(template["job_configuration"], defaults | given)
    manifest = job["job_manifest"]
    assert (manifest["kind"], manifest["metadata"]["namespace"], job["namespace"]) == ("Job", "ml", "ml")
    assert manifest["spec"]["ttlSecondsAfterFinished"] == 600
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["serviceAccountName"] == "runner"
    assert (container["image"], container["imagePullPolicy"]) == ("registry.example/unclip:1", "Always")
    assert container["resources"]["requests"] == {"cpu": "3", "memory": "5Gi"}
    assert container["resources"]["limits"]["memory"] == "5Gi"
    assert container["envFrom"] == [{"secretRef": {"name": "store-keys"}}]
    assert pod["volumes"] == [{"name": "store", "persistentVolumeClaim": {"claimName": "store"}}]
    assert container["volumeMounts"] == [{"name": "store", "mountPath": str(tmp_path / "store")}]
    place.deploy(config, "--until", "source")
    assert place.client.read_work_pool("pods").base_job_template == template
    assert "pods of 'pods' would lack kubernetes.secrets" in place.refused(config, "kubernetes.secrets=[others]")
    assert "Sometimes" in place.refused(config, "prefect.job_variables.image_pull_policy=Sometimes")
    assert "'gpus' is no variable of the pool 'pods'" in place.refused(config, "prefect.job_variables.gpus=1")
    assert "is a process pool" in place.refused(config, "prefect.pool=drill")
    assert "webhook/nobody" in place.refused(config, "prefect.notify=[webhook/nobody]")
    assert "'nightly' is no time table" in place.refused(config, "prefect.cron=nightly")


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # of what Prefect sends to Slack with
def test_notices_stand_on_the_server_as_the_config_says(place: Place, tmp_path: Path) -> None:
    from prefect.blocks.notifications import SlackWebhook
    from prefect.blocks.webhook import Webhook

    pager = Webhook(method="POST", url="http://127.0.0.1:9/").save("pager", overwrite=True)
    team = SlackWebhook(url="https://hooks.slack.com/services/T00000000/B00000000/no").save("team", overwrite=True)
    config = written(tmp_path, "told", prefect={"notify": ["webhook/pager", "slack-webhook/team"]})
    deployed = place.deploy(config, "--retrain", "--no-promote")
    (automation,) = place.client.read_automations_by_name("unclip/told: ends of runs")
    assert deployed["automations"] == [automation.name] and automation.enabled
    main_id = place.client.read_deployment_by_name(deployed["name"]).id
    trigger = automation.trigger
    assert isinstance(trigger, EventTrigger)
    assert trigger.expect == {f"prefect.flow-run.{end}" for end in ("Failed", "Crashed", "TimedOut", "Refused")}
    assert trigger.match_related.matches(
        Resource({"prefect.resource.role": "deployment", "prefect.resource.id": f"prefect.deployment.{main_id}"})
    )
    assert [(action.type, action.block_document_id) for action in automation.actions] == [
        ("call-webhook", pager),
        ("send-notification", team),
    ]
    written(tmp_path, "told", prefect={"notify": []})
    assert place.deploy(config, "--retrain")["automations"] == []
    assert place.client.read_automations_by_name("unclip/told: ends of runs") == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--retrain", "--until", "curate"], "--retrain: does all stages"),
        (["--no-promote"], "--no-promote: is of retraining"),
    ],
)
def test_what_cannot_be_deployed(
    place: Place, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", str(TOP / "tests" / "tiny.yaml"), *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("auth", ["drill:a-wrong-password", None], ids=["wrong", "missing"])
@pytest.mark.parametrize("command", [["run", "--only", "source"], ["deploy"], ["serve"]], ids=" ".join)
def test_a_password_that_is_wrong_or_missing_is_said(
    place: Place,
    tmp_path: Path,
    command: list[str],
    auth: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = written(tmp_path, "locked-out", cluster={"executor": "local"})
    monkeypatch.setenv(AUTH, auth) if auth else monkeypatch.delenv(AUTH)
    with temporary_settings({PREFECT_API_AUTH_STRING: auth}):
        assert main([command[0], str(config), *command[1:]]) == 1
    said = capsys.readouterr().err
    assert f"PREFECT_API_URL: the Prefect API at {place.url} refuses the key" in said
    assert "correct PREFECT_API_KEY or PREFECT_API_AUTH_STRING" in said and "a-wrong-password" not in said
    assert not list(tmp_path.glob("store/source/**/*.json")), "nothing has begun"
