"""A process killed at any step of a commit: what can be seen is whole, and the same run finishes with equal results."""

from __future__ import annotations

import signal

import pytest

from tests.chaos.conftest import DATA_STAGES, Run

pytestmark = pytest.mark.slow

POINTS = {
    f"{moment}-{kind}": (moment, kind)
    for kind in ("data", "record", "table", "manifest")
    for moment in ("writing", "publishing", "published")
}


@pytest.mark.chaos
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("stage", DATA_STAGES)
def test_killed_while(finished: Run, stage: str, point: str) -> None:
    moment, kind = POINTS[point]
    # The second shard is struck, so that a finished one is before it and an untouched one behind it.
    number = 2 if kind in ("data", "record") and finished.num_shards(stage) > 1 else 1
    finished.forget(stage)
    answer = finished.do(stage, kill={"moment": moment, "kind": kind, "number": number})
    assert answer["status"] == -signal.SIGKILL, answer
    finished.check_nothing_is_half_published(stage)
    assert finished.do(stage) == {"status": 0, "said": ""}
    finished.check_finished(stage)


@pytest.mark.parametrize("stage", DATA_STAGES)
def test_killed_at_every_shard(finished: Run, stage: str) -> None:
    finished.forget(stage)
    for number in range(finished.num_shards(stage)):
        # Each run finds one more record than the one before, and is killed as soon as it has written another.
        answer = finished.do(stage, kill={"moment": "published", "kind": "record", "number": 1})
        assert answer["status"] == -signal.SIGKILL, (number, answer)
        finished.check_nothing_is_half_published(stage)
    assert finished.do(stage) == {"status": 0, "said": ""}
    finished.check_finished(stage)
