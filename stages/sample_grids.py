"""What a model makes while it trains: a fixed few held-out samples, drawn by the averaged weights.

A decoder draws from the true image embeddings and captions, an upsampler from the shrunk true images; both give a grid
of pictures. A prior gives numbers: how close its embeddings are to the true ones and to the captions. Noise is a
function of the validation seed and the sample, so two grids differ by the model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from stages.held_out import HeldOut
from stages.pictures import Pixels, contact_sheet
from stages.validation_config import SamplesConfig
from unclip_models.ar_prior import ARPrior
from unclip_models.clip_text import features_of
from unclip_models.decoder import Decoder
from unclip_models.degradation import downsample
from unclip_models.prior import DiffusionPrior
from unclip_models.upsampler import Upsampler

_TILE_PX = (64, 256)  # smaller tiles are enlarged, larger ones shrunk
_PX_AT_ONCE = 256 * 256  # of images larger than this, one is drawn at a time


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        numbers: of a prior: ``sample_cosine_image``, ``sample_cosine_text`` and, for comparison,
            ``sample_cosine_true``: of the true image embedding with the caption.
        picture: of the others, uint8 ``(H, W, 3)``: a column per sample; the true image over the drawn one, or small,
            drawn and true image.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    picture: Pixels | None = None


class Painter:
    """Draws the samples of one training.

    Args:
        config: the settings.
        held_out: where the samples are from.
        seed: of the noise.
        complete: adds to a batch what the loss function would add, such as the CLIP's text.
    """

    def __init__(
        self,
        config: SamplesConfig,
        held_out: HeldOut,
        seed: int,
        complete: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda batch: batch,
    ) -> None:
        self._config = config
        self._held_out = held_out
        self._seed = seed
        self._complete = complete
        self._loaded: tuple[Mapping[str, Tensor], Sequence[int]] | None = None

    def __call__(self, model: nn.Module, device: torch.device) -> Drawn:
        """Draw with a model in evaluation mode.

        Raises:
            TypeError: for a model that draws nothing.
        """
        batch, indices = self._batch(device)
        generators = [torch.Generator().manual_seed((self._seed + index) % (1 << 63)) for index in indices]
        drawn = draw(model, batch, self._config, generators)
        if isinstance(model, DiffusionPrior | ARPrior):
            return Drawn(numbers=_cosines(batch, drawn.float()))
        if isinstance(model, Upsampler):
            return Drawn(picture=_grid(_shrunk(model, batch), drawn, batch["image"]))
        return Drawn(picture=_grid(batch["image"], drawn))

    def _batch(self, device: torch.device) -> tuple[Mapping[str, Tensor], Sequence[int]]:
        if self._loaded is None:
            count = min(self._config.num_samples, len(self._held_out))
            batch = self._held_out.load(0, count, whole=True)
            self._loaded = self._complete(batch.part(0, count, device)), batch.indices
        return self._loaded


def draw(
    model: nn.Module, batch: Mapping[str, Tensor], config: SamplesConfig, generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw one sample of every row of a batch.

    Args:
        model: in evaluation mode.
        batch: whole held-out samples, on the model's device.
        config: the settings.
        generators: one per row, of the noise.

    Returns:
        Image embeddings ``(N, D)`` of a prior, images ``(N, 3, s, s)`` in [-1, 1] of the others.

    Raises:
        TypeError: for a model that draws nothing.
    """
    if isinstance(model, DiffusionPrior | ARPrior):
        options: dict[str, Any] = {"steps": _steps(model, config)} if isinstance(model, DiffusionPrior) else {}
        return model.sample(
            batch["tokens"],
            batch["text_embedding"],
            **options,
            guidance_scale=config.guidance_scale,
            generators=generators,
            num_candidates=1,
            text_sequence=batch.get("text_sequence"),
        )
    if isinstance(model, Decoder):
        return model.sample(
            batch[model.config.condition_on],
            batch["tokens"],
            steps=_steps(model, config),
            guidance_scale=config.guidance_scale,
            sampler="ddim",
            generators=generators,
            clip_text=features_of(batch),
        )
    if isinstance(model, Upsampler):
        small, steps = _shrunk(model, batch), _steps(model, config)
        size = len(small) if model.config.image_size**2 <= _PX_AT_ONCE else 1
        parts = (slice(i, i + size) for i in range(0, len(small), size))
        return torch.cat([model.sample(small[part], steps=steps, generators=generators[part]) for part in parts])
    raise TypeError(f"{type(model).__name__} draws nothing")


def _steps(model: DiffusionPrior | Decoder | Upsampler, config: SamplesConfig) -> int:
    return min(config.steps, model.diffusion.num_timesteps)


def _shrunk(model: Upsampler, batch: Mapping[str, Tensor]) -> Tensor:
    return downsample(batch["image"], model.config.input_size)


def _cosines(batch: Mapping[str, Tensor], drawn: Tensor) -> dict[str, float]:
    true, text = batch["image_embedding"], batch["text_embedding"]
    pairs = {"image": (drawn, true), "text": (drawn, text), "true": (true, text)}
    return {f"sample_cosine_{name}": float(F.cosine_similarity(a, b).mean()) for name, (a, b) in pairs.items()}


def _grid(*rows: Tensor) -> Pixels:
    """Lay images ``(N, 3, s, s)`` in [-1, 1] out, one row per argument."""
    side = min(max(_TILE_PX[0], *(row.shape[-1] for row in rows)), _TILE_PX[1])
    tiles = [_tile(image, side) for row in rows for image in row.float().cpu()]
    return contact_sheet(tiles, columns=len(rows[0]))


def _tile(image: Tensor, side_px: int) -> npt.NDArray[np.uint8]:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()  # (s, s, 3)
    how = Image.Resampling.NEAREST if pixels.shape[0] < side_px else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize((side_px, side_px), how))
