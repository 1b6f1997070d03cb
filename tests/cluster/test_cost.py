"""The arithmetic of ``unclip plan --cost``: what is known is added up, what is not known stays unknown."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cost import NodeType, PriceTable, StageEstimate, estimate, storage_price, this_machine, total
from cluster.throughput import Throughput, speed_settings
from flows.cli import main
from stages.config import load_config
from stages.errors import ConfigError
from stages.graph import build_stages, fingerprints, inspect_all

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
MACHINES = PriceTable(
    data=NodeType(num_cpus=4, num_nodes=2, price_per_hour=0.5), gpu=NodeType(num_cpus=8, num_gpus=2, price_per_hour=4.0)
)


def speed(stage: str, rate: float, kept: float = 1.0, bytes_per_sample: float = 0.0) -> Throughput:
    return Throughput(
        stage=stage,
        fingerprint="0123456789abcdef",
        root="pilot",
        samples_per_s=rate,
        worker_s=100.0,
        kept_fraction=kept,
        num_bytes=1000,
        bytes_per_sample=bytes_per_sample,
    )


def estimates(*changes: str, speeds: tuple[Throughput, ...] = (), **given: Any) -> dict[str, StageEstimate]:
    config = load_config(QUICKSTART, ["root=nowhere/at-all", *changes])
    stages = build_stages(config)
    states = inspect_all(stages, fingerprints(stages))
    found = estimate(config, stages, states, {item.stage: item for item in speeds}, **{"machines": MACHINES, **given})
    return {item.stage: item for item in found}


def test_rows_flow_through_the_shares_kept() -> None:
    speeds = (
        speed("source", 1e6),
        speed("download", 10, 0.5, 100.0),
        speed("filter", 100, 0.8),
        speed("embed", 5, 1.0),
    )
    found = estimates("source.shapes.num_images=8000", speeds=speeds)
    assert [found[name].num_in for name in ("source", "download", "filter", "embed")] == [8000, 8000, 4000, 3200]
    assert found["download"].num_bytes == 800_000 and found["download"].num_shards == 16
    assert found["ledger"].num_in == 8000
    # 8 cores: 8 workers; one price per machine in use.
    assert (found["download"].num_workers, found["download"].num_nodes) == (8, 2)
    assert found["download"].worker_hours == pytest.approx(800 / 3600)
    assert found["download"].hours == pytest.approx(100 / 3600)
    assert found["download"].price == pytest.approx(100 / 3600 * 2 * 0.5)
    assert not found["embed"].at_most and found["pca"].at_most  # curate's share is not known


def test_what_was_not_measured_is_unknown_and_says_how_to_measure() -> None:
    found = estimates()
    assert found["decoder"].num_in == 700 * 32 and found["decoder"].num_shards == 1
    for item in found.values():
        assert item.hours is None and item.price is None and item.num_bytes is None
        assert item.basis.startswith("unknown; measure with `unclip run") and f"--until {item.stage}" in item.basis
    assert found["filter"].at_most and found["filter"].num_in == 4000
    assert total(list(found.values()), "price") == (0, 14)
    assert storage_price(list(found.values()), dataclasses.replace(MACHINES, storage_per_gib_month=1.0)) is None


def test_an_assumption_goes_before_a_measurement_and_is_named() -> None:
    found = estimates(speeds=(speed("decoder", 7.0),), assumed={"decoder": 2.0})
    assert found["decoder"].worker_hours == pytest.approx(700 * 32 / 2 / 3600)
    assert found["decoder"].basis == "assumed: 2 samples/s and worker"


def test_ranks_share_a_training() -> None:
    one, four = (
        estimates(f"decoder.num_ranks={ranks}", speeds=(speed("decoder", 7.0),))["decoder"] for ranks in (1, 4)
    )
    assert one.worker_hours == four.worker_hours and one.hours is not None and four.hours is not None
    assert one.hours == pytest.approx(4 * four.hours) and four.num_workers == 4


def test_rows_of_lists_are_stated_or_unknown() -> None:
    changes = ("source={kind: urls, lists: [a.txt], rows_per_shard: 1000}",)
    config = load_config(QUICKSTART, ["root=nowhere/at-all", *changes])
    stages = build_stages(config)
    names = dict.fromkeys(stages, "0" * 16)
    for num_rows, expected in ((None, (None, None)), (2500, (2500, 3))):
        found = estimate(config, stages, inspect_all(stages, names), {}, machines=None, num_rows=num_rows)
        assert (found[0].num_in, found[0].num_shards) == expected
        assert found[1].num_in == expected[0] and found[0].num_workers is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("decoder.num_ranks=16, global", "16 workers.*room for 8.*smallest change that fits: num_nodes: 4"),
        ("decoder.gpus_per_rank=1", "4 workers.*num_nodes: 2, or -s decoder.num_ranks=2 -s decoder.micro_batch_size=8"),
        ("decoder.cpus_per_rank=64", "larger machines"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_smallest_change(change: str, expected: str) -> None:
    changes = {"decoder.num_ranks=16, global": ["decoder.num_streams=16", "decoder.num_ranks=16"]}.get(
        change, ["decoder.num_ranks=4", change]
    )
    with pytest.raises(ConfigError, match=expected):
        estimates(*changes)


def test_a_stage_with_gpus_needs_machines_with_gpus() -> None:
    with pytest.raises(ConfigError, match=r"embed: needs 1 GPU.*-s embed.num_gpus=0"):
        estimates("embed.num_gpus=1", machines=PriceTable(data=NodeType(num_cpus=4)))


@given(
    cpus=st.floats(0.25, 64),
    gpus=st.sampled_from([0, 0.25, 0.5, 1]),
    node_cpus=st.integers(1, 128),
    node_gpus=st.integers(0, 8),
)
def test_as_many_workers_as_fit_and_not_one_more(cpus: float, gpus: float, node_cpus: int, node_gpus: int) -> None:
    node = NodeType(num_cpus=node_cpus, num_gpus=node_gpus)
    num = node.workers(cpus, gpus)
    assert num * cpus <= node_cpus + 1e-6 * cpus and num * gpus <= node_gpus
    assert (num + 1) * cpus > node_cpus - 1e-6 or (num + 1) * gpus > node_gpus


def test_speed_depends_on_models_and_not_on_the_number_of_steps() -> None:
    def of(stage: str, *changes: str) -> dict[str, Any]:
        return speed_settings(stage, build_stages(load_config(QUICKSTART, ["root=x", *changes])))

    assert of("decoder") == of(
        "decoder", "decoder.num_steps=50", "decoder.learning_rate=1e-3", "decoder.warmup_steps=0"
    )
    assert of("decoder") != of("decoder", "decoder.model.unet.model_channels=48")
    assert of("decoder") != of("decoder", "decoder.num_ranks=2")
    assert of("embed") != of("embed", "clip.model.vision_width=64")
    assert of("embed") == of("embed", "clip.num_steps=7", "clip.warmup_steps=0")
    assert of("generate") != of("generate", "decoder.model.unet.model_channels=48")


@pytest.mark.parametrize(
    ("settings", "is_known"),
    [
        (["cluster.num_cpus=2"], True),
        (["cluster.submit=http://head:8265"], False),
        (["cluster.address=ray://head:10001"], False),
        (["cluster.executor=local"], False),
    ],
)
def test_what_runs_elsewhere_or_in_one_process_is_not_held_to_this_machine(
    settings: list[str], is_known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["root=nowhere/at-all", "decoder.num_ranks=2", "decoder.cpus_per_rank=64", "cluster.num_gpus=0", *settings]
    assert (this_machine(load_config(QUICKSTART, wanted)) is not None) == is_known
    line = ["plan", QUICKSTART, "--cost", *(part for setting in wanted for part in ("-s", setting))]
    assert main(line) == (2 if is_known else 0)
    assert ("decoder" in capsys.readouterr().err) == is_known


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = tmp_path / "prices.yaml"
    gpu = "gpu: {num_cpus: 4, num_gpus: 1, gpu_memory_gib: 0.1}\n"
    prices.write_text("data: {num_cpus: 4, price_per_hour: 2.0}\nstorage_per_gib_month: 0.02\n" + gpu)
    line = ["plan", QUICKSTART, "-s", f"root={tmp_path}/store", "--cost", "--prices", str(prices)]
    assert main([*line, "--assume", "decoder=2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    [decoder] = [stage for stage in said["stages"] if stage["stage"] == "decoder"]
    assert decoder["price"] == pytest.approx(700 * 32 / 2 / 3600 * 2.0) and said["price"] == decoder["price"]
    assert said["stages_of_unknown_price"] == 13 and math.isclose(said["worker_hours"], decoder["worker_hours"])
    ways = said["memory_by_way_bytes"]["decoder"]
    (chosen,) = [way for way in ways if (way["zero_stage"], way["offload_optimizer"]) == (1, "none")]
    rank = said["memory_per_rank_bytes"]["decoder"]
    assert (
        len(ways) == 12
        and chosen["on_device"]
        == sum(size for name, size in rank.items() if name[0] != "o")
        + (
            rank["optimizer"]  # all but what is offloaded or on a disk, of which there is nothing
        )
    )
    assert main([*line, "--assume", "decoder=2"]) == 0
    out = capsys.readouterr().out
    (row,) = [row.split() for row in out.splitlines() if row.split()[:1] == ["decoder"] and " 1   *" in row]
    assert row[:5] == ["decoder", "1", "x", "32", "1"] and row[5].startswith("*!")
    assert main([*line, "-s", "prior.gpus_per_rank=1"]) == 2
    assert "more than the 0.1 GiB of gpu_memory_gib; the smallest change that fits: -s pri" in capsys.readouterr().err
    assert "price: 6.22 USD, without 13 stages of which it is not known" in out and "evaluate: unknown; measure" in out
    assert main([*line, "--assume", "decodr=2"]) == 2 and "write STAGE=SAMPLES_PER_S" in capsys.readouterr().err
    prices.write_text("data: {num_cpus: 4, price_per_huor: 2.0}\n")
    assert main(line) == 2 and "data.price_per_huor: unknown key" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
