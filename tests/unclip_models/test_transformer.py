"""Attention, cache and activation checkpointing of the transformer."""

import pytest
import torch

from unclip_models.transformer import Transformer


def _transformer(*, causal: bool, checkpoint: bool = False) -> Transformer:
    torch.manual_seed(0)
    return Transformer(16, 3, 4, causal=causal, checkpoint_activations=checkpoint)


def test_attention_is_softmax_of_scaled_products() -> None:
    attention = _transformer(causal=True).blocks[0].attention
    x = torch.randn(2, 5, 16)
    q, k, v = attention.qkv(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16))
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_causal_positions_do_not_see_the_future() -> None:
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 4:] = torch.randn(1, 2, 16)
    for causal in (True, False):
        model = _transformer(causal=causal)
        same = torch.allclose(model(x)[:, :4], model(changed)[:, :4], atol=1e-6)
        assert same is causal


@torch.no_grad()
def test_cached_pieces_equal_the_full_pass() -> None:
    model, x = _transformer(causal=True), torch.randn(2, 9, 16)
    cache = model.new_cache()
    pieces = [model(piece, cache) for piece in x.split([4, 3, 1, 1], dim=1)]
    assert cache.length == 9
    assert torch.allclose(torch.cat(pieces, dim=1), model(x), atol=1e-5)


@torch.no_grad()
def test_forked_and_repeated_caches_leave_the_original_alone() -> None:
    model, x = _transformer(causal=True), torch.randn(2, 6, 16)
    cache = model.new_cache()
    model(x[:, :4], cache)
    full = model(x)[:, 4:]
    assert torch.allclose(model(x[:, 4:], cache.fork()), full, atol=1e-5)
    repeated = model(x[:, 4:].repeat_interleave(3, dim=0), cache.repeated(3))
    assert torch.allclose(repeated, full.repeat_interleave(3, dim=0), atol=1e-5)
    assert cache.length == 4


def test_checkpointing_changes_no_number() -> None:
    grads = []
    for checkpoint in (False, True):
        model = _transformer(causal=False, checkpoint=checkpoint)
        x = torch.ones(1, 3, 16, requires_grad=True)
        model(x).sum().backward()
        grads.append((x.grad, model.blocks[0].mlp[0].weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        Transformer(16, 1, 3, causal=True)
    with pytest.raises(ValueError, match="not causal"):
        _transformer(causal=False).new_cache()
