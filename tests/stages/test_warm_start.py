"""Warm starts and frozen parts: what the training begins with, what it leaves alone, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.checkpoints import CheckpointFolder
from stages.config import load_config
from stages.engine import TorchEngine
from stages.errors import ConfigError, InputError, IntegrityError
from stages.executor import ClusterConfig, LocalExecutor
from stages.generator_config import PriorTraining
from stages.manifest import Manifest
from stages.metrics import read_metrics
from stages.runner import run_stage
from stages.train import Decoder, Prior
from stages.training import Trained, TrainingStoppedError, train
from stages.training_config import TrainingConfig
from stages.warm_start import InitFrom, freeze, frozen_names
from stages.weights import weights_of
from tests.stages.state_files import parameters_of
from tests.stages.test_other_datasets import ATTENDING, DECODER, publish
from tests.stages.training_data import DIM, TinyModel, VectorStream
from unclip_models.checkpoint import load_model
from unclip_models.randomness import SampleRandom
from unclip_models.settings import DiffusionPriorConfig

PRIOR = PriorTraining(
    model=DiffusionPriorConfig(embedding_dim=DIM, text=DECODER.model.text, width=16, layers=1, heads=2),
    num_steps=3,
    global_batch_size=8,
    num_streams=4,
    tensorboard=False,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    return publish(str(tmp_path_factory.mktemp("store")), (12, 20))


def run(kind: Any, config: Any, inputs: dict[str, Manifest], root: str | None = None) -> Manifest:
    stage = kind(config, root=root or inputs["curate"].root, seed=3)
    own = {name: inputs[name] for name in stage.upstream}
    fingerprint = stage.fingerprint({name: own[name].fingerprint for name in own})
    return run_stage(stage, fingerprint, own, LocalExecutor(), ClusterConfig())


@pytest.fixture(scope="module")
def source(inputs: dict[str, Manifest]) -> Manifest:
    """A decoder that has learnt a little."""
    return run(Decoder, dataclasses.replace(DECODER, learning_rate=1e-2), inputs)


def tensors_of(manifest: Manifest) -> dict[str, torch.Tensor]:
    return load_model(Path(manifest.root) / weights_of(manifest).path)[0].state_dict()


def warm(config: Any, source: Manifest, **changes: Any) -> Any:
    init = InitFrom(root=source.root, fingerprint=source.fingerprint)
    return dataclasses.replace(config, init_from=init, **changes)


def test_the_first_loss_is_that_of_the_source(inputs: dict[str, Manifest], source: Manifest) -> None:
    config = warm(DECODER, source, num_steps=1, log_every_steps=1, seed=8)
    stage = Decoder(config, root=inputs["curate"].root, seed=3)
    shard = stage.plan(inputs)[0]
    batches = stage._stream(shard, None).batches(0)
    batch = next(batches)
    batches.close()
    model: Any = load_model(Path(source.root) / weights_of(source).path)[0].train()
    loss, _ = model.loss(batch.part(0, 8, torch.device("cpu")), SampleRandom(3, 0, batch.indices))
    record = run(Decoder, config, inputs).records[0]
    assert read_metrics(record.files["metrics"].read(source.root))[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    cold = run(Decoder, dataclasses.replace(config, init_from=None), inputs).records[0]
    assert read_metrics(cold.files["metrics"].read(source.root))[0]["loss"] != pytest.approx(loss.item(), rel=1e-3)


def test_frozen_parts_stay_bit_for_bit_and_the_model_is_whole(inputs: dict[str, Manifest], source: Manifest) -> None:
    config = warm(DECODER, source, frozen=("text_encoder.*", "unet.input*"), learning_rate=1e-2)
    before, after = tensors_of(source), tensors_of(run(Decoder, config, inputs))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    model = Decoder(config, root=source.root).fresh_model(Decoder(config, root=source.root).plan(inputs)[0])
    names = [name for name, _ in model.named_parameters()]
    frozen = set(frozen_names(names, config.frozen, "decoder.frozen"))
    assert frozen <= same and 0 < len(frozen) < len(names)
    assert [name for name in names if name in same - frozen] == []


def test_weights_count_by_content(inputs: dict[str, Manifest], source: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    shutil.copyfile(Path(source.root) / weights_of(source).path, file)

    def identity(config: Any) -> tuple[str, str]:
        stage = Decoder(config, root=inputs["curate"].root, seed=3)
        return stage.fingerprint(dict.fromkeys(stage.upstream, "f")), stage.plan(inputs)[0].id

    by_file = dataclasses.replace(DECODER, init_from=InitFrom(file=str(file)))
    assert identity(by_file) == identity(warm(DECODER, source))
    assert len({identity(c) for c in (DECODER, by_file, warm(DECODER, source, frozen=("unet.*",)))}) == 3
    stage = Decoder(by_file, root=inputs["curate"].root, seed=3)
    shard = stage.plan(inputs)[0]
    wanted = tensors_of(source)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in stage.build_model(shard).state_dict().items())
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match="the weights changed since this training was planned"):
        stage.build_model(shard)


def test_weights_of_another_shape_are_refused_with_the_difference(
    inputs: dict[str, Manifest], source: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    wide = dataclasses.replace(DECODER.model, unet=dataclasses.replace(ATTENDING, model_channels=16))
    stage = Decoder(warm(DECODER, source, model=wide), root=source.root)
    with pytest.raises(ConfigError, match=r"do not fit .*model.unet.model_channels: 8 there, 16 here"):
        stage.build_model(stage.plan(inputs)[0])
    other = dataclasses.replace(DECODER.model, caption_dropout=0.25)
    stage = Decoder(warm(DECODER, source, model=other), root=source.root)
    stage.build_model(stage.plan(inputs)[0])
    assert "trained with other settings: model.caption_dropout: 0.5 there, 0.25 here" in caplog.text
    init = InitFrom(root=source.root, stage="decoder", fingerprint=source.fingerprint)
    prior = Prior(dataclasses.replace(PRIOR, init_from=init), root=source.root)
    with pytest.raises(ConfigError, match="holds decoder, this section trains diffusion_prior"):
        prior.build_model(prior.plan(inputs)[0])


def test_what_is_not_there_is_refused(inputs: dict[str, Manifest], source: Manifest) -> None:
    for init, message in (
        (InitFrom(fingerprint="0" * 16), f"has no finished decoder stage '0+'; it has .*{source.fingerprint}"),
        (InitFrom(file="/nowhere.safetensors"), r"decoder.init_from.file: /nowhere.safetensors: no such file"),
    ):
        stage = Decoder(dataclasses.replace(DECODER, init_from=init), root=source.root)
        with pytest.raises(InputError, match=message):
            stage.plan(inputs)
    with pytest.raises(ValueError, match="name either a file, or the fingerprint"):
        InitFrom()
    with pytest.raises(ValueError, match="frozen: without init_from"):
        dataclasses.replace(DECODER, frozen=("unet.*",))


def test_patterns_that_name_nothing_or_everything_are_refused(inputs: dict[str, Manifest], source: Manifest) -> None:
    for frozen, message in (
        (("text_encodr.*",), r"decoder.frozen: 'text_encodr.\*' names no parameter; the closest are text_encoder"),
        (("*",), r"decoder.frozen: \* name all parameters; leave some to train"),
    ):
        with pytest.raises(ConfigError, match=message):
            Decoder(warm(DECODER, source, frozen=frozen), root=source.root).plan(inputs)
    with pytest.raises(ConfigError, match=r"'zzz' names no parameter; there are a\.\*, b\.\*"):
        frozen_names(["a.x", "b.y"], ["zzz"], "decoder.frozen")


def test_settings_come_from_the_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    base = Path(__file__).parents[2] / "configs/quickstart.yaml"
    path.write_text(
        f"extends: {base}\n"
        "decoder:\n"
        "  datasets: [{root: s3://bucket/other, fingerprint: 0123456789abcdef, weight: 0.25}]\n"
        "  init_from: {file: weights.safetensors}\n"
        "  frozen: ['text_encoder.*']\n"
    )
    config = load_config(path).decoder
    assert config.datasets[0].weight == 0.25 and config.init_from is not None and config.frozen == ("text_encoder.*",)
    with pytest.raises(ConfigError, match=r"decoder.datasets.0.weight: required, but not given"):
        load_config(path, ["decoder.datasets=[{fingerprint: x}]"])
    with pytest.raises(ConfigError, match=r"decoder.datasets: the weights add up to 2"):
        load_config(path, ["decoder.datasets=[{fingerprint: x, weight: 2.0}]"])
    with pytest.raises(ConfigError, match=r"decoder.init_from.fle: unknown key; did you mean 'decoder.init_from.file'"):
        load_config(path, ["decoder.init_from={fle: x}"])


CONFIG = TrainingConfig(
    num_steps=8, global_batch_size=8, num_streams=4, learning_rate=1e-2, checkpoint_every_steps=4, tensorboard=False
)


def train_frozen(folder: Path, stop_after: int = 99) -> tuple[nn.Module, Trained]:
    model, asked = TinyModel(dropout=0.2), itertools.count(1)
    freeze(model, ["body.0.*"], "tiny.frozen")
    options: dict[str, Any] = {"make_engine": TorchEngine, "seed": 5, "folder": str(folder), "place": "tiny"}
    return model, train(model, VectorStream(), CONFIG, should_stop=lambda: next(asked) == stop_after, **options)


def test_frozen_parts_are_not_in_checkpoints_and_resuming_is_exact(tmp_path: Path) -> None:
    model, straight = train_frozen(tmp_path / "straight")
    fresh = dict(TinyModel().named_parameters())
    assert straight.weights is not None
    assert straight.weights.keys() == {name for name in fresh if not name.startswith("body.0.")}
    for name, param in model.named_parameters():
        assert torch.equal(param, fresh[name]) == name.startswith("body.0.")
    with pytest.raises(TrainingStoppedError):
        train_frozen(tmp_path / "stopped", stop_after=5)
    _, resumed = train_frozen(tmp_path / "stopped")
    assert resumed.weights is not None
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in straight.weights.items())
    assert CheckpointFolder(str(tmp_path / "stopped"), 2).steps() == [8, 5]
    path = tmp_path / "stopped/checkpoints/step-000008/rank-0000.safetensors"
    assert parameters_of(path) == straight.weights.keys()
