"""The decoder: paper size, conditioning paths, guidance, sampling per seed, and that it learns."""

import pytest
import torch

from unclip_models.clip_text import ClipTextFeatures
from unclip_models.decoder import Decoder
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import combine_guidance, seeded_generators
from unclip_models.settings import ClipTextConfig, DecoderConfig, DiffusionConfig, TextEncoderConfig, UNetConfig

torch.set_num_threads(1)


def tiny_config(**changes: object) -> DecoderConfig:
    values: dict = {
        "image_size": 8,
        "embedding_dim": 12,
        "unet": UNetConfig(
            model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_channels=8
        ),
        "text": TextEncoderConfig(context_length=6, width=16, layers=1, heads=2, vocab_size=50),
    }
    return DecoderConfig(**{**values, **changes})


def tiny_decoder(**changes: object) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(tiny_config(**changes))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return decoder.eval()


def tiny_batch(count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1,
        "image_embedding": torch.nn.functional.normalize(torch.randn(count, 12, generator=generator), dim=-1),
        "tokens": torch.randint(1, 50, (count, 6), generator=generator),
    }


def test_the_papers_decoder_has_the_papers_size() -> None:
    config = DecoderConfig(
        image_size=64,
        embedding_dim=1024,
        unet=UNetConfig(model_channels=512, attention_resolutions=(32, 16, 8), dropout=0.1),
        text=TextEncoderConfig(context_length=256, width=2048, layers=24, heads=32),
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    total = sum(p.numel() for p in decoder.parameters()) / 1e9
    text = sum(p.numel() for p in decoder.text_encoder.parameters()) / 1e9
    assert total - text == pytest.approx(2.253, abs=0.0006)
    assert total == pytest.approx(3.56, abs=0.01)  # the paper says 3.5B; CLIP's token table is 0.1B of it


def test_every_condition_reaches_the_output_and_dropping_removes_it() -> None:
    decoder, batch = tiny_decoder(), tiny_batch(2)
    x, t = batch["image"], torch.tensor([10, 600])
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    other_z, other_tokens = batch["image_embedding"].flip(0), batch["tokens"].flip(0)
    base = decoder(x, t, batch["image_embedding"], batch["tokens"], no, no)
    assert base.shape == (2, 6, 8, 8)
    assert not torch.allclose(base, decoder(x, t, other_z, batch["tokens"], no, no))
    assert not torch.allclose(base, decoder(x, t, batch["image_embedding"], other_tokens, no, no))
    without_z = decoder(x, t, batch["image_embedding"], batch["tokens"], yes, no)
    assert torch.equal(without_z, decoder(x, t, other_z, batch["tokens"], yes, no))
    without_caption = decoder(x, t, batch["image_embedding"], batch["tokens"], no, yes)
    assert torch.equal(without_caption, decoder(x, t, batch["image_embedding"], other_tokens, no, yes))


def test_image_tokens_come_first_in_width_by_token_order() -> None:
    decoder, batch = tiny_decoder(), tiny_batch(2)
    no = torch.zeros(2, dtype=torch.bool)
    context = decoder.condition(batch["image_embedding"], batch["tokens"], no, no).context
    assert context.shape == (2, 4 + 6, 16)
    rows = decoder.image_to_tokens(batch["image_embedding"] * 12**0.5)
    torch.testing.assert_close(context[:, 1], rows[:, 1::4])


def test_a_learned_null_embedding_is_trained_only_by_dropped_samples() -> None:
    batch, random = tiny_batch(), SampleRandom(0, 0, range(4))
    for dropout, moved in ((1.0, True), (0.0, False)):
        decoder = tiny_decoder(null_embedding="learned", embedding_dropout=dropout)
        decoder.loss(batch, random)[0].backward()
        grad = decoder.null_image_embedding.grad
        assert bool(grad is not None and grad.any()) is moved


def test_loss_is_a_function_of_the_samples_not_of_their_grouping() -> None:
    decoder, batch = tiny_decoder(), tiny_batch()
    whole, terms = decoder.loss(batch, SampleRandom(3, 7, [0, 1, 2, 3]))
    halves = [
        decoder.loss({k: v[rows] for k, v in batch.items()}, SampleRandom(3, 7, rows))[0] for rows in ([0, 1], [2, 3])
    ]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)
    assert set(terms) == {"mse", "vb", "timestep"}
    assert all(term.shape == (4,) and not term.requires_grad for term in terms.values())


def test_learned_variance_is_trained() -> None:
    decoder, batch = tiny_decoder(), tiny_batch()
    decoder.loss(batch, SampleRandom(3, 7, range(4)))[0].backward()
    assert decoder.unet.out[2].weight.grad[3:].any()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_2m"])
def test_an_image_depends_on_its_own_seed_only(sampler: str) -> None:
    decoder, batch = tiny_decoder(), tiny_batch(3)
    options: dict = {"steps": 4, "guidance_scale": 2.0, "sampler": sampler}
    whole = decoder.sample(
        batch["image_embedding"], batch["tokens"], generators=seeded_generators([5, 6, 7], "d"), **options
    )
    alone = decoder.sample(
        batch["image_embedding"][1:2], batch["tokens"][1:2], generators=seeded_generators([6], "d"), **options
    )
    torch.testing.assert_close(whole[1:2], alone, atol=1e-4, rtol=1e-4)
    assert whole.shape == (3, 3, 8, 8) and whole.abs().max() <= 1 and whole.isfinite().all()


def test_guidance_of_one_is_the_conditional_model_and_zero_the_unconditional() -> None:
    decoder, batch = tiny_decoder(), tiny_batch(2)
    x, t = batch["image"], torch.tensor([10, 600])
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    z, tokens = batch["image_embedding"], batch["tokens"]
    with torch.no_grad():
        conditional, unconditional = decoder(x, t, z, tokens, no, no), decoder(x, t, z, tokens, yes, yes)
        for scale in (0.0, 1.0, 3.0):
            guided = decoder.guided_denoiser(z, tokens, scale)(x, t)
            noise = unconditional + scale * (conditional - unconditional)
            torch.testing.assert_close(guided[:, :3], noise[:, :3], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(guided[:, 3:], conditional[:, 3:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_guidance_runs_both_branches_as_one_batch_and_scale_one_runs_the_conditional_alone() -> None:
    decoder, batch = tiny_decoder(), tiny_batch(2)
    x, t = batch["image"], torch.tensor([10, 600])
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    z, tokens = batch["image_embedding"], batch["tokens"]
    sizes: list[int] = []
    decoder.unet.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    unguided = decoder.guided_denoiser(z, tokens, 1.0)(x, t)
    assert sizes == [2] and torch.equal(unguided, decoder(x, t, z, tokens, no, no))
    sizes.clear()
    guided = decoder.guided_denoiser(z, tokens, 3.0)(x, t)
    assert sizes == [4]
    two_calls = [decoder(x, t, z, tokens, drop, drop) for drop in (no, yes)]
    expected = combine_guidance(*two_calls, 3.0, num_channels=3)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_was_never_shown_in_training_is_not_shown_in_sampling() -> None:
    """The text-only baseline knows no embedding, and a decoder without captions none of them."""
    batch, t = tiny_batch(2), torch.tensor([10, 600])
    x, z, tokens = batch["image"], batch["image_embedding"], batch["tokens"]
    blind = tiny_decoder(embedding_dropout=1.0)
    assert torch.equal(blind.guided_denoiser(z, tokens, 1.0)(x, t), blind.guided_denoiser(-z, tokens, 1.0)(x, t))
    mute = tiny_decoder(caption_dropout=1.0)
    other = tokens.flip(0)
    assert torch.equal(mute.guided_denoiser(z, tokens, 1.0)(x, t), mute.guided_denoiser(z, other, 1.0)(x, t))


def test_a_text_embedding_decoder_is_trained_on_text_embeddings() -> None:
    decoder, batch = tiny_decoder(condition_on="text_embedding", embedding_dropout=0.0), tiny_batch(2)
    batch["text_embedding"] = batch["image_embedding"].flip(0)
    random = SampleRandom(0, 0, range(2))
    loss = decoder.loss(batch, random)[0]
    assert torch.equal(decoder.loss({**batch, "image_embedding": torch.zeros(2, 12)}, random)[0], loss)
    assert not torch.equal(decoder.loss({**batch, "text_embedding": batch["image_embedding"]}, random)[0], loss)


@torch.no_grad()
def test_a_decoder_that_reads_the_clips_text_hides_its_padding() -> None:
    decoder, batch = tiny_decoder(text=ClipTextConfig(context_length=6, width=10), context_width=16), tiny_batch(2)
    decoder.text_encoder.set_null_caption(torch.tensor([1, 2, 0, 0, 0, 0]), torch.randn(6, 10), torch.randn(12))
    x, t, z = batch["image"], torch.tensor([10, 600]), batch["image_embedding"]
    tokens = torch.tensor([[1, 5, 2, 0, 0, 0], [1, 5, 6, 7, 8, 2]])
    sequence, embedding = torch.randn(2, 6, 10), torch.randn(2, 12)
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    base = decoder(x, t, z, tokens, no, no, ClipTextFeatures(sequence, embedding))
    padded = sequence.clone()
    padded[0, 3:] = 9.0
    hidden = decoder(x, t, z, tokens, no, no, ClipTextFeatures(padded, embedding))
    torch.testing.assert_close(hidden, base, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(decoder(x, t, z, tokens, no, no, ClipTextFeatures(sequence, -embedding)), base)
    dropped = decoder(x, t, z, tokens, no, yes, ClipTextFeatures(sequence, embedding))
    assert torch.equal(dropped, decoder(x, t, z, tokens.flip(0), no, yes, ClipTextFeatures(-sequence, -embedding)))
    with pytest.raises(ValueError, match="no features are given"):
        decoder(x, t, z, tokens, no, no)


def test_no_caption_is_a_dropped_caption() -> None:
    decoder, batch = tiny_decoder(), tiny_batch(2)
    x, t = batch["image"], torch.tensor([10, 600])
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    out = decoder.guided_denoiser(batch["image_embedding"], None, 1.0)(x, t)
    torch.testing.assert_close(out, decoder(x, t, batch["image_embedding"], batch["tokens"], no, yes))


def test_inversion_finds_the_noise_that_decodes_to_the_image() -> None:
    decoder = tiny_decoder(diffusion=DiffusionConfig(prediction="v"))
    with torch.no_grad():  # predictions well inside [-1, 1], where nothing is clipped
        decoder.unet.out[2].weight.mul_(0.2)
    batch = tiny_batch(2)
    image = batch["image"] * 0.3
    x_T = decoder.invert(image, batch["image_embedding"], steps=20)
    back = decoder.sample(
        batch["image_embedding"], sampler="ddim", steps=20, generators=seeded_generators([0, 1]), x_T=x_T
    )
    torch.testing.assert_close(back, image, atol=0.02, rtol=0)


def test_it_learns_the_image_from_the_embedding() -> None:
    torch.manual_seed(0)
    config = tiny_config(
        unet=UNetConfig(model_channels=16, channel_mult=(1, 1), num_res_blocks=1),
        diffusion=DiffusionConfig(prediction="v"),
        embedding_dropout=0.0,
        caption_dropout=1.0,
    )
    decoder = Decoder(config)
    colours = torch.tensor([[0.8, -0.8, -0.8], [-0.8, 0.8, -0.8], [-0.8, -0.8, 0.8]])
    which = torch.arange(24) % 3
    batch = {
        "image": colours[which][:, :, None, None].expand(-1, 3, 8, 8),
        "image_embedding": torch.eye(12)[which],
        "tokens": torch.zeros(24, 6, dtype=torch.int64),
    }
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        decoder.loss(batch, SampleRandom(0, step, range(24)))[0].backward()
        optimizer.step()
    images = decoder.eval().sample(torch.eye(12)[:3], steps=10, sampler="ddim", generators=seeded_generators([1, 2, 3]))
    torch.testing.assert_close(images.mean(dim=(2, 3)), colours, atol=0.3, rtol=0)


def test_bad_settings_and_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="caption_dropout"):
        tiny_config(caption_dropout=1.5)
    with pytest.raises(ValueError, match="null_embedding"):
        tiny_config(null_embedding="none")
    decoder, batch = tiny_decoder(), tiny_batch(2)
    with pytest.raises(ValueError, match="training mode"):
        decoder.train().sample(batch["image_embedding"], generators=seeded_generators([0, 1]))
    decoder.eval()
    with pytest.raises(ValueError, match="sampler"):
        decoder.sample(batch["image_embedding"], sampler="magic", steps=2, generators=seeded_generators([0, 1]))
    with pytest.raises(ValueError, match="8, 8"):
        decoder.loss({**batch, "image": torch.zeros(2, 3, 4, 4)}, SampleRandom(0, 0, [0, 1]))
