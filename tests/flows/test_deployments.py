"""Deployments on a real Prefect server with a real worker: schedules, retries, cancelling, lists, notices."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from flows.cli import main
from flows.logs import PACKAGES
from stages.lease import read_lease
from tests.conftest import free_port
from tests.flows.prefect_setup import (
    TOP,
    eventually,
    listening_webhook,
    marked,
    running_server,
    running_worker,
)

pytestmark = pytest.mark.chaos
MARK = "UNCLIP_DRILL"


@dataclass(frozen=True)
class Place:
    """A server with a worker.

    Attributes:
        home: their folder.
        url: of the API.
        client: of it.
        mark: what processes of runs have in their environment as ``UNCLIP_DRILL``.
    """

    home: Path
    url: str
    client: SyncPrefectClient
    mark: str

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

    def tasks(self, run: Any) -> dict[str, str]:
        """Return the states of the tasks of a flow run."""
        chosen = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
        return {task.name: task.state_name for task in self.client.read_task_runs(flow_run_filter=chosen)}

    def artifacts(self, run: Any) -> list[Any]:
        """Return what a flow run has left to look at."""
        chosen = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
        return list(self.client.read_artifacts(artifact_filter=chosen))

    def until_over(self, run: Any, timeout_s: float = 90) -> str:
        """Wait for the end of a flow run; return how it ended."""

        def over() -> str | None:
            state = self.client.read_flow_run(run.id).state
            return state.name if state is not None and state.is_final() else None

        return str(eventually(over, timeout_s, f"{run.name} in {self.home}"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("prefect")
    mark = uuid.uuid4().hex
    with (
        kept_logging(),
        pytest.MonkeyPatch.context() as patch,
        running_server(home) as url,
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as client,
    ):
        patch.setenv("PREFECT_API_URL", url)
        with running_worker(home, url, "drill", **{MARK: mark}):
            yield Place(home, url, client, mark)


@contextlib.contextmanager
def kept_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.NOTSET)


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
    lines = [log.message for log in place.client.read_logs(LogFilter(flow_run_id={"any_": [run.id]}))]
    assert any("trying again in about" in line for line in lines) and any("done in" in line for line in lines), lines
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
    done = committed(shards)
    assert 2 <= len(done) < 12, "it was stopped in the middle"
    (lease,) = (tmp_path / "store" / "source").glob("*/lease.json")
    holding = read_lease(str(lease))
    assert holding is not None and holding.is_free, holding
    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "store" / "runs").glob("*.json")]
    assert record["status"] == "cancelled"
    assert not list(lease.parent.glob("manifest.json"))
    print(f"cancelled in {took_s:.1f} s")
    again = place.start(name)
    assert place.until_over(again, 120) == "Completed"
    after = committed(shards)
    assert len(after) == 12 and {path: after[path] for path in done} == done, "the finished shards were not done again"


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


def test_a_kubernetes_pool(place: Place, tmp_path: Path) -> None:
    config = written(
        tmp_path,
        "pods",
        kubernetes={"image": "registry.example/unclip:1", "namespace": "ml"},
        prefect={"pool": "pods", "pool_kind": "kubernetes", "job_variables": {"image_pull_policy": "Always"}},
    )
    name = place.deploy(config, "--until", "source")["name"]
    deployment = place.client.read_deployment_by_name(name)
    assert deployment.job_variables["image"] == "registry.example/unclip:1"
    assert place.client.read_work_pool("pods").type == "kubernetes"
    assert "Sometimes" in place.refused(config, "prefect.job_variables.image_pull_policy=Sometimes")
    assert "'gpus' is no variable of the pool 'pods'" in place.refused(config, "prefect.job_variables.gpus=1")
    assert "is a process pool" in place.refused(config, "prefect.pool=drill")
    assert "webhook/nobody" in place.refused(config, "prefect.notify=[webhook/nobody]")
    assert "'nightly' is no time table" in place.refused(config, "prefect.cron=nightly")
