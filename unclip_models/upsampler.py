"""An upsampler: a purely convolutional diffusion U-Net that enlarges an image (unCLIP, section 2.2).

It sees no caption and has no attention, so it is trained on random crops of a quarter of the side and applied at full
size. The low-resolution image, corrupted in training (``degradation.py``), is enlarged and joined to the noised image
by channel, as in ADM's upsamplers. Two options go beyond the paper: noise-conditioning augmentation of Ho et al. 2022
(cascaded diffusion, section 4), and sampling in overlapping tiles, which bounds the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from unclip_models.decoder import IMAGE_CHANNELS, run_image_sampler
from unclip_models.degradation import degrade, downsample
from unclip_models.diffusion import GaussianDiffusion, spaced_timesteps, timestep_embedding
from unclip_models.dropout import dropout_seeds
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import draw_noise
from unclip_models.sampling_settings import ImageSampler
from unclip_models.settings import UpsamplerConfig
from unclip_models.tiling import Tiling
from unclip_models.unet import UNet

# Noise levels in [0, 1) are embedded like the timesteps of a process of a thousand steps.
_LEVEL_SCALE = 1000.0


def training_sample(config: UpsamplerConfig, image: NDArray[np.uint8], random: SampleRandom) -> dict[str, Tensor]:
    """Make one sample's part of a batch ahead of the step, as a data loader's thread does.

    The result is, bit for bit, the sample's row of :meth:`Upsampler.training_pair`.

    Args:
        config: the upsampler's.
        image: uint8 ``(image_size, image_size, 3)``.
        random: the step's randomness, of this one sample.

    Returns:
        ``image`` uint8 ``(3, crop_px, crop_px)``, ``low_res`` float32 ``(3, crop_px / factor, crop_px / factor)``.

    Raises:
        ValueError: for an image of another shape.
    """
    side, crop_px = config.image_size, config.crop_px
    if image.shape != (side, side, IMAGE_CHANNELS):
        raise ValueError(f"upsampler: image of shape {image.shape}; it takes ({side}, {side}, 3)")
    (top, left), *_ = _crop_corners(config, random)
    pixels = image[top : top + crop_px, left : left + crop_px].copy()  # the whole image may be read-only, and is large
    crop = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, crop_px, crop_px)
    return {"image": crop, "low_res": _low_resolution(config, crop[None], random)[0]}


def _crop_corners(config: UpsamplerConfig, random: SampleRandom) -> list[tuple[int, int]]:
    """Draw top and left of every sample's crop."""
    num_places = config.image_size - config.crop_px + 1
    tops, lefts = (random.integers(tag, 0, num_places).tolist() for tag in ("crop_top", "crop_left"))
    return list(zip(tops, lefts, strict=True))


def _low_resolution(config: UpsamplerConfig, crops: Tensor, random: SampleRandom) -> Tensor:
    """Make the corrupted low-resolution versions of crops ``(B, 3, P, P)``, uint8 or in [-1, 1]; float32."""
    if crops.dtype == torch.uint8:
        crops = crops.float().div_(127.5).sub_(1.0)
    small_px = config.crop_px // config.factor
    generators = random.generator("degradation") if config.degradation in ("bsr", "bsr_light") else []
    low_res = degrade(config.degradation, crops, small_px, generators)
    if config.degradation_probability == 1.0:
        return low_res
    corrupted = random.bernoulli("degradation_coin", config.degradation_probability).to(low_res.device)
    return torch.where(corrupted[:, None, None, None], low_res, downsample(crops, small_px))


def add_noise(low_res: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Mix images with noise at constant variance: sqrt(1 - s^2) x + s noise; level 0 returns the images exactly.

    Args:
        low_res: ``(B, C, h, w)``.
        level: s in [0, 1), ``(B,)``.
        noise: standard normal, shape of ``low_res``.
    """
    s = level[:, None, None, None]
    return (1 - s**2).sqrt() * low_res + s * noise


class Upsampler(nn.Module):
    """The upsampler P(x_large | x_small)."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        learned = config.diffusion.variance == "learned_range"
        self.out_channels = IMAGE_CHANNELS * (2 if learned else 1)
        self.unet = UNet(
            config.unet,
            image_size=config.image_size,
            in_channels=2 * IMAGE_CHANNELS,
            out_channels=self.out_channels,
        )
        if config.max_noise_level > 0:
            width = config.unet.embedding_channels
            self.noise_level_embed = nn.Sequential(
                nn.Linear(config.unet.model_channels, width), nn.SiLU(), nn.Linear(width, width)
            )

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        low_res: Tensor,
        noise_level: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Predict from a noised image and its low-resolution version.

        Args:
            x_t: ``(B, 3, H, W)``.
            t: original timesteps ``(B,)``.
            low_res: ``(B, 3, h, w)`` in [-1, 1], enlarged here to H x W; already noised, if at all.
            noise_level: s of the noise in ``low_res``, ``(B,)``; None is 0.
            dropout_seeds: see :meth:`UNet.forward`.

        Returns:
            ``(B, 3, H, W)``, or ``(B, 6, H, W)`` with learned variance.
        """
        embedding = self._level_embedding(noise_level, len(x_t))
        return self._predict(x_t, t, self._enlarged(low_res, x_t), embedding, dropout_seeds)

    def _enlarged(self, low_res: Tensor, x_t: Tensor) -> Tensor:
        mode = self.config.enlarge_mode
        return F.interpolate(  # (B, 3, H, W)
            low_res.to(x_t.dtype), size=x_t.shape[-2:], mode=mode, align_corners=False, antialias=mode == "bicubic"
        )

    def _level_embedding(self, noise_level: Tensor | None, num_images: int) -> Tensor | None:
        """Embed noise levels: ``(B, 4 * model_channels)``, or None for a model that knows no noise."""
        if self.config.max_noise_level == 0:
            return None
        if noise_level is None:
            noise_level = torch.zeros(num_images, device=next(self.unet.parameters()).device)
        features = timestep_embedding(noise_level * _LEVEL_SCALE, self.config.unet.model_channels)
        return cast(Tensor, self.noise_level_embed(features.to(self.unet.dtype)))

    def _predict(
        self, x_t: Tensor, t: Tensor, enlarged: Tensor, embedding: Tensor | None, dropout_seeds: Tensor | None = None
    ) -> Tensor:
        return cast(
            Tensor, self.unet(torch.cat([x_t, enlarged], dim=1), t, embedding=embedding, dropout_seeds=dropout_seeds)
        )

    def _predict_tiled(
        self, x_t: Tensor, t: Tensor, enlarged: Tensor, embedding: Tensor | None, tiling: Tiling, batch_size: int
    ) -> Tensor:
        """Predict tile by tile, ``batch_size`` tiles at a time, and blend; image by image, so batches do not matter."""
        places = [(row, tile) for row in range(len(x_t)) for tile in tiling.tiles]
        px = tiling.tile_px
        blended = x_t.new_zeros(len(x_t), self.out_channels, x_t.shape[-2], x_t.shape[-1])
        for first in range(0, len(places), batch_size):
            part = places[first : first + batch_size]
            rows = torch.tensor([row for row, _ in part], device=t.device)
            output = self._predict(
                tiling.cut(x_t, part),
                t[rows],
                tiling.cut(enlarged, part),
                None if embedding is None else embedding[rows],
            )
            for (row, tile), prediction in zip(part, output, strict=True):
                blended[row, :, tile.top : tile.top + px, tile.left : tile.left + px] += prediction * tile.weight
        return blended

    def training_pair(self, images: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Cut a random crop of every image and make its corrupted low-resolution version.

        A data loader may call :func:`training_sample` ahead of the step instead (BSR runs on the CPU).

        Args:
            images: ``(B, 3, image_size, image_size)``, uint8 or in [-1, 1].
            random: the step's randomness, of the same B samples.

        Returns:
            ``(B, 3, crop_px, crop_px)`` in the dtype of ``images``, and float32
            ``(B, 3, crop_px / factor, crop_px / factor)`` in [-1, 1].

        Raises:
            ValueError: if the images have another shape.
        """
        side, crop_px = self.config.image_size, self.config.crop_px
        if images.dim() != 4 or tuple(images.shape[1:]) != (IMAGE_CHANNELS, side, side):
            raise ValueError(f"upsampler: images of shape {tuple(images.shape)}; it takes (B, 3, {side}, {side})")
        corners = _crop_corners(self.config, random)
        crops = torch.stack(
            [
                image[:, top : top + crop_px, left : left + crop_px]
                for image, (top, left) in zip(images, corners, strict=True)
            ]
        )
        return crops, _low_resolution(self.config, crops, random)

    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss of a batch.

        Args:
            batch: ``image`` ``(B, 3, image_size, image_size)`` in [-1, 1]; or, already made by
                :meth:`training_pair` or :func:`training_sample`, ``image`` holds the crops, in [-1, 1] too, and
                ``low_res`` their low-resolution versions.
            random: the step's randomness, of the same B samples.

        Returns:
            The mean loss, scalar, and detached per-sample terms ``(B,)``: ``mse``, ``vb`` if the variance is
            learned, and ``timestep`` int64.
        """
        x_start, low_res = batch["image"].float(), batch.get("low_res")
        if low_res is None:
            x_start, low_res = self.training_pair(x_start, random)
        low_res, level = self._augmented(low_res, random)
        t = random.integers("timestep", 0, self.diffusion.num_timesteps)
        noise = random.normal("noise", tuple(x_start.shape[1:]))
        seeds = dropout_seeds(random) if self.unet.drops else None
        loss, terms = self.diffusion.training_loss(
            lambda x_t, timesteps: self(x_t, timesteps, low_res, level, seeds), x_start, t, noise
        )
        return loss.mean(), {**terms, "timestep": t}

    def _augmented(self, low_res: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor | None]:
        """Add noise of a random level to the conditioning, if the model is told such levels; else leave it alone."""
        if self.config.max_noise_level == 0:
            return low_res, None
        level = random.uniform("noise_level") * self.config.max_noise_level
        return add_noise(low_res, level, random.normal("low_res_noise", tuple(low_res.shape[1:]))), level

    @torch.no_grad()
    def sample(
        self,
        low_res: Tensor,
        *,
        steps: int | str = 27,
        sampler: ImageSampler = "ddim",
        eta: float = 0.0,
        generators: Sequence[torch.Generator],
        noise_temperature: float = 1.0,
        noise_level: float = 0.0,
        tile_px: int | None = None,
        tile_overlap_px: int | None = None,
        tile_batch_size: int = 1,
    ) -> Tensor:
        """Enlarge images at full size, whole or in tiles.

        With ``tile_px`` the network runs, at every step, on overlapping tiles of the full-size x_t, and its predictions
        are blended (as in MultiDiffusion, Bar-Tal et al. 2023); memory is that of ``tile_batch_size`` tiles. The noise
        is the same as for whole images, but the result is not: each tile's group norms see the tile alone, and zeros
        stand around it where the network would have seen the image (a network without norms, whose view is shorter than
        a quarter of the overlap, gives the same). With the small models of the quickstart the two differ by 3 to 10 of
        255 levels in the mean. It need not be a loss: tiles of the size of the training crops have the statistics that
        the network was trained on, and came closer to the true images than whole ones, by 0.9 and 2.6 dB.

        Args:
            low_res: ``(B, 3, input_size, input_size)`` in [-1, 1]; rounded to 8 bits first, as GLIDE does, because the
                training images had no more.
            steps: timesteps to visit; the paper uses 27 (64 -> 256) and 15 (256 -> 1024) DDIM steps.
            sampler: ``ddim``, ``ddpm`` or ``dpm_solver_2m``.
            eta: noise of DDIM.
            generators: one per image.
            noise_temperature: factor on the starting noise (GLIDE: 0.997).
            noise_level: s of the noise added to ``low_res``, 0 to the model's ``max_noise_level``; more hides more of
                its faults, and of its details.
            tile_px: side of a tile; None runs the network on whole images.
            tile_overlap_px: see :class:`Tiling`.
            tile_batch_size: tiles that run through the network together.

        Returns:
            ``(B, 3, image_size, image_size)`` float32 in [-1, 1]; image i depends on row i and generator i alone.

        Raises:
            ValueError: if the input has another side, the model is in training mode, the noise level is not one the
                model knows, or the tiles do not fit.
        """
        self._check_sampling(low_res, noise_level, tile_batch_size)
        side, device = self.config.image_size, low_res.device
        x_T = noise_temperature * draw_noise(generators, (IMAGE_CHANNELS, side, side), device)  # noqa: N806
        rounded = ((low_res.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        level = torch.full((len(low_res),), noise_level, device=device)
        if noise_level > 0:
            rounded = add_noise(rounded, level, draw_noise(generators, tuple(low_res.shape[1:]), device))
        enlarged = self._enlarged(rounded, x_T)
        # Once, not at every step; and of one row, for a product of several rows is rounded by how many they are.
        embedding = self._level_embedding(level[:1], 1)
        embedding = None if embedding is None else embedding.expand(len(x_T), -1)
        tiling = None
        if tile_px is not None:
            tiling = Tiling(side, tile_px, tile_overlap_px, self.config.unet.min_multiple_px, device)

        def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
            if tiling is None:
                return self._predict(x_t, t, enlarged, embedding)
            return self._predict_tiled(x_t, t, enlarged, embedding, tiling, tile_batch_size)

        process = self.diffusion.respaced(spaced_timesteps(self.diffusion.num_timesteps, steps))
        return run_image_sampler(denoiser, x_T, process, sampler=sampler, eta=eta, generators=generators)

    def _check_sampling(self, low_res: Tensor, noise_level: float, tile_batch_size: int) -> None:
        if self.training:
            raise ValueError("Upsampler: sampling in training mode; call .eval() first")
        side, highest = self.config.input_size, self.config.max_noise_level
        if low_res.dim() != 4 or tuple(low_res.shape[1:]) != (IMAGE_CHANNELS, side, side):
            raise ValueError(f"upsampler: input of shape {tuple(low_res.shape)}; it takes (B, 3, {side}, {side})")
        if not 0.0 <= noise_level <= highest:
            raise ValueError(
                f"upsampler: noise_level {noise_level}; this model was trained with levels from 0 to {highest} "
                "(max_noise_level)"
            )
        if tile_batch_size < 1:
            raise ValueError(f"upsampler: tile_batch_size {tile_batch_size}; it must be at least 1")
