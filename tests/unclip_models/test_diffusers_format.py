"""Parity with diffusers' own classes: outputs, whole trajectories and timesteps, in both directions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from torch import Tensor, nn

from tests.unclip_models.small_stack import randomised
from unclip_models.ar_prior import ARPrior
from unclip_models.clip_text import ClipTextFeatures
from unclip_models.decoder import Decoder
from unclip_models.diffusers_format import export_diffusers, import_diffusers
from unclip_models.diffusion import spaced_timesteps
from unclip_models.prior import DiffusionPrior
from unclip_models.sampling import ddim_sample
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
from unclip_models.upsampler import Upsampler

torch.set_num_threads(1)
DIM, CONTEXT = 20, 7
TOKENS = torch.tensor([[3, 4, 5, 6, 0, 0, 0], [3, 9, 8, 7, 5, 6, 1]])


def _prior(**changes: Any) -> DiffusionPrior:
    config = DiffusionPriorConfig(
        embedding_dim=DIM, text=ClipTextConfig(context_length=CONTEXT, width=DIM), width=48, layers=2, heads=3,
        embedding_scaling="mean_std", raw_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    prior = randomised(DiffusionPrior(dataclasses.replace(config, **changes))).eval()
    if prior.config.embedding_scaling == "mean_std":
        prior.scaling.set_statistics(torch.linspace(-1, 1, DIM), torch.linspace(0.5, 1.5, DIM))
    return _knowing_the_empty_caption(prior)


def _decoder(**changes: Any) -> Decoder:
    unet = UNetConfig(
        model_channels=24, channel_mult=(1, 2, 3), num_res_blocks=2, attention_resolutions=(4, 8), head_channels=24,
        norm_groups=8, norm_group_min_channels=1,
    )  # fmt: skip
    config = DecoderConfig(
        image_size=16, embedding_dim=DIM, unet=unet, text=ClipTextConfig(context_length=CONTEXT, width=DIM),
        context_width=36, null_embedding="learned", embedding_scale=1.0, raw_embeddings=True,
        diffusion=DiffusionConfig(variance="learned_range"),
    )  # fmt: skip
    torch.manual_seed(0)
    return _knowing_the_empty_caption(randomised(Decoder(dataclasses.replace(config, **changes))).eval())


def _knowing_the_empty_caption(model: Any) -> Any:
    if model.config.text.kind == "clip":
        rng = torch.Generator().manual_seed(5)
        model.text_encoder.set_null_caption(
            torch.tensor([3, 4, 0, 0, 0, 0, 0]),
            torch.randn(CONTEXT, DIM, generator=rng),
            torch.randn(DIM, generator=rng),
        )
    return model


# The first is shaped like the paper's 64 -> 256 (as Karlo's), the second like its 256 -> 1024.
UPSAMPLERS = {
    "256": UpsamplerConfig(
        image_size=32, input_size=8, enlarge_mode="bicubic",
        unet=UNetConfig(
            model_channels=24, channel_mult=(1, 2, 3), num_res_blocks=2, use_scale_shift_norm=False, norm_groups=8,
            norm_group_min_channels=1,
        ),
    ),
    "1024": UpsamplerConfig(
        image_size=64, input_size=16,
        unet=UNetConfig(
            model_channels=8, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, norm_groups=4,
            norm_group_min_channels=1,
        ),
        crop_fraction=1.0,
        diffusion=DiffusionConfig(schedule="linear", variance="learned_range"),
    ),
}  # fmt: skip


def _upsampler(name: str) -> Upsampler:
    torch.manual_seed(0)
    return randomised(Upsampler(UPSAMPLERS[name])).eval()


def _randn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
    assert float(ours.std()) > 0.05  # or nothing was compared


MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7], dtype=torch.bool)
NO, YES = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)


# ---- one pass -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prior_equals_prior_transformer(tmp_path: Path) -> None:
    prior = _prior()
    export_diffusers(prior, tmp_path)
    theirs = PriorTransformer.from_pretrained(tmp_path / "prior").eval()
    x, z_t, sequence, t = (
        _randn(2, DIM),
        _randn(2, DIM, seed=8),
        _randn(2, CONTEXT, DIM, seed=9),
        torch.tensor([3, 700]),
    )
    expected = theirs(
        x, t, proj_embedding=z_t, encoder_hidden_states=sequence, attention_mask=MASK
    ).predicted_image_embedding
    _close(prior(x, t, TOKENS, z_t, NO, sequence), expected)
    _close(prior.scaling.unscale(x), theirs.post_process_latents(x))
    back = import_diffusers(tmp_path, "prior")
    _close(back(x, t, TOKENS, z_t, NO, sequence), expected)


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["paper", "sqrt_dim"])
def test_scales_of_the_prior_go_into_the_exported_weights(tmp_path: Path, scaling: str) -> None:
    prior = _prior(embedding_scaling=scaling, raw_embeddings=False)
    export_diffusers(prior, tmp_path)
    theirs = PriorTransformer.from_pretrained(tmp_path / "prior").eval()
    x, z_t, sequence, t = (
        _randn(2, DIM),
        _randn(2, DIM, seed=8),
        _randn(2, CONTEXT, DIM, seed=9),
        torch.tensor([3, 700]),
    )
    expected = theirs(
        x, t, proj_embedding=z_t, encoder_hidden_states=sequence, attention_mask=MASK
    ).predicted_image_embedding
    _close(prior(x, t, TOKENS, z_t, NO, sequence), expected, atol=2e-5)
    _close(prior.scaling.unscale(x), theirs.post_process_latents(x))
    back = import_diffusers(tmp_path, "prior")
    assert back.config == prior.config
    _close(back(x, t, TOKENS, z_t, NO, sequence), expected, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_decoder_equals_unet_2d_condition_model(tmp_path: Path, learned: bool, scale_shift: bool) -> None:
    base = _decoder().config
    decoder = _decoder(
        unet=dataclasses.replace(base.unet, use_scale_shift_norm=scale_shift),
        diffusion=DiffusionConfig(variance="learned_range" if learned else "fixed_small"),
        embedding_scale=None if scale_shift else 1.0,
    )
    export_diffusers(decoder, tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "decoder").eval()
    text_proj = UnCLIPTextProjModel.from_pretrained(tmp_path / "text_proj").eval()
    x, z, z_t = _randn(2, 3, 16, 16), _randn(2, DIM, seed=8), _randn(2, DIM, seed=9)
    sequence, t = _randn(2, CONTEXT, DIM, seed=10), torch.tensor([3, 700])

    def expected(image_embeddings: Tensor) -> Tensor:
        context, embedding = text_proj(
            image_embeddings=image_embeddings, prompt_embeds=z_t, text_encoder_hidden_states=sequence,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        mask = nn.functional.pad(MASK, (4, 0), value=True)
        return unet(x, t, encoder_hidden_states=context, class_labels=embedding, attention_mask=mask).sample

    null = text_proj.learned_classifier_free_guidance_embeddings.expand(2, -1)
    back = import_diffusers(tmp_path, "decoder")
    assert back.config == decoder.config
    for model in (decoder, back):
        features = ClipTextFeatures(sequence, z_t)
        _close(model(x, t, z, TOKENS, NO, NO, features), expected(z))
        _close(model(x, t, z, TOKENS, YES, NO, features), expected(null))


@torch.no_grad()
@pytest.mark.parametrize("name", UPSAMPLERS)
def test_upsampler_equals_unet_2d_model(tmp_path: Path, name: str) -> None:
    upsampler = _upsampler(name)
    side = upsampler.config.image_size
    export_diffusers(upsampler, tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path / "super_res_first").eval()
    x, low, t = _randn(2, 3, side, side), _randn(2, 3, side // 4, side // 4, seed=8), torch.tensor([3, 700])
    mode = upsampler.config.enlarge_mode
    enlarged = nn.functional.interpolate(low, size=(side, side), mode=mode, antialias=mode == "bicubic")
    expected = theirs(torch.cat([x, enlarged], dim=1), t).sample
    _close(upsampler(x, t, low), expected)
    back = import_diffusers(tmp_path, "upsampler")
    assert back.config == upsampler.config
    _close(back(x, t, low), expected)


@torch.no_grad()
def test_a_pipeline_that_diffusers_wrote_is_read(tmp_path: Path) -> None:
    """Karlo's published folder holds nothing of ours: configs are inferred, the empty caption is unknown."""
    torch.manual_seed(0)
    prior = PriorTransformer(
        num_attention_heads=3, attention_head_dim=16, num_layers=2, embedding_dim=DIM, num_embeddings=CONTEXT
    ).eval()
    unet = UNet2DConditionModel(
        sample_size=16, out_channels=6, layers_per_block=1, block_out_channels=(16, 32, 48), attention_head_dim=16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=36, class_embed_type="identity",
        resnet_time_scale_shift="scale_shift", norm_num_groups=8, in_channels=3,
    ).eval()  # fmt: skip
    text_proj = UnCLIPTextProjModel(clip_embeddings_dim=DIM, time_embed_dim=64, cross_attention_dim=36).eval()
    super_res = UNet2DModel(
        sample_size=32, in_channels=6, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
        add_attention=False, norm_num_groups=8,
    ).eval()  # fmt: skip
    parts = {"prior": prior, "decoder": unet, "text_proj": text_proj, "super_res_first": super_res}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    x, z_t, sequence, t = (
        _randn(2, DIM),
        _randn(2, DIM, seed=8),
        _randn(2, CONTEXT, DIM, seed=9),
        torch.tensor([3, 700]),
    )
    ours = import_diffusers(tmp_path, "prior")
    expected = prior(x, t, proj_embedding=z_t, encoder_hidden_states=sequence, attention_mask=MASK)
    _close(ours(x, t, TOKENS, z_t, NO, sequence), expected.predicted_image_embedding)
    with pytest.raises(ValueError, match="call set_null_caption first"):
        ours(x, t, TOKENS, z_t, YES, sequence)
    image, low = _randn(2, 3, 32, 32), _randn(2, 3, 8, 8, seed=8)
    enlarged = nn.functional.interpolate(low, size=(32, 32), mode="bicubic", antialias=True)
    expected = super_res(torch.cat([image, enlarged], dim=1), t).sample
    _close(import_diffusers(tmp_path, "upsampler")(image, t, low), expected)
    decoder = import_diffusers(tmp_path, "decoder")
    assert decoder.config.unet.attention_resolutions == (8, 4) and decoder.config.text.context_length == 77
    context, embedding = text_proj(
        image_embeddings=x, prompt_embeds=z_t, text_encoder_hidden_states=_randn(2, 77, DIM),
        do_classifier_free_guidance=False,
    )  # fmt: skip
    expected = unet(image[:, :, :16, :16], t, encoder_hidden_states=context, class_labels=embedding).sample
    features = ClipTextFeatures(_randn(2, 77, DIM), z_t)
    tokens = torch.ones(2, 77, dtype=torch.int64)
    _close(decoder(image[:, :, :16, :16], t, x, tokens, NO, NO, features), expected)


# ---- whole trajectories ---------------------------------------------------------------------------------------------


def _run(scheduler: Any, predict: Any, shape: tuple[int, ...], num_steps: int, seed: int) -> Tensor:
    """Step a scheduler of diffusers to the end, all noise from one generator, as our samplers draw it."""
    _in_float64(scheduler)
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    timesteps = [int(t) for t in scheduler.timesteps]
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        options: dict[str, Any] = {"generator": generator}
        if isinstance(scheduler, UnCLIPScheduler):
            options["prev_timestep"] = following
        if isinstance(scheduler, DDIMScheduler):
            options["use_clipped_model_output"] = True
        x = scheduler.step(predict(x, torch.full((shape[0],), t)), t, x, **options).prev_sample
    return x


def _in_float64(scheduler: Any) -> None:
    """Give a scheduler its tables in float64, by its own formula.

    With its float32 tables UnCLIPScheduler's first and last step are off by up to 5e-4, and so it differs from us by up
    to 2e-3; DDPMScheduler and DDIMScheduler agree as they are (``test_diffusers_edges.py``).
    """
    config, total = scheduler.config, scheduler.config.num_train_timesteps
    if config.beta_schedule == "linear":
        scheduler.betas = torch.linspace(config.beta_start, config.beta_end, total, dtype=torch.float64)
    else:
        edges = (torch.arange(total + 1, dtype=torch.float64) / total + 0.008) / 1.008 * torch.pi / 2
        alpha_bar = torch.cos(edges) ** 2
        scheduler.betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [25, 64])
def test_a_trajectory_of_the_prior_equals_karlos(tmp_path: Path, num_steps: int) -> None:
    prior = _prior()
    export_diffusers(prior, tmp_path)
    theirs = PriorTransformer.from_pretrained(tmp_path / "prior").eval()
    z_t, sequence = _randn(1, DIM, seed=8), _randn(1, CONTEXT, DIM, seed=9)
    text = prior.text_encoder

    def predict(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = (
            theirs(x, t, proj_embedding=z, encoder_hidden_states=s, attention_mask=m).predicted_image_embedding
            for z, s, m in (
                (z_t, sequence, MASK[:1]),
                (text.null_embedding[None], text.null_sequence[None], text.null_tokens[None] != 0),
            )
        )
        return uncond + 4.0 * (cond - uncond)

    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    expected = theirs.post_process_latents(_run(scheduler, predict, (1, DIM), num_steps, seed=3))
    ours = prior.sample(
        TOKENS[:1], z_t, steps=num_steps, guidance_scale=4.0, generators=[torch.Generator().manual_seed(3)],
        num_candidates=1, sampler="ddpm", clip_range=5.0, text_sequence=sequence,
    )  # fmt: skip
    _close(ours, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scheduler_kind", [UnCLIPScheduler, DDPMScheduler])
def test_a_trajectory_of_the_decoder_equals_karlos(tmp_path: Path, scheduler_kind: Any) -> None:
    decoder = _decoder()
    export_diffusers(decoder, tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "decoder").eval()
    text_proj = UnCLIPTextProjModel.from_pretrained(tmp_path / "text_proj").eval()
    z, z_t, sequence = _randn(1, DIM), _randn(1, DIM, seed=8), _randn(1, CONTEXT, DIM, seed=9)
    text = decoder.text_encoder
    context, embedding = text_proj(
        image_embeddings=z,
        prompt_embeds=torch.cat([text.null_embedding[None], z_t]),
        text_encoder_hidden_states=torch.cat([text.null_sequence[None], sequence]),
        do_classifier_free_guidance=True,
    )
    mask = nn.functional.pad(torch.cat([text.null_tokens[None] != 0, MASK[:1]]), (4, 0), value=True)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out = unet(
            torch.cat([x, x]), t.repeat(2), encoder_hidden_states=context, class_labels=embedding, attention_mask=mask
        ).sample
        uncond, cond = out.chunk(2)
        noise = uncond[:, :3] + 8.0 * (cond[:, :3] - uncond[:, :3])
        return torch.cat([noise, cond[:, 3:]], dim=1)

    if scheduler_kind is UnCLIPScheduler:
        scheduler: Any = UnCLIPScheduler(variance_type="learned_range")
    else:
        scheduler = DDPMScheduler.from_pretrained(tmp_path / "decoder_scheduler")
    expected = _run(scheduler, predict, (1, 3, 16, 16), 50, seed=3).clamp(-1, 1)
    ours = decoder.sample(
        z, TOKENS[:1], steps=50, guidance_scale=8.0, generators=[torch.Generator().manual_seed(3)],
        clip_text=ClipTextFeatures(sequence, z_t),
    )  # fmt: skip
    _close(ours, expected, atol=1e-4)


@torch.no_grad()
def test_a_trajectory_of_the_first_upsampler_equals_karlos(tmp_path: Path) -> None:
    upsampler = _upsampler("256")
    export_diffusers(upsampler, tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path / "super_res_first").eval()
    low = ((_randn(1, 3, 8, 8).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    enlarged = nn.functional.interpolate(low, size=(32, 32), mode="bicubic", antialias=True)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return theirs(torch.cat([x, enlarged], dim=1), t).sample

    expected = _run(UnCLIPScheduler(), predict, (1, 3, 32, 32), 7, seed=3).clamp(-1, 1)
    ours = upsampler.sample(low, steps=7, sampler="ddpm", generators=[torch.Generator().manual_seed(3)])
    _close(ours, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_ddim_trajectory_equals_diffusers(tmp_path: Path, schedule: str) -> None:
    """DDIMScheduler knows equal strides only; so both visit 0, 40, .. 960."""
    config = dataclasses.replace(UPSAMPLERS["256"], diffusion=DiffusionConfig(schedule=schedule))  # type: ignore[arg-type]
    torch.manual_seed(0)
    upsampler = randomised(Upsampler(config)).eval()
    export_diffusers(upsampler, tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path / "super_res_first").eval()
    betas = json.loads((tmp_path / "super_res_scheduler" / "scheduler_config.json").read_text())
    scheduler = DDIMScheduler(
        beta_start=betas["beta_start"], beta_end=betas["beta_end"], beta_schedule=betas["beta_schedule"]
    )
    low = _randn(1, 3, 8, 8).clamp(-1, 1)
    enlarged = upsampler._enlarged(low, torch.zeros(1, 3, 32, 32))
    expected = _run(
        scheduler, lambda x, t: theirs(torch.cat([x, enlarged], dim=1), t).sample, (1, 3, 32, 32), 25, seed=3
    )
    ours = ddim_sample(
        lambda x, t: upsampler(x, t, low), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)),
        upsampler.diffusion.respaced(range(0, 1000, 40)), clip=lambda x: x.clamp(-1, 1),
    )  # fmt: skip
    _close(ours, expected, atol=1e-4)


@pytest.mark.parametrize("num_steps", [7, 15, 25, 27, 50, 64, 250])
def test_timesteps_are_karlos(num_steps: int) -> None:
    karlo = UnCLIPScheduler()
    ddpm = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace")
    for scheduler in (karlo, ddpm):
        scheduler.set_timesteps(num_steps)
        assert spaced_timesteps(1000, num_steps)[::-1] == scheduler.timesteps.tolist()


# ---- what diffusers cannot hold -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_decoder_with_a_text_encoder_of_its_own_keeps_it_beside(tmp_path: Path) -> None:
    text = TextEncoderConfig(context_length=CONTEXT, width=36, layers=1, heads=2, vocab_size=20)
    decoder = _decoder(text=text, context_width=None, raw_embeddings=False, embedding_scale=None)
    export_diffusers(decoder, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder", "decoder_scheduler", "unclip.safetensors"]
    back = import_diffusers(tmp_path, "decoder")
    x, z, t = _randn(2, 3, 16, 16), _randn(2, DIM, seed=8), torch.tensor([3, 700])
    _close(back(x, t, z, TOKENS, NO, NO), decoder(x, t, z, TOKENS, NO, NO))
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "decoder").eval()
    condition = decoder.condition(z, TOKENS, NO, NO)
    expected = unet(x, t, encoder_hidden_states=condition.context, class_labels=condition.embedding).sample
    _close(decoder(x, t, z, TOKENS, NO, NO), expected)


def test_what_diffusers_has_no_class_for_is_refused(tmp_path: Path) -> None:
    text = TextEncoderConfig(context_length=CONTEXT, width=16, layers=1, heads=2, vocab_size=20)
    ar = ARPrior(ARPriorConfig(embedding_dim=DIM, num_codes=3, text=text, width=16, layers=1, heads=2))
    with pytest.raises(ValueError, match="ARPrior: diffusers has no class for it"):
        export_diffusers(ar, tmp_path)
    with pytest.raises(ValueError, match=r"prior\.text\.width: 16, embedding_dim: 20"):
        export_diffusers(_prior(text=text), tmp_path)
    narrow = dataclasses.replace(_decoder().config.unet, norm_groups=32, norm_group_min_channels=4)
    with pytest.raises(ValueError, match=r"norms have \[6, 12, 18, 24, 30\] groups"):
        export_diffusers(_decoder(unet=narrow), tmp_path)
    strided = dataclasses.replace(UPSAMPLERS["256"].unet, resblock_updown=False)
    with pytest.raises(ValueError, match="resblock_updown: false"):
        export_diffusers(Upsampler(dataclasses.replace(UPSAMPLERS["256"], unet=strided)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    export_diffusers(_prior(), tmp_path)
    with pytest.raises(ValueError, match="holds a DiffusionPrior, not a decoder"):
        import_diffusers(tmp_path, "decoder")
    (tmp_path / "unclip.safetensors").unlink()
    with pytest.raises(ValueError, match=r"decoder/config\.json: cannot be read"):
        import_diffusers(tmp_path, "decoder")
    (tmp_path / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no such file; give a folder of diffusers weights"):
        import_diffusers(tmp_path, "prior")
