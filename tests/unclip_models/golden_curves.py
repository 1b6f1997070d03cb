"""Loss curves of every model and baseline, 20 optimizer steps each on fixed data: small, so that a change shows.

``python -m tests.unclip_models.golden_curves`` writes the file that ``test_golden_curves.py`` compares with; do so only
when the numbers are meant to change, and say why in the commit.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip_models.ar_prior import ARPrior
from unclip_models.checkpoint import build
from unclip_models.clip_text import ClipText
from unclip_models.prior import DiffusionPrior
from unclip_models.randomness import SampleRandom
from unclip_models.settings import (
    ARPriorConfig,
    ClipTextConfig,
    DecoderConfig,
    DiffusionConfig,
    DiffusionPriorConfig,
    TextEncoderConfig,
    UNetConfig,
    UpsamplerConfig,
)

GOLDEN = Path(__file__).parent / "golden_curves.json"
NUM_STEPS, BATCH, DIM = 20, 8, 16

TEXT = TextEncoderConfig(context_length=6, width=16, layers=1, heads=2, vocab_size=32)
CLIP_TEXT = ClipTextConfig(context_length=6, width=16)
UNET = UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, dropout=0.1)
PRIOR = DiffusionPriorConfig(embedding_dim=DIM, text=dataclasses.replace(TEXT, layers=0), width=32, layers=2, heads=2)
DECODER = DecoderConfig(
    image_size=8,
    embedding_dim=DIM,
    text=TEXT,
    unet=dataclasses.replace(UNET, attention_resolutions=(4,), head_channels=16),
    null_embedding="learned",
)
UPSAMPLER = UpsamplerConfig(image_size=32, input_size=8, crop_fraction=0.5, unet=UNET)

CONFIGS: dict[str, Any] = {
    "prior": PRIOR,
    "prior_sqrt_dim": dataclasses.replace(PRIOR, embedding_scaling="sqrt_dim"),
    "prior_of_karlo": dataclasses.replace(PRIOR, text=CLIP_TEXT, embedding_scaling="mean_std"),
    "ar_prior": ARPriorConfig(
        embedding_dim=DIM, num_codes=6, num_buckets=8, num_dot_buckets=8, text=TEXT, width=32, layers=2, heads=2
    ),
    "decoder": DECODER,
    "decoder_of_karlo": dataclasses.replace(DECODER, text=CLIP_TEXT, context_width=24),
    "text_embedding_decoder": dataclasses.replace(DECODER, condition_on="text_embedding"),
    "text_only_decoder": dataclasses.replace(DECODER, embedding_dropout=1.0, caption_dropout=0.2),
    "upsampler_blur": UPSAMPLER,
    "upsampler_bsr": dataclasses.replace(
        UPSAMPLER, degradation="bsr_light", diffusion=DiffusionConfig(schedule="linear")
    ),
}


def make(name: str) -> nn.Module:
    """Build a model with weights and measured tables that depend on nothing but its config."""
    torch.manual_seed(0)
    model = build(CONFIGS[name])
    rng = torch.Generator().manual_seed(1)
    if isinstance(model, ARPrior):
        edges = torch.linspace(-0.6, 0.6, 9)
        model.set_pca(
            mean=torch.zeros(DIM), axes=torch.eye(DIM)[:6], edges=edges.expand(6, -1), dot_edges=edges.clone()
        )
    if isinstance(model, DiffusionPrior) and model.config.embedding_scaling == "mean_std":
        model.scaling.set_statistics(torch.full((DIM,), 0.02), torch.full((DIM,), 0.25))
    if isinstance(text := getattr(model, "text_encoder", None), ClipText):
        text.set_null_caption(
            torch.tensor([30, 31, 0, 0, 0, 0]), torch.randn(6, 16, generator=rng), torch.randn(DIM, generator=rng)
        )
    return model.train()


def make_batch() -> dict[str, Tensor]:
    """Return eight samples with every field that a model may want; images have something to be learnt."""
    rng = torch.Generator().manual_seed(2)
    image_embedding = nn.functional.normalize(torch.randn(BATCH, DIM, generator=rng), dim=1)
    noise = torch.randn(BATCH, DIM, generator=rng)
    tokens = torch.randint(1, 32, (BATCH, 6), generator=rng)
    tokens[:, 4:] = 0
    return {
        "image_embedding": image_embedding,
        "text_embedding": nn.functional.normalize(image_embedding + 0.3 * noise, dim=1),
        "text_sequence": torch.randn(BATCH, 6, 16, generator=rng),
        "tokens": tokens,
    }


def images_for(config: Any) -> dict[str, Tensor]:
    """Return images of a model's side: smooth waves whose phase is the sample."""
    side = getattr(config, "image_size", 0)
    grid = torch.arange(side, dtype=torch.float32) / max(side, 1) * 6.283
    phase = torch.arange(BATCH, dtype=torch.float32)[:, None, None, None]
    channel = torch.arange(3, dtype=torch.float32)[None, :, None, None]
    return {"image": torch.sin(grid[None, None, :, None] + grid * (1 + channel) + phase) * 0.8} if side else {}


def curve(name: str, *, autocast: bool = False, num_steps: int = NUM_STEPS) -> list[float]:
    """Train a model for a few steps; return the loss before each of them."""
    model = make(name)
    batch = make_batch() | images_for(CONFIGS[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    losses = []
    for step in range(num_steps):
        random = SampleRandom(0, step, range(step * BATCH, (step + 1) * BATCH))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = model.loss(batch, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    curves = {name: [float(f"{loss:.6g}") for loss in curve(name)] for name in CONFIGS}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
    print(f"{GOLDEN}: {len(curves)} curves")
