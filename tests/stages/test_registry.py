"""The registry: versions stay what they were, production changes by one write or not at all, and its history grows."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import ItemsView
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import storage, swap
from stages.errors import ConflictError, InputError, IntegrityError, UnclipError
from stages.gate import GateRule, PromotionGateConfig
from stages.registry import (
    Promotion,
    card_uri,
    find_version,
    promote,
    read_production,
    read_versions,
    register,
    rollback,
    version_uri,
)
from stages.version import compare
from tests.stages.finished_run import finished_run, publish_stage

OPEN = PromotionGateConfig()
NO_WORSE = PromotionGateConfig(rules={"clip_score": GateRule(min=0.2, max_drop=0.0625)})


def registered(root: str, *seeds: int, **metrics: Any) -> list[int]:
    return [register(root, finished_run(root, seed, **metrics), OPEN).number for seed in seeds]


def production_bytes(root: str) -> bytes:
    return storage.read_bytes(f"{root}/registry/production.json")


def test_a_version_tells_what_its_manifests_say_and_is_registered_once(atomic_root: str) -> None:
    root = atomic_root
    run = finished_run(root, 1, lists={"jan.csv": 30, "feb.csv": 12}, clip_score=0.3)
    version = register(root, run, NO_WORSE)
    record = storage.read_bytes(version_uri(root, 1))
    assert register(root, run, OPEN) == version == find_version(root, 1)
    assert storage.read_bytes(version_uri(root, 1)) == record
    assert register(root, finished_run(root, 2), OPEN).number == 2
    assert list(read_versions(root)) == [1, 2] and read_versions(root)[1] == version
    assert {name: stage.digest for name, stage in version.stages.items()} == {n: m.digest for n, m in run.items()}
    decoder = version.stages["decoder"]
    assert storage.read_bytes(f"{root}/{decoder.manifest}") and decoder.weights[0].read(root) == b"decoder of 1"
    assert [(item.name, item.num_rows) for item in version.lists] == [("jan.csv", 30), ("feb.csv", 12)]
    assert (version.stages["curate"].num_in, version.stages["curate"].num_kept) == (42, 40)
    assert version.metrics["clip_score"] == 0.3 and version.decision.passed and version.code_versions == ["1.0"]


def test_the_card_says_what_the_record_says(tmp_path: Path) -> None:
    root = str(tmp_path)
    version = register(root, finished_run(root, 1, clip_score=0.125), NO_WORSE)
    card = storage.read_bytes(card_uri(root, 1)).decode()
    decoder = version.stages["decoder"].weights[0]
    assert f"| decoder | `{decoder.path}` | 12 | `{decoder.sha256}` |" in card
    assert f"| `jan.csv` | 30 | `{version.lists[0].sha256}` |" in card and "| curate | 30 | 28 |" in card
    assert "| clip_score | 0.125 |  |" in card and "- NOT met: clip_score 0.125 is below 0.2 (min)" in card
    storage.delete(card_uri(root, 1))  # as if the one who registered it had died before
    register(root, finished_run(root, 1, clip_score=0.125), NO_WORSE)
    assert storage.read_bytes(card_uri(root, 1)).decode() == card


def test_a_server_that_ignores_conditions_will_do(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "SETTLE_S", 0.05)
    assert not swap.is_atomic(f"{s3_root}/x")
    for number in registered(s3_root, 1, 2):
        promote(s3_root, number, OPEN)
    assert rollback(s3_root).number == read_production(s3_root).number == 1


def test_a_failed_gate_leaves_production_untouched_and_says_why(atomic_root: str) -> None:
    root = atomic_root
    good, better = registered(root, 1, 2, clip_score=0.25)
    (bad,) = registered(root, 3, clip_score=0.125)
    refused = promote(root, bad, NO_WORSE)
    assert refused.status == "refused" and not storage.exists(f"{root}/registry/production.json")
    assert promote(root, good, NO_WORSE).status == "promoted"
    before = production_bytes(root)
    refused = promote(root, bad, NO_WORSE)
    assert refused.status == "refused" and refused.before == good and refused.decision is not None
    assert refused.decision.failures == [
        "clip_score 0.125 is below 0.2 (min)",
        "clip_score 0.125 is below 0.1875 (max_drop)",
    ]
    assert promote(root, good, NO_WORSE).status == "unchanged" and production_bytes(root) == before
    assert promote(root, better, NO_WORSE).before == good
    forced = promote(root, bad, NO_WORSE, force_reason="the lawyers asked")
    assert forced.status == "promoted" and read_production(root).number == bad
    change = read_production(root).history[-1]
    assert (change.reason, change.before, change.action) == ("the lawyers asked", better, "promote")
    assert change.decision is not None and change.decision["passed"] is False


def test_rollback_goes_back_through_what_stands(atomic_root: str) -> None:
    root = atomic_root
    with pytest.raises(InputError, match="nothing is in production"):
        rollback(root)
    for number in registered(root, 1, 2, 3, 4)[:3]:
        promote(root, number, OPEN)
    assert (rollback(root).number, rollback(root).number) == (2, 1)
    with pytest.raises(InputError, match="version 1 has none before it"):
        rollback(root)
    assert rollback(root, to=3).before == 1 and rollback(root).number == 1
    for to, message in ((1, "is in production"), (4, "never been in production"), (9, "never been in production")):
        with pytest.raises(InputError, match=message):
            rollback(root, to=to)
    with pytest.raises(InputError, match=r"no such version; there are: 1, 2, 3, 4"):
        promote(root, 9, OPEN)
    assert [change.number for change in read_production(root).history] == [1, 2, 3, 2, 1, 3, 1]


class Meeting(dict[str, GateRule]):
    """Rules at which two promotions wait for each other: both have read what is in production, neither has written."""

    def __init__(self, rules: dict[str, GateRule]) -> None:
        super().__init__(rules)
        self.barrier = threading.Barrier(2, timeout=30)

    def items(self) -> ItemsView[str, GateRule]:
        self.barrier.wait()
        return super().items()


@pytest.mark.parametrize("occupied", [False, True])
def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(atomic_root: str, occupied: bool) -> None:
    first, *numbers = registered(atomic_root, 1, 2, 3)
    if occupied:
        promote(atomic_root, first, OPEN)
    gate = PromotionGateConfig()
    object.__setattr__(gate, "rules", Meeting({"clip_score": GateRule(min=0.0)}))

    def attempt(number: int) -> Promotion | ConflictError:
        try:
            return promote(atomic_root, number, gate)
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(numbers, pool.map(attempt, numbers), strict=True))
    (winner,) = (number for number, outcome in outcomes.items() if isinstance(outcome, Promotion))
    (error,) = (outcome for outcome in outcomes.values() if isinstance(outcome, ConflictError))
    assert f"came first, version {winner} is in production now" in str(error)
    history = [change.number for change in read_production(atomic_root).history]
    assert history == ([first, winner] if occupied else [winner])


def test_registrations_at_once_share_no_number(atomic_root: str) -> None:
    runs = [finished_run(atomic_root, seed) for seed in (1, 1, 2, 2, 3, 3)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda run: register(atomic_root, run, OPEN), runs))
    assert sorted({version.number for version in found}) == [1, 2, 3] == list(read_versions(atomic_root))
    assert all(found[i] == found[i + 1] for i in (0, 2, 4))


def test_weights_that_are_gone_or_made_anew_are_not_put_into_production(atomic_root: str) -> None:
    root = atomic_root
    first, second, third = registered(root, 1, 2, 3)
    for number in (first, second):
        promote(root, number, OPEN)
    before = production_bytes(root)
    versions = read_versions(root)
    storage.delete(f"{root}/{versions[first].stages['decoder'].weights[0].path}")
    with pytest.raises(IntegrityError, match=r"version 1: decoder/.*safetensors is gone"):
        rollback(root)
    # `--force` on other hardware: the same fingerprint, other weights.
    publish_stage(root, "prior", versions[third].stages["prior"].fingerprint, weights=b"others")
    with pytest.raises(IntegrityError, match=r"version 3: prior/.* was made anew since"):
        promote(root, third, OPEN)
    assert production_bytes(root) == before


def test_damage_is_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    (number,) = registered(root, 1)
    promote(root, number, OPEN)
    value = json.loads(production_bytes(root))
    for damaged in ({**value, "number": 2}, {**value, "history": [{}]}, [], {**value, "format_version": 2}):
        storage.write_json(f"{root}/registry/production.json", damaged)
        with pytest.raises(IntegrityError, match=r"production\.json: not a record of production"):
            promote(root, number, OPEN)
    for damaged in ({}, {**json.loads(storage.read_bytes(version_uri(root, 1))), "format_version": 2}):
        storage.write_json(version_uri(root, 1), damaged)
        with pytest.raises(IntegrityError, match=r"0001\.json: "):
            read_versions(root)


def test_a_diff_tells_what_distinguishes_two_versions(tmp_path: Path) -> None:
    root = str(tmp_path)
    a = register(root, finished_run(root, 1, lists={"jan.csv": 30, "old.csv": 5}), OPEN)
    lists = {"jan.csv": 40, "feb.csv": 7}
    b = register(root, finished_run(root, 2, lists=lists, learning_rate=2e-4, clip_score=0.3, recall=0.5), OPEN)
    found = compare(a, b)
    assert set(found.results) == {"source", "curate", "prior", "decoder", "evaluate"}
    assert found.config == {"decoder.learning_rate": (1e-4, 2e-4)}
    assert [item.name for item in found.added] == ["feb.csv"] and [item.name for item in found.removed] == ["old.csv"]
    assert [(x.num_rows, y.num_rows) for x, y in found.changed.values()] == [(30, 40)]
    assert found.rows == {"source": (35, 47), "curate": (33, 45)}
    assert found.metrics == {"clip_score": (0.25, 0.3), "recall": (None, 0.5)} and not found.code
    same = compare(b, b).to_json()
    assert not any(same[name] for name in same.keys() - {"a", "b"})


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["promote", "refused", "rollback", "rollback to"]), st.integers(1, 4)), max_size=8
)


@pytest.fixture(scope="module")
def three_versions(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("three") / "store")
    registered(root, 1, 2, 3, clip_score=0.1)
    return root


@given(actions=ACTIONS)
@settings(max_examples=15)
def test_history_only_grows(three_versions: str, actions: list[tuple[str, int]]) -> None:
    """Whatever is asked in whatever order: changes are added at the end or nothing is written at all."""
    with tempfile.TemporaryDirectory() as folder:
        root = shutil.copytree(three_versions, f"{folder}/store")
        for action, number in actions:
            before = read_production(root)
            try:
                if action == "rollback":
                    rollback(root)
                elif action == "rollback to":
                    rollback(root, to=number)
                else:
                    promote(root, number, OPEN if action == "promote" else NO_WORSE)
            except UnclipError:
                assert read_production(root) == before
                continue
            after = read_production(root)
            assert after.history[: len(before.history)] == before.history
            assert len(after.history) - len(before.history) == (after.number != before.number)
            assert action != "refused" or after == before
            if after.history:
                assert after.standing[-1] == after.number == after.history[-1].number
                assert after.history[-1].before == (after.history[-2].number if len(after.history) > 1 else None)
        assert len({change.id for change in read_production(root).history}) == len(read_production(root).history)
