"""A run and all that is kept of it: its record, log, metrics, estimate; what a watcher sees; and no secret anywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.throughput import measured
from flows.cli import main
from flows.cli_operate import reopen_quarantined
from flows.console import open_console
from flows.progress import LogDisplay, Outcome
from flows.project import Project, open_project
from flows.recording import recorded
from flows.report import render
from flows.run_log import read_log
from flows.run_record import read_runs
from flows.selection import Selection
from flows.watch import Watch
from stages import storage
from stages.base import Shard
from stages.errors import ShardError
from stages.executor import LocalExecutor
from stages.manifest import Manifest
from stages.runner import inspect_stage, run_stage
from tests.conftest import free_port

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
STAGES = ("source", "download", "filter")
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-key",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0123",
    "PREFECT_API_KEY": "pnu_planted_prefect_key",
    "PREFECT_API_AUTH_STRING": "admin:planted-password",
    "HTTPS_PROXY_PASSWORD": "planted-proxy-password",
}
PLANTED_URL = "http://ann:planted-in-a-url@127.0.0.1:1"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kept:
    """A finished run of the first stages, and of a config that repeats it on more rows."""

    project: Project
    given: tuple[str, ...]


def run_in_process(project: Project, *, failing: str = "") -> None:
    """Do the first stages as the flow does; one shard of the stage ``failing`` is given up on."""
    with recorded(project, Selection(STAGES), TINY, LogDisplay()) as recording:
        manifests: dict[str, Manifest] = {}
        for name in STAGES:
            stage, state = project.stages[name], project.states[name]
            inputs = {upstream: manifests[upstream] for upstream in stage.upstream}
            found = inspect_stage(stage, state.fingerprint, inputs)
            if found.manifest is None and name == failing:
                spoil(stage, stage.plan(inputs)[0].id)
            cached = found.manifest is not None
            manifests[name] = found.manifest or run_stage(
                stage,
                state.fingerprint,
                inputs,
                LocalExecutor(),
                project.config.cluster,
                on_progress=recording.display.update,
            )
            recording.display.end(Outcome(stage=name, status="cached" if cached else "done", manifest=manifests[name]))
        recording.note_result("done", [], 0)


def spoil(stage: object, shard_id: str) -> None:
    """Make one shard fail for good, with secrets in its message."""
    process = stage.process  # type: ignore[attr-defined]

    def fail(shard: Shard, output: str) -> object:
        if shard.id == shard_id:
            raise ShardError(f"cannot read {PLANTED_URL}/x with {PLANTED['AWS_SECRET_ACCESS_KEY']}")
        return process(shard, output)

    stage.process = fail  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    root = tmp_path_factory.mktemp("recording") / "store"
    given = (f"root={root}", f"source.shapes.port={free_port()}", "cluster.max_failed_fraction=0.5",
             f"cluster.metrics_port={free_port()}")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        run_in_process(open_project(TINY, given), failing="filter")
        yield Kept(open_project(TINY, given), given)


def test_no_secret_is_kept_anywhere(kept: Kept) -> None:
    root = kept.project.config.root
    html = render(kept.project.manifests, kept.project.config)
    kept_texts = {"report": html, "fingerprints": json.dumps(kept.project.fingerprints)}
    for name in storage.list_files(root):
        kept_texts[name] = storage.read_bytes(f"{root}/{name}").decode("latin-1")
    assert any(name.startswith("logs/") for name in kept_texts) and any(n.startswith("runs/") for n in kept_texts)
    for secret in (*PLANTED.values(), "planted"):
        assert [name for name, text in kept_texts.items() if secret in text] == []
    [reason] = kept.project.manifests["filter"].quarantined.values()
    assert reason == "cannot read http://***@127.0.0.1:1/x with ***"


def test_fingerprints_do_not_depend_on_secrets(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLANTED:
        monkeypatch.setenv(name, "another-secret-value")
    assert open_project(TINY, kept.given).fingerprints == kept.project.fingerprints


def test_the_run_is_on_record_with_its_log(kept: Kept) -> None:
    root = kept.project.config.root
    run = read_runs(root)[-1]
    assert (run.status, run.exit_code, run.count("done")) == ("done", 0, 3) and run.selected == list(STAGES)
    assert set(run.estimates) == set(STAGES) and run.estimates["source"]["num_in"] == 192
    lines = list(read_log(root, run.id))
    [failed] = [line for line in lines if "failed, attempt" in line["message"]]
    assert failed["stage"] == "filter" and failed["shard"] in kept.project.manifests["filter"].quarantined
    assert [line["stage"] for line in lines if line["message"].startswith("done")] == list(STAGES)


def test_speed_is_measured_and_planned_with(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    root = kept.project.config.root
    found = measured(kept.project.stages, [root])
    assert set(found) == set(STAGES)
    manifest = kept.project.manifests["download"]
    assert found["download"].samples_per_s == pytest.approx(192 / sum(r.wall_time_s for r in manifest.records))
    assert found["download"].kept_fraction == manifest.num_kept / 192
    line = ["plan", TINY, "--cost", "--json", "--measured-in", root, "-s", f"root={root}-larger"]
    assert main([*line, "-s", "source.shapes.num_images=19200"]) == 0
    said = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert said["download"]["num_in"] == 19200 and said["filter"]["num_in"] == pytest.approx(100 * manifest.num_kept)
    assert said["download"]["worker_hours"] == pytest.approx(19200 / found["download"].samples_per_s / 3600)


def test_plan_and_actual_stand_in_the_report(kept: Kept) -> None:
    html = render(kept.project.manifests, kept.project.config)
    assert '<h2 id="plan">Planned and actual</h2>' in html
    section = html.partition('<h2 id="plan">')[2].partition("<h2")[0]
    assert all(name in section for name in STAGES) and "embed" not in section


def test_a_watcher_sees_the_store_alone(kept: Kept) -> None:
    looks = {look.stage: look for look in Watch(kept.project).look()}
    assert [looks[name].status for name in STAGES] == ["done"] * 3 and looks["embed"].status == "waiting"
    assert (looks["filter"].num_done, looks["filter"].num_total, looks["filter"].num_quarantined) == (2, 3, 1)
    assert (looks["clip"].status, looks["clip"].unit, looks["clip"].num_total) == ("not started", "steps", 12)


def test_a_watcher_tells_the_speed_of_what_is_under_way(kept: Kept) -> None:
    root, state = kept.project.config.root, kept.project.states["download"]
    project = replace(kept.project, states={**kept.project.states, "download": replace(state, manifest=None)})
    uri = f"{root}/download/{state.fingerprint}/manifest.json"
    manifest, one = storage.read_bytes(uri), kept.project.manifests["download"].records[0].shard_id
    record = storage.read_bytes(f"{root}/download/shards/{one}.json")
    try:
        storage.delete(uri)
        storage.delete(f"{root}/download/shards/{one}.json")
        watch = Watch(project)
        look = {look.stage: look for look in watch.look(time.time() + 10)}["download"]
        assert (look.status, look.num_done, look.num_total) == ("under way", 2, 3)
        assert look.samples_per_s is not None and look.eta_s is not None
        # Two shards of 64 samples since the first of them: one shard's worth in that time.
        assert look.samples_per_s * look.eta_s == pytest.approx(64)
        storage.write_bytes(f"{root}/download/shards/{one}.json", record)
        storage.write_bytes(uri, manifest)
        assert {look.stage: look for look in watch.look()}["download"].status == "done"
    finally:
        storage.write_bytes(f"{root}/download/shards/{one}.json", record)
        storage.write_bytes(uri, manifest)


def test_a_watcher_sees_the_steps_of_a_training(kept: Kept) -> None:
    clip, manifests = kept.project.stages["clip"], kept.project.manifests
    [shard] = clip.plan({"filter": manifests["filter"]})
    folder = f"{kept.project.config.root}/clip/shards/{shard.id}"
    watch = Watch(kept.project)
    try:
        storage.write_json(f"{folder}/checkpoints/step-000003/checkpoint.json", {})
        look = {look.stage: look for look in watch.look()}["clip"]
        assert (look.status, look.num_done, look.num_total, look.eta_s) == ("under way", 3, 12, None)
        storage.write_bytes(f"{folder}/metrics.jsonl", b'{"step": 6, "samples_per_s": 64.0}\n')
        look = {look.stage: look for look in watch.look()}["clip"]
        assert (look.num_done, look.samples_per_s, look.eta_s) == (6, 64.0, (12 - 6) * 32 / 64)
    finally:
        storage.delete_tree(folder)


def test_status_watch_prints_what_it_sees(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.watch import describe_run, runs_table, watch_view

    run = read_runs(kept.project.config.root)[-1]
    console = open_console(open("/dev/null", "w"))  # noqa: SIM115
    with console.capture() as capture:
        console.print(watch_view("root", run, Watch(kept.project).look()))
        console.print(runs_table([run, replace(run, status="running", exit_code=None)]))
    shown = capture.get()
    console.file.close()
    assert "2/3 shards" in shown and run.id in shown and describe_run(None) == "no run is recorded"


def test_retry_does_the_quarantined_shards_and_no_other(kept: Kept) -> None:
    before = {record.shard_id: record for record in kept.project.manifests["filter"].records}
    assert reopen_quarantined(kept.project, ["source"]) == {}
    assert reopen_quarantined(kept.project, STAGES) == {"filter": 1}
    project = open_project(TINY, kept.given)
    assert [project.states[name].status for name in STAGES] == ["done", "done", "pending"]
    run_in_process(project)
    again = open_project(TINY, kept.given)
    manifest = again.manifests["filter"]
    assert len(manifest.records) == 3 and not manifest.quarantined
    assert all(before[r.shard_id].wall_time_s == r.wall_time_s for r in manifest.records if r.shard_id in before)
    assert reopen_quarantined(again, STAGES) == {}
    assert [run.count("cached") for run in read_runs(again.config.root)] == [2, 0]


def test_a_run_that_raises_is_on_record_as_failed(tmp_path: Path) -> None:
    project = open_project(TINY, [f"root={tmp_path}/store"])
    for error, status, code in ((ShardError("broken"), "failed", 1), (KeyboardInterrupt(), "cancelled", 130)):
        with pytest.raises(type(error)), recorded(project, Selection(STAGES), TINY, LogDisplay()):
            raise error
        run = read_runs(str(tmp_path / "store"))
        assert {(r.status, r.exit_code) for r in run} >= {(status, code)}
