"""Bad samples: replaced by rule, counted, too many refused. Starving steps: who is to blame, and what helps."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.data_parts import PartTimes
from stages.data_watch import DataWatch
from stages.dataset import Batch, TrainingStream
from stages.engine import TorchEngine
from stages.engine_settings import EngineSettings
from stages.errors import IntegrityError, StageError
from stages.held_out import HeldOutSamples
from stages.metrics import read_metrics
from stages.open_shard import TrainingShard
from stages.training import TrainingStoppedError, model_loss, train
from stages.training_config import TrainingConfig
from tests.stages.training_data import TinyModel, write_dataset

SIZES, BAD = (7, 12, 5), {1, 9, 12}
SETTINGS = vars(TrainingConfig(global_batch_size=100, num_streams=4, max_bad_fraction=0.01))


def number_of(captions: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[int(caption.split()[1])] for caption in captions])


def stream_of(shards: Sequence[TrainingShard], root: str, **options: Any) -> TrainingStream:
    defaults: dict[str, Any] = {"num_streams": 2, "global_batch_size": 4, "seed": 0, "embeddings": True}
    defaults |= {"image_size_px": 8, "tokenize": number_of}
    return TrainingStream(shards, root=root, **(defaults | options))


def take(stream: TrainingStream, count: int, first_step: int = 0, **position: int) -> list[Batch]:
    with contextlib.closing(stream.batches(first_step, **position)) as batches:
        return list(itertools.islice(batches, count))


def rows_of(batches: Sequence[Batch]) -> list[list[int]]:
    for batch in batches:  # image, vector and caption are of one sample, whoever it is
        assert batch.tensors["image"][:, 0, 0, 0].tolist() == batch.tensors["tokens"][:, 0].tolist()
    return [batch.tensors["tokens"][:, 0].tolist() for batch in batches]


def test_a_bad_held_out_sample_is_replaced_by_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = str(tmp_path)
    options: dict[str, Any] = {"seed": 0, "image_size_px": 8, "tokenize": number_of}

    def look(bad: Collection[int]) -> list[int]:
        shards = [dataclasses.replace(s, num_held_out=3) for s in write_dataset(root, (7, 12), bad=bad)]
        batch = HeldOutSamples(shards, root=root, **options).load(1, 5)
        assert batch.tensors["image"][:, 0, 0, 0].tolist() == batch.tensors["tokens"][:, 0].tolist()
        return [int(number) for number in batch.tensors["tokens"][:, 0]]

    wanted = look(())
    with caplog.at_level(logging.WARNING):
        found = look({wanted[0], wanted[3]})
        assert found == look({wanted[0], wanted[3]}), "the same in every look"
    assert found[1:3] == wanted[1:3] and found[0] == wanted[1] and found[3] not in (wanted[3], wanted[0])
    assert "cannot decode the image" in caplog.text and "looked at twice" in caplog.text
    with pytest.raises(IntegrityError, match=r"none of the 3 held-out samples of a shard.*validation.num_samples to 0"):
        look(range(7))


def test_a_bad_sample_is_replaced_in_its_place_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, damaged = str(tmp_path / "good"), str(tmp_path / "damaged")
    wanted = rows_of(take(stream_of(write_dataset(good, SIZES), good), 20))
    with caplog.at_level(logging.WARNING):
        batches = take(stream_of(write_dataset(damaged, SIZES, bad=BAD), damaged), 20)
    for batch, found, row in zip(batches, rows_of(batches), wanted, strict=True):
        replaced = [w in BAD for w in row]
        assert batch.num_bad == sum(replaced)
        for number, original, is_replaced in zip(found, row, replaced, strict=True):
            assert (number not in BAD) if is_replaced else number == original
    assert sum(batch.num_bad for batch in batches) == sum(w in BAD for row in wanted for w in row) > 3
    messages = [record.message for record in caplog.records]
    assert len(messages) == len(BAD)  # each is named once
    assert any(
        "download/1.tar: sample 0001000005: cannot decode the image (unknown format); " in message
        for message in messages
    )


def test_who_stands_in_depends_on_nothing_but_the_position(tmp_path: Path) -> None:
    root = str(tmp_path)
    shards = write_dataset(root, SIZES, bad=BAD)
    straight = take(stream_of(shards, root), 12)
    rows, num_bad = rows_of(straight), [batch.num_bad for batch in straight]
    threads = take(stream_of(shards, root, num_decode_threads=3, cache_gib=0.0), 12)
    assert rows_of(threads) == rows
    resumed = take(stream_of(shards, root), 5, first_step=7)
    assert (rows_of(resumed), [batch.num_bad for batch in resumed]) == (rows[7:], num_bad[7:])
    halves = [take(stream_of(shards, root), 12, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*map(rows_of, halves), strict=True)] == rows
    assert [a.num_bad + b.num_bad for a, b in zip(*halves, strict=True)] == num_bad


def test_a_shard_without_any_good_sample_is_an_error(tmp_path: Path) -> None:
    root = str(tmp_path)
    shards = write_dataset(root, (5, 6), bad=range(5))
    with pytest.raises(IntegrityError, match=r"download/0.tar: sample .* and no other of its stretch .*unclip repair"):
        take(stream_of(shards, root), 8)


def run(shards: Sequence[TrainingShard], root: str, folder: Path, stop_after: int = 99, **changes: Any) -> Any:
    config = TrainingConfig(
        **{"num_steps": 12, "global_batch_size": 4, "num_streams": 2, "log_every_steps": 3, "tensorboard": False}
        | changes
    )
    asked = itertools.count(1)
    options: dict[str, Any] = {"make_engine": TorchEngine, "seed": 5, "folder": str(folder), "place": "tiny"}
    return train(TinyModel(), stream_of(shards, root), config, should_stop=lambda: next(asked) == stop_after, **options)


def test_the_count_goes_on_after_a_restart(tmp_path: Path) -> None:
    root = str(tmp_path)
    shards = write_dataset(root, SIZES, bad=BAD)
    batches = take(stream_of(shards, root), 12)
    expected = [sum(batch.num_bad for batch in batches[:step]) for step in (3, 6, 9, 12)]
    lines = read_metrics(run(shards, root, tmp_path / "straight").metrics_log)
    assert [line["num_bad_samples"] for line in lines] == expected
    assert {"data_opening_s", "data_decoding_s", "data_tokenising_s"} <= lines[0].keys()
    with pytest.raises(TrainingStoppedError):
        run(shards, root, tmp_path / "stopped", stop_after=6)
    again = read_metrics(run(shards, root, tmp_path / "stopped").metrics_log)
    assert [line["num_bad_samples"] for line in again] == expected


def test_too_many_end_the_training(tmp_path: Path) -> None:
    shards = write_dataset(str(tmp_path), SIZES, bad=BAD)
    with pytest.raises(StageError, match=r"tiny: 1 of 12 samples could not be decoded.*tiny.max_bad_fraction: 0 allow"):
        run(shards, str(tmp_path), tmp_path / "run", max_bad_fraction=0.0)


@pytest.fixture
def engine() -> Iterator[TorchEngine]:
    yield TorchEngine(TinyModel(), model_loss, EngineSettings())


def test_a_fraction_is_judged_on_a_thousand_samples_at_least(engine: TorchEngine) -> None:
    watch = DataWatch(SETTINGS, "decoder")
    watch.took(Batch(0, [], {}, num_bad=10), 0.0)
    assert watch.close(engine, 1)["num_bad_samples"] == 10
    watch.took(Batch(1, [], {}, num_bad=1), 0.0)
    with pytest.raises(StageError, match="decoder: 11 of 200 samples"):
        watch.close(engine, 2)
    assert DataWatch(SETTINGS, "decoder", num_bad=11).close(engine, 11)["num_bad_samples"] == 11


@pytest.mark.parametrize(
    ("worst", "remedy"),
    [
        ("opening", "raise decoder.cache_gib (now 1), and for a remote store set decoder.shard_cache_dir"),
        ("decoding", "raise decoder.num_decode_threads (now 0;"),
        ("preparing", "raise decoder.num_decode_threads (now 0;"),
        ("tokenising", "raise decoder.num_ranks (now 1)"),
    ],
)
def test_starving_names_the_bottleneck_and_what_to_raise(
    engine: TorchEngine, worst: str, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = DataWatch(SETTINGS, "decoder")
    work = {"opening": 0.25, "decoding": 0.5, "preparing": 0.125, "tokenising": 0.25} | {worst: 2.0}
    for step in range(3):
        watch.took(Batch(step, [], {}, work_s=work), 1e3)
        assert watch.close(engine, step + 1)[f"data_{worst}_s"] == 2.0
        assert len(caplog.records) == min(step, 1)  # not of the first batches, and not again soon
    (message,) = [record.message for record in caplog.records]
    assert f"the bottleneck is {worst}: " in message and remedy in message and f"{worst} 2 s" in message


def test_a_fed_training_is_not_warned(engine: TorchEngine, caplog: pytest.LogCaptureFixture) -> None:
    watch = DataWatch(SETTINGS, "decoder")
    for step in range(3):
        watch.took(Batch(step, [], {}, work_s={"decoding": 2.0}), 0.0)
        watch.close(engine, step + 1)
    assert not caplog.records


def test_times_of_threads_add_up_to_the_time_that_passed() -> None:
    times = PartTimes()
    with times.of_threads("decoding", "preparing"):
        times.seconds |= {"decoding": 30.0, "preparing": 10.0}
    total = sum(times.seconds.values())
    assert 0 < total < 5
    assert times.seconds["decoding"] == pytest.approx(3 * times.seconds["preparing"])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="max_bad_fraction: 2 is not between 0 and 1"):
        dataclasses.replace(TrainingConfig(), max_bad_fraction=2)
