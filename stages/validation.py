"""Validation: the loss on held-out samples, with everything random in it fixed.

What a sample meets (timesteps, noise, dropped captions, crop) is a function of the validation seed and its key.
Every sample is measured once in each of ``timesteps_per_sample`` equal parts of [0, T). The result is a function of the
weights, the held-out samples and the seed: two runs, two world sizes and two moments of one training can be compared,
and a difference is the model's. Validation draws nothing from global generators and leaves the weights alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.dataset import Batch
from stages.engine import Engine, MicroBatch
from stages.held_out import HeldOut
from stages.metrics import TIMESTEP_TERMS, means_of, term_sums
from stages.validation_config import ValidationConfig
from unclip_models.randomness import SampleRandom


@dataclass
class Validation:
    """Validates one training's model; every rank has one, with its share of the samples.

    Attributes:
        config: the settings.
        held_out: the samples.
        num_timesteps: of the diffusion; None for models without.
        micro_batch_size: samples per forward pass and rank.
    """

    config: ValidationConfig
    held_out: HeldOut
    num_timesteps: int | None
    micro_batch_size: int
    _own: Batch | None = field(default=None, init=False)

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Measure the losses (collective).

        Returns:
            ``validation_loss`` with its terms and quartiles for the averaged weights, ``validation_raw_loss`` and so on
            for the raw ones; ``validation_s``.
        """
        started_at = time.monotonic()
        numbers: dict[str, float] = {}
        for prefix, averaged in (("validation_", True), ("validation_raw_", False)):
            if self.config.weights in ("both", "averaged" if averaged else "raw"):
                with engine.evaluating(averaged=averaged):
                    sums = self._sums(engine)
                totals = engine.total(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
                means = means_of(dict(zip(sums, totals, strict=True)))
                numbers |= {f"{prefix}{name}": value for name, value in sorted(means.items())}
        return {**numbers, "validation_s": time.monotonic() - started_at}

    def _sums(self, engine: Engine) -> dict[str, float]:
        """Sum losses and terms over this rank's share."""
        num_samples = len(self.held_out)
        first, last = (rank * num_samples // engine.world_size for rank in (engine.rank, engine.rank + 1))
        if self._own is None:  # a rank without a share keeps one sample, to take part with
            self._own = self.held_out.load(min(first, num_samples - 1), max(last, min(first, num_samples - 1) + 1))
        loss_sum, terms = 0.0, []
        for micro_batch in self._micro_batches(self._own, engine):
            loss, per_sample = engine.loss_of(micro_batch)
            loss_sum += float(loss) * len(micro_batch[1])
            terms.append(per_sample)
        sums = {"loss/sum": loss_sum, "loss/count": float(self.num_passes * len(self._own.indices))}
        sums |= term_sums(terms, self.num_timesteps)
        # Where weights are partitioned, all ranks go through the network equally often.
        most = max(-(-num_samples // engine.world_size), 1)
        missing = self._num_micro_batches(most) - self._num_micro_batches(len(self._own.indices))
        for _ in range(missing if engine.partitioned else 0):
            engine.loss_of(micro_batch)
        return sums if last > first else dict.fromkeys(sums, 0.0)

    @property
    def num_passes(self) -> int:
        """How often each sample is measured."""
        return self.config.timesteps_per_sample if self.num_timesteps else 1

    def _num_micro_batches(self, num_samples: int) -> int:
        return self.num_passes * -(-num_samples // self.micro_batch_size)

    def _micro_batches(self, batch: Batch, engine: Engine) -> Iterator[MicroBatch]:
        for stratum in range(self.num_passes):
            for first in range(0, len(batch.indices), self.micro_batch_size):
                indices = batch.indices[first : first + self.micro_batch_size]
                part = batch.part(first, first + len(indices), engine.device)
                yield part, StratifiedRandom(self.config.seed, stratum, self.num_passes, indices, engine.device)


class StratifiedRandom(SampleRandom):
    """Randomness of one pass over held-out samples, whose timesteps lie in one of several equal parts of their range.

    Args:
        seed: the validation's.
        stratum: number of the pass, and of the part that timesteps lie in.
        num_strata: parts.
        indices: one number per sample, of its key.
        device: where tensors are returned.
    """

    def __init__(
        self, seed: int, stratum: int, num_strata: int, indices: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(seed, stratum, indices, device)
        self._num_strata = num_strata

    def integers(self, tag: str, low: int, high: int) -> Tensor:
        """See ``SampleRandom.integers``; timesteps lie in the pass's part of ``[low, high)``."""
        if tag not in TIMESTEP_TERMS:
            return super().integers(tag, low, high)
        fraction = (self.step + torch.from_numpy(self._uniform(tag))) / self._num_strata
        return (low + (fraction * (high - low)).long()).clamp(max=high - 1).to(self.device)
