"""Manipulations: what each keeps and what it changes, on a stack of random weights."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.unclip_models.small_stack import FAST, small_stack
from unclip_models.generate import UnCLIP
from unclip_models.manipulate import (
    PrincipalAxes,
    _known_at_decoder_side,
    decode_latents,
    edit,
    inpaint,
    interpolate,
    invert,
    keep_components,
    outpaint_canvas,
    probe,
    reconstruct,
    reconstruction_error,
    slerp,
    text_diff,
    to_decoder_side,
    vary,
)
from unclip_models.sampling_settings import SamplingConfig

torch.set_num_threads(1)


def _image(seed: int = 0, side: int = 16) -> Tensor:
    return torch.randint(60, 200, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _steps(steps: int) -> SamplingConfig:
    return dataclasses.replace(FAST, decoder=dataclasses.replace(FAST.decoder, steps=steps, guidance_scale=1.0))


@pytest.fixture(scope="module")
def calm() -> UnCLIP:
    """A stack whose decoder predicts well inside [-1, 1], where nothing is clipped and inversion is exact in time."""
    model = small_stack()
    with torch.no_grad():
        model.decoder.unet.out[2].weight.mul_(0.2)
    return model


def test_variations_keep_the_embedding_and_spread_with_eta(stack: UnCLIP) -> None:
    image = _image()
    out = vary(stack, image.expand(2, -1, -1, -1), [0, 1], FAST)
    torch.testing.assert_close(out.image_embeddings, stack.clip.encode_image(image).expand(2, -1))
    assert not torch.equal(out.images[8][0], out.images[8][1])


def test_inversion_reconstructs_and_its_error_falls_with_steps(calm: UnCLIP) -> None:
    errors = []
    for steps in (5, 50):
        sampling = _steps(steps)
        inversion = invert(calm, _image(), sampling)
        errors.append(float(reconstruction_error(calm, inversion, sampling)[0]))
    assert errors[1] < errors[0] and errors[1] < 0.02
    back = reconstruct(calm, inversion, sampling).images[8][0].float()
    given = (inversion.image[0].permute(1, 2, 0) + 1) * 127.5
    assert float((back - given).square().mean().sqrt()) < 0.02 * 127.5 + 0.5  # and the rounding to 8 bits


def test_the_ends_of_an_interpolation_reconstruct_both_pictures(calm: UnCLIP) -> None:
    first, second = _image(1), _image(2)
    sampling = _steps(30)
    frames = interpolate(calm, first, second, [0.0, 0.5, 1.0], sampling)
    assert frames.final.shape == (3, 32, 32, 3)
    for frame, image in ((0, first), (2, second)):
        expected = (to_decoder_side(calm, image)[0].permute(1, 2, 0) + 1) * 127.5
        assert float((frames.images[8][frame].float() - expected).abs().mean()) < 3
    torch.testing.assert_close(frames.image_embeddings[:1], calm.embed_images(first))
    seeded = interpolate(calm, first, second, [0.0, 1.0], sampling, noise="seeded", seed=3)
    alone = calm.decode(
        calm.embed_images(first),
        [3],
        dataclasses.replace(sampling, decoder=dataclasses.replace(sampling.decoder, sampler="ddim")),
    )
    torch.testing.assert_close(seeded.images[8][:1].float(), alone.images[8].float(), atol=1, rtol=0)


def test_an_edit_starts_at_the_picture_and_turns_towards_the_caption(calm: UnCLIP) -> None:
    sampling = _steps(20)
    frames = edit(calm, _image(), "a blue square", "a photo", [0.0, 0.25, 0.5], sampling)
    kept = reconstruct(calm, invert(calm, _image(), sampling), sampling)
    torch.testing.assert_close(frames.images[8][0].float(), kept.images[8][0].float(), atol=1, rtol=0)
    z_t, z_0 = calm.embed_captions(["a blue square", "a photo"])
    agreement = frames.image_embeddings @ torch.nn.functional.normalize(z_t - z_0, dim=0)
    assert agreement[0] < agreement[1] < agreement[2]


def test_text_diff_turns_by_the_fraction_of_the_angle(stack: UnCLIP) -> None:
    z_i = stack.embed_images(_image())
    torch.testing.assert_close(text_diff(stack, z_i, "a blue square", "a photo", 0.0), z_i)
    z_t, z_0 = stack.embed_captions(["a blue square", "a photo"])
    direction = torch.nn.functional.normalize(z_t - z_0, dim=-1)
    whole = torch.acos(z_i @ direction)
    part = torch.acos((text_diff(stack, z_i, "a blue square", "a photo", 0.3) * z_i).sum())
    torch.testing.assert_close(part, 0.3 * whole[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="same embedding"):
        text_diff(stack, z_i, "a photo", "a photo", 0.3)


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
    noise = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(slerp(noise, noise.flip(0), torch.tensor([0.0, 1.0])), noise[[0, 0]])


def test_probing_keeps_the_first_components_and_the_norm(stack: UnCLIP) -> None:
    z = stack.embed_images(_image())
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0].T
    axes = PrincipalAxes(torch.full((12,), 0.05), basis)
    torch.testing.assert_close(keep_components(z, axes, 12), z, atol=1e-5, rtol=1e-4)
    errors = [float((keep_components(z, axes, k) - z).norm()) for k in (1, 6, 12)]
    assert errors[0] > errors[1] > errors[2]
    frames = probe(stack, _image(), axes, [0, 3, 12], FAST, seed=4)
    assert frames.final.shape == (3, 32, 32, 3)
    torch.testing.assert_close(frames.image_embeddings.norm(dim=1), torch.ones(3))
    with pytest.raises(ValueError, match="the pca stage kept 12; ask for 0 to that many"):
        keep_components(z, axes, 13)


def test_inpainting_keeps_known_pixels_and_paints_the_rest(stack: UnCLIP) -> None:
    image = _image(side=8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :, 4:] = False
    out = inpaint(stack, image.expand(2, -1, -1, -1), mask.expand(2, -1, -1, -1), [1, 2], FAST, captions=["red"] * 2)
    expected = image[0].permute(1, 2, 0)
    for frame in out.images[8]:
        assert torch.equal(frame[:, :3], expected[:, :3])  # the mask's last column is cut off in shrinking
    assert not torch.equal(out.images[8][0, :, 4:], out.images[8][1, :, 4:])
    with pytest.raises(ValueError, match="no unknown pixel"):
        inpaint(stack, image, torch.ones_like(mask), [0], FAST)
    with pytest.raises(ValueError, match=r"mask of shape \(1, 1, 4, 8\)"):
        inpaint(stack, image, mask[:, :, :4], [0], FAST)


@pytest.mark.parametrize("side", [8, 16, 20, 40])
@pytest.mark.parametrize("offset", [0, 1])
def test_what_is_unknown_does_not_show_in_known_pixels(stack: UnCLIP, side: int, offset: int) -> None:
    """The decoder's pixels lie under a filter that weighs what is around them, partly negatively."""
    hole = (..., slice(side // 4 + offset, side * 3 // 4), slice(side // 3 + offset, side * 2 // 3))
    mask, images = torch.ones(1, 1, side, side, dtype=torch.bool), _image(side=side).repeat(2, 1, 1, 1)
    mask[hole] = False
    images[0][hole], images[1][hole] = 0, 255
    known = _known_at_decoder_side(stack, mask)
    white, black = to_decoder_side(stack, images)
    assert torch.equal(white[known[0].expand(3, -1, -1)], black[known[0].expand(3, -1, -1)])
    assert known.any() and not known.all() and torch.equal(known, _known_at_decoder_side(stack, mask.float()))


def test_outpainting_puts_the_picture_into_a_border() -> None:
    canvas, mask = outpaint_canvas(_image(), 2.0)
    assert canvas.shape == (1, 3, 16, 16) and int(mask.sum()) == 64 and bool(mask[0, 0, 4:12, 4:12].all())
    assert torch.equal(canvas[:, :, 0, 4:12], canvas[:, :, 4, 4:12])
    for zoom in (1.0, 0.5, 100.0):
        with pytest.raises(ValueError, match="no border to paint, or no picture"):
            outpaint_canvas(_image(), zoom)


def test_pictures_of_any_side_are_cut_to_a_square(stack: UnCLIP) -> None:
    wide = torch.zeros(1, 3, 20, 60, dtype=torch.uint8)
    wide[:, :, :, 20:40] = 255
    torch.testing.assert_close(to_decoder_side(stack, wide), torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match="give RGB images"):
        to_decoder_side(stack, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="one image"):
        edit(stack, wide.expand(2, -1, -1, -1), "a", "b", [0.1], FAST)


def test_latents_decode_without_further_noise(stack: UnCLIP) -> None:
    z, noise = stack.embed_images(_image()), torch.randn(1, 3, 8, 8)
    first, second = (decode_latents(stack, z, noise, FAST, seed) for seed in (0, 1))
    assert torch.equal(first.images[8], second.images[8])  # the seed is the upsamplers' alone
