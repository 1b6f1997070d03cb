"""The decoder: a GLIDE-style diffusion U-Net that renders an image from z_i and, optionally, a caption.

unCLIP, section 2.1: z_i enters twice, projected and added to the timestep embedding, and projected to four tokens
joined to the caption encoder's outputs, which every attention of the U-Net sees. As in GLIDE, the encoder's last
position is also projected and added to the timestep embedding. For classifier-free guidance z_i is withheld 10% of the
time (zero or a learned embedding) and the caption 50%; the paper's Fig. 8 and section 5.1 say 5% for z_i, so both are
settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from unclip_models.diffusion import Denoiser, DiffusionConfig, GaussianDiffusion, spaced_timesteps
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import combine_guidance, ddim_invert, ddim_sample, ddpm_sample, dpm_solver_2m, draw_noise
from unclip_models.text_encoder import TextEncoder, TextEncoderConfig
from unclip_models.unet import UNet, UNetConfig

IMAGE_CHANNELS = 3
ImageSampler = Literal["ddpm", "ddim", "dpm_solver_2m"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of a decoder; the paper's is 64 px, 512 channels, attention at 32, 16 and 8 px (Table 3).

    Attributes:
        image_size: side of the image in px.
        embedding_dim: dimension D of CLIP's embeddings.
        num_image_tokens: context tokens made from z_i.
        unet: the U-Net; its context tokens have the width of the text encoder.
        text: the caption encoder.
        caption_dropout: probability that a training caption is withheld.
        embedding_dropout: probability that z_i is withheld; 1 trains a text-only decoder (the GLIDE baseline).
        null_embedding: what stands for a withheld z_i. The paper leaves it open (UNVERIFIED which one it used).
        embedding_scale: factor on the unit-norm z_i; None is sqrt(D), which gives every component unit variance and so
            lets z_i weigh as much as the timestep from the first step. The paper names no factor for the decoder.
        diffusion: the process; the paper learns the variance.
    """

    image_size: int
    embedding_dim: int
    num_image_tokens: int = 4
    unet: UNetConfig
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    caption_dropout: float = 0.5
    embedding_dropout: float = 0.1
    null_embedding: Literal["zero", "learned"] = "zero"
    embedding_scale: float | None = None
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(variance="learned_range"))

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "embedding_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"decoder.{name}: {getattr(self, name)} is no probability; use 0 to 1")
        if self.null_embedding not in ("zero", "learned"):
            raise ValueError(f"decoder.null_embedding: {self.null_embedding!r}; use 'zero' or 'learned'")
        if self.embedding_dim < 1 or self.num_image_tokens < 0:
            raise ValueError("decoder.embedding_dim must be positive and decoder.num_image_tokens not negative")


class Condition(NamedTuple):
    """What the U-Net is told about the image: ``embedding`` (B, 4ch) and ``context`` tokens (B, 4 + L, W)."""

    embedding: Tensor
    context: Tensor


class Decoder(nn.Module):
    """The decoder P(x | z_i, y) of the first, small image."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        learned = config.diffusion.variance == "learned_range"
        self.unet = UNet(
            config.unet,
            image_size=config.image_size,
            in_channels=IMAGE_CHANNELS,
            out_channels=IMAGE_CHANNELS * (2 if learned else 1),
            context_dim=config.text.width,
        )
        self.text_encoder = TextEncoder(config.text)
        width, embedding_channels = config.text.width, config.unet.embedding_channels
        self.text_to_time = nn.Linear(width, embedding_channels)
        self.image_to_time = nn.Linear(config.embedding_dim, embedding_channels)
        self.image_to_tokens = nn.Linear(config.embedding_dim, width * config.num_image_tokens)
        self.null_image_embedding = (
            nn.Parameter(torch.zeros(config.embedding_dim)) if config.null_embedding == "learned" else None
        )

    def condition(
        self, image_embedding: Tensor, tokens: Tensor, drop_embedding: Tensor, drop_caption: Tensor
    ) -> Condition:
        """Encode z_i and caption for the U-Net; constant over the timesteps of a sample.

        Args:
            image_embedding: unit-norm z_i ``(B, D)``.
            tokens: caption tokens ``(B, context_length)``, int64.
            drop_embedding: bool ``(B,)``, True where z_i is withheld.
            drop_caption: bool ``(B,)``, True where the caption is withheld.
        """
        weight = self.image_to_time.weight
        scale = self.config.embedding_scale
        z = image_embedding.float() * (math.sqrt(self.config.embedding_dim) if scale is None else scale)  # (B, D)
        null = torch.zeros_like(z) if self.null_image_embedding is None else self.null_image_embedding.float()
        z = torch.where(drop_embedding[:, None], null, z).to(weight.dtype)
        sequence, pooled = self.text_encoder(tokens, drop_caption)  # (B, L, W), (B, W)
        embedding = self.image_to_time(z) + self.text_to_time(pooled)  # (B, 4ch)
        # Rows are (width, token), the order of Karlo's and diffusers' weights.
        image_tokens = self.image_to_tokens(z).unflatten(1, (sequence.shape[-1], -1)).transpose(1, 2)
        return Condition(embedding, torch.cat([image_tokens.to(sequence.dtype), sequence], dim=1))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        image_embedding: Tensor,
        tokens: Tensor,
        drop_embedding: Tensor,
        drop_caption: Tensor,
    ) -> Tensor:
        """Predict from a noised image ``(B, 3, S, S)``; for the other arguments see :meth:`condition`.

        Returns:
            ``(B, 3, S, S)``, or ``(B, 6, S, S)`` with learned variance.
        """
        embedding, context = self.condition(image_embedding, tokens, drop_embedding, drop_caption)
        return cast(Tensor, self.unet(x_t, t, embedding=embedding, context=context))

    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss of a batch.

        Args:
            batch: ``image`` ``(B, 3, S, S)`` in [-1, 1], ``image_embedding`` ``(B, D)`` unit norm, ``tokens``
                ``(B, context_length)``.
            random: the step's randomness, of the same B samples.

        Returns:
            The mean loss, scalar, and detached per-sample terms ``(B,)``: ``mse``, ``vb`` if the variance is
            learned, and ``timestep`` int64.
        """
        x_start = batch["image"].float()
        _check_image(x_start, self.config.image_size)
        t = random.integers("timestep", 0, self.diffusion.num_timesteps)
        noise = random.normal("noise", tuple(x_start.shape[1:]))
        drop_embedding = random.bernoulli("embedding_dropout", self.config.embedding_dropout)
        drop_caption = random.bernoulli("caption_dropout", self.config.caption_dropout)

        def denoiser(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return cast(
                Tensor,
                self(x_t, timesteps, batch["image_embedding"], batch["tokens"], drop_embedding, drop_caption),
            )

        loss, terms = self.diffusion.training_loss(denoiser, x_start, t, noise)
        return loss.mean(), {**terms, "timestep": t}

    @torch.no_grad()
    def sample(
        self,
        image_embedding: Tensor,
        tokens: Tensor | None = None,
        *,
        steps: int | str = 250,
        guidance_scale: float = 1.0,
        sampler: ImageSampler = "ddpm",
        eta: float = 0.0,
        generators: Sequence[torch.Generator],
        x_T: Tensor | None = None,  # noqa: N803 - the paper's letter
    ) -> Tensor:
        """Render images from z_i and, optionally, captions.

        Args:
            image_embedding: unit-norm z_i ``(B, D)``.
            tokens: ``(B, context_length)``; None withholds the captions.
            steps: timesteps to visit, as in :func:`unclip_models.diffusion.spaced_timesteps`.
            guidance_scale: 1 is no guidance; the unconditional branch withholds both z_i and caption.
            sampler: ``ddpm`` (learned variance, the paper's), ``ddim`` or ``dpm_solver_2m``.
            eta: noise of DDIM; 0 is deterministic.
            generators: one per image.
            x_T: starting noise ``(B, 3, S, S)``; None draws it from the generators.

        Returns:
            ``(B, 3, S, S)`` float32 in [-1, 1]; image i depends on row i and generator i alone.
        """
        side = self.config.image_size
        if x_T is None:
            x_T = draw_noise(generators, (IMAGE_CHANNELS, side, side), image_embedding.device)  # noqa: N806
        denoiser = self.guided_denoiser(image_embedding, tokens, guidance_scale)
        process = self.diffusion.respaced(spaced_timesteps(self.diffusion.num_timesteps, steps))
        return run_image_sampler(denoiser, x_T, process, sampler=sampler, eta=eta, generators=generators)

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        image_embedding: Tensor,
        tokens: Tensor | None = None,
        *,
        steps: int | str = 250,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Find the noise x_T from which DDIM (eta 0, same steps and scale) decodes back to ``images`` (section 3).

        Args:
            images: ``(B, 3, S, S)`` in [-1, 1].
            image_embedding: their z_i ``(B, D)``.
            tokens: captions, or None.
            steps: as in :meth:`sample`.
            guidance_scale: as in :meth:`sample`.

        Returns:
            ``(B, 3, S, S)`` float32.
        """
        _check_image(images, self.config.image_size)
        denoiser = self.guided_denoiser(image_embedding, tokens, guidance_scale)
        process = self.diffusion.respaced(spaced_timesteps(self.diffusion.num_timesteps, steps))
        return ddim_invert(denoiser, images, process)

    def guided_denoiser(self, image_embedding: Tensor, tokens: Tensor | None, guidance_scale: float) -> Denoiser:
        """Bind the conditioning, encoded once; both branches of the guidance run as one batch.

        Raises:
            ValueError: if the model is in training mode, where dropout would disturb the samples.
        """
        if self.training:
            raise ValueError("Decoder: sampling in training mode; call .eval() first")
        num_images, device = image_embedding.shape[0], image_embedding.device
        drop_caption = torch.full((num_images,), tokens is None, device=device)
        if tokens is None:
            tokens = torch.zeros(num_images, self.config.text.context_length, dtype=torch.int64, device=device)
        never, always = (torch.full((num_images,), value, device=device) for value in (False, True))
        if guidance_scale == 1.0:
            embedding, context = self.condition(image_embedding, tokens, never, drop_caption)
            return lambda x_t, t: self.unet(x_t, t, embedding=embedding, context=context)
        both = self.condition(
            torch.cat([image_embedding, image_embedding]),
            torch.cat([tokens, tokens]),
            torch.cat([never, always]),
            torch.cat([drop_caption, always]),
        )

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            output = self.unet(torch.cat([x_t, x_t]), torch.cat([t, t]), embedding=both.embedding, context=both.context)
            conditional, unconditional = output.chunk(2)
            return combine_guidance(conditional, unconditional, guidance_scale, num_channels=IMAGE_CHANNELS)

        return guided


def clip_to_image_range(x: Tensor) -> Tensor:
    """Bring a predicted image back into [-1, 1]."""
    return x.clamp(-1.0, 1.0)


def run_image_sampler(
    denoiser: Denoiser,
    x_T: Tensor,  # noqa: N803
    process: GaussianDiffusion,
    *,
    sampler: ImageSampler,
    eta: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Run one of the image samplers by name, predictions clipped to [-1, 1]; for the arguments see ``Decoder.sample``.

    Raises:
        ValueError: for an unknown sampler.
    """
    if sampler == "ddpm":
        x = ddpm_sample(denoiser, x_T, process, generators=generators, clip=clip_to_image_range)
    elif sampler == "ddim":
        x = ddim_sample(denoiser, x_T, process, eta=eta, generators=generators, clip=clip_to_image_range)
    elif sampler == "dpm_solver_2m":
        x = dpm_solver_2m(denoiser, x_T, process, clip=clip_to_image_range)
    else:
        raise ValueError(f"sampler: {sampler!r}; use ddpm, ddim or dpm_solver_2m")
    return clip_to_image_range(x)


def _check_image(image: Tensor, side: int) -> None:
    if image.dim() != 4 or tuple(image.shape[1:]) != (IMAGE_CHANNELS, side, side):
        raise ValueError(f"decoder: images of shape {tuple(image.shape)}; it takes (B, 3, {side}, {side})")
