"""What a Ray Job is given: a config that makes the same things, and no secret but those that were named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.connection import _runtime_env
from cluster.jobs import JobState
from flows.cli import main
from flows.cli_jobs import _STATUS, _environment, _exit_code, _for_the_cluster, _is_of, _selection_arguments, _what
from flows.project import Project, open_project
from flows.selection import select
from stages.config import load_config
from stages.graph import STAGE_NAMES, build_stages, fingerprints

TINY = str(Path(__file__).parents[1] / "tiny.yaml")


def project(*settings: str) -> Project:
    return open_project(TINY, ["root=store", *settings])


def test_the_job_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = project("cluster.submit=http://head:8265", "cluster.executor=local")
    (tmp_path / "job.yaml").write_text(_for_the_cluster(here.config))
    there = load_config(str(tmp_path / "job.yaml"), [])
    assert fingerprints(build_stages(there)) == here.fingerprints
    assert there.root == str(tmp_path / "store")
    assert (there.cluster.submit, there.cluster.executor, there.cluster.address) == (None, "ray", "auto")


def test_one_name_for_one_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    everything, a_part = select(STAGE_NAMES), select(STAGE_NAMES, until="embed")
    plain = _what(project(), everything)
    assert plain == _what(project("cluster.max_attempts=9", "cluster.submit=http://head:8265"), everything)
    others = {
        _what(project(), a_part),
        _what(project(), select(STAGE_NAMES, force=["embed"])),
        _what(project("seed=7"), everything),
        _what(open_project(TINY, ["root=elsewhere"]), everything),
    }
    assert len(others) == 4 and plain not in others


def test_the_selection_travels() -> None:
    for options in ({}, {"only": "embed"}, {"start": "clip", "until": "pca", "force": ["embed", "clip"]}):
        selection = select(STAGE_NAMES, **options)
        words = iter(_selection_arguments(selection))
        given: dict[str, list[str]] = {"--from": [], "--until": [], "--force": []}
        for word in words:
            given[word].append(next(words))
        (start,), (until,) = given["--from"], given["--until"]
        assert select(STAGE_NAMES, start=start, until=until, force=given["--force"]) == selection


def test_secrets_travel_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    config = project("cluster.pass_env=[HF_TOKEN]").config
    workers = _runtime_env(config.cluster)["env_vars"]  # of a cluster that this process drives itself
    assert workers["HF_TOKEN"] == "planted-token" and "AWS_SECRET_ACCESS_KEY" not in workers
    environment = _environment(config)
    assert environment["HF_TOKEN"] == "planted-token" and environment["AWS_ENDPOINT_URL"] == "http://store:9000"
    assert "AWS_SECRET_ACCESS_KEY" not in environment
    assert "planted" not in _for_the_cluster(config)


@pytest.mark.parametrize(
    ("url", "travels"),
    [
        ("https://api.prefect.cloud/api/accounts/1/workspaces/2", True),
        ("http://10.0.0.7:4200/api", True),
        ("http://localhost.example:4200/api", True),
        ("http://127.0.0.1:4200/api", False),
        ("http://localhost:4200/api", False),
        ("http://[::1]:4200/api", False),
        ("http://0.0.0.0:4200/api", False),
    ],
)
def test_a_prefect_server_of_this_machine_does_not_travel(
    url: str, travels: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.setenv("PREFECT_API_KEY", "planted-key")
    assert _environment(project().config).get("PREFECT_API_URL") == (url if travels else None)
    assert caplog.text.count(f"PREFECT_API_URL is on this machine ({url})") == (not travels)
    wanted = _environment(project("cluster.pass_env=[PREFECT_API_URL]").config)
    assert wanted["PREFECT_API_URL"] == url and "PREFECT_API_KEY" not in wanted
    assert len(caplog.records) == (not travels)  # what was asked for is not commented on


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["cluster.pass_env=[NOT_SET_ANYWHERE]"], "cluster.pass_env: NOT_SET_ANYWHERE is not set"),
        (["cluster.submit=http://127.0.0.1:9"], "cluster.submit: 'http://127.0.0.1:9'"),
    ],
)
def test_a_job_that_cannot_be_submitted(
    settings: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"root={tmp_path}", "cluster.submit=http://127.0.0.1:9", *settings]
    assert main(["run", TINY, *(part for setting in given for part in ("-s", setting))]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "is_meant"),
    [
        ("tiny.yaml", True),
        ("tiny", True),
        ("tiny-v1.5", True),
        ("tiny-v1.5.yaml", True),
        ("tiny-v1", False),
        ("", False),
    ],
)
def test_jobs_bear_the_name_of_a_file_or_of_a_deployment(label: str, is_meant: bool) -> None:
    assert _is_of(label, {"tiny", "tiny-v1.5"}) == is_meant


def test_nothing_to_cancel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", TINY, "-s", f"root={tmp_path}"]) == 2
    assert "cancel: cluster.submit names no cluster" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (JobState(status="SUCCEEDED", exit_code=0), 0),
        (JobState(status="FAILED", exit_code=1), 1),
        (JobState(status="FAILED", exit_code=2), 2),
        (JobState(status="FAILED", exit_code=130), 130),
        (JobState(status="FAILED", exit_code=143), 143),
        (JobState(status="FAILED", exit_code=-9), 1),
        (JobState(status="FAILED"), 1),
        (JobState(status="STOPPED", exit_code=-15), 130),
    ],
)
def test_exit_codes_are_those_of_a_run_here(state: JobState, code: int) -> None:
    assert _exit_code(state) == code
    assert _STATUS.get(code) == {0: "done", 130: "cancelled", 143: "cancelled"}.get(code)
