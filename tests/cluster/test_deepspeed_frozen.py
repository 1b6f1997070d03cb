"""Frozen parts under every ZeRO stage, on two ranks: the losses of the plain-torch engine, and no state for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.engine import TorchEngine
from stages.training import model_loss
from tests.cluster.deepspeed_frozen import frozen_model
from tests.cluster.deepspeed_rank import ZERO_STAGES, settings, steps
from tests.cluster.ranks import run_ranks

pytestmark = pytest.mark.slow


def test_every_zero_stage_leaves_frozen_parts_alone(tmp_path: Path) -> None:
    codes, said = run_ranks("tests.cluster.deepspeed_frozen", 2, tmp_path, timeout_s=300)
    assert codes == [0, 0], said
    found = json.loads((tmp_path / "found.json").read_text())
    wanted = steps(TorchEngine(frozen_model(), model_loss, settings(1, 0)), 0, 8)
    trained = sorted(name for name, param in frozen_model().named_parameters() if param.requires_grad)
    assert trained == ["bias", "body.3.bias", "body.3.weight", "body.4.weight"]
    for stage in ZERO_STAGES:
        rows = found[str(stage)]["rows"]
        for row, expected in zip(rows, wanted, strict=True):  # had a frozen part moved, the losses would differ
            assert row[:2] == pytest.approx(expected[:2], rel=1e-5, abs=1e-6)
        assert found[str(stage)]["again"] == rows[4:]
        assert found[str(stage)]["names"] == trained
