"""The configs of published models hold the published numbers and have the published sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flows.model_sizes import model_sizes
from stages.config import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
BILLION = 1e9


def _sizes(name: str) -> dict[str, float]:
    sizes = model_sizes(load_config(CONFIGS / f"{name}.yaml"))
    return {size.model: size.num_parameters / BILLION for size in sizes if size.num_parameters is not None}


def test_the_papers_models_have_the_papers_sizes() -> None:
    sizes = _sizes("paper")
    assert sizes["decoder"] == pytest.approx(3.5, rel=0.05)  # text encoder included
    assert 1.0 <= sizes["prior"] <= 1.3
    assert sizes["upsampler_256"] == pytest.approx(0.7, rel=0.1)
    assert sizes["upsampler_1024"] == pytest.approx(0.3, rel=0.1)


def test_karlos_models_have_karlos_sizes() -> None:
    sizes = _sizes("karlo")
    assert sizes["prior"] == pytest.approx(1.022, abs=0.002)
    assert sizes["decoder"] == pytest.approx(0.893, abs=0.002)
    assert sizes["upsampler_256"] == pytest.approx(0.6916, abs=0.001)


# Appendix C, Table 3, in its own order: column -> what it says.
TABLE_3 = {
    "prior": {
        "model.diffusion.num_timesteps": 1000, "model.diffusion.schedule": "cosine",
        "model.text.context_length": 256, "model.width": 2048, "model.layers": 24, "model.heads": 32,
        "weight_decay": 6.0e-2, "global_batch_size": 4096, "num_steps": 600_000, "learning_rate": 1.1e-4,
        "beta2": 0.96, "eps": 1.0e-6, "ema_decay": 0.9999,
    },
    "decoder": {
        "model.diffusion.num_timesteps": 1000, "model.diffusion.schedule": "cosine",
        "model.diffusion.variance": "learned_range",
        "model.unet.model_channels": 512, "model.unet.num_res_blocks": 3, "model.unet.channel_mult": (1, 2, 3, 4),
        "model.unet.head_channels": 64, "model.unet.attention_resolutions": (32, 16, 8),
        "model.text.context_length": 256, "model.text.width": 2048, "model.text.layers": 24, "model.text.heads": 32,
        "model.unet.dropout": 0.1, "global_batch_size": 2048, "num_steps": 800_000, "learning_rate": 1.2e-4,
        "beta2": 0.999, "eps": 1.0e-8, "ema_decay": 0.9999,
    },
    "upsampler_256": {
        "model.diffusion.num_timesteps": 1000, "model.diffusion.schedule": "cosine", "model.crop_fraction": 0.25,
        "model.unet.model_channels": 320, "model.unet.num_res_blocks": 3, "model.unet.channel_mult": (1, 2, 3, 4),
        "model.unet.attention_resolutions": (),
        "model.unet.dropout": 0.1, "global_batch_size": 1024, "num_steps": 1_000_000, "learning_rate": 1.2e-4,
        "beta2": 0.999, "eps": 1.0e-8, "ema_decay": 0.9999,
    },
    "upsampler_1024": {
        "model.diffusion.num_timesteps": 1000, "model.diffusion.schedule": "linear", "model.crop_fraction": 0.25,
        "model.unet.model_channels": 192, "model.unet.num_res_blocks": 2,
        "model.unet.channel_mult": (1, 1, 2, 2, 4, 4), "model.unet.attention_resolutions": (),
        "model.unet.dropout": 0.0, "global_batch_size": 512, "num_steps": 1_000_000, "learning_rate": 1.0e-4,
        "beta2": 0.999, "eps": 1.0e-8, "ema_decay": 0.9999,
    },
    "generate": {
        "prior.steps": 64, "prior.sampler": "analytic", "decoder.steps": 250, "decoder.sampler": "ddpm",
        "upsampler_256.steps": 27, "upsampler_256.sampler": "ddim",
        "upsampler_1024.steps": 15, "upsampler_1024.sampler": "ddim",
    },
}  # fmt: skip
TABLE_3_AR = {
    "model.text.context_length": 256, "model.text.width": 2048, "model.text.layers": 24, "model.text.heads": 32,
    "model.width": 1664, "model.layers": 24, "model.heads": 26, "model.num_codes": 319, "model.num_buckets": 1024,
    "weight_decay": 4.0e-2, "global_batch_size": 4096, "num_steps": 1_000_000, "learning_rate": 1.6e-4,
    "beta2": 0.91, "eps": 1.0e-10, "ema_decay": 0.999,
}  # fmt: skip


def _value(config: object, path: str) -> object:
    for part in path.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("section", TABLE_3)
def test_paper_config_holds_every_number_of_table_3(section: str) -> None:
    config = getattr(load_config(CONFIGS / "paper.yaml"), section)
    assert {path: _value(config, path) for path in TABLE_3[section]} == TABLE_3[section]


def test_paper_ar_config_differs_from_the_paper_config_in_the_prior_alone() -> None:
    paper, ar = (load_config(CONFIGS / f"{name}.yaml") for name in ("paper", "paper_ar"))
    assert {path: _value(ar.prior, path) for path in TABLE_3_AR} == TABLE_3_AR
    same = dataclasses.replace(ar, root=paper.root, prior=paper.prior, generate=paper.generate)
    assert same == paper
