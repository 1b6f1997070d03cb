"""What the ranks of a training take, from its config alone."""

from __future__ import annotations

import torch

from cluster.memory import RankMemory, TrainingShape, shape_of, states_and_passing
from stages.engine_settings import EngineSettings
from stages.example_batch import example_batch
from stages.generator_config import GeneratorTraining
from stages.training import model_loss
from stages.training_config import engine_settings
from stages.warm_start import frozen_names
from unclip_models.ar_prior import ARPrior
from unclip_models.checkpoint import build


class RankMemories:
    """Estimates of one training in several ways; every size of micro batch is rehearsed once, which takes seconds."""

    def __init__(self) -> None:
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
            self._shapes[size] = _training_shape(config, settings)
        return states_and_passing(settings, config.num_ranks, self._shapes[size], plain=config.engine == "torch")


def rank_memory(config: GeneratorTraining) -> RankMemory:
    """Estimate a training's ranks; rehearses one micro batch.

    Args:
        config: prior, decoder or upsampler.
    """
    return RankMemories().of(config)


def _training_shape(config: GeneratorTraining, settings: EngineSettings) -> TrainingShape:
    """Build a training's model without content, and rehearse a micro batch."""
    with torch.device("meta"):
        model = build(config.model)  # type: ignore[attr-defined]
    if isinstance(model, ARPrior):
        model.assume_pca()
    frozen = set(frozen_names([name for name, _ in model.named_parameters()], config.frozen, "frozen"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    return shape_of(model, model_loss, example_batch(config.model), settings)  # type: ignore[attr-defined]
