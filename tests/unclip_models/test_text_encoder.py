"""The caption encoder: padding, pooling, dropped captions."""

import pytest
import torch

from unclip_models.settings import TextEncoderConfig
from unclip_models.text_encoder import TextEncoder, caption_mask

CONFIG = TextEncoderConfig(context_length=6, width=16, layers=2, heads=2, vocab_size=50)
TOKENS = torch.tensor([[48, 5, 7, 49, 0, 0], [48, 3, 49, 0, 0, 0]])


@pytest.fixture
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(CONFIG)


def test_padding_is_the_run_of_zeros_at_the_end() -> None:
    tokens = torch.tensor([[48, 0, 7, 49, 0, 0], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    assert caption_mask(tokens).tolist() == [[True] * 4 + [False] * 2, [False] * 6, [True] * 6]


def test_shapes_and_pooling_at_the_last_position(encoder: TextEncoder) -> None:
    sequence, pooled = encoder(TOKENS)
    assert sequence.shape == (2, 6, 16) and torch.equal(pooled, sequence[:, -1])
    # The output of the final LayerNorm.
    assert torch.allclose(sequence.mean(-1), torch.zeros(2, 6), atol=1e-5)


def test_attention_is_not_causal_and_pooling_sees_every_token(encoder: TextEncoder) -> None:
    changed = TOKENS.clone()
    changed[0, 2] = 9
    before, after = encoder(TOKENS), encoder(changed)
    assert not torch.allclose(before[0][0, 0], after[0][0, 0], atol=1e-6)
    assert not torch.allclose(before[1][0], after[1][0], atol=1e-6)
    assert torch.allclose(before[1][1], after[1][1], atol=1e-6)


def test_a_dropped_caption_is_an_all_padding_row(encoder: TextEncoder) -> None:
    drop = torch.tensor([True, False])
    blank = TOKENS.clone()
    blank[0] = 0
    assert torch.equal(encoder(TOKENS, drop)[0], encoder(blank)[0])


def test_gradients_reach_padding_only_where_there_is_padding(encoder: TextEncoder) -> None:
    encoder(TOKENS)[0].square().sum().backward()
    assert encoder.padding_embedding.grad is not None
    norms = encoder.padding_embedding.grad.norm(dim=1)
    assert (norms[:3] == 0).all() and (norms[3:] > 0).all()


def test_no_layers_leaves_embeddings_and_norm() -> None:
    encoder = TextEncoder(TextEncoderConfig(context_length=6, width=16, layers=0, heads=2, vocab_size=50))
    embedded = encoder.token_embedding(TOKENS) + encoder.positional_embedding
    embedded = torch.where(caption_mask(TOKENS)[..., None], embedded, encoder.padding_embedding)
    assert torch.equal(encoder(TOKENS)[0], encoder.final_norm(embedded))


def test_bad_input_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="context_length"):
        encoder(TOKENS[:, :5])
    with pytest.raises(ValueError, match="not divisible"):
        TextEncoderConfig(width=10, heads=4)
    with pytest.raises(ValueError, match=r"text\.layers is -1"):
        TextEncoderConfig(layers=-1)
