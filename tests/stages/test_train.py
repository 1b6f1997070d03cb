"""The four trainings as stages: what they plan, refuse and publish."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from stages import storage
from stages.base import Stage
from stages.errors import ConfigError, InputError, IntegrityError
from stages.executor import ClusterConfig, LocalExecutor
from stages.generator_config import DecoderTraining, PriorTraining, UpsamplerTraining
from stages.manifest import Manifest
from stages.metrics import read_metrics
from stages.runner import run_stage
from stages.train import Decoder, Prior, Upsampler256, Upsampler1024
from tests.stages.training_data import DIM, manifests, put, write_dataset
from unclip_models.ar_prior import ARPrior
from unclip_models.checkpoint import load_model
from unclip_models.clip import ClipModel
from unclip_models.prior import DiffusionPrior
from unclip_models.randomness import SampleRandom
from unclip_models.settings import (
    ARPriorConfig,
    ClipModelConfig,
    ClipTextConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    TextEncoderConfig,
    UNetConfig,
    UpsamplerConfig,
)

COMMON: dict[str, Any] = {"num_steps": 3, "global_batch_size": 8, "num_streams": 4, "tensorboard": False}
TEXT = TextEncoderConfig(context_length=8, width=16, layers=1, heads=2)
SMALL: dict[str, Any] = {"embedding_dim": DIM, "text": TEXT, "width": 16, "layers": 1, "heads": 2}
PRIOR = PriorTraining(model=DiffusionPriorConfig(**SMALL), **COMMON)
AR_PRIOR = PriorTraining(model=ARPriorConfig(num_codes=6, num_buckets=4, num_dot_buckets=3, **SMALL), **COMMON)
UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4)
DECODER = DecoderTraining(
    model=DecoderConfig(
        image_size=8,
        embedding_dim=DIM,
        text=TEXT,
        unet=dataclasses.replace(UNET, attention_resolutions=(4,), head_channels=8),
    ),
    **COMMON,
)
UPSAMPLER = UpsamplerTraining(
    model=UpsamplerConfig(image_size=16, input_size=8, crop_fraction=0.5, unet=UNET), **COMMON
)
CLIP_TEXT = ClipTextConfig(context_length=8, width=32)
KARLO_PRIOR = dataclasses.replace(
    PRIOR, model=dataclasses.replace(PRIOR.model, text=CLIP_TEXT, embedding_scaling="mean_std")
)
KARLO_DECODER = dataclasses.replace(DECODER, model=dataclasses.replace(DECODER.model, text=CLIP_TEXT, context_width=24))
TEXT_DECODER = dataclasses.replace(DECODER, model=dataclasses.replace(DECODER.model, condition_on="text_embedding"))
TRAININGS = {
    "prior": (Prior, PRIOR),
    "karlo_prior": (Prior, KARLO_PRIOR),
    "karlo_decoder": (Decoder, KARLO_DECODER),
    "text_decoder": (Decoder, TEXT_DECODER),
    "ar_prior": (Prior, AR_PRIOR),
    "decoder": (Decoder, DECODER),
    "upsampler_256": (Upsampler256, UPSAMPLER),
    "upsampler_1024": (Upsampler1024, UPSAMPLER),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """A data set with its manifests, and the principal axes of nothing in particular."""
    root = str(tmp_path_factory.mktemp("store"))
    found = manifests(root, write_dataset(root, (12, 20)))
    k = 8
    arrays = {
        "mean": np.zeros(DIM, dtype=np.float32),
        "std": np.full(DIM, 0.25, dtype=np.float32),
        "axes": np.eye(k, DIM, dtype=np.float32),
        "edges": np.tile(np.linspace(-1, 1, 5, dtype=np.float32), (k, 1)),
        "dot_edges": np.linspace(-1, 1, 4, dtype=np.float32),
    }
    file = put(root, "pca/pca.safetensors", safetensors.numpy.save(arrays))
    found["pca"] = dataclasses.replace(
        found["clip"], stage="pca", fingerprint="a" * 16, files={"pca": file}, metrics={"num_components": k}
    )
    clip = ClipModel.from_config(
        ClipModelConfig(embedding_dim=DIM, context_length=8, vision_layers=1, text_width=32, text_layers=1)
    )
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    clip.save(path)
    metrics = {"embedding_dim": DIM, "context_length": 8, "text_width": 32}
    weights = {"weights": put(root, "clip/clip.safetensors", path.read_bytes())}
    found["clip"] = dataclasses.replace(found["clip"], files=weights, metrics=metrics)
    return found


def needed(stage: Stage[Any], inputs: dict[str, Manifest]) -> dict[str, Manifest]:
    return {name: inputs[name] for name in stage.upstream}


@pytest.mark.parametrize("name", TRAININGS)
def test_each_trains_and_publishes_its_weights(name: str, inputs: dict[str, Manifest]) -> None:
    kind, config = TRAININGS[name]
    stage: Stage[Any] = kind(config, root=inputs["curate"].root, seed=3)
    own = needed(stage, inputs)
    fingerprint = stage.fingerprint({upstream: own[upstream].fingerprint for upstream in own})
    manifest = run_stage(stage, fingerprint, own, LocalExecutor(), ClusterConfig())
    record = manifest.records[0]
    assert record.num_in == record.num_kept == inputs["curate"].num_kept
    assert [line["step"] for line in read_metrics(record.files["metrics"].read(stage.root))] == [3]
    with storage.local_copy(stage.uri(record.files["weights"])) as path:
        model, metadata = load_model(path)
    assert metadata["stage"] == stage.name and metadata["steps"] == "3"
    assert record.metrics["num_parameters"] == sum(param.numel() for param in model.parameters())
    assert {"loss", "grad_norm", "samples_per_s"} <= record.metrics.keys()
    fresh = stage.build_model(stage.plan(own)[0])  # type: ignore[attr-defined]
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    if isinstance(model, ARPrior):
        assert torch.equal(model.pca_axes, torch.eye(6, DIM))
    if isinstance(model, DiffusionPrior):
        assert bool((model.gamma >= 0).all())  # measured, so that the paper's sampler works
    if name == "karlo_prior":
        assert torch.equal(model.scaling.std, torch.full((DIM,), 0.25))
    if name.startswith("karlo"):
        assert bool(model.text_encoder.null_tokens.any()) and bool(model.text_encoder.null_embedding.any())


@pytest.mark.parametrize("degradation", ["blur", "bsr_light"])
def test_an_upsampler_gets_its_pairs_from_the_stream(degradation: Any, inputs: dict[str, Manifest]) -> None:
    """The loss is that of pairs made within the step, to the last bit."""
    config = dataclasses.replace(UPSAMPLER, model=dataclasses.replace(UPSAMPLER.model, degradation=degradation))
    stage = Upsampler1024(config, root=inputs["curate"].root, seed=3)
    shard = stage.plan(needed(stage, inputs))[0]
    model, losses = stage.build_model(shard, None), []
    stream = stage._stream(shard, None)
    for prepare in (stream._prepare, None):
        stream._prepare = prepare
        with contextlib.closing(stream.batches(2)) as batches:
            batch = next(batches)
        assert ("low_res" in batch.tensors) == (prepare is not None)
        part = batch.part(0, 8, torch.device("cpu"))
        losses.append(model.loss(part, SampleRandom(3, 2, batch.indices))[0])  # type: ignore[operator]
    assert torch.equal(*losses)


def test_the_plan_is_pure_and_ignores_where_it_runs(inputs: dict[str, Manifest]) -> None:
    root = inputs["curate"].root
    elsewhere = dataclasses.replace(PRIOR, num_ranks=4, zero_stage=3, micro_batch_size=1, keep_last=9)
    ids = {Prior(config, root=root, seed=3).plan(inputs)[0].id for config in (PRIOR, PRIOR, elsewhere)}
    assert len(ids) == 1
    other = [
        Prior(dataclasses.replace(PRIOR, learning_rate=1.0), root=root, seed=3),
        Prior(PRIOR, root=root, seed=4),
    ]
    assert not ids & {stage.plan(inputs)[0].id for stage in other}


def test_a_model_that_does_not_fit_is_refused_before_training(inputs: dict[str, Manifest]) -> None:
    root = inputs["curate"].root
    wrong = dataclasses.replace(PRIOR, model=DiffusionPriorConfig(**(SMALL | {"embedding_dim": 32})))
    with pytest.raises(ConfigError, match=r"prior.model.embedding_dim: 32, but .* have 16 dimensions; write 16"):
        Prior(wrong, root=root).plan(inputs)
    other = dataclasses.replace(KARLO_DECODER.model, text=ClipTextConfig(context_length=8, width=48))
    with pytest.raises(
        ConfigError, match=r"decoder.model.text.width: 48, but the text tower .* has width 32; write 32"
    ):
        Decoder(dataclasses.replace(KARLO_DECODER, model=other), root=root).plan(inputs)
    raw = dataclasses.replace(PRIOR, model=dataclasses.replace(PRIOR.model, raw_embeddings=True))
    with pytest.raises(ConfigError, match=r"prior.model.raw_embeddings: true, but the embed stage stores"):
        Prior(raw, root=root).plan(inputs)
    many = dataclasses.replace(AR_PRIOR, model=dataclasses.replace(AR_PRIOR.model, num_codes=9))
    with pytest.raises(ConfigError, match=r"prior.model.num_codes: 9, but the pca stage kept 8 components"):
        Prior(many, root=root).plan(inputs)


def test_other_buckets_than_those_of_the_pca_are_refused(inputs: dict[str, Manifest], tmp_path: Path) -> None:
    wrong = dataclasses.replace(AR_PRIOR, model=dataclasses.replace(AR_PRIOR.model, num_buckets=5))
    stage = Prior(wrong, root=inputs["curate"].root)
    with pytest.raises(IntegrityError, match=r"does not fit prior\.model .*num_buckets"):
        stage.process(stage.plan(inputs)[0], str(tmp_path))


def test_too_few_samples_are_refused(inputs: dict[str, Manifest]) -> None:
    config = dataclasses.replace(PRIOR, num_streams=32, global_batch_size=32)
    with pytest.raises(InputError, match=r"curate kept 24 samples to train on, fewer than prior\.num_streams: 32"):
        Prior(config, root=inputs["curate"].root).plan(inputs)


def test_shards_without_samples_are_left_out(inputs: dict[str, Manifest]) -> None:
    empty = dataclasses.replace(inputs["curate"].records[0], shard_id="0" * 16, num_in=0, num_kept=0)
    more = inputs | {"curate": dataclasses.replace(inputs["curate"], records=[empty, *inputs["curate"].records])}
    plans = [Prior(PRIOR, root=inputs["curate"].root).plan(i)[0] for i in (inputs, more)]
    assert plans[0].id == plans[1].id
    assert json.dumps(plans[0].params["num_kept"]) == "[9, 15]"
