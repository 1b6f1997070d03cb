"""Upsamplers: crops, conditioning, noise augmentation, sampling at full size, whole and in tiles, and refusals."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unclip_models.degradation import degrade
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import seeded_generators
from unclip_models.settings import DiffusionConfig, UNetConfig, UpsamplerConfig
from unclip_models.tiling import Tiling
from unclip_models.unet import AttentionBlock, GroupNorm
from unclip_models.upsampler import Upsampler, add_noise, training_sample

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


def test_every_corner_is_as_likely_as_any_other() -> None:
    """Pixel values are coordinates; 25 x 25 places, 2500 crops: chi-square of an axis within its 1 in 1000 bound."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    whole = torch.stack([rows, columns, rows])[None].expand(2500, 3, 32, 32)
    crops, _ = tiny_upsampler(degradation="none").training_pair(whole, SampleRandom(3, 0, range(2500)))
    tops, lefts = crops[:, 0, 0, 0], crops[:, 1, 0, 0]
    assert torch.equal(crops[:, 0, -1, 0], tops + 7) and torch.equal(crops[:, 1, 0, -1], lefts + 7)
    for corners in (tops, lefts):
        counts = torch.bincount(corners.long(), minlength=25)
        assert len(counts) == 25 and ((counts - 100) ** 2 / 100).sum() < 51.2
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.066  # 3.3 standard errors


@pytest.mark.parametrize("changes", [{}, {"degradation_probability": 0.5}, {"input_size": 8, "crop_fraction": 0.5}])
@pytest.mark.parametrize("degradation", ["none", "blur", "bsr_light", "bsr"])
def test_samples_made_by_the_loader_are_those_of_the_step(degradation: str, changes: dict) -> None:
    model, random = tiny_upsampler(degradation=degradation, **changes), SampleRandom(1, 2, [7, 8, 9, 10])
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    pixels.flags.writeable = False  # as Pillow gives it
    samples = [
        training_sample(model.config, image, SampleRandom(1, 2, [index]))
        for image, index in zip(pixels, random.indices, strict=True)
    ]
    made = {name: torch.stack([sample[name] for sample in samples]) for name in ("image", "low_res")}
    whole = torch.tensor(pixels).permute(0, 3, 1, 2)
    crops, low_res = model.training_pair(whole.float().div(127.5).sub(1), random)
    assert made["image"].dtype == torch.uint8 and torch.equal(made["image"].float().div(127.5).sub(1), crops)
    assert torch.equal(made["low_res"], low_res) and made["low_res"].is_contiguous()
    for a, b in zip(model.training_pair(whole, random), (made["image"], low_res), strict=True):
        assert torch.equal(a, b)


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


def test_bicubic_is_pillows_and_bilinear_has_nothing_to_antialias() -> None:
    low, x = images(1, 16), torch.zeros(1, 3, 64, 64)
    pillow = np.asarray(Image.fromarray(low[0, 0].numpy()).resize((64, 64), Image.Resampling.BICUBIC))
    bicubic = tiny_upsampler(enlarge_mode="bicubic")._enlarged(low, x)
    np.testing.assert_allclose(bicubic[0, 0].numpy(), pillow, atol=1e-5)
    pillow = np.asarray(Image.fromarray(low[0, 0].numpy()).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(tiny_upsampler()._enlarged(low, x)[0, 0].numpy(), pillow, atol=1e-5)


@pytest.mark.parametrize("tile_px", [None, 16])
def test_learned_variance_doubles_the_channels(tile_px: int | None) -> None:
    model = tiny_upsampler(diffusion=DiffusionConfig(variance="learned_range"), crop_fraction=0.5)
    assert model(images(2), torch.tensor([5, 500]), images(2, 16)).shape == (2, 6, 32, 32)
    _, terms = model.loss({"image": images(2)}, SampleRandom(0, 0, [0, 1]))
    assert terms["vb"].shape == (2,)
    out = model.sample(
        images(1, 16), steps=3, sampler="ddpm", generators=seeded_generators([0]), tile_px=tile_px, tile_overlap_px=8
    )
    assert out.shape == (1, 3, 32, 32) and out.isfinite().all()


def test_noise_augmentation_off_changes_nothing() -> None:
    off, on = tiny_upsampler(), tiny_upsampler(max_noise_level=0.5)
    assert {name for name in on.state_dict() if name not in off.state_dict()} == {
        f"noise_level_embed.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    torch.manual_seed(0)
    fresh = Upsampler(tiny_config()).state_dict()
    torch.manual_seed(0)
    augmented = Upsampler(tiny_config(max_noise_level=0.5)).state_dict()
    assert all(torch.equal(weights, augmented[name]) for name, weights in fresh.items())
    random = SampleRandom(0, 0, [0, 1])
    assert off._augmented(images(2, 4), random)[1] is None


def test_the_conditioning_keeps_its_variance_under_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 3, 64, 64, generator=rng) for _ in range(2))
    level = torch.tensor([0.0, 0.3, 0.9])
    out = add_noise(x, level, noise)
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out.std(dim=(1, 2, 3)), torch.ones(3), atol=0.03, rtol=0)
    for row in (1, 2):
        slope = (out[row] * noise[row]).mean() / (noise[row] ** 2).mean()
        assert slope == pytest.approx(float(level[row]), abs=0.03)


def test_training_draws_a_level_for_every_sample_and_tells_the_network() -> None:
    model, low = tiny_upsampler(max_noise_level=0.4, crop_fraction=0.5), images(64, 8)
    random = SampleRandom(5, 6, range(64))
    noised, level = model._augmented(low, random)
    assert level is not None and 0 <= level.min() < 0.05 and 0.35 < level.max() < 0.4
    assert level.mean() == pytest.approx(0.2, abs=0.05) and noised.shape == low.shape
    half, half_level = model._augmented(low[32:], SampleRandom(5, 6, range(32, 64)))
    assert torch.equal(half, noised[32:]) and torch.equal(half_level, level[32:])
    model.loss({"image": images(4)}, SampleRandom(0, 0, range(4)))[0].backward()
    for name, parameter in model.noise_level_embed.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    x, t, y = images(2), torch.tensor([5, 500]), images(2, 16)
    assert torch.equal(model(x, t, y), model(x, t, y, torch.zeros(2)))
    assert not torch.allclose(model(x, t, y), model(x, t, y, torch.full((2,), 0.4)))


def test_level_zero_samples_the_plain_conditioning_and_a_level_noises_it() -> None:
    """Level 0 is the network with the constant embedding of zero, and consumes no randomness."""
    model, low = tiny_upsampler(max_noise_level=0.5), images(2, 16)

    def sample(rows: slice = slice(None), **options: float) -> torch.Tensor:
        return model.sample(low[rows], steps=2, generators=seeded_generators([5, 6][rows]), **options)

    plain = sample()
    assert torch.equal(plain, sample(noise_level=0.0))
    zero = model._level_embedding(torch.zeros(1), 1)
    assert zero is not None
    bare = tiny_upsampler()
    bare.unet.load_state_dict(model.unet.state_dict())
    unet = bare.unet.forward
    bare.unet.forward = lambda x, t, embedding=None, **given: unet(x, t, embedding=zero.expand(2, -1))  # type: ignore
    assert torch.equal(bare.sample(low, steps=2, generators=seeded_generators([5, 6])), plain)
    noised = sample(noise_level=0.3)
    assert not torch.allclose(noised, plain, atol=1e-3)
    torch.testing.assert_close(sample(slice(1, 2), noise_level=0.3), noised[1:], atol=1e-4, rtol=1e-4)


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
        ({"max_noise_level": -0.1}, "max_noise_level"),
        ({"max_noise_level": 1.0}, "nothing but noise"),
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
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 30\); it takes \(B, 3, 32, 32\)"):
        model.training_pair(images(1)[..., :30], SampleRandom(0, 0, [0]))
    with pytest.raises(ValueError, match=r"\(32, 30, 3\); it takes \(32, 32, 3\)"):
        training_sample(model.config, np.zeros((32, 30, 3), np.uint8), SampleRandom(0, 0, [0]))
    with pytest.raises(ValueError, match=r"levels from 0 to 0.0 \(max_noise_level\)"):
        model.sample(images(1, 16), noise_level=0.1, generators=seeded_generators([0]))
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


@pytest.mark.parametrize(
    ("side", "tile", "overlap"), [(64, 32, 8), (64, 24, 8), (40, 16, 0), (96, 32, 16), (48, 48, 8)]
)
def test_tiles_cover_every_pixel_with_smooth_weights_that_sum_to_one(side: int, tile: int, overlap: int) -> None:
    tiling, total = Tiling(side, tile, overlap, 8), torch.zeros(side, side)
    for top, left, weight in tiling.tiles:
        assert top % 8 == left % 8 == 0 and 0 <= top <= side - tile and 0 <= left <= side - tile
        assert weight.shape == (tile, tile) and weight.min() >= 0
        total[top : top + tile, left : left + tile] += weight
        # No step is higher than the steepest of a raised cosine over half the overlap.
        if overlap:
            assert weight.diff(dim=1).abs().max() <= math.pi / overlap + 1e-6
        if left > 0 and overlap:  # what saw the zeros around the tile does not count
            assert weight[:, : overlap // 4].max() == 0
    torch.testing.assert_close(total, torch.ones(side, side))


def test_one_tile_over_everything_is_the_whole_image() -> None:
    model, low = tiny_upsampler(), images(2, 16)
    whole = model.sample(low, steps=3, generators=seeded_generators([5, 6]))
    for tile_px in (32, 48):
        tiled = model.sample(low, steps=3, generators=seeded_generators([5, 6]), tile_px=tile_px, tile_batch_size=2)
        assert torch.equal(tiled, whole)


def without_norms(model: Upsampler) -> Upsampler:
    """Take away what looks farther than the convolutions: then a tile's margin hides all that lies outside of it."""
    for module in model.modules():
        if isinstance(module, nn.Sequential) and len(module) and isinstance(module[0], GroupNorm):
            module[0] = nn.Identity()
    return model


def test_tiles_of_a_network_with_a_small_field_of_view_are_exact() -> None:
    """Twelve convolutions see 12 px; a quarter of the overlap is 12 px; so no seam can be seen anywhere."""
    unet = UNetConfig(model_channels=8, channel_mult=(1,), num_res_blocks=1)
    model = without_norms(tiny_upsampler(image_size=128, input_size=64, unet=unet))
    low, options = images(1, 64), {"steps": 2, "generators": seeded_generators([5])}
    whole = model.sample(low, **options)
    options["generators"] = seeded_generators([5])
    tiled = model.sample(low, tile_px=96, tile_overlap_px=48, **options)
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
    options["generators"] = seeded_generators([5])
    assert (model.sample(low, tile_px=64, tile_overlap_px=0, **options) - whole).abs().max() > 1e-3


def test_tiled_images_depend_on_their_own_input_and_seed_only() -> None:
    model, low = tiny_upsampler(max_noise_level=0.5), images(3, 16)
    options = {"steps": 2, "noise_level": 0.2, "tile_px": 16, "tile_overlap_px": 8, "eta": 0.5}
    whole = model.sample(low, generators=seeded_generators([5, 6, 7]), tile_batch_size=1, **options)
    again = model.sample(low[1:], generators=seeded_generators([6, 7]), tile_batch_size=1, **options)
    assert torch.equal(again, whole[1:])  # one tile at a time: not even rounding differs
    seen: list[tuple[int, ...]] = []
    model.unet.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    many = model.sample(low, generators=seeded_generators([5, 6, 7]), tile_batch_size=5, **options)
    assert set(seen) == {(5, 6, 16, 16), (2, 6, 16, 16)} and len(seen) == 2 * 6  # 27 tiles at each of two steps
    torch.testing.assert_close(many, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tile_px": 15}, "tile_px: 15; it must be a multiple of 2"),
        ({"tile_px": 0}, "tile_px: 0"),
        ({"tile_px": 16, "tile_overlap_px": 3}, "tile_overlap_px: 3 with tile_px 16; it must be a multiple of 2"),
        ({"tile_px": 16, "tile_overlap_px": 10}, "half a tile"),
        ({"tile_px": 16, "tile_overlap_px": -2}, "half a tile"),
        ({"tile_px": 16, "tile_batch_size": 0}, "tile_batch_size 0"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_upsampler().sample(images(1, 16), steps=2, generators=seeded_generators([0]), **options)
