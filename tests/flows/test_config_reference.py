"""``docs/config.md`` is what the schema says today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.cli import main
from flows.config_reference import reference
from stages.config import settings

TOP = Path(__file__).parents[2]


def test_the_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--reference"]) == 0
    printed = capsys.readouterr().out
    current = (TOP / "docs" / "config.md").read_text()
    assert printed == current, "run: unclip config --reference > docs/config.md"


def test_it_names_every_setting_with_its_meaning() -> None:
    text = reference()
    paths = [info.path for info in settings()]
    parents = {path.rpartition(".")[0] for path in paths}
    leaves = [info for info in settings() if info.path not in parents]
    missing = [info.path for info in leaves if f"| `{info.path}` |" not in text]
    assert len(leaves) > 200 and not missing
    assert "| `kubernetes.gpu.num_gpus` | `int` | `1` |" in text  # of the section, not of its base class
    rows = [re.split(r"(?<!\\) \| ", line) for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row) == 5 and row[3].strip() for row in rows), [row[0] for row in rows if not row[3].strip()]


def test_a_config_is_still_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 2 and "required: CONFIG" in capsys.readouterr().err
