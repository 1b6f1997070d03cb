"""What diffusers cannot hold is refused, what it leaves unsaid is not guessed; its schedulers are taken as shipped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PriorTransformer, UNet2DModel
from torch import Tensor

from tests.unclip_models.small_stack import randomised
from tests.unclip_models.test_diffusers_format import (
    CONTEXT,
    DIM,
    MASK,
    TOKENS,
    UPSAMPLERS,
    _decoder,
    _prior,
    _randn,
    _upsampler,
)
from unclip_models.diffusers_format import export_diffusers, import_diffusers
from unclip_models.diffusion import spaced_timesteps
from unclip_models.settings import DiffusionConfig
from unclip_models.upsampler import Upsampler

torch.set_num_threads(1)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert float(ours.std()) > 0.05


# ---- trajectories, nothing of diffusers touched ---------------------------------------------------------------------


def _ancestral(folder: Path, predict: Any, shape: tuple[int, ...], num_steps: int) -> Tensor:
    scheduler = DDPMScheduler.from_pretrained(folder)
    scheduler.set_timesteps(num_steps)
    generator = _generator()
    x = torch.randn(shape, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t.expand(shape[0])), int(t), x, generator=generator).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("num_steps", [25, 64])
def test_a_prior_walks_as_its_exported_scheduler(tmp_path: Path, num_steps: int) -> None:
    prior = _prior()
    export_diffusers(prior, tmp_path)
    theirs = PriorTransformer.from_pretrained(tmp_path / "prior").eval()
    z_t, sequence = _randn(1, DIM, seed=8), _randn(1, CONTEXT, DIM, seed=9)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out = theirs(x, t, proj_embedding=z_t, encoder_hidden_states=sequence, attention_mask=MASK[:1])
        return out.predicted_image_embedding

    expected = theirs.post_process_latents(_ancestral(tmp_path / "prior_scheduler", predict, (1, DIM), num_steps))
    ours = prior.sample(
        TOKENS[:1], z_t, steps=num_steps, guidance_scale=1.0, generators=[_generator()], num_candidates=1,
        sampler="ddpm", clip_range=5.0, text_sequence=sequence,
    )  # fmt: skip
    _close(ours, expected)


def _enlarged(upsampler: Upsampler) -> tuple[Tensor, Tensor]:
    side = upsampler.config.image_size
    low = ((_randn(1, 3, side // 4, side // 4).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return low, upsampler._enlarged(low, torch.zeros(1, 3, side, side))


@torch.no_grad()
def test_an_upsampler_walks_as_its_exported_scheduler(tmp_path: Path) -> None:
    upsampler = _upsampler("256")
    export_diffusers(upsampler, tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path / "super_res_first").eval()
    low, enlarged = _enlarged(upsampler)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return theirs(torch.cat([x, enlarged], dim=1), t).sample

    expected = _ancestral(tmp_path / "super_res_scheduler", predict, (1, 3, 32, 32), 7).clamp(-1, 1)
    _close(upsampler.sample(low, steps=7, sampler="ddpm", generators=[_generator()]), expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "num_steps"), [("256", 27), ("1024", 15)])
def test_ddim_at_the_papers_steps(tmp_path: Path, name: str, num_steps: int) -> None:
    """DDIMScheduler goes back by equal strides only; given the respaced betas, its stride of 1 visits the same list."""
    upsampler = _upsampler(name)
    export_diffusers(upsampler, tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path / "super_res_first").eval()
    process = upsampler.diffusion.respaced(spaced_timesteps(1000, num_steps))
    low, enlarged = _enlarged(upsampler)
    scheduler = DDIMScheduler(num_train_timesteps=num_steps, trained_betas=process.betas.tolist())
    scheduler.set_timesteps(num_steps)
    x = torch.randn(1, 3, *enlarged.shape[2:], generator=_generator())
    for index in scheduler.timesteps:
        t = torch.tensor([process.timesteps[int(index)]])
        noise = theirs(torch.cat([x, enlarged], dim=1), t).sample[:, :3]  # DDIM leaves a learned variance alone
        x = scheduler.step(noise, int(index), x, use_clipped_model_output=True).prev_sample
    _close(upsampler.sample(low, steps=num_steps, sampler="ddim", generators=[_generator()]), x.clamp(-1, 1))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_noise_level": 0.3}, r"max_noise_level: 0\.3"),
        ({"unet": dataclasses.replace(UPSAMPLERS["256"].unet, channel_mult=(2, 4))}, "the first must be 1"),
    ],
)
def test_an_upsampler_that_would_lose_something_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    model = Upsampler(dataclasses.replace(UPSAMPLERS["256"], **changes))
    with pytest.raises(ValueError, match=message):
        export_diffusers(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_heads_of_several_widths_are_refused(tmp_path: Path) -> None:
    wide = dataclasses.replace(_decoder().config.unet, head_channels=96)
    with pytest.raises(ValueError, match=r"head_channels: 96; heads are \[48, 72\] channels wide"):
        export_diffusers(_decoder(unet=wide), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("norm_eps", 0.01), ("freq_shift", 1), ("flip_sin_to_cos", False), ("act_fn", "gelu")]
)
def test_settings_that_leave_no_trace_in_the_weights_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    _without_our_file(_upsampler("256"), tmp_path)
    path = tmp_path / "super_res_first" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        import_diffusers(tmp_path, "upsampler")


def test_the_process_is_read_off_the_scheduler(tmp_path: Path) -> None:
    diffusion = DiffusionConfig(schedule="linear", prediction="v", num_timesteps=500)
    _without_our_file(Upsampler(dataclasses.replace(UPSAMPLERS["256"], diffusion=diffusion)), tmp_path)
    assert import_diffusers(tmp_path, "upsampler").config.diffusion == diffusion
    path = tmp_path / "super_res_scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_schedule": "sigmoid"}))
    with pytest.raises(ValueError, match="schedule is 'sigmoid'"):
        import_diffusers(tmp_path, "upsampler")


def _without_our_file(model: Upsampler, folder: Path) -> None:
    export_diffusers(randomised(model), folder)
    (folder / "unclip.safetensors").unlink()
