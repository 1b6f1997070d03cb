"""Settings of what a training is looked at with: validation, and samples drawn on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stages.base import refuse_below, setting
from stages.other_datasets import CuratedSet

LOSS = "validation_loss"
RAW_LOSS = "validation_raw_loss"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation on samples that are held out of the training."""

    num_samples: int = setting(0, "samples held out of the training, the same for every model of a run; 0: none")
    dataset: CuratedSet | None = setting(
        None,
        "take them from this curated set instead: a yardstick that is the same for all versions; null: hold out",
        affects="nothing",
    )
    every_steps: int = setting(1000, "steps between validations; 0: never", affects="nothing")
    weights: Literal["averaged", "raw", "both"] = setting(
        "averaged",
        "which weights are validated: the moving average (what is exported), the raw ones",
        affects="nothing",
    )
    timesteps_per_sample: int = setting(4, "timesteps at which a diffusion model meets each sample", affects="nothing")
    seed: int = setting(0, "of the noise; keep it, to compare losses across runs", affects="nothing")
    early_stop_patience: int | None = setting(
        None, "end the training after so many validations without improvement and export the best step; null: never"
    )
    early_stop_min_delta: float = setting(0.0, "by how much the loss must fall to count as an improvement")

    def __post_init__(self) -> None:
        refuse_below(self, 0, "num_samples", "every_steps")
        refuse_below(self, 1, "timesteps_per_sample")
        if self.dataset is not None and not self.num_samples:
            raise ValueError("dataset: num_samples is 0, none of it is looked at; say how many, or write null")
        if self.early_stop_min_delta < 0:
            raise ValueError(f"early_stop_min_delta: {self.early_stop_min_delta:g} is negative; write 0 or more")
        if self.early_stop_patience is None:
            return
        if self.early_stop_patience < 1:
            raise ValueError(
                f"early_stop_patience: {self.early_stop_patience} is below 1; write null for no early stop"
            )
        if not self.is_on:
            raise ValueError(
                "early_stop_patience: needs validations; set num_samples and every_steps, or write null for none"
            )

    @property
    def is_on(self) -> bool:
        """Whether validations take place."""
        return self.num_samples > 0 and self.every_steps > 0

    @property
    def judged(self) -> str:
        """The number that early stopping looks at: of the averaged weights, if those are validated."""
        return RAW_LOSS if self.weights == "raw" else LOSS


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Samples drawn during a training, of the held-out ones."""

    every_steps: int = setting(0, "steps between grids of samples; 0: none; needs validation.num_samples")
    num_samples: int = setting(8, "samples in a grid")
    steps: int = setting(25, "sampling steps of a diffusion model (DDIM)")
    guidance_scale: float = setting(1.0, "classifier-free guidance of prior and decoder; 1: none")

    def __post_init__(self) -> None:
        refuse_below(self, 0, "every_steps")
        refuse_below(self, 1, "num_samples", "steps")
