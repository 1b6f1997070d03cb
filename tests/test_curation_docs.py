"""The table of rules in docs/curation.md is the code's: its settings, defaults, reason codes and their order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from stages import curate, filter_rules
from stages.concepts import Concept
from stages.config import settings
from stages.curate import CurateConfig
from stages.filter_rules import FilterConfig

DOCS = Path(__file__).parents[1] / "docs" / "curation.md"


@dataclass(frozen=True)
class Rule:
    setting: str
    unit: str
    default: str
    reason: str
    cost: str


def rules() -> list[Rule]:
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith(("| `filter.", "| `curate."))]
    return [Rule(*(cell.strip().strip("`") for cell in line.strip("|").split(" | "))) for line in lines]


def test_reason_codes_are_the_codes_own_in_order() -> None:
    listed = list(dict.fromkeys(rule.reason for rule in rules()))
    assert listed == [*filter_rules.REASONS, *curate.REASONS]


def test_every_setting_is_there_with_its_default() -> None:
    known = [*settings(FilterConfig, "filter."), *settings(CurateConfig, "curate.")]
    assert {rule.setting: rule.default for rule in rules()} == {s.path: json.dumps(s.default) for s in known}
    assert all(rule.unit and rule.cost for rule in rules())


def test_concept_reasons_follow_their_pattern() -> None:
    config = CurateConfig(concepts={"b": Concept(head="x", max=1), "a": Concept(head="x", max=1)})
    assert config.reasons == ("clip_score_min", "concept_a", "concept_b", "semantic_duplicate", "keep_fraction")
