"""The autoregressive prior: quantiser, cache, sampling."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_models.ar_prior import ARPrior, inverse_transform
from unclip_models.randomness import SampleRandom
from unclip_models.sampling import seeded_generators
from unclip_models.settings import ARPriorConfig, TextEncoderConfig

DIM, CODES, BUCKETS, DOTS, CONTEXT = 8, 4, 32, 6, 5
CONFIG = ARPriorConfig(
    embedding_dim=DIM,
    num_codes=CODES,
    num_buckets=BUCKETS,
    num_dot_buckets=DOTS,
    text=TextEncoderConfig(context_length=CONTEXT, width=12, layers=1, heads=2, vocab_size=20),
    width=16,
    layers=2,
    heads=2,
)


def _data(size: int, seed: int = 0) -> Tensor:
    """Unit-norm embeddings whose spectrum falls, as CLIP's does."""
    spread = torch.linspace(1.0, 0.05, DIM)
    return F.normalize(torch.randn(size, DIM, generator=torch.Generator().manual_seed(seed)) * spread, dim=-1)


def _with_pca(prior: ARPrior, num_codes: int = CODES, num_buckets: int = BUCKETS) -> ARPrior:
    data = _data(500)
    mean = data.mean(dim=0)
    axes = torch.linalg.svd(data - mean, full_matrices=False).Vh[:num_codes]
    components = (data - mean) @ axes.T
    fractions = torch.linspace(0, 1, num_buckets + 1)
    low, high = components.amin(dim=0)[:, None], components.amax(dim=0)[:, None]
    dot_edges = torch.linspace(-1, 1, prior.config.num_dot_buckets + 1)
    prior.set_pca(mean=mean, axes=axes, edges=low + (high - low) * fractions, dot_edges=dot_edges)
    return prior


@pytest.fixture
def prior() -> ARPrior:
    torch.manual_seed(0)
    return _with_pca(ARPrior(CONFIG))


def _batch(size: int = 4) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 20, (size, CONTEXT), generator=rng)
    tokens[:, 3:] = 0
    return {"tokens": tokens, "text_embedding": _data(size, 4), "image_embedding": _data(size, 5)}


def _sample(prior: ARPrior, batch: dict[str, Tensor], seeds: list[int], **overrides: object) -> Tensor:
    settings = {"guidance_scale": 1.0, **overrides}
    generators = seeded_generators(seeds)
    return prior.sample(batch["tokens"], batch["text_embedding"], generators=generators, **settings)  # type: ignore[arg-type]


def test_codes_round_trip_within_half_a_bucket(prior: ARPrior) -> None:
    data = _data(500)
    codes = prior.encode(data)
    assert codes.dtype == torch.int64 and codes.shape == (500, CODES)
    assert int(codes.min()) == 0 and int(codes.max()) == BUCKETS - 1
    project = lambda z: (z - prior.pca_mean) @ prior.pca_axes.T  # noqa: E731
    error = (project(prior.decode(codes)) - project(data)).abs()
    half_bucket = (prior.code_edges[:, 1] - prior.code_edges[:, 0]) / 2
    assert bool((error <= half_bucket + 1e-5).all())
    assert torch.equal(prior.encode(prior.decode(codes)), codes)


def test_the_quantiser_does_not_mind_autocast() -> None:
    prior = _with_pca(ARPrior(dataclasses.replace(CONFIG, num_codes=DIM, num_buckets=1024)), DIM, 1024)
    codes = prior.encode(_data(500))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior.encode(_data(500)), codes)
        decoded = prior.decode(codes)
    assert decoded.dtype == torch.float32 and torch.equal(decoded, prior.decode(codes))


def test_all_components_and_fine_buckets_reconstruct_the_embedding() -> None:
    config = dataclasses.replace(CONFIG, num_codes=DIM, num_buckets=1024)
    prior = _with_pca(ARPrior(config), DIM, 1024)
    assert torch.allclose(prior.decode(prior.encode(_data(500))), _data(500), atol=4e-3)


def test_outliers_take_the_end_buckets_and_edges_belong_to_the_right(prior: ARPrior) -> None:
    edges, axis = prior.code_edges[0], prior.pca_axes[0]
    points = torch.stack([edges[0] - 5, edges[3] + 1e-6, edges[4] - 1e-6, edges[-1] + 5])
    assert prior.encode(prior.pca_mean + points[:, None] * axis)[:, 0].tolist() == [0, 3, 3, BUCKETS - 1]


def test_dot_product_is_quantised() -> None:
    prior = _with_pca(ARPrior(CONFIG))
    one = torch.eye(DIM)[:1]
    # Six buckets over [-1, 1]: -1, 0 and 1 fall into the first, the fourth and the last.
    dots = [int(prior.encode_dot(one * factor, one)) for factor in (-1.0, 0.0, 1.0)]
    assert dots == [0, 3, 5]


@pytest.mark.parametrize("text_prefix", ["sequence", "pooled"])
@torch.no_grad()
def test_the_cache_of_sampling_equals_the_full_pass(text_prefix: str) -> None:
    """Sampled codes must be the inverse transform of what one full pass predicts for them."""
    torch.manual_seed(0)
    prior = _with_pca(ARPrior(dataclasses.replace(CONFIG, text_prefix=text_prefix, temperature=0.7)))  # type: ignore[arg-type]
    for embedding in (prior.code_embedding.weight, prior.code_head.weight, prior.dot_head.weight):
        embedding.mul_(20)  # far from uniform, so that the codes depend on what came before
    batch = _batch(3)
    uniforms = torch.rand(6, CODES + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (1.0, 2.5):
        codes = prior._sample_codes(batch["tokens"], batch["text_embedding"], scale, uniforms)
        tokens, text_embedding = (batch[name].repeat_interleave(2, dim=0) for name in ("tokens", "text_embedding"))
        keep = torch.zeros(6, dtype=torch.bool)
        dot_logits, _ = prior(torch.zeros(6, dtype=torch.int64), codes, tokens, text_embedding, keep)
        null_dot_logits, _ = prior(torch.zeros(6, dtype=torch.int64), codes, tokens, text_embedding, ~keep)
        guided = null_dot_logits + scale * (dot_logits - null_dot_logits)
        dot = inverse_transform(guided, 0.5 + 0.5 * uniforms[:, 0])
        logits = prior(dot, codes, tokens, text_embedding, keep)[1]
        null_logits = prior(dot, codes, tokens, text_embedding, ~keep)[1]
        guided = (null_logits + scale * (logits - null_logits)) / 0.7
        expected = [inverse_transform(guided[:, j], uniforms[:, j + 1]) for j in range(CODES)]
        assert torch.equal(codes, torch.stack(expected, dim=1))


@torch.no_grad()
def test_a_code_is_predicted_from_earlier_ones_only(prior: ARPrior) -> None:
    batch, keep = _batch(1), torch.tensor([False])
    codes, dot = torch.tensor([[1, 2, 3, 4]]), torch.tensor([2])
    base_dot, base = prior(dot, codes, batch["tokens"], batch["text_embedding"], keep)
    assert base_dot.shape == (1, DOTS) and base.shape == (1, CODES, BUCKETS)
    other_dot, other = prior(dot, torch.tensor([[1, 9, 3, 4]]), batch["tokens"], batch["text_embedding"], keep)
    assert torch.equal(base_dot, other_dot) and torch.allclose(base[:, :2], other[:, :2], atol=1e-6)
    assert not torch.allclose(base[:, 2], other[:, 2], atol=1e-6)
    third_dot, third = prior(torch.tensor([5]), codes, batch["tokens"], batch["text_embedding"], keep)
    assert torch.equal(base_dot, third_dot) and not torch.allclose(base[:, 0], third[:, 0], atol=1e-6)


def test_inverse_transform_samples_the_distribution_and_its_top_half() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = probabilities.log().expand(1000, 4)
    counts = inverse_transform(logits, grid).bincount(minlength=4)
    assert torch.allclose(counts / 1000, probabilities, atol=2e-3)
    top = inverse_transform(logits, 0.5 + 0.5 * grid).bincount(minlength=4) / 1000
    # Above the median lie 0.1 of the third bucket and the whole fourth one.
    assert torch.allclose(top, torch.tensor([0.0, 0.0, 0.2, 0.8]), atol=2e-3)
    assert inverse_transform(torch.zeros(1, 4), torch.tensor([1.0], dtype=torch.float64)).tolist() == [3]


def test_loss_starts_near_uniform_and_trains_every_parameter() -> None:
    torch.manual_seed(0)
    prior = _with_pca(ARPrior(dataclasses.replace(CONFIG, caption_dropout=0.5)))
    loss, terms = prior.loss(_batch(8), SampleRandom(0, 0, range(8)))
    uniform = (CODES * torch.tensor(float(BUCKETS)).log() + torch.tensor(float(DOTS)).log()) / (CODES + 1)
    assert float(loss.detach()) == pytest.approx(float(uniform), rel=0.25)
    mean = (CODES * terms["code_cross_entropy"] + terms["dot_cross_entropy"]) / (CODES + 1)
    assert torch.allclose(terms["loss"], mean, atol=1e-5)
    loss.backward()
    assert not [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.any()]


def test_gradients_reach_the_null_embeddings_only_when_dropped(prior: ARPrior) -> None:
    tokens = torch.randint(1, 20, (2, CONTEXT))  # no padding
    dot, codes = torch.tensor([0, 1]), prior.encode(_data(2))
    for drop, reached in ((torch.tensor([False, False]), False), (torch.tensor([True, False]), True)):
        prior.zero_grad()
        prior(dot, codes, tokens, _data(2, 9), drop)[1].square().sum().backward()
        for parameter in (prior.null_text_embedding, prior.text_encoder.padding_embedding):
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0) is reached


def test_samples_are_unit_norm_and_depend_on_their_seed_alone(prior: ARPrior) -> None:
    batch = _batch(3)
    whole = _sample(prior, batch, [5, 6, 7], guidance_scale=2.0, num_candidates=2, steps=64, sampler="ddim")
    assert whole.shape == (3, DIM) and torch.allclose(whole.norm(dim=-1), torch.ones(3), atol=1e-5)
    alone = {name: value[1:2] for name, value in batch.items()}
    assert torch.allclose(_sample(prior, alone, [6], guidance_scale=2.0, num_candidates=2), whole[1:2], atol=1e-5)


def test_guidance_scale_one_equals_the_conditional_model_exactly(prior: ARPrior) -> None:
    before = _sample(prior, _batch(2), [1, 2])
    with torch.no_grad():
        prior.null_text_embedding.fill_(7.0)
    assert torch.equal(_sample(prior, _batch(2), [1, 2]), before)


def test_it_learns_a_caption_to_embedding_map(prior: ARPrior) -> None:
    batch = {name: value[:2].repeat(8, 1) for name, value in _batch(2).items()}
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for step in range(80):
        optimizer.zero_grad()
        loss = prior.loss(batch, SampleRandom(0, step, range(16)))[0]
        loss.backward()
        optimizer.step()
    pair = {name: value[:2] for name, value in batch.items()}
    expected = F.normalize(prior.decode(prior.encode(pair["image_embedding"])), dim=-1)
    assert torch.allclose(_sample(prior, pair, [1, 2]), expected, atol=1e-4)


def test_the_quantiser_survives_half_precision_and_a_checkpoint(prior: ARPrior) -> None:
    edges = prior.code_edges.clone()
    state = {name: value.clone() for name, value in prior.state_dict().items()}
    prior.bfloat16()
    assert torch.equal(prior.code_edges, edges) and prior.code_head.weight.dtype == torch.bfloat16
    prior.loss(_batch(), SampleRandom(0, 0, range(4)))
    loaded = ARPrior(CONFIG)
    loaded.load_state_dict(state)
    assert torch.equal(loaded.encode(_data(20)), prior.encode(_data(20)))


def test_bad_input_is_refused(prior: ARPrior) -> None:
    with pytest.raises(ValueError, match="call set_pca"):
        ARPrior(CONFIG).encode(_data(2))
    good = {"mean": prior.pca_mean, "axes": prior.pca_axes, "edges": prior.code_edges, "dot_edges": prior.dot_edges}
    for name, value, message in (
        ("axes", prior.pca_axes[:2], "pca_axes must be finite and"),
        ("axes", prior.pca_axes * 2, "not orthonormal"),
        ("edges", prior.code_edges.flip(1), "code_edges must increase"),
        ("dot_edges", prior.dot_edges * float("nan"), "dot_edges must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ARPrior(CONFIG).set_pca(**{**good, name: value})
    with pytest.raises(ValueError, match="above embedding_dim"):
        ARPriorConfig(embedding_dim=8, num_codes=9)
    with pytest.raises(ValueError, match="generators for"):
        _sample(prior, _batch(2), [1])
