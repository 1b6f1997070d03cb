"""The paper's configuration on many GPUs (``docs/training.md``): configs load, numbers are what the code says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.memory import shape_of, states_and_passing
from cluster.memory_plan import RankMemories, clip_text_bytes
from stages.config import Config, load_config
from stages.example_batch import example_batch
from stages.flops import flops_per_sample
from stages.training import model_loss
from stages.training_config import engine_settings
from unclip_models.checkpoint import build

TOP = Path(__file__).parents[1]
PAGE = (TOP / "docs" / "training.md").read_text()
SIZES = (8, 64, 512)
MODELS = ("prior", "decoder", "upsampler_256", "upsampler_1024")
PEAK_FLOP_PER_S, MFU = 989e12, 0.4
GIB = 1 << 30


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Config]:
    """The configs of the page, by number of GPUs."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "configs").symlink_to(TOP / "configs")
    found = {}
    for num_gpus, text in re.findall(r"^```yaml\n# (\d+) GPUs\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        path = folder / f"paper-{num_gpus}.yaml"
        path.write_text(text)
        found[int(num_gpus)] = load_config(path)
    assert tuple(found) == SIZES
    return found


def rows_of(first_column: str) -> dict[str, list[str]]:
    """Read the table whose header begins with these words: first cell -> the others."""
    (table,) = re.findall(rf"^\| {re.escape(first_column)} \|.*\n\| --- .*\n((?:\| .*\n)+)", PAGE, re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines()]
    return {cells[0]: cells[1:] for cells in lines}


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[\d.,]*\d", text)]


def test_the_configs_use_the_gpus_they_are_for_and_leave_the_training_as_published(
    configs: Mapping[int, Config],
) -> None:
    paper = load_config(TOP / "configs" / "paper.yaml")
    for num_gpus, config in configs.items():
        trainings = [getattr(config, name) for name in MODELS]
        assert sum(training.num_ranks * training.gpus_per_rank for training in trainings) == num_gpus
        for name, training in zip(MODELS, trainings, strict=True):
            published = getattr(paper, name)
            assert training.model == published.model
            assert training.global_batch_size == published.global_batch_size
    decoder = configs[8].decoder
    assert engine_settings(decoder, decoder.num_ranks).num_micro_batches == 64
    assert all(
        engine_settings(getattr(configs[512], n), getattr(configs[512], n).num_ranks).num_micro_batches == 1
        for n in MODELS
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", ["paper", "paper_ar"])
def test_the_papers_trainings_fit_cards_of_80_gb(config: str, name: str) -> None:
    loaded = load_config(TOP / "configs" / f"{config}.yaml")
    planned = RankMemories(clip_text_bytes(loaded.clip)).of(getattr(loaded, name))
    assert planned.on_device / GIB < 60, "libraries and fragmentation need room, too"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_memory_and_hours_are_what_the_code_says(name: str, configs: Mapping[int, Config]) -> None:
    config: Any = getattr(configs[8], name)
    with torch.device("meta"):
        model = build(config.model)
    example = example_batch(config.model)
    shape = shape_of(model, model_loss, example, engine_settings(config, config.num_ranks))
    memory = []
    for zero_stage in (1, 2, 3):
        for num_gpus in SIZES:
            training = dataclasses.replace(getattr(configs[num_gpus], name), zero_stage=zero_stage)
            settings = engine_settings(training, training.num_ranks)
            planned = states_and_passing(settings, training.num_ranks, shape)
            memory.append(planned.on_device / GIB)
    assert numbers(" ".join(rows_of("a rank's memory")[name])) == pytest.approx(memory, abs=0.06)

    flop = flops_per_sample(model, model_loss, example)
    num_parameters, tflop, samples, gpu_hours, hours = rows_of("work")[name]
    assert numbers(num_parameters) == pytest.approx([sum(shape.sizes) / 1e9], abs=0.006)
    assert numbers(tflop) == pytest.approx([flop / 1e12], abs=0.006)
    assert numbers(samples) == [config.num_steps, config.global_batch_size]
    wanted = config.num_steps * config.global_batch_size * flop / (PEAK_FLOP_PER_S * MFU) / 3600
    assert numbers(gpu_hours) == pytest.approx([wanted], rel=0.005)
    ranks = [getattr(configs[num_gpus], name).num_ranks for num_gpus in SIZES]
    assert numbers(hours) == pytest.approx([wanted / num_ranks for num_ranks in ranks], rel=0.01, abs=0.5)
    (assumed,) = re.findall(rf"--assume {name}=(\d+)", PAGE)
    assert float(assumed) == pytest.approx(PEAK_FLOP_PER_S * MFU / flop, abs=0.6)
