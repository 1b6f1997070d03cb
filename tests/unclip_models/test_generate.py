"""The whole stack: an image depends on caption, seed and weights, and parts that do not fit are refused."""

import math

import pytest
import torch

from unclip_models.ar_prior import ARPrior, ARPriorConfig
from unclip_models.clip import ClipModel, ClipModelConfig
from unclip_models.decoder import Decoder, DecoderConfig
from unclip_models.generate import (
    DecoderSampling,
    PriorSampling,
    SamplingConfig,
    UnCLIP,
    UpsamplerSampling,
    slerp,
    to_uint8,
)
from unclip_models.prior import DiffusionPrior, DiffusionPriorConfig
from unclip_models.text_encoder import TextEncoderConfig
from unclip_models.unet import UNetConfig
from unclip_models.upsampler import Upsampler, UpsamplerConfig

torch.set_num_threads(1)
TEXT = TextEncoderConfig(context_length=8, width=16, layers=1, heads=2)
UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
FAST = SamplingConfig(
    prior=PriorSampling(steps=4),
    decoder=DecoderSampling(steps=4, guidance_scale=2.0),
    upsamplers=(UpsamplerSampling(steps=2), UpsamplerSampling(steps=2)),
)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


@pytest.fixture(scope="module")
def stack() -> UnCLIP:
    torch.manual_seed(0)
    clip = ClipModel.from_config(
        ClipModelConfig(embedding_dim=12, image_size=16, vision_width=32, vision_layers=1, text_width=32, text_layers=1)
    ).freeze()
    prior = DiffusionPrior(DiffusionPriorConfig(embedding_dim=12, text=TEXT, width=16, layers=1, heads=2))
    decoder = Decoder(DecoderConfig(image_size=8, embedding_dim=12, unet=UNET, text=TEXT))
    ups = [Upsampler(UpsamplerConfig(image_size=2 * side, input_size=side, unet=UNET)) for side in (16, 8)][::-1]
    for up in ups:
        assert up.config.crop_px >= 4
    return UnCLIP(clip, randomised(prior), randomised(decoder), [randomised(up) for up in ups])


def test_every_resolution_comes_back_and_seeds_decide(stack: UnCLIP) -> None:
    captions = ["a red circle", "a blue square", "a red circle"]
    out = stack.text_to_image(captions, [1, 2, 3], FAST)
    assert {side: tuple(images.shape) for side, images in out.images.items()} == {
        side: (3, side, side, 3) for side in (8, 16, 32)
    }
    assert all(images.dtype == torch.uint8 for images in out.images.values())
    assert out.final is out.images[32]
    torch.testing.assert_close(out.image_embeddings.norm(dim=-1), torch.ones(3))
    assert not torch.equal(out.final[0], out.final[2])


def test_an_image_does_not_depend_on_its_batch(stack: UnCLIP) -> None:
    captions, seeds = ["a red circle", "a blue square", "green"], [5, 6, 7]
    whole = stack.text_to_image(captions, seeds, FAST)
    alone = stack.text_to_image(captions[1:2], seeds[1:2], FAST)
    torch.testing.assert_close(whole.image_embeddings[1:2], alone.image_embeddings, atol=1e-4, rtol=1e-4)
    for side, images in whole.images.items():
        assert (images[1:2].int() - alone.images[side].int()).abs().max() <= 1  # a rounding of the last bit


def test_without_a_prior_the_text_embedding_is_decoded(stack: UnCLIP) -> None:
    bare = UnCLIP(stack.clip, None, stack.decoder)
    expected = stack.clip.encode_text(stack.clip.tokenize(["green"]))
    out = bare.text_to_image(["green"], [0], FAST)
    assert torch.equal(out.image_embeddings, expected) and list(out.images) == [8]


def test_variations_keep_the_embedding(stack: UnCLIP) -> None:
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    out = stack.vary(image.expand(2, -1, -1, -1), [0, 1], FAST)
    torch.testing.assert_close(out.image_embeddings, stack.clip.encode_image(image).expand(2, -1))
    assert not torch.equal(out.images[8][0], out.images[8][1])


def test_text_diff_turns_by_the_fraction_of_the_angle(stack: UnCLIP) -> None:
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    z_i = stack.clip.encode_image(image)
    torch.testing.assert_close(stack.text_diff(image, "a blue square", "a photo", 0.0), z_i)
    z_t, z_0 = stack.clip.encode_text(stack.clip.tokenize(["a blue square", "a photo"]))
    direction = torch.nn.functional.normalize(z_t - z_0, dim=-1)
    whole = torch.acos(z_i @ direction)
    part = torch.acos((stack.text_diff(image, "a blue square", "a photo", 0.3) * z_i).sum())
    torch.testing.assert_close(part, 0.3 * whole[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="same embedding"):
        stack.text_diff(image, "a photo", "a photo", 0.3)


def test_slerp_keeps_the_norm_and_divides_the_angle() -> None:
    a, b = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    whole = torch.acos((a * b).sum(-1))
    for theta in (0.0, 0.25, 0.5, 1.0):
        z = slerp(a, b, theta)
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(torch.acos((a * z).sum(-1).clamp(-1, 1)), theta * whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    x = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([1 / 3]))
    torch.testing.assert_close(x, torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]]))


def test_to_uint8_covers_the_range() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 1.5]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 128, 255, 255]


def test_parts_that_do_not_fit_are_refused(stack: UnCLIP) -> None:
    other = Decoder(DecoderConfig(image_size=8, embedding_dim=9, unet=UNET, text=TEXT))
    with pytest.raises(ValueError, match="9 dimensions"):
        UnCLIP(stack.clip, None, other)
    with pytest.raises(ValueError, match="given 8 px"):
        UnCLIP(stack.clip, None, stack.decoder, stack.upsamplers[1:])
    with pytest.raises(ValueError, match="one seed per image"):
        stack.text_to_image(["a"], [1, 2], FAST)
    with pytest.raises(ValueError, match="give one each"):
        stack.text_to_image(["a"], [1], SamplingConfig(upsamplers=()))


def test_the_autoregressive_prior_takes_the_same_place(stack: UnCLIP) -> None:
    torch.manual_seed(1)
    prior = ARPrior(
        ARPriorConfig(
            embedding_dim=12, num_codes=3, num_buckets=4, num_dot_buckets=4, text=TEXT, width=16, layers=1, heads=2
        )
    )
    edges = torch.linspace(-1, 1, 5)
    prior.set_pca(mean=torch.full((12,), 0.1), axes=torch.eye(12)[:3], edges=edges.repeat(3, 1), dot_edges=edges)
    ar_stack = UnCLIP(stack.clip, prior, stack.decoder)
    whole, alone = (ar_stack.text_to_image(["red", "blue"][n:], [4, 5][n:], FAST) for n in (0, 1))
    torch.testing.assert_close(whole.image_embeddings[1:], alone.image_embeddings)
    torch.testing.assert_close(whole.image_embeddings.norm(dim=-1), torch.ones(2))
