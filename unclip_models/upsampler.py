"""An upsampler: a purely convolutional diffusion U-Net that enlarges an image (unCLIP, section 2.2).

It sees no caption and has no attention, so it is trained on random crops of a quarter of the side and applied at full
size. The low-resolution image, corrupted in training (``degradation.py``), is enlarged and joined to the noised image
by channel, as in ADM's upsamplers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_models.decoder import IMAGE_CHANNELS, ImageSampler, run_image_sampler
from unclip_models.degradation import Degradation, degrade, downsample
from unclip_models.diffusion import DiffusionConfig, GaussianDiffusion, spaced_timesteps
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import draw_noise
from unclip_models.unet import UNet, UNetConfig


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Settings of an upsampler; the paper's are 64 -> 256 (blur, cosine) and 256 -> 1024 (BSR, linear), Table 3.

    Attributes:
        image_size: side of the output in px.
        input_size: side of the low-resolution input in px; divides ``image_size``.
        crop_fraction: side of the training crop over ``image_size``; 1 trains on whole images.
        degradation: how the low-resolution image is corrupted in training.
        degradation_probability: fraction of the samples that are corrupted; the others are only shrunk. The paper
            names none; Ho et al. 2022 (cascaded diffusion) found one half best for blur.
        enlarge_mode: interpolation of the low-resolution image to ``image_size`` (GLIDE: bilinear; Karlo: bicubic).
        unet: the U-Net, without attention.
        diffusion: the process; the paper's second upsampler uses the linear schedule.
    """

    image_size: int
    input_size: int
    crop_fraction: float = 0.25
    degradation: Degradation = "blur"
    degradation_probability: float = 1.0
    enlarge_mode: Literal["bilinear", "bicubic"] = "bilinear"
    unet: UNetConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        if self.input_size < 1 or self.image_size % self.input_size or self.image_size == self.input_size:
            raise ValueError(
                f"upsampler.image_size: {self.image_size} px must be a multiple, 2 or more, of input_size "
                f"{self.input_size} px"
            )
        if self.unet.attention_resolutions:
            raise ValueError("upsampler.unet.attention_resolutions: must be empty, or crops could not train it")
        if self.degradation not in ("none", "blur", "bsr_light", "bsr"):
            raise ValueError(f"upsampler.degradation: {self.degradation!r}; use none, blur, bsr_light or bsr")
        if self.enlarge_mode not in ("bilinear", "bicubic"):
            raise ValueError(f"upsampler.enlarge_mode: {self.enlarge_mode!r}; use bilinear or bicubic")
        if not 0.0 <= self.degradation_probability <= 1.0:
            raise ValueError(f"upsampler.degradation_probability: {self.degradation_probability}; use 0 to 1")
        self._check_crop()

    def _check_crop(self) -> None:
        if not 0.0 < self.crop_fraction <= 1.0:
            raise ValueError(f"upsampler.crop_fraction: {self.crop_fraction}; it must be in (0, 1]")
        multiple = self.unet.min_multiple_px
        if self.crop_px % multiple or self.crop_px % self.factor or self.crop_px // self.factor < 2:
            raise ValueError(
                f"upsampler.crop_fraction: {self.crop_fraction} of {self.image_size} px is a crop of {self.crop_px} "
                f"px; it must be a multiple of {multiple} (levels of the U-Net) and {self.factor} (enlargement), and "
                "at least 2 low-resolution px wide"
            )

    @property
    def factor(self) -> int:
        """How many times larger the output is."""
        return self.image_size // self.input_size

    @property
    def crop_px(self) -> int:
        """Side of the training crop in px."""
        return round(self.image_size * self.crop_fraction)


class Upsampler(nn.Module):
    """The upsampler P(x_large | x_small)."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        learned = config.diffusion.variance == "learned_range"
        self.unet = UNet(
            config.unet,
            image_size=config.image_size,
            in_channels=2 * IMAGE_CHANNELS,
            out_channels=IMAGE_CHANNELS * (2 if learned else 1),
        )

    def forward(self, x_t: Tensor, t: Tensor, low_res: Tensor) -> Tensor:
        """Predict from a noised image and its low-resolution version.

        Args:
            x_t: ``(B, 3, H, W)``.
            t: original timesteps ``(B,)``.
            low_res: ``(B, 3, h, w)`` in [-1, 1], enlarged here to H x W.

        Returns:
            ``(B, 3, H, W)``, or ``(B, 6, H, W)`` with learned variance.
        """
        return self._predict(x_t, t, self._enlarged(low_res, x_t))

    def _enlarged(self, low_res: Tensor, x_t: Tensor) -> Tensor:
        size, mode = x_t.shape[-2:], self.config.enlarge_mode
        return F.interpolate(low_res.to(x_t.dtype), size=size, mode=mode, align_corners=False)  # (B, 3, H, W)

    def _predict(self, x_t: Tensor, t: Tensor, enlarged: Tensor) -> Tensor:
        return cast(Tensor, self.unet(torch.cat([x_t, enlarged], dim=1), t))

    def training_pair(self, images: Tensor, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Cut a random crop of every image and make its corrupted low-resolution version.

        A data loader may call this ahead of the step (BSR runs on the CPU) and pass both on to :meth:`loss`.

        Args:
            images: ``(B, 3, image_size, image_size)`` in [-1, 1].
            random: the step's randomness, of the same B samples.

        Returns:
            ``(B, 3, crop_px, crop_px)``, and float32 ``(B, 3, crop_px / factor, crop_px / factor)`` in [-1, 1].
        """
        config = self.config
        side = config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (IMAGE_CHANNELS, side, side):
            raise ValueError(f"upsampler: images of shape {tuple(images.shape)}; it takes (B, 3, {side}, {side})")
        tops = random.integers("crop_top", 0, side - config.crop_px + 1).tolist()
        lefts = random.integers("crop_left", 0, side - config.crop_px + 1).tolist()
        crops = torch.stack(
            [
                image[:, top : top + config.crop_px, left : left + config.crop_px]
                for image, top, left in zip(images, tops, lefts, strict=True)
            ]
        )
        small_px = config.crop_px // config.factor
        needs_generators = config.degradation in ("bsr", "bsr_light")
        generators = random.generator("degradation") if needs_generators else []
        low_res = degrade(config.degradation, crops, small_px, generators)
        if config.degradation_probability < 1.0:
            corrupted = random.bernoulli("degradation_coin", config.degradation_probability).to(low_res.device)
            low_res = torch.where(corrupted[:, None, None, None], low_res, downsample(crops, small_px))
        return crops, low_res

    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss of a batch.

        Args:
            batch: ``image`` ``(B, 3, image_size, image_size)`` in [-1, 1]; or, already made by
                :meth:`training_pair`, ``image`` holds the crops and ``low_res`` their low-resolution versions.
            random: the step's randomness, of the same B samples.

        Returns:
            The mean loss, scalar, and detached per-sample terms ``(B,)``: ``mse``, ``vb`` if the variance is
            learned, and ``timestep`` int64.
        """
        x_start, low_res = batch["image"].float(), batch.get("low_res")
        if low_res is None:
            x_start, low_res = self.training_pair(x_start, random)
        t = random.integers("timestep", 0, self.diffusion.num_timesteps)
        noise = random.normal("noise", tuple(x_start.shape[1:]))
        loss, terms = self.diffusion.training_loss(
            lambda x_t, timesteps: self(x_t, timesteps, low_res), x_start, t, noise
        )
        return loss.mean(), {**terms, "timestep": t}

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
    ) -> Tensor:
        """Enlarge images at full size.

        Args:
            low_res: ``(B, 3, input_size, input_size)`` in [-1, 1]; rounded to 8 bits first, as GLIDE does, because the
                training images had no more.
            steps: timesteps to visit; the paper uses 27 (64 -> 256) and 15 (256 -> 1024) DDIM steps.
            sampler: ``ddim``, ``ddpm`` or ``dpm_solver_2m``.
            eta: noise of DDIM.
            generators: one per image.
            noise_temperature: factor on the starting noise (GLIDE: 0.997).

        Returns:
            ``(B, 3, image_size, image_size)`` float32 in [-1, 1].

        Raises:
            ValueError: if the input has another side, or the model is in training mode.
        """
        if self.training:
            raise ValueError("Upsampler: sampling in training mode; call .eval() first")
        side = self.config.input_size
        if low_res.dim() != 4 or tuple(low_res.shape[1:]) != (IMAGE_CHANNELS, side, side):
            raise ValueError(f"upsampler: input of shape {tuple(low_res.shape)}; it takes (B, 3, {side}, {side})")
        out_shape = (IMAGE_CHANNELS, self.config.image_size, self.config.image_size)
        x_T = noise_temperature * draw_noise(generators, out_shape, low_res.device)  # noqa: N806
        rounded = ((low_res.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        enlarged = self._enlarged(rounded, x_T)  # once, not at every step
        process = self.diffusion.respaced(spaced_timesteps(self.diffusion.num_timesteps, steps))
        return run_image_sampler(
            lambda x_t, t: self._predict(x_t, t, enlarged),
            x_T,
            process,
            sampler=sampler,
            eta=eta,
            generators=generators,
        )
