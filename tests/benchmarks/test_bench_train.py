"""The benchmark of the training loop runs, at a size that measures nothing; what it computes of saves is right."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench_train import COMPARISONS, compare_loops, measure_stalls, prepared, report
from tests.benchmarks.model_sizes import SIZES, Task
from tests.benchmarks.save_stall import stalls_of

WINDOW = 4


def given_at(num_steps: int, slow: dict[int, float]) -> list[float]:
    """Let every step take a second, and those that are named longer."""
    at = [0.0]
    for step in range(num_steps):
        at.append(at[-1] + 1.0 + slow.get(step, 0.0))
    return at


def test_a_save_costs_what_its_window_is_longer_than_its_neighbours() -> None:
    # Saves after 8 and 16 steps; the steps beside the writing are slower, too.
    at = given_at(23, {7: 0.5, 8: 0.25, 15: 0.5, 16: 0.5})
    lost_s, waited_s, step_s = stalls_of(at, [at[10], at[18]], WINDOW)
    assert lost_s == pytest.approx([0.75, 1.0])
    assert waited_s == pytest.approx([0.5, 0.5])
    assert step_s == 1.0


def test_a_save_that_outlasts_its_window_is_refused() -> None:
    at = given_at(23, {})
    with pytest.raises(RuntimeError, match=r"save 2 ended 0\.5 s after"):
        stalls_of(at, [at[10], at[18] + 0.5], WINDOW)


@pytest.mark.slow
def test_every_loop_but_dalle2s_gets_a_row_and_every_way_of_saving() -> None:
    template = Task(
        model="", rival="", operation="", side="", folder="", sizes=SIZES["tiny"], num_threads=1, min_seconds=0.0
    )
    with prepared(template, num_shards=2, num_samples=80) as task:
        rows = list(compare_loops(task, None, num_repetitions=1, num_rounds=1))
        stalls = measure_stalls(task, num_saves=1, window=200)
    wanted = [names for names in COMPARISONS if names[1] != "dalle2"]
    assert [(row.task.model, row.task.rival, row.task.engine, row.task.batch_size) for row in rows] == wanted
    for row in rows:
        assert row.ours.num_parameters == row.theirs.num_parameters
        assert 0.2 < row.ours.output / row.theirs.output < 5  # both losses are of the same model and data
        assert row.ours.flop == row.theirs.flop
        assert min(row.wall_ratios) > 0
    assert [stall.in_background for stall in stalls] == [True, False]
    assert all(stall.state_bytes > 0 and stall.step_s > 0 for stall in stalls)
    assert report(rows, stalls).count("\n| ") == len(wanted) + 5
