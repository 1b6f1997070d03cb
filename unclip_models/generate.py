"""Generate images with a whole unCLIP stack: CLIP, prior, decoder and upsamplers (unCLIP, section 2).

Every image is a function of its caption (or embedding), its seed and the weights: all noise comes from generators
seeded per image and per model, so neither batch size nor neighbours matter (up to the rounding of batched arithmetic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip_models.ar_prior import ARPrior
from unclip_models.clip import ClipModel
from unclip_models.clip_input import tokenize
from unclip_models.clip_text import ClipText, ClipTextFeatures
from unclip_models.decoder import Decoder
from unclip_models.prior import DiffusionPrior
from unclip_models.sampling import seeded_generators
from unclip_models.sampling_settings import PriorSampling, SamplingConfig
from unclip_models.upsampler import Upsampler

_PX_AT_ONCE = 4 * 1024**2  # of images that an upsampler samples together


@dataclass(frozen=True)
class GeneratedImages:
    """Images of every resolution, and the embeddings they were decoded from.

    Attributes:
        images: side in px -> uint8 ``(B, side, side, 3)`` on the CPU, smallest first.
        image_embeddings: unit-norm z_i, float32 ``(B, D)`` on the CPU.
    """

    images: dict[int, Tensor]
    image_embeddings: Tensor

    @property
    def final(self) -> Tensor:
        """The largest images, uint8 ``(B, S, S, 3)``."""
        return self.images[max(self.images)]


def to_uint8(images: Tensor) -> Tensor:
    """Turn ``(B, 3, H, W)`` in [-1, 1] into uint8 ``(B, H, W, 3)`` on the CPU.

    Raises:
        ValueError: if a number is not finite; it would be a black pixel.
    """
    if num_bad := int((~torch.isfinite(images).flatten(1).all(dim=1)).sum()):
        raise ValueError(
            f"{num_bad} of {len(images)} images of {images.shape[-1]} px hold numbers that are not finite; generate in "
            "precision fp32, or look at the weights of the model that makes this size"
        )
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


class UnCLIP:
    """A whole stack, ready to generate; all models are put into eval mode.

    Args:
        clip: the CLIP the others were trained with.
        prior: diffusion or autoregressive; None feeds the text embedding to the decoder, as a text-embedding decoder
            wants it, and as the paper's "no prior" baseline does with an ordinary one.
        decoder: renders the smallest image.
        upsamplers: in order, each taking the side its predecessor returns.

    Raises:
        ValueError: if dimensions or sides do not fit together.
    """

    def __init__(
        self,
        clip: ClipModel,
        prior: DiffusionPrior | ARPrior | None,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
    ) -> None:
        self.clip, self.prior, self.decoder, self.upsamplers = clip, prior, decoder, tuple(upsamplers)
        for name, model in (("prior", prior), ("decoder", decoder)):
            if model is not None and model.config.embedding_dim != clip.embedding_dim:
                raise ValueError(
                    f"UnCLIP: the {name} takes embeddings of {model.config.embedding_dim} dimensions, the CLIP "
                    f"({clip.origin}) has {clip.embedding_dim}; use the CLIP it was trained with"
                )
        side = decoder.config.image_size
        for index, upsampler in enumerate(self.upsamplers):
            if upsampler.config.input_size != side:
                raise ValueError(
                    f"UnCLIP: upsampler {index} takes {upsampler.config.input_size} px but is given {side} px"
                )
            side = upsampler.config.image_size
        self._check_norms()
        for module in (clip, prior, decoder, *self.upsamplers):
            if module is not None:
                module.eval()

    def _check_norms(self) -> None:
        """Prior and decoder must agree on whether embeddings have unit norm."""
        if isinstance(self.prior, DiffusionPrior) and self.prior.config.raw_embeddings == self.unit_norm:
            raise ValueError(
                f"UnCLIP: raw_embeddings is {self.prior.config.raw_embeddings} in the prior and {not self.unit_norm} "
                "in the decoder; use two models made for the same embeddings"
            )

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are; all models must be there."""
        return next(self.decoder.parameters()).device

    @property
    def unit_norm(self) -> bool:
        """Whether the stack works on embeddings of unit norm, as those trained here do, or on raw ones (Karlo)."""
        return not self.decoder.config.raw_embeddings

    def text_to_image(
        self, captions: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig | None = None
    ) -> GeneratedImages:
        """Generate one image per caption.

        Args:
            captions: B captions.
            seeds: B seeds; the same caption and seed give the same image.
            sampling: steps, samplers and guidance; None is the paper's.

        Raises:
            ValueError: if captions and seeds, or upsamplers and their settings, differ in number.
        """
        sampling = sampling or SamplingConfig()
        embeddings = self.imagine(captions, seeds, sampling.prior)
        return self.decode(embeddings, seeds, sampling, captions=captions)

    @torch.no_grad()
    def imagine(self, captions: Sequence[str], seeds: Sequence[int], sampling: PriorSampling | None = None) -> Tensor:
        """Draw an image embedding for every caption from the prior: unit-norm float32 ``(B, D)``."""
        _check_count("captions", len(captions), seeds)
        sampling = sampling or PriorSampling()
        text = self._clip_text(captions)
        if self.prior is None:
            return text.embedding
        reads_clip = isinstance(self.prior.text_encoder, ClipText)
        return self.prior.sample(
            self._tokens(self.prior, captions),
            text.embedding,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            generators=seeded_generators(seeds, "prior"),
            num_candidates=sampling.num_candidates,
            sampler=sampling.sampler,
            clip_range=sampling.clip_range,
            text_sequence=text.sequence if reads_clip else None,
        )

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images ``(B, 3, H, W)``, uint8 or in [-1, 1], as the decoder wants them: z_i, float32 ``(B, D)``."""
        return self.clip.encode_image(images, normalize=self.unit_norm).to(self.device)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions as the decoder wants embeddings: z_t, float32 ``(B, D)``."""
        return self.clip.encode_text(self.clip.tokenize(captions), normalize=self.unit_norm).to(self.device)

    def caption_inputs(self, captions: Sequence[str] | None) -> tuple[Tensor | None, ClipTextFeatures | None]:
        """Return what the decoder reads of captions: tokens and, for a decoder that reads CLIP's text, its features."""
        if captions is None:
            return None, None
        reads_clip = isinstance(self.decoder.text_encoder, ClipText)
        return self._tokens(self.decoder, captions), self._clip_text(captions) if reads_clip else None

    def _tokens(self, model: DiffusionPrior | ARPrior | Decoder, captions: Sequence[str]) -> Tensor:
        reads_clip = isinstance(model.text_encoder, ClipText)
        length = model.config.text.context_length
        tokens = self.clip.tokenize(captions) if reads_clip else tokenize(captions, length)
        return tokens.to(self.device)

    @torch.no_grad()
    def _clip_text(self, captions: Sequence[str]) -> ClipTextFeatures:
        sequence, embedding = self.clip.encode_text_sequence(self.clip.tokenize(captions), normalize=self.unit_norm)
        return ClipTextFeatures(sequence.to(self.device), embedding.to(self.device))

    @torch.no_grad()
    def decode(
        self,
        image_embeddings: Tensor,
        seeds: Sequence[int],
        sampling: SamplingConfig | None = None,
        *,
        captions: Sequence[str] | None = None,
        x_T: Tensor | None = None,  # noqa: N803 - the paper's letter
    ) -> GeneratedImages:
        """Render embeddings at every resolution.

        Args:
            image_embeddings: unit-norm z_i ``(B, D)``.
            seeds: B seeds.
            sampling: as in :meth:`text_to_image`; ``prior`` is not used.
            captions: B captions for the decoder; None withholds them.
            x_T: the decoder's starting noise, e.g. from ``Decoder.invert``; None draws it from the seeds.
        """
        sampling = self._fitting(sampling)
        _check_count("image embeddings", len(image_embeddings), seeds)
        if captions is not None:
            _check_count("captions", len(captions), seeds)
        z = image_embeddings.to(self.device)
        tokens, clip_text = self.caption_inputs(captions)
        options = sampling.decoder
        x = self.decoder.sample(
            z,
            tokens,
            steps=options.steps,
            guidance_scale=options.guidance_scale,
            guidance_rescale=options.guidance_rescale,
            sampler=options.sampler,
            eta=options.eta,
            dynamic_percentile=options.dynamic_percentile,
            generators=seeded_generators(seeds, "decoder"),
            x_T=x_T,
            clip_text=clip_text,
        )
        return GeneratedImages(self.enlarge(x, seeds, sampling), z.float().cpu())

    @torch.no_grad()
    def enlarge(self, x: Tensor, seeds: Sequence[int], sampling: SamplingConfig | None = None) -> dict[int, Tensor]:
        """Run the upsamplers.

        Args:
            x: images of the decoder's side ``(B, 3, S, S)`` in [-1, 1].
            seeds: B seeds.
            sampling: as in :meth:`text_to_image`; only ``upsamplers`` is used.

        Returns:
            Side in px -> uint8 ``(B, side, side, 3)`` on the CPU, the given images first.
        """
        sampling = self._fitting(sampling)
        images = {self.decoder.config.image_size: to_uint8(x)}
        for index, upsampler in enumerate(self.upsamplers):
            up = sampling.upsamplers[index]
            generators = seeded_generators(seeds, f"upsampler_{index}")
            # Of large images a few at a time: each takes gigabytes, and its noise is its own.
            num_at_once = max(1, _PX_AT_ONCE // upsampler.config.image_size**2)
            parts = [slice(start, start + num_at_once) for start in range(0, len(x), num_at_once)]
            x = torch.cat(
                [
                    upsampler.sample(
                        x[part],
                        steps=up.steps,
                        sampler=up.sampler,
                        eta=up.eta,
                        generators=generators[part],
                        noise_temperature=up.noise_temperature,
                        noise_level=up.noise_level,
                        tile_px=up.tile_px,
                    )
                    for part in parts
                ]
            )
            images[upsampler.config.image_size] = to_uint8(x)
        return images

    def _fitting(self, sampling: SamplingConfig | None) -> SamplingConfig:
        """Return the settings, or the paper's for as many upsamplers as there are; refuse too few."""
        sampling = sampling or SamplingConfig(upsamplers=SamplingConfig().upsamplers[: len(self.upsamplers)])
        if len(sampling.upsamplers) < len(self.upsamplers):
            raise ValueError(
                f"UnCLIP: sampling.upsamplers has {len(sampling.upsamplers)} entries for {len(self.upsamplers)} "
                "upsamplers; give one each"
            )
        return sampling


def _check_count(what: str, count: int, seeds: Sequence[int]) -> None:
    if count != len(seeds):
        raise ValueError(f"UnCLIP: {count} {what} but {len(seeds)} seeds; give one seed per image")
