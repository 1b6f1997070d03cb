"""Train 2N steps = train N, die, resume: every model, every ZeRO stage; and under another number of ranks."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from stages.base import Stage
from stages.manifest import Manifest
from stages.metrics import read_metrics
from tests.cluster.ranks import run_ranks
from tests.cluster.training_rank import Job, Run
from tests.stages.test_train import TRAININGS, inputs  # noqa: F401 - a fixture

MODELS = ("prior", "ar_prior", "decoder", "upsampler_256", "upsampler_1024")
ZERO_STAGES = (1, 2, 3)
NUM_STEPS = 6

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


def training(name: str, root: str, **settings: Any) -> Stage[Any]:
    """Build a small training whose checkpoints come every two steps."""
    kind, config = TRAININGS[name]
    if hasattr(config.model, "unet"):
        unet = dataclasses.replace(config.model.unet, dropout=0.1)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, unet=unet))
    fixed = {"num_steps": NUM_STEPS, "checkpoint_every_steps": 2, "log_every_steps": 1, "keep_last": 100}
    changed: Any = dataclasses.replace(config, **fixed | settings)
    stage: Stage[Any] = kind(changed, root=root, seed=3)
    return stage


def run_group(folder: Path, world_size: int, inputs: dict[str, Manifest], runs: list[Run]) -> list[int]:  # noqa: F811
    """Let ranks do the runs; return how each ended."""
    folder.mkdir(parents=True)
    job = folder / "job"
    job.write_bytes(pickle.dumps(Job(inputs, runs, meeting=str(folder / "meeting"))))
    codes, said = run_ranks("tests.cluster.training_rank", world_size, job, timeout_s=600)
    killed = -signal.SIGKILL in codes  # the other rank may be torn down by the loss before it kills itself
    assert killed or set(codes) == {0}, said
    return codes


def state_of(output: Path, step: int) -> dict[str, bytes]:
    """Read the files of a checkpoint: weights, averages, moments, and how many updates there were."""
    (folder,) = output.glob(f"*/checkpoints/step-{step:06d}")
    return {path.name: path.read_bytes() for path in folder.glob("rank-*.safetensors")}


def losses_of(output: Path) -> list[float]:
    """Read the loss of every step from the last checkpoint."""
    (path,) = output.glob(f"*/checkpoints/step-{NUM_STEPS:06d}/metrics.jsonl")
    lines = read_metrics(path.read_bytes())
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    return [line["loss"] for line in lines]


def rows_of(output: Path) -> dict[int, dict[str, str]]:
    """Read what every step saw: sample index -> what it held, over all ranks and attempts."""
    seen: dict[int, dict[str, str]] = {}
    for path in output.glob("rows-*.jsonl"):
        for line in path.read_text().splitlines():
            step, rows = json.loads(line)
            for index, digest in rows.items():
                assert seen.setdefault(step, {}).setdefault(index, digest) == digest, "not the sample of before"
    return seen


def test_every_model_goes_on_to_the_bit(inputs: dict[str, Manifest], tmp_path: Path) -> None:  # noqa: F811
    root = inputs["curate"].root
    names = [f"{model}-zero{zero_stage}" for model in MODELS for zero_stage in ZERO_STAGES]
    stages = {name: training(name.partition("-")[0], root, zero_stage=int(name[-1])) for name in names}
    # A group that is killed takes all its ranks along, so every stage of ZeRO needs one of its own.
    for zero_stage in ZERO_STAGES:
        own = [name for name in names if name.endswith(f"zero{zero_stage}")]
        own = own[zero_stage:] + own[:zero_stage]
        runs = [Run(stages[name], str(tmp_path / "straight" / name)) for name in own]
        runs += [Run(stages[name], str(tmp_path / "killed" / name), die_at=3) for name in own[:-1]]
        runs.append(Run(stages[own[-1]], str(tmp_path / "killed" / own[-1]), die_at=3, kill=True))
        assert 0 not in run_group(tmp_path / f"first{zero_stage}", 2, inputs, runs)
    runs = [Run(stages[name], str(tmp_path / "killed" / name)) for name in names]
    assert run_group(tmp_path / "second", 2, inputs, runs) == [0, 0]
    for name in names:
        straight, killed = tmp_path / "straight" / name, tmp_path / "killed" / name
        wanted, found = state_of(straight, NUM_STEPS), state_of(killed, NUM_STEPS)
        assert len(wanted) == 2 and found == wanted, name
        assert losses_of(killed) == losses_of(straight), name
        assert rows_of(killed) == rows_of(straight), name
        (a,), (b,) = straight.glob("*.safetensors"), killed.glob("*.safetensors")
        assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.parametrize(("model", "zero_stage"), [("decoder", 1), ("upsampler_256", 2), ("prior", 3)])
def test_the_number_of_ranks_may_change(
    inputs: dict[str, Manifest],  # noqa: F811
    tmp_path: Path,
    model: str,
    zero_stage: int,
) -> None:
    root, output = inputs["curate"].root, str(tmp_path / "elastic")
    # Written before the next step, so that there is one to resume from when the group dies a step later.
    shape = {"num_streams": 12, "global_batch_size": 12, "zero_stage": zero_stage, "checkpoint_in_background": False}
    for number, (world_size, die_at) in enumerate([(4, 3), (2, 5), (3, None)]):
        stage = training(model, root, num_ranks=world_size, **shape)
        run_group(tmp_path / f"group{number}", world_size, inputs, [Run(stage, output, die_at=die_at)])
    # Of four files, two ranks read about half each: the cuts of neither fall exactly on those of the other.
    told = [(tmp_path / "elastic" / f"told-{rank}-of-2.txt").read_text() for rank in range(2)]
    num_read = [int(number) for said in told for number in re.findall(r"reads (\d) of 4 files", said)]
    assert len(num_read) == 2 and max(num_read) <= 3
    straight = training(model, root, num_ranks=1, **shape)
    run_group(tmp_path / "alone", 1, inputs, [Run(straight, str(tmp_path / "straight"))])
    assert rows_of(tmp_path / "elastic") == rows_of(tmp_path / "straight")
    assert losses_of(tmp_path / "elastic") == pytest.approx(losses_of(tmp_path / "straight"), rel=1e-4)
