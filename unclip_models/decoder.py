"""The decoder: a GLIDE-style diffusion U-Net that renders an image from z_i and, optionally, a caption.

unCLIP, section 2.1: z_i enters twice, projected and added to the timestep embedding, and projected to four tokens
joined to the caption encoder's outputs, which every attention of the U-Net sees. As in GLIDE, the encoder's last
position is also projected and added to the timestep embedding. For classifier-free guidance z_i is withheld 10% of the
time (zero or a learned embedding) and the caption 50%; the paper's Fig. 8 and section 5.1 say 5% for z_i, so both are
settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_models.clip_text import ClipText, ClipTextFeatures, build_text, encode_captions, features_of
from unclip_models.diffusion import Clip, Denoiser, GaussianDiffusion, spaced_timesteps
from unclip_models.dropout import dropout_seeds
from unclip_models.inpainting import inpaint_sample
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import (
    combine_guidance,
    ddim_invert,
    ddim_sample,
    ddpm_sample,
    dpm_solver_2m,
    draw_noise,
    dynamic_threshold,
)
from unclip_models.sampling_settings import ImageSampler
from unclip_models.settings import DecoderConfig
from unclip_models.unet import UNet

IMAGE_CHANNELS = 3


class Condition(NamedTuple):
    """What the U-Net is told about the image.

    Attributes:
        embedding: added to the timestep embedding, ``(B, 4ch)``.
        context: tokens ``(B, 4 + L, W)``.
        visible: bool ``(B, 4 + L)``, False for padding; None shows all tokens.
    """

    embedding: Tensor
    context: Tensor
    visible: Tensor | None


class Decoder(nn.Module):
    """The decoder P(x | z_i, y) of the first, small image."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.diffusion = GaussianDiffusion(config.diffusion)
        learned = config.diffusion.variance == "learned_range"
        width = config.context_width or config.text.width
        self.unet = UNet(
            config.unet,
            image_size=config.image_size,
            in_channels=IMAGE_CHANNELS,
            out_channels=IMAGE_CHANNELS * (2 if learned else 1),
            context_dim=width,
        )
        self.text_encoder = build_text(config.text, config.embedding_dim)
        embedding_channels = config.unet.embedding_channels
        if isinstance(self.text_encoder, ClipText):
            self.text_to_context = nn.Sequential(nn.Linear(config.text.width, width), nn.LayerNorm(width))
            self.text_to_time = nn.Linear(config.embedding_dim, embedding_channels)
        else:
            self.text_to_context = nn.Sequential()
            self.text_to_time = nn.Linear(width, embedding_channels)
        self.image_to_time = nn.Linear(config.embedding_dim, embedding_channels)
        self.image_to_tokens = nn.Linear(config.embedding_dim, width * config.num_image_tokens)
        self.null_image_embedding = (
            nn.Parameter(torch.zeros(config.embedding_dim)) if config.null_embedding == "learned" else None
        )

    def condition(
        self,
        image_embedding: Tensor,
        tokens: Tensor,
        drop_embedding: Tensor,
        drop_caption: Tensor,
        clip_text: ClipTextFeatures | None = None,
    ) -> Condition:
        """Encode z_i and caption for the U-Net; constant over the timesteps of a sample.

        Args:
            image_embedding: z_i ``(B, D)``, unit norm unless ``raw_embeddings``; z_t for a text-embedding decoder.
            tokens: caption tokens ``(B, context_length)``, int64.
            drop_embedding: bool ``(B,)``, True where z_i is withheld.
            drop_caption: bool ``(B,)``, True where the caption is withheld.
            clip_text: with ``text.kind: clip``, what the CLIP says of the captions.
        """
        dtype = self.image_to_time.weight.dtype
        z = image_embedding.float() * self.config.factor  # (B, D)
        null = torch.zeros_like(z) if self.null_image_embedding is None else self.null_image_embedding.float()
        z = torch.where(drop_embedding[:, None], null, z).to(dtype)
        caption = encode_captions(self.text_encoder, tokens, drop_caption, clip_text)
        sequence = self.text_to_context(caption.sequence.to(dtype))  # (B, L, W)
        embedding = self.image_to_time(z) + self.text_to_time(caption.pooled.to(dtype))  # (B, 4ch)
        # Rows are (width, token), the order of Karlo's and diffusers' weights.
        image_tokens = self.image_to_tokens(z).unflatten(1, (sequence.shape[-1], -1)).transpose(1, 2)
        context = torch.cat([image_tokens.to(sequence.dtype), sequence], dim=1)
        visible = caption.visible
        if visible is not None:
            visible = F.pad(visible, (self.config.num_image_tokens, 0), value=True)
        return Condition(embedding, context, visible)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        image_embedding: Tensor,
        tokens: Tensor,
        drop_embedding: Tensor,
        drop_caption: Tensor,
        clip_text: ClipTextFeatures | None = None,
        dropout_seeds: Tensor | None = None,
    ) -> Tensor:
        """Predict from a noised image ``(B, 3, S, S)``; for the other arguments see :meth:`condition`, and for
        ``dropout_seeds`` :meth:`UNet.forward`.

        Returns:
            ``(B, 3, S, S)``, or ``(B, 6, S, S)`` with learned variance.
        """
        condition = self.condition(image_embedding, tokens, drop_embedding, drop_caption, clip_text)
        return self._predict(x_t, t, condition, dropout_seeds)

    def _predict(self, x_t: Tensor, t: Tensor, condition: Condition, dropout_seeds: Tensor | None = None) -> Tensor:
        given = {"embedding": condition.embedding, "context": condition.context, "context_mask": condition.visible}
        return cast(Tensor, self.unet(x_t, t, **given, dropout_seeds=dropout_seeds))

    def loss(self, batch: Mapping[str, Tensor], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the training loss of a batch.

        Args:
            batch: ``image`` ``(B, 3, S, S)`` in [-1, 1], ``image_embedding`` (or what ``condition_on`` names)
                ``(B, D)`` unit norm, ``tokens`` ``(B, context_length)``; with ``text.kind: clip`` also
                ``text_embedding`` and ``text_sequence`` ``(B, context_length, W)``.
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

        seeds = dropout_seeds(random) if self.unet.drops else None
        z, tokens, clip_text = batch[self.config.condition_on], batch["tokens"], features_of(batch)

        def denoiser(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return cast(Tensor, self(x_t, timesteps, z, tokens, drop_embedding, drop_caption, clip_text, seeds))

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
        guidance_rescale: float = 0.0,
        sampler: ImageSampler = "ddpm",
        eta: float = 0.0,
        dynamic_percentile: float | None = None,
        generators: Sequence[torch.Generator],
        x_T: Tensor | None = None,  # noqa: N803 - the paper's letter
        clip_text: ClipTextFeatures | None = None,
    ) -> Tensor:
        """Render images from z_i and, optionally, captions.

        Args:
            image_embedding: z_i ``(B, D)``, unit norm unless ``raw_embeddings``.
            tokens: ``(B, context_length)``; None withholds the captions.
            steps: timesteps to visit, as in :func:`unclip_models.diffusion.spaced_timesteps`.
            guidance_scale: 1 is no guidance; the unconditional branch withholds both z_i and caption.
            guidance_rescale: 0 to 1, how far the guided output takes back the spread of the conditional one.
            sampler: ``ddpm`` (learned variance, the paper's), ``ddim`` or ``dpm_solver_2m``.
            eta: noise of DDIM; 0 is deterministic.
            dynamic_percentile: dynamic thresholding at this fraction, e.g. 0.995; None clips to [-1, 1].
            generators: one per image.
            x_T: starting noise ``(B, 3, S, S)``; None draws it from the generators.
            clip_text: with ``text.kind: clip``, what the CLIP says of the captions.

        Returns:
            ``(B, 3, S, S)`` float32 in [-1, 1]; image i depends on row i and generator i alone.
        """
        denoiser = self.guided_denoiser(
            image_embedding, tokens, guidance_scale, guidance_rescale=guidance_rescale, clip_text=clip_text
        )
        return run_image_sampler(
            denoiser,
            self._starting_noise(x_T, generators),
            self._process(steps),
            sampler=sampler,
            eta=eta,
            generators=generators,
            clip=clip_to_image_range if dynamic_percentile is None else dynamic_threshold(dynamic_percentile),
        )

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        image_embedding: Tensor,
        tokens: Tensor | None = None,
        *,
        steps: int | str = 250,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        num_resamples: int = 5,
        generators: Sequence[torch.Generator],
        clip_text: ClipTextFeatures | None = None,
    ) -> Tensor:
        """Paint the unknown part of images so that the whole shows z_i and caption (RePaint, Lugmayr et al. 2022).

        Args:
            images: ``(B, 3, S, S)`` in [-1, 1]; unknown pixels may hold anything finite.
            mask: bool ``(B, 1, S, S)``, True where a pixel is known and kept.
            image_embedding: z_i of what the whole image should show ``(B, D)``.
            tokens: as in :meth:`sample`, like the arguments below.
            steps: timesteps to visit.
            guidance_scale: 1 is no guidance.
            guidance_rescale: see :meth:`sample`.
            num_resamples: rounds of each step, which bring the painted part into harmony with the known one.
            generators: one per image.
            clip_text: see :meth:`sample`.

        Returns:
            ``(B, 3, S, S)`` float32 in [-1, 1], with the known pixels unchanged.
        """
        _check_image(images, self.config.image_size)
        denoiser = self.guided_denoiser(
            image_embedding, tokens, guidance_scale, guidance_rescale=guidance_rescale, clip_text=clip_text
        )
        return inpaint_sample(
            denoiser,
            self._starting_noise(None, generators),
            self._process(steps),
            known=images,
            mask=mask,
            generators=generators,
            num_resamples=num_resamples,
            clip=clip_to_image_range,
        )

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        image_embedding: Tensor,
        tokens: Tensor | None = None,
        *,
        steps: int | str = 250,
        guidance_scale: float = 1.0,
        clip_text: ClipTextFeatures | None = None,
    ) -> Tensor:
        """Find the noise x_T from which DDIM (eta 0, same steps and scale) decodes back to ``images`` (section 3).

        Args:
            images: ``(B, 3, S, S)`` in [-1, 1].
            image_embedding: their z_i ``(B, D)``.
            tokens: captions, or None.
            steps: as in :meth:`sample`.
            guidance_scale: as in :meth:`sample`.
            clip_text: as in :meth:`sample`.

        Returns:
            ``(B, 3, S, S)`` float32.
        """
        _check_image(images, self.config.image_size)
        denoiser = self.guided_denoiser(image_embedding, tokens, guidance_scale, clip_text=clip_text)
        return ddim_invert(denoiser, images, self._process(steps))

    def guided_denoiser(
        self,
        image_embedding: Tensor,
        tokens: Tensor | None,
        guidance_scale: float,
        *,
        guidance_rescale: float = 0.0,
        clip_text: ClipTextFeatures | None = None,
    ) -> Denoiser:
        """Bind the conditioning, encoded once; both branches of the guidance run as one batch.

        A condition that was never shown in training (a dropout of 1) is withheld.

        Raises:
            ValueError: if the model is in training mode, where dropout would disturb the samples.
        """
        if self.training:
            raise ValueError("Decoder: sampling in training mode; call .eval() first")
        num_images, device = image_embedding.shape[0], image_embedding.device
        always = torch.ones(num_images, dtype=torch.bool, device=device)
        drop_caption = always if tokens is None or not self.config.uses_caption else ~always
        drop_embedding = ~always if self.config.uses_embedding else always
        if tokens is None:
            tokens = torch.zeros(num_images, self.config.text.context_length, dtype=torch.int64, device=device)
        conditional = self.condition(image_embedding, tokens, drop_embedding, drop_caption, clip_text)
        if guidance_scale == 1.0:
            return lambda x_t, t: self._predict(x_t, t, conditional)
        unconditional = self.condition(image_embedding, tokens, always, always, clip_text)
        both = Condition(
            torch.cat([conditional.embedding, unconditional.embedding]),
            torch.cat([conditional.context, unconditional.context]),
            _joined(conditional.visible, unconditional.visible),
        )

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            output = self._predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            with_condition, without = output.chunk(2)
            return combine_guidance(
                with_condition, without, guidance_scale, num_channels=IMAGE_CHANNELS, rescale=guidance_rescale
            )

        return guided

    def _process(self, steps: int | str) -> GaussianDiffusion:
        return self.diffusion.respaced(spaced_timesteps(self.diffusion.num_timesteps, steps))

    def _starting_noise(self, x_T: Tensor | None, generators: Sequence[torch.Generator]) -> Tensor:  # noqa: N803
        side = self.config.image_size
        device = self.image_to_time.weight.device
        return draw_noise(generators, (IMAGE_CHANNELS, side, side), device) if x_T is None else x_T


def _joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])


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
    clip: Clip = clip_to_image_range,
) -> Tensor:
    """Run one of the image samplers by name, predictions and result clipped; for the rest see ``Decoder.sample``.

    Raises:
        ValueError: for an unknown sampler.
    """
    if sampler == "ddpm":
        x = ddpm_sample(denoiser, x_T, process, generators=generators, clip=clip)
    elif sampler == "ddim":
        x = ddim_sample(denoiser, x_T, process, eta=eta, generators=generators, clip=clip)
    elif sampler == "dpm_solver_2m":
        x = dpm_solver_2m(denoiser, x_T, process, clip=clip)
    else:
        raise ValueError(f"sampler: {sampler!r}; use ddpm, ddim or dpm_solver_2m")
    return clip_to_image_range(x)


def _check_image(image: Tensor, side: int) -> None:
    if image.dim() != 4 or tuple(image.shape[1:]) != (IMAGE_CHANNELS, side, side):
        raise ValueError(f"decoder: images of shape {tuple(image.shape)}; it takes (B, 3, {side}, {side})")
