"""Randomness that is a function of position, never of history.

Every random number of a training step is keyed by (seed, step, tag, global sample index). A sample therefore meets the
same noise, timestep and dropout in step k whether one rank or sixty-four share the batch, and whether the run was
resumed or never stopped. The counter-based Philox generator makes this cheap: its 128-bit key is
(hash of seed, step and tag | sample index), so two samples can never share a stream within a step.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_UINT64_MASK = (1 << 64) - 1


class SampleRandom:
    """The random numbers of one optimizer step, drawn per sample.

    A tag names a purpose (``"noise"``, ``"timestep"``). Asking twice for one tag gives the same numbers; different tags
    are independent.

    Args:
        seed: the run's seed, any integer.
        step: optimizer step, from 0.
        indices: global sample index of each row of the batch; its length is the batch size B.
        device: where the tensors are returned. Numbers are drawn on the CPU, so they do not depend on the device.
    """

    def __init__(self, seed: int, step: int, indices: Sequence[int], device: torch.device | str = "cpu") -> None:
        if step < 0:
            raise ValueError(f"SampleRandom: step is {step}; give the optimizer step, counted from 0")
        self.seed = int(seed)
        self.step = int(step)
        self.indices = tuple(int(index) for index in indices)
        if any(index < 0 for index in self.indices):
            raise ValueError(f"SampleRandom: indices hold {min(self.indices)}; give global sample indices, from 0")
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.indices)

    def normal(self, tag: str, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal noise, float32 ``(B, *shape)``."""
        out = np.empty((len(self.indices), *shape), dtype=np.float32)
        for row, generator in zip(out, self.generator(tag), strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(out).to(self.device)

    def uniform(self, tag: str) -> Tensor:
        """Draw one number per sample, uniform in [0, 1), float32 ``(B,)``."""
        return torch.from_numpy(self._uniform(tag).astype(np.float32)).to(self.device)

    def integers(self, tag: str, low: int, high: int) -> Tensor:
        """Draw one integer per sample, uniform in [low, high), int64 ``(B,)``.

        Raises:
            ValueError: if the range is empty.
        """
        if high <= low:
            raise ValueError(f"SampleRandom.integers: the range [{low}, {high}) of {tag!r} is empty; raise high")
        values = [int(generator.integers(low, high)) for generator in self.generator(tag)]
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def bernoulli(self, tag: str, p: float) -> Tensor:
        """Draw one coin per sample that is True with probability ``p``, bool ``(B,)``.

        Raises:
            ValueError: if ``p`` is not a probability.
        """
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"SampleRandom.bernoulli: p of {tag!r} is {p}; give a probability in [0, 1]")
        return torch.from_numpy(self._uniform(tag) < p).to(self.device)

    def generator(self, tag: str) -> list[np.random.Generator]:
        """Return one fresh numpy generator per sample, for crops and degradations."""
        stream = self._stream(tag)
        return [_philox(stream, index) for index in self.indices]

    def _uniform(self, tag: str) -> np.ndarray:
        """Draw one float64 per sample in [0, 1); kept in float64 so that p = 1 - 1e-9 is not rounded to a certainty."""
        return np.array([generator.random() for generator in self.generator(tag)], dtype=np.float64)

    def _stream(self, tag: str) -> int:
        """Hash (seed, step, tag) to the 64-bit half of the key that all samples of the step share."""
        text = f"{self.seed}/{self.step}/{tag}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class _NoEntropy(np.random.bit_generator.ISeedSequence):
    """A seed sequence that only hands the key on: numpy would otherwise read OS entropy for every generator."""

    def __init__(self, key: np.ndarray) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:  # numpy's interface
        return self._key[:n_words]


def _philox(stream: int, index: int) -> np.random.Generator:
    """Return the generator whose Philox key is (stream, index) and whose counter is 0."""
    key = np.array([stream & _UINT64_MASK, index & _UINT64_MASK], dtype=np.uint64)
    # numpy accepts any ISeedSequence; its type stubs name only SeedSequence.
    return np.random.Generator(np.random.Philox(seed=_NoEntropy(key)))  # type: ignore[arg-type]
