"""The history of a store: records, logs, and what a look at the store tells."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest

from flows.cli import main
from flows.progress import Outcome
from flows.run_log import RunLog, follow_log, read_log
from flows.run_record import RunRecord, begin_run, end_run, find_run, prune_runs, read_runs
from stages import storage
from stages.errors import ConfigError
from stages.runner import StageProgress

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def begin(root: str) -> RunRecord:
    return begin_run(root, config="a.yaml", config_digest="ab" * 32, selected=["source", "filter"], estimates={})


def test_a_run_is_written_twice_and_read_back(root: str) -> None:
    record = begin(root)
    [running] = read_runs(root)
    assert running == record and running.status == "running" and running.exit_code is None
    outcomes = [Outcome(stage="source", status="cached"), Outcome(stage="filter", status="failed", error=OSError("x"))]
    ended = end_run(root, record, status="failed", outcomes=outcomes, errors=["filter: x"], exit_code=1)
    assert read_runs(root) == [ended]
    assert (ended.count("cached"), ended.count("failed"), ended.seconds >= 0) == (1, 1, True)


def test_runs_are_found_by_the_beginning_of_their_id_and_pruned_with_their_logs(tmp_path: Path) -> None:
    root = str(tmp_path)
    with pytest.raises(ConfigError, match="no run is recorded"):
        find_run(root, None)
    ids = [f"2026010{day}T000000Z-aaaaaa" for day in range(1, 6)]
    for run in ids:
        record = RunRecord(id=run, status="done", started_at="2026-01-01T00:00:00+00:00")
        storage.write_json(f"{root}/runs/{run}.json", record.to_json())
        storage.write_bytes(f"{root}/logs/{run}/00000.jsonl", b"{}\n")
    assert find_run(root, None) == ids[-1] and find_run(root, "20260102") == ids[1]
    with pytest.raises(ConfigError, match="5 runs have such an id"):
        find_run(root, "2026")
    prune_runs(root, keep=2)
    assert [run.id for run in read_runs(root)] == ids[:2:-1]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ids[3:]


def test_a_run_that_goes_on_is_not_pruned(tmp_path: Path) -> None:
    """A training of weeks, beside which hundreds of short runs end."""
    root = str(tmp_path)
    going_on = begin_run(root, config="c", config_digest="", selected=["prior"], estimates={})
    killed = RunRecord(id="20200101T000000Z-aaaaaa", status="running", started_at="2020-01-01T00:00:00+00:00")
    storage.write_json(f"{root}/runs/{killed.id}.json", killed.to_json())
    for number in range(3):
        run = RunRecord(id=f"{going_on.id}-later-{number}", status="done", started_at=going_on.started_at)
        storage.write_json(f"{root}/runs/{run.id}.json", run.to_json())
    prune_runs(root, keep=2)
    assert [run.id for run in read_runs(root)][-1] == going_on.id and len(read_runs(root)) == 3
    end_run(root, going_on, status="failed", outcomes=[], errors=["boom"], exit_code=1)
    prune_runs(root, keep=2, spare=going_on.id)
    assert read_runs(root)[-1].errors == ["boom"]
    prune_runs(root, keep=2)
    assert going_on.id not in {run.id for run in read_runs(root)}


def test_a_log_names_run_stage_and_shard(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", 'planted-"é\\-secret')  # JSON would write it otherwise
    log = RunLog(root, "run-1")
    logger = logging.getLogger("stages.test_log")
    logger.setLevel(logging.INFO)
    with log.kept():
        log.update(StageProgress(stage="filter", num_done=0, num_shards=3, is_waiting=True))
        log.update(StageProgress(stage="filter", num_done=1, num_shards=3))
        log.update(StageProgress(stage="filter", num_done=2, num_shards=3))
        logger.warning("shard failed with %s", os.environ["A_SECRET"], extra={"stage": "filter", "shard": "ab12"})
        log.publish()
        logger.info("of no stage")
        logging.getLogger("somebody.else").error("not ours")
        log.end(Outcome(stage="filter", status="failed", error=OSError("broken")))
    lines = list(read_log(root, "run-1"))
    assert [line.get("stage") for line in lines] == ["filter", "filter", None, "filter"]
    assert lines[1]["shard"] == "ab12" and lines[1]["message"] == "shard failed with ***"
    assert {line["run"] for line in lines} == {"run-1"} and lines[3]["level"] == "ERROR"
    assert len(storage.list_files(storage.join(root, "logs/run-1"))) == 2
    assert [line["message"] for line in read_log(root, "run-1", stage="filter")][
        -1
    ] == "failed: filter: OSError: broken"


def test_a_log_is_bounded_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), "run-1", max_bytes=2000)
    with log.kept():
        for number in range(1000):
            log.add("INFO", f"line {number}")
    lines = [line["message"] for line in read_log(str(tmp_path), "run-1")]
    kept = len(lines) - 1
    assert lines[:-1] == [f"line {number}" for number in range(kept)] and 0 < kept < 1000
    assert lines[-1] == f"{1000 - kept} further lines are left out: the log had grown too long"


def test_lines_of_a_store_that_fails_are_written_later(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    log = RunLog(str(tmp_path), "run-1")
    log.add("INFO", "kept")
    log.publish()
    (tmp_path / "logs").unlink()
    log.publish()
    assert [line["message"] for line in read_log(str(tmp_path), "run-1")] == ["kept"]


def test_following_shows_every_line_once_and_ends_with_the_run(tmp_path: Path) -> None:
    log, over, seen = RunLog(str(tmp_path), "run-1"), threading.Event(), []
    following = follow_log(str(tmp_path), "run-1", stage=None, is_over=over.is_set, every_s=0.01)
    log.add("INFO", "1")
    log.publish()
    seen.append(next(following)["message"])
    log.add("INFO", "2")
    log.add("INFO", "3")
    log.publish()
    seen += [next(following)["message"], next(following)["message"]]
    log.add("INFO", "4")
    log.publish()
    over.set()
    seen += [line["message"] for line in following]
    assert seen == ["1", "2", "3", "4"]


def test_the_commands_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [QUICKSTART, "-s", f"root={tmp_path}"]
    assert main(["runs", *given]) == 0 and "no run is recorded" in capsys.readouterr().out
    assert main(["logs", *given]) == 2 and "no run is recorded" in capsys.readouterr().err
    record = begin(str(tmp_path))
    log = RunLog(str(tmp_path), record.id)
    log.add("INFO", "hello", stage="filter")
    log.add("INFO", "others", stage="embed")
    log.publish()
    end_run(str(tmp_path), record, status="done", outcomes=[], errors=[], exit_code=0)
    assert main(["runs", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["id"] == record.id
    assert main(["runs", *given]) == 0 and record.id in capsys.readouterr().out
    assert main(["logs", *given[:1], "filter", *given[1:], "--follow"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("INFO stage=filter hello\n") and "others" not in out
    assert main(["logs", *given[:1], "nonsense", *given[1:]]) == 2
    assert "the stages are: source" in capsys.readouterr().err
