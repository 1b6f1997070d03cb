"""A whole stack of random weights, tiny, with embeddings of 12 dimensions and images of 8, 16 and 32 px."""

import torch

from unclip_models.clip import ClipModel
from unclip_models.decoder import Decoder
from unclip_models.generate import UnCLIP
from unclip_models.prior import DiffusionPrior
from unclip_models.sampling_settings import DecoderSampling, PriorSampling, SamplingConfig, UpsamplerSampling
from unclip_models.settings import (
    ClipModelConfig,
    ClipTextConfig,
    DecoderConfig,
    DiffusionConfig,
    DiffusionPriorConfig,
    TextEncoderConfig,
    UNetConfig,
    UpsamplerConfig,
)
from unclip_models.upsampler import Upsampler

TEXT = TextEncoderConfig(context_length=8, width=16, layers=1, heads=2)
CLIP_TEXT = ClipTextConfig(context_length=16, width=32)
UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
FAST = SamplingConfig(
    prior=PriorSampling(steps=4),
    decoder=DecoderSampling(steps=4, guidance_scale=2.0),
    upsamplers=(UpsamplerSampling(steps=2), UpsamplerSampling(steps=2)),
)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Move weights away from their zeros, so that every input counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


def small_clip() -> ClipModel:
    """Build the CLIP."""
    return ClipModel.from_config(
        ClipModelConfig(embedding_dim=12, image_size=16, vision_width=32, vision_layers=1, text_width=32, text_layers=1)
    ).freeze()


def small_stack(*, reads_clip_text: bool = False, raw_embeddings: bool = False) -> UnCLIP:
    """Build the stack; with ``reads_clip_text`` and ``raw_embeddings`` in the manner of Karlo."""
    torch.manual_seed(0)
    clip = small_clip()
    text = CLIP_TEXT if reads_clip_text else TEXT
    prior = DiffusionPrior(
        DiffusionPriorConfig(embedding_dim=12, text=text, width=16, layers=1, heads=2, raw_embeddings=raw_embeddings)
    )
    decoder = Decoder(
        DecoderConfig(
            image_size=8,
            embedding_dim=12,
            unet=UNetConfig(
                model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=8
            ),
            text=text,
            raw_embeddings=raw_embeddings,
            diffusion=DiffusionConfig(prediction="v"),
        )
    )
    if reads_clip_text:
        tokens = clip.tokenize([""])
        sequence, embedding = clip.encode_text_sequence(tokens, normalize=not raw_embeddings)
        for model in (prior, decoder):
            model.text_encoder.set_null_caption(tokens[0], sequence[0], embedding[0])
    upsamplers = [Upsampler(UpsamplerConfig(image_size=2 * side, input_size=side, unet=UNET)) for side in (8, 16)]
    return UnCLIP(clip, randomised(prior), randomised(decoder), [randomised(up) for up in upsamplers])
