"""What the ranks of a training take, from its config alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cluster.memory import RankMemory, TrainingShape, shape_of, states_and_passing
from stages.activation_memory import drawing_memory
from stages.clip import ClipConfig
from stages.engine_settings import EngineSettings
from stages.example_batch import example_batch
from stages.generator_config import GeneratorTraining
from stages.generator_training import reads_clip_text
from stages.sample_grids import draw
from stages.training import model_loss
from stages.training_config import engine_settings
from stages.warm_start import frozen_names
from unclip_models.ar_prior import ARPrior
from unclip_models.checkpoint import build
from unclip_models.clip import ClipModel
from unclip_models.open_clip_models import published_shape


class RankMemories:
    """Estimates of one training in several ways; every size of micro batch is rehearsed once, which takes seconds.

    Args:
        clip_text_bytes: of the CLIP that encodes captions on every rank, for models that read its text.
    """

    def __init__(self, clip_text_bytes: int = 0) -> None:
        self._clip_text_bytes = clip_text_bytes
        self._shapes: dict[int, TrainingShape] = {}

    def of(self, config: GeneratorTraining) -> RankMemory:
        """Estimate a rank.

        Args:
            config: the training, or the same one held in memory in another way.

        Raises:
            ConfigError: if its batch cannot be dealt to its ranks.
        """
        settings = engine_settings(config, config.num_ranks)
        size = settings.micro_batch_size
        if size not in self._shapes:
            beside = self._clip_text_bytes if reads_clip_text(_wanted(config)) else 0
            self._shapes[size] = _training_shape(config, settings, beside)
        return states_and_passing(settings, config.num_ranks, self._shapes[size], plain=config.engine == "torch")


def rank_memory(config: GeneratorTraining) -> RankMemory:
    """Estimate a training's ranks; rehearses one micro batch.

    Args:
        config: prior, decoder or upsampler.
    """
    return RankMemories().of(config)


def clip_text_bytes(config: ClipConfig) -> int:
    """Return the bytes of a CLIP's text tower; 0 where its shape is known to its weights only."""
    shape = config.model if config.kind == "train" else published_shape(config.name or "")
    if shape is None:
        return 0
    with torch.device("meta"):
        clip = ClipModel.from_config(shape).keep_text()
    return sum(tensor.nbytes for tensor in (*clip.parameters(), *clip.buffers()))


def _training_shape(config: GeneratorTraining, settings: EngineSettings, beside: int) -> TrainingShape:
    """Rehearse a micro batch, and the drawing of samples."""
    shape = shape_of(_empty_model(config), model_loss, example_batch(_wanted(config)), settings)
    drawing = _drawing(config, settings) if config.samples.every_steps else 0
    return dataclasses.replace(shape, fixed=shape.fixed + beside, drawing=drawing)


def _drawing(config: GeneratorTraining, settings: EngineSettings) -> int:
    """Rehearse the drawing of samples; two steps of a diffusion take what all of them do."""
    num = config.samples.num_samples
    samples = dataclasses.replace(config.samples, steps=min(config.samples.steps, 2))

    def look(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return draw(model, batch, samples, [torch.Generator() for _ in range(num)])

    batch = example_batch(_wanted(config), whole=True)
    return drawing_memory(look, _empty_model(config), batch, num=num, precision=settings.precision)


def _empty_model(config: GeneratorTraining) -> nn.Module:
    """Build a training's model without content; a rehearsal leaves things in it, so every one has its own."""
    with torch.device("meta"):
        model = build(_wanted(config))
    if isinstance(model, ARPrior):
        model.assume_pca()
    frozen = set(frozen_names([name for name, _ in model.named_parameters()], config.frozen, "frozen"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    return model


def _wanted(config: GeneratorTraining) -> Any:
    """Return the model's config, which every kind of training has."""
    return config.model  # type: ignore[attr-defined]
