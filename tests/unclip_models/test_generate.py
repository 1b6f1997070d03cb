"""The whole stack: an image depends on caption, seed and weights, and parts that do not fit are refused."""

import pytest
import torch

from tests.unclip_models.small_stack import FAST, TEXT, UNET, small_stack
from unclip_models.ar_prior import ARPrior
from unclip_models.decoder import Decoder
from unclip_models.generate import UnCLIP, to_uint8
from unclip_models.sampling_settings import SamplingConfig
from unclip_models.settings import ARPriorConfig, DecoderConfig

torch.set_num_threads(1)


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


def test_large_images_are_upsampled_a_few_at_a_time(stack: UnCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    x, seeds = torch.rand(3, 3, stack.decoder.config.image_size, stack.decoder.config.image_size), [1, 2, 3]
    together = stack.enlarge(x, seeds)
    monkeypatch.setattr("unclip_models.generate._PX_AT_ONCE", 1)
    alone = stack.enlarge(x, seeds)
    assert alone.keys() == together.keys() and len(together) > 1
    for side, images in together.items():
        assert (alone[side].int() - images.int()).abs().max() <= 1


def test_without_a_prior_the_text_embedding_is_decoded(stack: UnCLIP) -> None:
    bare = UnCLIP(stack.clip, None, stack.decoder)
    expected = stack.clip.encode_text(stack.clip.tokenize(["green"]))
    out = bare.text_to_image(["green"], [0], FAST)
    assert torch.equal(out.image_embeddings, expected) and list(out.images) == [8]


@pytest.mark.parametrize("raw_embeddings", [False, True])
def test_a_stack_may_read_the_clips_text_and_raw_embeddings(raw_embeddings: bool) -> None:
    karlo = small_stack(reads_clip_text=True, raw_embeddings=raw_embeddings)
    captions, seeds = ["a red circle", "a blue square"], [5, 6]
    whole = karlo.text_to_image(captions, seeds, FAST)
    alone = karlo.text_to_image(captions[1:], seeds[1:], FAST)
    torch.testing.assert_close(whole.image_embeddings[1:], alone.image_embeddings, atol=1e-4, rtol=1e-4)
    assert (whole.final[1:].int() - alone.final.int()).abs().max() <= 1
    has_unit_norm = torch.allclose(whole.image_embeddings.norm(dim=1), torch.ones(2), atol=1e-4)
    assert has_unit_norm is not raw_embeddings
    other = karlo.decode(whole.image_embeddings, seeds, FAST, captions=captions[::-1])
    assert not torch.equal(other.images[8], whole.images[8])  # the caption reaches the decoder


def test_prior_and_decoder_must_agree_on_the_norm(stack: UnCLIP) -> None:
    raw = small_stack(raw_embeddings=True)
    with pytest.raises(ValueError, match="raw_embeddings is True in the prior and False in the decoder"):
        UnCLIP(stack.clip, raw.prior, stack.decoder)


def test_what_is_not_finite_is_no_black_picture() -> None:
    x = torch.zeros(3, 3, 8, 8)
    x[1, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 3 images of 8 px hold numbers that are not finite; generate in.*fp32"):
        to_uint8(x)


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
