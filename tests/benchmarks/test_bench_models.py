"""The benchmark of the models runs, at a size that measures nothing."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench_models import COMPARISONS, report, run
from tests.benchmarks.model_sizes import SIZES, Task


def test_a_task_survives_the_command_line() -> None:
    task = Task(
        model="prior", rival="dalle2", operation="sample", side="ours", folder="f", sizes=SIZES["tiny"], num_threads=1
    )
    assert Task.from_json(task.to_json()) == task


@pytest.mark.slow
def test_every_comparison_but_dalle2s_gets_a_row() -> None:
    template = Task(
        model="", rival="", operation="", side="", folder="", sizes=SIZES["tiny"], num_threads=1, min_seconds=0.0
    )
    rows = list(run(template, None, num_repetitions=1, num_rounds=2))
    wanted = [(m, r, o) for m, r, operations in COMPARISONS if r != "dalle2" for o in operations]
    assert [(row.task.model, row.task.rival, row.task.operation) for row in rows] == wanted
    for row in rows:
        assert row.ours.num_parameters == row.theirs.num_parameters or row.task.model == "prior"
        assert len(row.wall_ratios) == 2
        assert row.ours.peak_mib > 0 and min(row.wall_ratios) > 0
    assert report(rows, None).count("\n| ") == len(wanted) + 1
