"""Metrics: what is exported is what the dashboard shows, and the numbers are those of the run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from flows.progress import Outcome
from flows.run_metrics import _RESTARTED, EXPORTED, RunMetrics
from stages.base import Progress
from stages.errors import ConfigError
from stages.runner import StageProgress
from tests.conftest import free_port

TOP = Path(__file__).parents[2]
DASHBOARD = TOP / "cluster" / "grafana" / "unclip.json"


def expressions() -> list[str]:
    """Return the queries of the dashboard."""
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("unclip_")]
    return {name: float(value) for name, value in lines if "_created" not in name}


def test_a_scrape_shows_the_run() -> None:
    metrics = RunMetrics()
    progress = StageProgress(
        stage="filter", num_done=3, num_shards=9, num_samples=120, num_failures=2, num_retries=1, num_quarantined=1
    )
    with metrics.served("127.0.0.1", 0) as port:
        metrics.update(StageProgress(stage="filter", num_done=1, num_shards=9, num_samples=40))
        metrics.update(progress)
        metrics.update(progress)
        numbers = {"loss": 0.25, "samples_per_s": 80.0, "data_wait": 0.125, "unknown": 1.0}
        inner = Progress(done=5, total=10, unit="steps", numbers=numbers)
        metrics.update(StageProgress(stage="prior", num_done=0, num_shards=1, inner=inner))
        logging.getLogger("cluster.training").warning("died", extra={"stage": "prior", "event": _RESTARTED})
        metrics.end(Outcome(stage="embed", status="failed", error=OSError("x")))
        seen = scrape(port)
    assert seen['unclip_shards{stage="filter"}'] == 9 and seen['unclip_shards_done{stage="filter"}'] == 3
    assert seen['unclip_samples_total{stage="filter"}'] == 120
    assert seen['unclip_shard_failures_total{stage="filter"}'] == 2
    assert seen['unclip_shard_retries_total{stage="filter"}'] == 1
    assert seen['unclip_shards_quarantined{stage="filter"}'] == 1
    assert seen['unclip_stage_running{stage="filter"}'] == 1 and seen['unclip_stage_failed{stage="embed"}'] == 1
    assert seen['unclip_training_step{stage="prior"}'] == 5 and seen['unclip_training_steps{stage="prior"}'] == 10
    assert seen['unclip_training_loss{stage="prior"}'] == 0.25
    assert seen['unclip_training_samples_per_second{stage="prior"}'] == 80
    assert seen['unclip_training_data_wait_fraction{stage="prior"}'] == 0.125
    assert seen['unclip_training_restarts_total{stage="prior"}'] == 1
    assert {name.partition("{")[0] for name in seen} == EXPORTED


def test_the_first_restart_is_an_increase() -> None:
    """Of a counter that begins at 1, Prometheus' ``increase`` says 0."""
    metrics = RunMetrics()
    metrics.update(StageProgress(stage="prior", num_done=0, num_shards=1))
    labels = {"stage": "prior"}
    assert metrics.registry.get_sample_value("unclip_training_restarts_total", labels) == 0
    metrics.handle(logging.makeLogRecord({"stage": "prior", "event": _RESTARTED, "levelno": logging.WARNING}))
    assert metrics.registry.get_sample_value("unclip_training_restarts_total", labels) == 1


@pytest.mark.slow
def test_a_real_run_serves_all_that_the_dashboard_asks_for(tmp_path: Path, prefect_state: Path) -> None:
    port = free_port()
    given = {"root": tmp_path / "store", "cluster.executor": "local", "source.shapes.port": free_port()}
    command = [sys.executable, "-m", "flows.cli", "run", str(TOP / "tests" / "tiny.yaml"), "--until", "clip"]
    command += ["--metrics-port", str(port), *(word for k, v in given.items() for word in ("-s", f"{k}={v}"))]
    environment = os.environ | {"XDG_STATE_HOME": str(prefect_state), "PYTHONPATH": str(TOP)}
    seen: dict[str, list[float]] = {}
    with (tmp_path / "said").open("wb") as said:
        run = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 240
            while run.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(OSError):  # it is not up yet, or no more
                    for name, value in scrape(port).items():
                        seen.setdefault(name, []).append(value)
                time.sleep(0.1)
            assert run.wait(10) == 0, (tmp_path / "said").read_text()
        finally:
            run.kill()
            run.wait()
    asked_for = set(re.findall(r"\bunclip_\w+", " ".join(expressions())))
    assert asked_for - {name.partition("{")[0] for name in seen} == set()
    assert set(seen['unclip_training_restarts_total{stage="clip"}']) == {0}
    assert (
        seen['unclip_shards_done{stage="download"}'][-1] == 3
        and seen['unclip_samples_total{stage="source"}'][-1] == 192
    )


def test_a_counter_never_falls_where_a_stage_begins_again() -> None:
    metrics = RunMetrics()
    for num_samples in (40, 100, 0, 30):
        metrics.update(StageProgress(stage="filter", num_done=0, num_shards=9, num_samples=num_samples))
    assert metrics.registry.get_sample_value("unclip_samples_total", {"stage": "filter"}) == 130


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="choose another port"), RunMetrics().served("127.0.0.1", port):
            pass


def test_the_dashboard_uses_exactly_what_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert set(re.findall(r"\bunclip_\w+", " ".join(expressions()))) == EXPORTED
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_restarts_are_marked_by_the_name_that_is_counted() -> None:
    source = (Path(__file__).parents[2] / "cluster" / "training.py").read_text()
    assert f'RESTARTED = "{_RESTARTED}"' in source
