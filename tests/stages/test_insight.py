"""Validation, early stop, samples and arithmetic: what a training tells of itself, without being changed by it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stages.base import Stage
from stages.checkpoints import CheckpointFolder
from stages.errors import InputError
from stages.example_batch import example_batch
from stages.executor import ClusterConfig, LocalExecutor
from stages.flops import flops_per_sample
from stages.hardware import peak_tflops
from stages.held_out import held_out_counts
from stages.manifest import Manifest
from stages.metrics import read_metrics
from stages.runner import run_stage
from stages.training import TrainingStoppedError, model_loss
from stages.training_config import TrainingConfig, learning_rate_at
from stages.validation_config import SamplesConfig, ValidationConfig
from tests.stages.test_train import TRAININGS, inputs, needed  # noqa: F401 - `inputs` is a fixture
from unclip_models.ar_prior import ARPrior
from unclip_models.checkpoint import build, load_model
from unclip_models.randomness import SampleRandom

MODELS = ("prior", "ar_prior", "decoder", "upsampler_256")
PEAK_TFLOPS = 0.25
VALIDATED = ValidationConfig(num_samples=4, every_steps=2)


def training(name: str, root: str, **settings: Any) -> Stage[Any]:
    kind, config = TRAININGS[name]
    changed: Any = dataclasses.replace(config, **{"num_steps": 6, "log_every_steps": 1} | settings)
    stage: Stage[Any] = kind(changed, root=root, seed=3)
    return stage


def run(stage: Stage[Any], inputs: dict[str, Manifest]) -> Manifest:  # noqa: F811
    own = needed(stage, inputs)
    fingerprint = stage.fingerprint({upstream: own[upstream].fingerprint for upstream in own})
    return run_stage(stage, fingerprint, own, LocalExecutor(), ClusterConfig())


def fresh(inputs: dict[str, Manifest], tmp_path: Path) -> dict[str, Manifest]:  # noqa: F811
    """Give the data set in a copy of its store, where nothing has been trained."""
    root = Path(inputs["curate"].root)
    copy = tmp_path / "store"
    copy.mkdir()
    for folder in root.iterdir():
        if folder.name in ("curate", "download", "embed", "clip", "pca"):
            (copy / folder.name).symlink_to(folder)
    return {name: dataclasses.replace(manifest, root=str(copy)) for name, manifest in inputs.items()}


def lines_of(manifest: Manifest) -> list[dict[str, float]]:
    return read_metrics(manifest.records[0].files["metrics"].read(manifest.root))


def weights_of(manifest: Manifest) -> dict[str, Tensor]:
    model, _ = load_model(Path(manifest.root) / manifest.records[0].files["weights"].path)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_looking_changes_nothing(name: str, inputs: dict[str, Manifest], tmp_path: Path) -> None:  # noqa: F811
    """With the same samples held out, weights and losses are equal to the bit, looked at or not."""
    found = {}
    for how, every in (("looked at", 2), ("left alone", 0)):
        (tmp_path / how).mkdir()
        own = fresh(inputs, tmp_path / how)
        validation = dataclasses.replace(VALIDATED, every_steps=every, weights="both")
        samples = SamplesConfig(every_steps=3 * (every > 0), num_samples=2, steps=2)
        settings = {"validation": validation, "samples": samples, "peak_tflops": PEAK_TFLOPS}
        found[how] = run(training(name, own["curate"].root, **settings), own)
    seen, alone = (weights_of(found[how]) for how in ("looked at", "left alone"))
    assert all(torch.equal(seen[key], alone[key]) for key in alone)
    kept = ("loss", "grad_norm", "step")
    assert [[line[key] for key in kept] for line in lines_of(found["looked at"])] == [
        [line[key] for key in kept] for line in lines_of(found["left alone"])
    ]
    record = found["looked at"].records[0]
    assert record.dropped == {"held_out": 4} and record.num_in == record.num_kept + 4
    lines = lines_of(found["looked at"])
    validated = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(validated) == [2, 4, 6] and all(loss > 0 for loss in validated.values())
    raw = [line["validation_raw_loss"] for line in lines if "validation_raw_loss" in line]
    assert len(raw) == 3 and raw != list(validated.values())
    model = build(TRAININGS[name][1].model)
    flops = flops_per_sample(model, model_loss, _batch(name, model))
    for line in lines:
        assert line["tflops_per_s"] == pytest.approx(flops * line["samples_per_s"] / 1e12, rel=1e-3)
        assert line["mfu"] == pytest.approx(line["tflops_per_s"] / PEAK_TFLOPS)
        assert 0 < line["data_wait_fraction"] < 1


def test_validation_does_not_depend_on_the_training(inputs: dict[str, Manifest], tmp_path: Path) -> None:  # noqa: F811
    """Two trainings whose weights are equal have the same validation loss, whatever batches they had on the way."""
    losses = []
    for number, batch_size in enumerate((8, 12)):
        (tmp_path / str(number)).mkdir()
        own = fresh(inputs, tmp_path / str(number))
        settings = {"learning_rate": 1e-30, "global_batch_size": batch_size, "num_steps": 2}
        manifest = run(training("decoder", own["curate"].root, validation=VALIDATED, **settings), own)
        losses.append(lines_of(manifest)[-1]["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_grid_of_samples_is_published(inputs: dict[str, Manifest], tmp_path: Path) -> None:  # noqa: F811
    own = fresh(inputs, tmp_path)
    samples = SamplesConfig(every_steps=3, num_samples=2, steps=2)
    manifest = run(training("decoder", own["curate"].root, validation=VALIDATED, samples=samples), own)
    folder = Path(manifest.root) / "decoder" / "shards" / manifest.records[0].shard_id / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003.png", "step-000006.png"]
    pixels = np.asarray(Image.open(folder / "step-000006.png"))
    assert pixels.std() > 1, "there is something in it"


def test_a_prior_tells_how_close_it_comes(inputs: dict[str, Manifest], tmp_path: Path) -> None:  # noqa: F811
    own = fresh(inputs, tmp_path)
    samples = SamplesConfig(every_steps=6, num_samples=4, steps=2)
    manifest = run(training("prior", own["curate"].root, validation=VALIDATED, samples=samples), own)
    last = lines_of(manifest)[-1]
    assert all(-1 <= last[f"sample_cosine_{name}"] <= 1 for name in ("image", "text", "true"))


def test_early_stop_exports_the_best_step(inputs: dict[str, Manifest], tmp_path: Path) -> None:  # noqa: F811
    """A learning rate that ruins the model: validation gets worse, the training ends, and the best step is exported."""
    own = fresh(inputs, tmp_path)
    validation = dataclasses.replace(VALIDATED, every_steps=1, weights="raw", early_stop_patience=2)
    settings = {"num_steps": 40, "learning_rate": 0.5, "checkpoint_every_steps": 100, "ema_decay": 0.0}
    stage = training("decoder", own["curate"].root, validation=validation, **settings)
    manifest = run(stage, own)
    losses = {line["step"]: line["validation_raw_loss"] for line in lines_of(manifest)}
    best = min(losses, key=lambda step: losses[step])
    record = manifest.records[0]
    assert max(losses) < 40 and record.metrics["exported_step"] == best < max(losses)
    folder = Path(manifest.root) / "decoder" / "shards" / record.shard_id
    shapes = {name: param.shape for name, param in weights_of(manifest).items()}
    kept = CheckpointFolder(str(folder), 2).weights(int(best), shapes)
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights_of(manifest).items())


def test_a_best_step_without_a_checkpoint_is_not_exported(
    inputs: dict[str, Manifest],  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    validation = dataclasses.replace(VALIDATED, every_steps=1, weights="raw", early_stop_patience=2)
    settings = {"num_steps": 40, "learning_rate": 0.5, "checkpoint_every_steps": 100, "ema_decay": 0.0}
    best = 0
    for name in ("undisturbed", "obstructed"):
        (tmp_path / name).mkdir()
        own = fresh(inputs, tmp_path / name)
        stage = training("decoder", own["curate"].root, validation=validation, **settings)
        folder = Path(stage.root) / "decoder" / "shards" / stage.plan(needed(stage, own))[0].id
        if best:
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints" / f"step-{best:06d}").write_text("in the way")
        manifest = run(stage, own)
        best = best or int(manifest.records[0].metrics["exported_step"])
    assert f"the checkpoint of step {best} is not written" in caplog.text
    assert [line["step"] for line in lines_of(manifest) if line.get("lost_best_step") == best] == [best + 1]
    others = {line["step"]: line["validation_raw_loss"] for line in lines_of(manifest) if line["step"] != best}
    exported = manifest.records[0].metrics["exported_step"]
    assert exported == min(others, key=lambda step: others[step]) and max(others) < 40
    # The same once more from the lines alone.
    folder.with_suffix(".json").unlink()
    Path(manifest.uri).unlink()
    assert run(stage, own).records[0].metrics["exported_step"] == exported


def test_a_resumed_training_stops_at_the_same_step(inputs: dict[str, Manifest], tmp_path: Path) -> None:  # noqa: F811
    validation = dataclasses.replace(VALIDATED, every_steps=1, weights="raw", early_stop_patience=3)
    settings = {"num_steps": 40, "learning_rate": 0.5, "checkpoint_every_steps": 2, "checkpoint_in_background": False}
    found = []
    for stops in (False, True):
        (tmp_path / str(stops)).mkdir()
        own = fresh(inputs, tmp_path / str(stops))
        stage = training("decoder", own["curate"].root, validation=validation, **settings)
        if stops:
            asked = iter([False, False, True])
            shard = stage.plan(needed(stage, own))[0]
            process: Any = stage.process
            with contextlib.suppress(TrainingStoppedError):
                process(shard, f"{stage.root}/decoder/shards", should_stop=lambda asked=asked: next(asked))
        manifest = run(stage, own)
        found.append(
            (manifest.records[0].metrics["exported_step"], lines_of(manifest)[-1]["step"], weights_of(manifest))
        )
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(found[0][2][name], found[1][2][name]) for name in found[0][2])


@pytest.mark.parametrize("sizes", [(5, 5), (100, 1, 50), (1,) * 40])
def test_held_out_samples_come_from_all_over(sizes: tuple[int, ...]) -> None:
    total = sum(sizes)
    counts = held_out_counts(sizes, 5)
    assert sum(counts) == 5 and all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert held_out_counts(sizes, 0) == [0] * len(sizes)
    with pytest.raises(InputError, match="cannot be held out"):
        held_out_counts(sizes, total)


def _batch(name: str, model: nn.Module) -> Mapping[str, Tensor]:
    shapes = example_batch(TRAININGS[name][1].model)
    if isinstance(model, ARPrior):
        edges, dots = torch.linspace(-1, 1, 5).repeat(6, 1), torch.linspace(-1, 1, 4)
        model.set_pca(mean=torch.zeros(16), axes=torch.eye(6, 16), edges=edges, dot_edges=dots)
    return {
        key: torch.ones(value.shape, dtype=value.dtype) if key == "tokens" else torch.rand(value.shape)
        for key, value in shapes.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_a_real_step(name: str) -> None:
    """Counted on shapes alone, they are what the counter finds on numbers."""
    model = build(TRAININGS[name][1].model)
    batch = _batch(name, model)
    counted = flops_per_sample(model, model_loss, batch)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model_loss(model, batch, SampleRandom(0, 0, [0]))[0].backward()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02) and counted > 1000


def test_peaks_are_known_or_said_to_be_unknown() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(989, rel=0.01)
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "bf16") == pytest.approx(312)
    assert peak_tflops("Some card of 2031", "bf16") is None


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_schedules(schedule: Any) -> None:
    config = TrainingConfig(
        num_steps=100,
        warmup_steps=10,
        learning_rate=2.0,
        learning_rate_schedule=schedule,
        final_learning_rate_fraction=0.1,
    )
    rates = [learning_rate_at(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    falls = [a - b for a, b in pairwise(rates[10:])]
    assert all(fall >= -1e-12 for fall in falls)
    if schedule == "constant":
        assert set(rates[10:]) == {2.0}
    else:
        assert rates[10] == pytest.approx(2.0, rel=0.02) and 0.2 <= rates[-1] <= 0.3
    if schedule == "wsd":
        assert set(rates[10:80]) == {2.0}


def test_tensorboard_shows_the_grid(inputs: dict[str, Manifest], tmp_path: Path) -> None:  # noqa: F811
    own = fresh(inputs, tmp_path)
    samples = SamplesConfig(every_steps=6, num_samples=2, steps=2)
    stage = training("upsampler_256", own["curate"].root, validation=VALIDATED, samples=samples, tensorboard=True)
    manifest = run(stage, own)
    folder = Path(manifest.root) / "upsampler_256" / "shards" / manifest.records[0].shard_id
    (events,) = (folder / "tensorboard").glob("events.*")
    assert b"samples" in events.read_bytes()
    picture = Image.open(io.BytesIO((folder / "samples" / "step-000006.png").read_bytes()))
    assert picture.info["step"] == "6"
