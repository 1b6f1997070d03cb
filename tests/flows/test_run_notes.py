"""What a run tells beside its report: the gate is asked about the same numbers as when a version is promoted."""

from __future__ import annotations

from pathlib import Path

from flows.run_notes import run_notes
from stages.config import load_config
from tests.stages.small_store import Given

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def test_the_gate_knows_the_losses_of_trainings(tmp_path: Path) -> None:
    root = str(tmp_path)
    config = load_config(QUICKSTART, [f"root={root}", "gate.rules={prior_validation_loss: {max: 0.5}}"])
    evaluate = Given("evaluate", root).manifest([], metrics={"clip_score": 0.6})
    for loss, verdict in ((0.4, "would be promoted"), (0.6, "would be **refused**")):
        prior = Given("prior", root)
        record = prior.record(0, {}, {}, metrics={"validation_loss": loss})
        notes = run_notes({"prior": prior.manifest([record]), "evaluate": evaluate}, config)
        assert f"This run {verdict}; nothing is in production." in notes["gate"]
        assert "prior_validation_loss" in notes["gate"] and "| prior |" in notes["cost"]
