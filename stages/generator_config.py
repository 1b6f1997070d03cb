"""Settings of the trainings of the four generators: the prior, the decoder and the two upsamplers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from stages.base import setting
from stages.mixture import shares_of
from stages.other_datasets import OtherDataset
from stages.training_config import TrainingConfig
from stages.warm_start import InitFrom
from unclip_models.settings import ARPriorConfig, DecoderConfig, DiffusionPriorConfig, UpsamplerConfig


@dataclass(frozen=True, kw_only=True)
class GeneratorTraining(TrainingConfig):
    """What the trainings of the four models have beside the settings of every training."""

    datasets: tuple[OtherDataset, ...] = setting((), "further curated sets, mixed in by weight")
    init_from: InitFrom | None = setting(None, "weights to start from; null: random ones")
    frozen: tuple[str, ...] = setting((), "parameters to leave as they are: patterns such as `text_encoder.*`")

    def __post_init__(self) -> None:
        super().__post_init__()
        shares_of([other.weight for other in self.datasets], "datasets")
        if self.frozen and self.init_from is None:
            raise ValueError("frozen: without init_from, random weights would stay random; name weights to start from")


@dataclass(frozen=True, kw_only=True)
class PriorTraining(GeneratorTraining):
    """The prior: caption -> image embedding (unCLIP, section 2.2)."""

    model: DiffusionPriorConfig | ARPriorConfig = setting(help="the prior's size; `kind` says which of the two")


@dataclass(frozen=True, kw_only=True)
class DecoderTraining(GeneratorTraining):
    """The decoder: image embedding and caption -> small image (unCLIP, section 2.1)."""

    model: DecoderConfig = setting(help="the decoder's size and conditioning")


@dataclass(frozen=True, kw_only=True)
class UpsamplerTraining(GeneratorTraining):
    """An upsampler: small image -> larger image (unCLIP, section 2.1)."""

    model: UpsamplerConfig = setting(help="the upsampler's size and degradation")


TrainingC = TypeVar("TrainingC", PriorTraining, DecoderTraining, UpsamplerTraining)
