"""``unclip promote``, ``retrain``, ``rollback``, ``models list``, ``diff`` over results of three weeks, one bad.

The source stage runs; the other results, metrics included, are written by hand: the registry is tested, not training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.cli_registry import REFUSED
from flows.project import open_project
from stages.base import identity_of
from stages.executor import LocalExecutor
from stages.manifest import Manifest, ShardRecord
from stages.runner import run_stage
from stages.withdrawn import withdraw
from tests.stages.finished_run import publish_stage

TINY = Path(__file__).parents[1] / "tiny.yaml"
MODELS = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
GATE = {"rules": {"clip_score": {"min": 0.2, "max_drop": 0.03125}, "frechet_distance": {"max_rise": 1}}}


class Weeks:
    """A config whose lists grow; a week's run is real in its source stage, its identities and its manifests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lists = folder, folder / "lists"
        self.lists.mkdir()
        self.config = str(folder / "config.yaml")
        self.write({})

    def write(self, prior: dict[str, Any], gate: dict[str, Any] = GATE) -> None:
        source = {"kind": "urls", "lists": [str(self.lists)]}
        settings = {"root": str(self.folder / "store"), "source": source, "gate": gate, "prior": prior}
        lines = [f"extends: {TINY}", *(f"{name}: {json.dumps(value)}" for name, value in settings.items())]
        Path(self.config).write_text("\n".join(lines) + "\n")

    def append(self, week: int, num_rows: int) -> None:
        rows = [json.dumps({"url": f"http://host/{week}/{i}.jpg", "caption": f"picture {i}"}) for i in range(num_rows)]
        (self.lists / f"week{week}.jsonl").write_text("\n".join(rows) + "\n")

    def finish(self, clip_score: float, frechet_distance: float, *, but: str = "") -> dict[str, Manifest]:
        """Finish every stage for the present lists and settings, except ``but``."""
        project = open_project(self.config, [])
        found: dict[str, Manifest] = {}
        for name, stage in project.stages.items():
            fingerprint, inputs = project.fingerprints[name], {up: found[up] for up in stage.upstream if up in found}
            if name == "source":
                found[name] = run_stage(stage, fingerprint, inputs, LocalExecutor(), project.config.cluster)
            elif name != but:
                num = found["source"].num_kept
                record = ShardRecord(shard_id=fingerprint, files={}, num_in=num, num_kept=num)
                metrics = {"clip_score": clip_score, "frechet_distance": frechet_distance}
                found[name] = publish_stage(
                    project.config.root,
                    name,
                    fingerprint,
                    () if name in MODELS else [record],
                    upstream=inputs,
                    config=identity_of(stage.config, ("shard", "stage", "nothing")),
                    weights=f"{name} {fingerprint}".encode() if name in MODELS else b"",
                    metrics=metrics if name == "evaluate" else {},
                )
        return found


@pytest.fixture
def weeks(tmp_path: Path) -> Weeks:
    found = Weeks(tmp_path)
    found.append(1, 5)
    return found


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_registry_over_three_weeks_of_results(weeks: Weeks, capsys: pytest.CaptureFixture[str]) -> None:
    config = weeks.config
    weeks.finish(0.25, 8.0, but="ledger")
    assert main(["promote", config]) == 1 and "ledger not finished; `unclip run" in capsys.readouterr().err
    assert main(["models", "list", config]) == 0 and "no version yet" in capsys.readouterr().out
    weeks.finish(0.25, 8.0)
    assert main(["promote", config]) == 0
    said = capsys.readouterr().out
    assert "version 1 is in production (before: nothing)" in said and "nothing is in production to compare with" in said
    again = answer(capsys, "promote", config)
    assert (again["status"], again["version"], again["production"]) == ("unchanged", 1, 1)

    weeks.append(2, 7)
    weeks.finish(0.3125, 7.0)
    assert answer(capsys, "promote", config)["status"] == "promoted"

    usual = open_project(config, []).config.prior.learning_rate
    weeks.append(3, 2)  # poisoned
    weeks.write({"learning_rate": 0.5})
    weeks.finish(0.25, 9.0)
    before = (weeks.folder / "store/registry/production.json").read_bytes()
    refused = answer(capsys, "promote", config, code=REFUSED)
    assert (refused["status"], refused["version"], refused["production"]) == ("refused", 3, 2)
    failures = [rule["reason"] for rule in refused["decision"]["rules"] if not rule["passed"]]
    assert failures == ["clip_score 0.25 is below 0.2812 (max_drop)", "frechet_distance 9 is above 8 (max_rise)"]
    assert main(["promote", config]) == REFUSED
    said = capsys.readouterr().out
    assert "NOT met  clip_score 0.25 is below" in said and "not promoted; in production is still version 2" in said
    assert (weeks.folder / "store/registry/production.json").read_bytes() == before

    difference = answer(capsys, "diff", config, "2", "3")
    assert difference["config"] == {"prior.learning_rate": [usual, 0.5]}
    assert [(item["name"], item["num_rows"]) for item in difference["added"]] == [("week3.jsonl", 2)]
    assert difference["rows"]["source"] == [12, 14] and difference["metrics"]["clip_score"] == [0.3125, 0.25]
    assert main(["diff", config, "2", "3"]) == 0
    assert "+ list week3.jsonl: 2 rows" in capsys.readouterr().out

    weeks.write({}, gate={"rules": {"clip_score": {"min": 0.2}}})  # another threshold, the same results
    assert answer(capsys, "promote", config, "--version", "3")["status"] == "promoted"
    rolled = answer(capsys, "rollback", config)
    assert (rolled["version"], rolled["before"]) == (2, 3)
    assert main(["rollback", config, "--to", "1"]) == 0
    assert "version 1 is in production again (before: version 2)" in capsys.readouterr().out
    listed = answer(capsys, "models", "list", config)
    assert listed["production"] == 1 and [version["number"] for version in listed["versions"]] == [1, 2, 3]
    assert [(change["action"], change["number"]) for change in listed["history"]] == [
        ("promote", 1),
        ("promote", 2),
        ("promote", 3),
        ("rollback", 2),
        ("rollback", 1),
    ]
    weeks.write({"learning_rate": 0.5})  # leads to the third week alone
    assert main(["gc", config, "--stale", "--older-than", "0", "--apply"]) == 0
    assert answer(capsys, "rollback", config, "--to", "2")["version"] == 2


def test_a_forced_promotion_keeps_its_reason(weeks: Weeks, capsys: pytest.CaptureFixture[str]) -> None:
    weeks.finish(0.125, 8.0)
    assert main(["promote", weeks.config]) == REFUSED
    assert main(["promote", weeks.config, "--force-reason", " "]) == 2
    assert "--force-reason: is empty" in capsys.readouterr().err
    assert main(["promote", weeks.config, "--force-reason", "for the demo"]) == 0
    assert "forced past the gate: for the demo" in capsys.readouterr().out
    assert main(["models", "list", weeks.config]) == 0
    said = capsys.readouterr().out
    assert "in production" in said and "failed" in said and "forced: for the demo" in said
    card = (weeks.folder / "store/registry/versions/0001.md").read_text()
    assert "# Models, version 1" in card and "| `week1.jsonl` | 5 |" in card


def test_what_is_not_there_is_named(weeks: Weeks, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollback", weeks.config]) == 1 and "nothing is in production" in capsys.readouterr().err
    assert main(["diff", weeks.config, "1", "2"]) == 1 and "there are: none" in capsys.readouterr().err
    assert main(["promote", weeks.config, "--version", "7"]) == 1
    assert "version 7: " in capsys.readouterr().err and not (weeks.folder / "store").exists()


def test_a_retraining_asks_the_gate_and_never_undoes_a_rollback(
    weeks: Weeks, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage is done, as where a retraining was killed before it had registered what it made."""
    config = weeks.config
    weeks.finish(0.25, 8.0)
    held = answer(capsys, "retrain", config, "--no-promote")
    assert (held["status"], held["version"], held["production"], held["trained"]) == ("held", 1, None, False)
    assert held["decision"]["passed"]
    assert main(["retrain", config]) == 0
    said = capsys.readouterr().out
    assert "nothing has changed since version 1" in said and "version 1 is in production" in said
    assert answer(capsys, "retrain", config)["status"] == "unchanged"

    weeks.append(2, 7)
    weeks.finish(0.125, 7.0)
    production = (weeks.folder / "store/registry/production.json").read_bytes()
    for _ in range(2):
        refused = answer(capsys, "retrain", config, code=REFUSED)
        assert (refused["status"], refused["version"], refused["production"]) == ("refused", 2, 1)
    assert main(["retrain", config]) == REFUSED
    assert "NOT met  clip_score 0.125 is below 0.2 (min)" in capsys.readouterr().out
    assert (weeks.folder / "store/registry/production.json").read_bytes() == production

    weeks.append(3, 2)
    weeks.finish(0.3125, 7.0)
    assert answer(capsys, "retrain", config)["status"] == "promoted"
    assert main(["rollback", config]) == 0
    back = answer(capsys, "retrain", config)
    assert (back["status"], back["version"], back["production"]) == ("taken back", 3, 1)
    assert main(["retrain", config]) == 0 and "was taken back from production" in capsys.readouterr().out

    assert main(["retrain", config, "--from-scratch"]) == 2
    assert "no training of this config starts from production" in capsys.readouterr().err
    withdraw(str(weeks.folder / "store"), 3, ["prior"])
    assert main(["models", "list", config]) == 0
    said = capsys.readouterr().out
    assert "WITHDRAWN" in said and "prior learned from samples that were taken down" in said
    assert main(["rollback", config, "--to", "3"]) == 1 and "version 3 is withdrawn" in capsys.readouterr().err
    assert main(["promote", config, "--version", "3", "--force-reason", "we want it"]) == 1
    assert answer(capsys, "models", "list", config)["withdrawn"]["3"]["models"] == ["prior"]
    assert main(["generate", config, "a circle", "--version", "3", "-o", str(weeks.folder / "x.png")]) == 1
    assert "use: version 3 is withdrawn" in capsys.readouterr().err


def test_verify_reads_the_weights_of_every_version(weeks: Weeks, capsys: pytest.CaptureFixture[str]) -> None:
    manifests = weeks.finish(0.25, 8.0)
    assert main(["promote", weeks.config]) == 0
    file = manifests["prior"].records[0].files["weights"]
    weeks.append(2, 3)  # version 1 is no result of this config any more
    weeks.finish(0.25, 8.0)
    path = weeks.folder / "store" / file.path
    path.write_bytes(bytes(file.num_bytes))
    found = answer(capsys, "verify", weeks.config, code=1)["findings"]
    versions = [finding for finding in found if finding["kind"] == "version"]
    assert [(item["path"], item["stage"]) for item in versions] == [(file.path, "prior")]
    assert main(["repair", weeks.config, "--dry-run"]) == 0
    assert f"would delete prior/{manifests['prior'].fingerprint}" not in capsys.readouterr().out
