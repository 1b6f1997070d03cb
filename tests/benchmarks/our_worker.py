"""Our models as one side of a comparison; given a task as argument, writes the weights for both sides instead.

We and diffusers read what our models were exported to, so both compute the same function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from tests.benchmarks.model_sizes import Sizes, Task
from tests.benchmarks.timed_worker import Inputs, Work, draw_inputs, serve
from unclip_models.clip_text import ClipText, ClipTextFeatures
from unclip_models.decoder import Decoder
from unclip_models.diffusers_format import export_diffusers, import_diffusers
from unclip_models.prior import DiffusionPrior
from unclip_models.randomness import SampleRandom
from unclip_models.settings import ClipTextConfig, DecoderConfig, DiffusionPriorConfig, UNetConfig, UpsamplerConfig
from unclip_models.upsampler import Upsampler

GUIDANCE_SCALE = 4.0


# ---- weights --------------------------------------------------------------------------------------------------------


def export_models(sizes: Sizes, folder: str) -> None:
    """Write a prior, a decoder and an upsampler of random weights; none of them zero, so that every input counts."""
    text = ClipTextConfig(context_length=sizes.context_length, width=sizes.embedding_dim)
    prior = DiffusionPriorConfig(
        embedding_dim=sizes.embedding_dim,
        text=text,
        width=sizes.embedding_dim,
        layers=sizes.prior_layers,
        heads=sizes.prior_heads,
    )
    decoder = DecoderConfig(
        image_size=sizes.decoder_px,
        embedding_dim=sizes.embedding_dim,
        text=text,
        unet=_unet_config(sizes, sizes.attention_px),
    )
    upsampler = UpsamplerConfig(
        image_size=4 * sizes.upsampler_px, input_size=sizes.upsampler_px, unet=_unet_config(sizes, ())
    )
    models = {"prior": DiffusionPrior(prior), "decoder": Decoder(decoder), "upsampler": Upsampler(upsampler)}
    torch.manual_seed(0)
    for name, model in models.items():
        _randomise(model)
        export_diffusers(model, Path(folder) / name)


def _unet_config(sizes: Sizes, attention_px: tuple[int, ...]) -> UNetConfig:
    return UNetConfig(
        model_channels=sizes.channels,
        channel_mult=sizes.channel_mult,
        num_res_blocks=sizes.num_res_blocks,
        attention_resolutions=attention_px,
        head_channels=sizes.head_channels,
        norm_groups=min(32, sizes.channels // 2),
        norm_group_min_channels=1,
    )


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    if isinstance(model, DiffusionPrior | Decoder):
        null = cast(ClipText, model.text_encoder)
        tokens = torch.zeros_like(null.null_tokens)
        tokens[:2] = torch.tensor([998, 999])
        null.set_null_caption(tokens, torch.randn_like(null.null_sequence), torch.randn_like(null.null_embedding))


# ---- ours -----------------------------------------------------------------------------------------------------------


def build(task: Task) -> Work:
    """Build our side of a task."""
    model = import_diffusers(Path(task.folder) / task.model, task.model).to(task.device)
    inputs = draw_inputs(task)
    if isinstance(model, DiffusionPrior):
        return _our_prior(task, model, inputs)
    if isinstance(model, Decoder) and task.rival == "dalle2":
        return _our_decoder(task, model, inputs)
    unet = cast(Decoder | Upsampler, model).unet
    embedding, context = unet_condition(task)
    return module_work(task, unet, lambda: cast(Tensor, unet(inputs.x, inputs.t, embedding=embedding, context=context)))


def _our_prior(task: Task, prior: DiffusionPrior, inputs: Inputs) -> Work:
    keep = torch.zeros(task.batch_size, dtype=torch.bool, device=task.device)

    def predict() -> Tensor:
        return cast(
            Tensor,
            prior(inputs.x, inputs.t, inputs.tokens, inputs.text_embedding, keep, text_sequence=inputs.text_sequence),
        )

    def sample() -> Tensor:
        return prior.sample(
            inputs.tokens,
            inputs.text_embedding,
            steps=task.sizes.steps["prior"],
            guidance_scale=GUIDANCE_SCALE,
            generators=_generators(task),
            num_candidates=1,
            sampler="ddpm" if task.rival == "diffusers" else "ddim",
            text_sequence=inputs.text_sequence,
        )

    if task.operation == "sample":
        return Work(prior, sample)
    if task.operation == "train" and task.rival == "dalle2":
        return Work(prior, lambda: prior.loss(_batch(inputs), _random(task))[0])
    return module_work(task, prior, predict)


def _our_decoder(task: Task, decoder: Decoder, inputs: Inputs) -> Work:
    keep = torch.zeros(task.batch_size, dtype=torch.bool, device=task.device)
    features = ClipTextFeatures(inputs.text_sequence, inputs.text_embedding)

    def predict() -> Tensor:
        z, tokens = inputs.image_embedding, inputs.tokens
        return cast(Tensor, decoder(inputs.x, inputs.t, z, tokens, keep, keep, features))

    def sample() -> Tensor:
        return decoder.sample(
            inputs.image_embedding,
            inputs.tokens,
            steps=task.sizes.steps["decoder"],
            guidance_scale=GUIDANCE_SCALE,
            sampler="ddim",
            generators=_generators(task),
            clip_text=features,
        )

    if task.operation == "sample":
        return Work(decoder, sample)
    if task.operation == "train":
        return Work(decoder, lambda: decoder.loss(_batch(inputs), _random(task))[0])
    return Work(decoder, predict)


def _batch(inputs: Inputs) -> dict[str, Tensor]:
    return {"image": inputs.x.clamp(-1, 1), **inputs._asdict()}


def _random(task: Task) -> SampleRandom:
    return SampleRandom(0, 0, range(task.batch_size), task.device)


def _generators(task: Task) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(task.batch_size)]


def module_work(task: Task, model: nn.Module, predict: Callable[[], Tensor]) -> Work:
    """Make the work of a bare module, whose training loss is the mean square of what it predicts."""
    return Work(model, (lambda: predict().float().square().mean()) if task.operation == "train" else predict)


def unet_condition(task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Draw what the decoder's U-Net is told: ``(B, 4ch)``, and four image tokens before the caption's ``(B, L, W)``."""
    if task.model == "upsampler":
        return None, None
    rng, sizes = torch.Generator().manual_seed(2), task.sizes
    embedding = torch.randn(task.batch_size, 4 * sizes.channels, generator=rng)
    context = torch.randn(task.batch_size, 4 + sizes.context_length, sizes.embedding_dim, generator=rng)
    return embedding.to(task.device), context.to(task.device)


def main() -> None:
    """Export the models, or serve."""
    if sys.argv[1:]:
        task = Task.from_json(sys.argv[1])
        export_models(task.sizes, task.folder)
    else:
        serve(build)


if __name__ == "__main__":
    main()
