"""What no node could ever hold is refused, and what is said to fit does: of data stages and of trainings."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.room import could_hold, refuse_what_never_fits, smallest_change
from flows.cli import main
from stages.base import Stage
from stages.errors import ConfigError
from stages.graph import build_stages
from tests.stages.small_config import quickstart

TINY = "tests/tiny.yaml"
DECODER = build_stages(quickstart())["decoder"]
LAPTOP = [{"Resources": {"CPU": 2.0}, "Labels": {}}]


def stage(name: str, *changes: str) -> Stage[Any]:
    return build_stages(quickstart(*(f"{name}.{change}" for change in changes)))[name]


def changed(old: Stage[Any], said: str) -> Stage[Any]:
    """Do what the smallest change says."""
    options = (option.split("=", 1) for option in re.findall(r"-s (\S+)", said))
    values = {name.removeprefix(f"{old.name}."): json.loads(value) for name, value in options}
    return type(old)(dataclasses.replace(old.config, **values), root="")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("embed", ["num_gpus=1"], "-s embed.num_gpus=0"),
        ("embed", ["num_cpus=4"], "-s embed.num_cpus=2"),
        ("embed", ["num_cpus=4", "num_gpus=0.5"], "-s embed.num_cpus=2 -s embed.num_gpus=0"),
        ("decoder", ["num_ranks=4", "micro_batch_size=2"], "-s decoder.num_ranks=2"),
        # Its micro batches of 32 / 4 samples do not grow.
        ("decoder", ["num_ranks=4"], "-s decoder.num_ranks=2 -s decoder.micro_batch_size=8"),
        ("decoder", ["gpus_per_rank=1"], "-s decoder.gpus_per_rank=0"),
        (
            "decoder",
            ["gpus_per_rank=1", "accelerator_type=H100"],
            "-s decoder.accelerator_type=null -s decoder.gpus_per",
        ),
        ("decoder", ["num_ranks=2", "placement=strict_spread"], '-s decoder.placement="pack"'),
        ("decoder", ["node_labels={pool: training}"], "-s decoder.node_labels={}"),
        ("decoder", ["num_ranks=8", "micro_batch_size=1", "cpus_per_rank=2"], "-s decoder.num_ranks=1"),
        # Three have room, and would not divide the streams.
        ("decoder", ["num_ranks=8", "micro_batch_size=1", "cpus_per_rank=0.6"], "-s decoder.num_ranks=2"),
    ],
)
def test_the_smallest_change_is_named(name: str, changes: list[str], expected: str) -> None:
    wanted = stage(name, *changes)
    assert not could_hold(LAPTOP, wanted)
    said = smallest_change(wanted, LAPTOP)
    assert said.startswith(f"the smallest change that fits: {expected}")
    with pytest.raises(ConfigError, match=re.escape(said)):
        refuse_what_never_fits([stage("filter"), wanted], LAPTOP)
    assert could_hold(LAPTOP, changed(wanted, said))


@given(
    num_ranks=st.sampled_from([1, 2, 4, 8]),
    cpus=st.sampled_from([0.5, 1.0, 3.0, 16.0]),
    gpus=st.sampled_from([0, 1]),
    placement=st.sampled_from(["pack", "strict_pack", "spread", "strict_spread"]),
    label=st.booleans(),
    nodes=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2), st.booleans()), max_size=3),
)
def test_what_is_named_fits_wherever_a_core_is(
    num_ranks: int, cpus: float, gpus: int, placement: str, label: bool, nodes: list[tuple[int, int, bool]]
) -> None:
    there = [{"Resources": {"CPU": c, "GPU": g}, "Labels": {"pool": "a"} if is_a else {}} for c, g, is_a in nodes]
    config = dataclasses.replace(
        DECODER.config,
        num_ranks=num_ranks,
        cpus_per_rank=cpus,
        gpus_per_rank=gpus,
        placement=placement,
        node_labels={"pool": "a"} if label else {},
    )
    wanted = type(DECODER)(config, root="")
    said = smallest_change(wanted, there) if not could_hold(there, wanted) else "holds"
    assert bool(said) == any(c for c, _, _ in nodes)
    if said not in ("", "holds"):
        assert could_hold(there, changed(wanted, said))


def test_fewer_ranks_that_will_do_are_no_reason_to_refuse() -> None:
    assert could_hold(LAPTOP, stage("decoder", "num_ranks=4", "min_ranks=2"))
    assert not could_hold(LAPTOP, stage("decoder", "num_ranks=8", "min_ranks=4"))


def test_the_plan_of_a_local_run_refuses_too(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", TINY, "--cost", "-s", "root=nowhere/at-all", "-s", "cluster.num_gpus=0"]
    assert main([*line, "-s", "embed.num_gpus=1"]) == 2
    said = capsys.readouterr().err
    assert "embed: a worker needs 1 CPU, 1 GPU" in said and "fits: -s embed.num_gpus=0, or run it on a clus" in said
