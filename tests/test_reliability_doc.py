"""``docs/reliability.md`` names tests that exist, and all kill points."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.chaos.conftest import DATA_STAGES
from tests.chaos.test_kill_points import POINTS

TOP = Path(__file__).parents[1]
TEXT = (TOP / "docs" / "reliability.md").read_text()


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`(test_\w+)", TEXT))
    trees = [ast.parse(path.read_text()) for path in (TOP / "tests").rglob("test_*.py")]
    defined = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert len(named) >= 18 and named <= defined, named - defined


def test_every_kill_point_has_its_row() -> None:
    rows = re.findall(r"^\|.*\| all eight \| disk, S3 \| `test_killed_while\[([\w-]+)\]` \|$", TEXT, re.MULTILINE)
    assert sorted(rows) == sorted(POINTS)
    assert f"({', '.join(DATA_STAGES)})" in TEXT.replace("\n", " ")
