"""Upsamplers: crops, conditioning, sampling at full size, and refusals."""

import pytest
import torch

from unclip_models.degradation import degrade
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import seeded_generators
from unclip_models.unet import AttentionBlock, UNetConfig
from unclip_models.upsampler import Upsampler, UpsamplerConfig

torch.set_num_threads(1)


def tiny_config(**changes: object) -> UpsamplerConfig:
    values: dict = {
        "image_size": 32,
        "input_size": 16,
        "unet": UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1),
    }
    return UpsamplerConfig(**{**values, **changes})


def tiny_upsampler(**changes: object) -> Upsampler:
    torch.manual_seed(0)
    model = Upsampler(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def images(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("degradation", ["none", "blur", "bsr_light", "bsr"])
def test_a_training_pair_is_a_crop_and_its_degraded_version(degradation: str) -> None:
    model, whole, random = tiny_upsampler(degradation=degradation), images(3), SampleRandom(1, 2, [7, 8, 9])
    crops, low_res = model.training_pair(whole, random)
    assert crops.shape == (3, 3, 8, 8) and low_res.shape == (3, 3, 4, 4)
    for image, crop in zip(whole, crops, strict=True):
        windows = image.unfold(1, 8, 1).unfold(2, 8, 1)  # (3, 25, 25, 8, 8)
        assert (windows == crop[:, None, None]).all(dim=(0, 3, 4)).sum() == 1
    assert torch.equal(low_res, degrade(degradation, crops, 4, random.generator("degradation")))


def test_crops_reach_every_corner() -> None:
    ramp = torch.arange(32.0).expand(1, 3, 32, 32).repeat(400, 1, 1, 1)
    crops, _ = tiny_upsampler().training_pair(ramp, SampleRandom(0, 0, range(400)))
    assert crops[:, 0, 0, 0].min() == 0 and crops[:, 0, 0, -1].max() == 31


def test_degradation_probability_leaves_the_others_clean() -> None:
    whole, random = images(64), SampleRandom(1, 2, range(64))
    crops, mixed = tiny_upsampler(degradation_probability=0.5).training_pair(whole, random)
    clean = degrade("none", crops, 4, [])
    is_clean = (mixed == clean).all(dim=(1, 2, 3))
    assert 16 < is_clean.sum() < 48
    assert torch.equal(mixed[~is_clean], degrade("blur", crops, 4, [])[~is_clean])


def test_loss_takes_pairs_made_ahead() -> None:
    model, whole, random = tiny_upsampler(degradation="bsr_light"), images(3), SampleRandom(1, 2, [7, 8, 9])
    expected, terms = model.loss({"image": whole}, random)
    crops, low_res = model.training_pair(whole, random)
    torch.testing.assert_close(model.loss({"image": crops, "low_res": low_res}, random)[0], expected)
    assert set(terms) == {"mse", "timestep"} and terms["mse"].shape == (3,)
    expected.backward()


def test_it_has_no_attention_and_sees_the_low_resolution_image() -> None:
    model = tiny_upsampler()
    assert not [module for module in model.modules() if isinstance(module, AttentionBlock)]
    x, t, low = images(2), torch.tensor([5, 500]), images(2, 16)
    assert not torch.allclose(model(x, t, low), model(x, t, low.flip(0)))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_2m"])
def test_an_image_depends_on_its_own_input_and_seed_only(sampler: str) -> None:
    model, low = tiny_upsampler(), images(3, 16)
    whole = model.sample(low, steps=3, sampler=sampler, generators=seeded_generators([5, 6, 7]))
    alone = model.sample(low[2:], steps=3, sampler=sampler, generators=seeded_generators([7]))
    assert whole.shape == (3, 3, 32, 32) and whole.abs().max() <= 1
    torch.testing.assert_close(whole[2:], alone, atol=1e-4, rtol=1e-4)


def test_inputs_closer_than_8_bits_are_the_same_input() -> None:
    model = tiny_upsampler()
    low = torch.randint(0, 256, (1, 3, 16, 16)) / 127.5 - 1
    a, b = (model.sample(x, steps=2, generators=seeded_generators([0])) for x in (low, low + 0.001))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input_size": 12}, "multiple"),
        ({"input_size": 32}, "multiple"),
        ({"crop_fraction": 0.0}, "crop_fraction"),
        ({"crop_fraction": 0.1}, "crop of 3 px"),
        ({"degradation": "fog"}, "degradation"),
        ({"enlarge_mode": "nearest"}, "enlarge_mode"),
        ({"degradation_probability": 2.0}, "degradation_probability"),
        ({"unet": UNetConfig(model_channels=16, attention_resolutions=(8,))}, "must be empty"),
    ],
)
def test_bad_settings_are_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_config(**change)


def test_bad_inputs_are_refused() -> None:
    model = tiny_upsampler()
    with pytest.raises(ValueError, match="16, 16"):
        model.sample(images(1, 8), generators=seeded_generators([0]))
    with pytest.raises(ValueError, match="32, 32"):
        model.loss({"image": images(1, 16)}, SampleRandom(0, 0, [0]))
    with pytest.raises(ValueError, match="training mode"):
        model.train().sample(images(1, 16), generators=seeded_generators([0]))


def test_the_papers_configs_are_accepted() -> None:
    first = UpsamplerConfig(image_size=256, input_size=64, unet=UNetConfig(model_channels=320, dropout=0.1))
    second = UpsamplerConfig(
        image_size=1024,
        input_size=256,
        degradation="bsr_light",
        unet=UNetConfig(model_channels=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2),
    )
    assert (first.crop_px, second.crop_px) == (64, 256)
