"""The diffusion prior: its sequence, loss, guidance and samplers."""

import dataclasses
import json
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_models.prior import DiffusionPrior, best_candidate
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import seeded_generators
from unclip_models.sampling_settings import PriorSampler
from unclip_models.settings import ClipTextConfig, DiffusionConfig, DiffusionPriorConfig, TextEncoderConfig

DIM, CONTEXT = 8, 5
CONFIG = DiffusionPriorConfig(
    embedding_dim=DIM,
    text=TextEncoderConfig(context_length=CONTEXT, width=12, layers=1, heads=2, vocab_size=20),
    width=16,
    layers=2,
    heads=2,
    diffusion=DiffusionConfig(prediction="x_start", num_timesteps=100),
)


@pytest.fixture
def prior() -> DiffusionPrior:
    torch.manual_seed(0)
    return DiffusionPrior(CONFIG)


def _batch(size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 20, (size, CONTEXT), generator=rng)
    tokens[:, 3:] = 0
    return {
        "tokens": tokens,
        "text_embedding": F.normalize(torch.randn(size, DIM, generator=rng), dim=-1),
        "image_embedding": F.normalize(torch.randn(size, DIM, generator=rng), dim=-1),
    }


def _sample(prior: DiffusionPrior, batch: dict[str, Tensor], seeds: list[int], **overrides: object) -> Tensor:
    settings = {"steps": 5, "guidance_scale": 1.0, **overrides}
    generators = seeded_generators(seeds)
    return prior.sample(batch["tokens"], batch["text_embedding"], generators=generators, **settings)  # type: ignore[arg-type]


def test_loss_is_the_squared_error_of_the_scaled_embedding(prior: DiffusionPrior) -> None:
    batch, random = _batch(), SampleRandom(0, 0, range(4))
    loss, terms = prior.loss(batch, random)
    t, noise = random.integers("timestep", 0, 100), random.normal("noise", (DIM,))
    x_start = batch["image_embedding"] * 17.2 * (DIM / 1024) ** 0.5
    x_t = prior.diffusion.q_sample(x_start, t, noise)
    drop = random.bernoulli("caption_dropout", 0.1)
    expected = (prior(x_t, t, batch["tokens"], batch["text_embedding"], drop) - x_start).square().mean(dim=1)
    assert torch.allclose(terms["loss"], expected, atol=1e-6) and torch.allclose(loss, expected.mean())
    assert torch.equal(terms["t"], t) and not terms["loss"].requires_grad


def test_loss_of_a_sample_does_not_depend_on_its_batch_mates(prior: DiffusionPrior) -> None:
    batch = _batch()
    whole = prior.loss(batch, SampleRandom(0, 5, [8, 9, 10, 11]))[1]["loss"]
    half = {name: value[2:] for name, value in batch.items()}
    assert torch.allclose(prior.loss(half, SampleRandom(0, 5, [10, 11]))[1]["loss"], whole[2:], atol=1e-5)


def test_output_is_read_at_a_last_position_that_sees_everything(prior: DiffusionPrior) -> None:
    batch, x_t, t = _batch(1), torch.randn(1, DIM), torch.tensor([50])
    keep = torch.tensor([False])
    base = prior(x_t, t, batch["tokens"], batch["text_embedding"], keep)
    other_tokens = batch["tokens"].roll(1, dims=1).clamp(min=1)
    changed = [
        prior(x_t + 1, t, batch["tokens"], batch["text_embedding"], keep),
        prior(x_t, t + 20, batch["tokens"], batch["text_embedding"], keep),
        prior(x_t, t, other_tokens, batch["text_embedding"], keep),
        prior(x_t, t, batch["tokens"], -batch["text_embedding"], keep),
    ]
    assert all(not torch.allclose(base, other, atol=1e-6) for other in changed)


def test_dropping_withholds_caption_and_text_embedding(prior: DiffusionPrior) -> None:
    one, other = _batch(2, seed=0), _batch(2, seed=1)
    x_t, t = torch.randn(2, DIM), torch.tensor([10, 60])
    drop = torch.tensor([True, False])
    outputs = [prior(x_t, t, b["tokens"], b["text_embedding"], drop) for b in (one, other)]
    assert torch.equal(outputs[0][0], outputs[1][0]) and not torch.allclose(outputs[0][1], outputs[1][1])


def test_gradients_reach_the_null_embeddings_only_when_dropped(prior: DiffusionPrior) -> None:
    batch, t = _batch(2), torch.tensor([10, 60])
    batch["tokens"] = torch.randint(1, 20, (2, CONTEXT))  # no padding
    for drop, reached in ((torch.tensor([False, False]), False), (torch.tensor([True, False]), True)):
        prior.zero_grad()
        prior(torch.randn(2, DIM), t, batch["tokens"], batch["text_embedding"], drop).square().sum().backward()
        for parameter in (prior.null_text_embedding, prior.text_encoder.padding_embedding):
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) is reached


def test_every_parameter_is_trained(prior: DiffusionPrior) -> None:
    config = dataclasses.replace(CONFIG, caption_dropout=0.5, checkpoint_activations=True)
    prior = DiffusionPrior(config)
    prior.loss(_batch(8), SampleRandom(0, 0, range(8)))[0].backward()
    assert not [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_the_cached_denoiser_of_sampling_equals_forward(prior: DiffusionPrior) -> None:
    batch, t = _batch(2), torch.tensor([3, 70])
    x_t, drop = torch.randn(2, 3, DIM), torch.tensor([False, True])
    denoiser = prior.bind(batch["tokens"], batch["text_embedding"], drop, num_candidates=3)
    for _ in range(2):  # the second call must not see the first one's keys
        got = denoiser(x_t, t)
    for candidate in range(3):
        expected = prior(x_t[:, candidate], t, batch["tokens"], batch["text_embedding"], drop)
        assert torch.allclose(got[:, candidate], expected, atol=1e-5)


@pytest.mark.parametrize("sampler", get_args(PriorSampler))
def test_samples_are_unit_norm_and_depend_on_their_seed_alone(prior: DiffusionPrior, sampler: str) -> None:
    batch = _batch(3)
    prior.measure_gamma(batch, SampleRandom(0, 0, range(3)), num_points=10)
    whole = _sample(prior, batch, [5, 6, 7], sampler=sampler, guidance_scale=2.0)
    assert whole.shape == (3, DIM) and whole.dtype == torch.float32
    assert torch.allclose(whole.norm(dim=-1), torch.ones(3), atol=1e-5)
    alone = {name: value[1:2] for name, value in batch.items()}
    assert torch.allclose(_sample(prior, alone, [6], sampler=sampler, guidance_scale=2.0), whole[1:2], atol=1e-4)


def test_guidance_scale_one_equals_the_conditional_model_exactly(prior: DiffusionPrior) -> None:
    batch = _batch(2)
    before = _sample(prior, batch, [1, 2], guidance_scale=1.0)
    guided = _sample(prior, batch, [1, 2], guidance_scale=3.0)
    with torch.no_grad():
        prior.null_text_embedding.fill_(7.0)
    assert torch.equal(_sample(prior, batch, [1, 2], guidance_scale=1.0), before)
    assert not torch.allclose(guided, before)


def test_the_best_candidate_has_the_largest_dot_product() -> None:
    candidates = F.normalize(torch.randn(5, 4, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    text_embedding = F.normalize(torch.randn(5, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
    best = best_candidate(candidates, text_embedding)
    scores = torch.einsum("bnd,bd->bn", candidates, text_embedding)
    assert torch.allclose((best * text_embedding).sum(-1), scores.max(dim=1).values)
    close = text_embedding[:, None] + 1e-3 * candidates  # bfloat16 cannot tell them apart
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = best_candidate(close, text_embedding)
    assert torch.equal(cast, best_candidate(close, text_embedding))


def test_more_candidates_never_match_worse(prior: DiffusionPrior) -> None:
    batch = _batch(4)
    chosen = _sample(prior, batch, [1, 2, 3, 4], num_candidates=6)
    # Candidates of one caption differ, or choosing among them would mean nothing.
    alone = _sample(prior, batch, [1, 2, 3, 4], num_candidates=1)
    score = lambda z: (z * batch["text_embedding"]).sum(-1)  # noqa: E731
    assert float(score(chosen).mean()) >= float(score(alone).mean())
    assert not torch.allclose(chosen, alone)


def test_gamma_is_measured_some_samples_at_a_time(prior: DiffusionPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, random = _batch(5), SampleRandom(0, 0, range(5))
    held, bind = list[int](), prior.bind

    def counted(tokens: Tensor, *rest: Any, **named: Any) -> Any:
        held.append(len(tokens))
        return bind(tokens, *rest, **named)

    monkeypatch.setattr(prior, "bind", counted)
    whole = prior.measure_gamma(batch, random, num_points=8).clone()
    monkeypatch.setattr("unclip_models.prior._SAMPLES_AT_ONCE", 2)
    assert torch.allclose(prior.measure_gamma(batch, random, num_points=8), whole, rtol=1e-5)
    assert held == [5, 2, 2, 1]


def test_analytic_sampling_needs_gamma_which_survives_half_precision(prior: DiffusionPrior) -> None:
    batch = _batch(2)
    with pytest.raises(ValueError, match="run measure_gamma first"):
        _sample(prior, batch, [1, 2], sampler="analytic")
    gamma = prior.measure_gamma(batch, SampleRandom(0, 0, range(2)), num_points=8).clone()
    assert gamma.shape == (100,) and bool((gamma >= 0).all())
    prior.bfloat16()
    assert prior.gamma.dtype == torch.float32 and torch.equal(prior.gamma, gamma)
    assert prior.out_proj.weight.dtype == torch.bfloat16
    assert _sample(prior, batch, [1, 2], sampler="analytic").dtype == torch.float32


@torch.no_grad()
def test_loss_runs_under_autocast_and_in_bfloat16(prior: DiffusionPrior) -> None:
    batch, random = _batch(), SampleRandom(0, 0, range(4))
    exact = prior.loss(batch, random)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = prior.loss(batch, random)[0]
    half = prior.bfloat16().loss(batch, random)[0]
    assert cast.dtype == half.dtype == torch.float32
    assert float(cast) == pytest.approx(float(exact), rel=0.05) and float(half) == pytest.approx(float(exact), rel=0.05)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_other_predictions_train_and_sample(prediction: str) -> None:
    torch.manual_seed(0)
    diffusion = DiffusionConfig(prediction=prediction, num_timesteps=100)  # type: ignore[arg-type]
    prior = DiffusionPrior(dataclasses.replace(CONFIG, diffusion=diffusion))
    assert torch.isfinite(prior.loss(_batch(), SampleRandom(0, 0, range(4)))[0])
    assert torch.isfinite(_sample(prior, _batch(2), [1, 2])).all()


def test_it_learns_a_caption_to_embedding_map(prior: DiffusionPrior) -> None:
    """Two captions, two embeddings: after a short training the samples land on the right one."""
    batch = {name: value[:2].repeat(16, 1) for name, value in _batch(2).items()}
    optimizer = torch.optim.Adam(prior.parameters(), lr=5e-3)
    for step in range(150):
        optimizer.zero_grad()
        prior.loss(batch, SampleRandom(0, step, range(32)))[0].backward()
        optimizer.step()
    pair = {name: value[:2] for name, value in batch.items()}
    samples = _sample(prior, pair, [1, 2], steps=20, sampler="ddim")
    assert float((samples * pair["image_embedding"]).sum(-1).min()) > 0.9


@pytest.mark.parametrize("scaling", ["paper", "sqrt_dim", "mean_std"])
def test_every_scaling_trains_and_samples_embeddings_in_their_own_units(scaling: str) -> None:
    torch.manual_seed(0)
    prior = DiffusionPrior(dataclasses.replace(CONFIG, embedding_scaling=scaling))  # type: ignore[arg-type]
    batch = _batch(2)
    if scaling == "mean_std":
        with pytest.raises(ValueError, match="call set_statistics first"):
            prior.loss(batch, SampleRandom(0, 0, range(2)))
        prior.scaling.set_statistics(torch.full((DIM,), 0.1), torch.linspace(0.2, 0.4, DIM))
    assert torch.isfinite(prior.loss(batch, SampleRandom(0, 0, range(2)))[0])
    samples = _sample(prior, batch, [1, 2], clip_range=3.0)
    assert torch.allclose(samples.norm(dim=-1), torch.ones(2), atol=1e-5)


CLIP_TEXT = dataclasses.replace(CONFIG, text=ClipTextConfig(context_length=CONTEXT, width=6))


@torch.no_grad()
def test_a_prior_that_reads_the_clips_text_ignores_its_padding_and_caches_alike() -> None:
    torch.manual_seed(0)
    prior, batch = DiffusionPrior(CLIP_TEXT).eval(), _batch(2)
    assert "null_text_embedding" not in dict(prior.named_parameters())
    prior.text_encoder.set_null_caption(torch.tensor([3, 4, 0, 0, 0]), torch.randn(CONTEXT, 6), torch.randn(DIM))
    sequence, x_t, t = torch.randn(2, CONTEXT, 6), torch.randn(2, DIM), torch.tensor([3, 70])
    no, some = torch.tensor([False, False]), torch.tensor([False, True])
    base = prior(x_t, t, batch["tokens"], batch["text_embedding"], no, sequence)
    padded = sequence.clone()
    padded[:, 3:] = 9.0  # behind the captions' ends
    assert torch.equal(prior(x_t, t, batch["tokens"], batch["text_embedding"], no, padded), base)
    dropped = prior(x_t, t, batch["tokens"], batch["text_embedding"], some, sequence)
    assert torch.equal(dropped[0], base[0]) and not torch.allclose(dropped[1], base[1])
    bound = prior.bind(batch["tokens"], batch["text_embedding"], some, text_sequence=sequence, num_candidates=2)
    cached = bound(x_t[:, None].expand(-1, 2, -1), t)
    assert torch.allclose(cached, dropped[:, None].expand(-1, 2, -1), atol=1e-5)


def test_bad_settings_are_refused(prior: DiffusionPrior) -> None:
    with pytest.raises(ValueError, match="fixed variance"):
        DiffusionPriorConfig(diffusion=DiffusionConfig(variance="learned_range"))
    with pytest.raises(ValueError, match=r"prior\.caption_dropout is 1\.0"):
        DiffusionPriorConfig(caption_dropout=1.0)
    with pytest.raises(ValueError, match=r"prior\.embedding_scale: mean_std measures"):
        DiffusionPriorConfig(embedding_scaling="mean_std", embedding_scale=2.0)
    with pytest.raises(ValueError, match="sampler is 'euler'"):
        _sample(prior, _batch(1), [0], sampler="euler")
    with pytest.raises(ValueError, match="2 generators for 1 captions"):
        _sample(prior, _batch(1), [0, 1])
    with pytest.raises(ValueError, match="num_candidates is 0"):
        _sample(prior, _batch(1), [0], num_candidates=0)
    json.dumps(dataclasses.asdict(CONFIG))
