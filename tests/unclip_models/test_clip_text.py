"""The frozen CLIP's text as captions: the empty caption stands in where one is withheld."""

import pytest
import torch

from unclip_models.clip_text import ClipText, ClipTextFeatures, build_text, encode_captions, features_of
from unclip_models.settings import ClipTextConfig, TextEncoderConfig
from unclip_models.text_encoder import TextEncoder

CONFIG = ClipTextConfig(context_length=5, width=4)
TOKENS = torch.tensor([[7, 8, 9, 0, 0], [7, 9, 0, 0, 0]])
FEATURES = ClipTextFeatures(torch.randn(2, 5, 4), torch.randn(2, 3))
NO, SOME = torch.tensor([False, False]), torch.tensor([False, True])


def _text() -> ClipText:
    text = ClipText(CONFIG, 3)
    text.set_null_caption(torch.tensor([7, 8, 0, 0, 0]), torch.full((5, 4), 0.5), torch.full((3,), 0.25))
    return text


def test_captions_pass_through_with_their_padding_hidden() -> None:
    encoding = _text()(TOKENS, NO, FEATURES)
    assert torch.equal(encoding.sequence, FEATURES.sequence) and torch.equal(encoding.pooled, FEATURES.embedding)
    assert encoding.visible.tolist() == [[True, True, True, False, False], [True, True, False, False, False]]


def test_a_withheld_caption_is_the_empty_one() -> None:
    encoding = _text()(TOKENS, SOME, FEATURES)
    assert torch.equal(encoding.sequence[0], FEATURES.sequence[0])
    assert torch.equal(encoding.sequence[1], torch.full((5, 4), 0.5))
    assert torch.equal(encoding.pooled[1], torch.full((3,), 0.25))
    assert encoding.visible[1].tolist() == [True, True, False, False, False]


def test_features_may_be_left_out_where_all_is_withheld() -> None:
    encoding = _text()(TOKENS, ~NO, None)
    assert torch.equal(encoding.sequence, torch.full((2, 5, 4), 0.5))
    with pytest.raises(ValueError, match="no features are given"):
        _text()(TOKENS, SOME, None)


def test_dropping_needs_the_empty_caption_which_a_checkpoint_brings() -> None:
    text = ClipText(CONFIG, 3)
    text(TOKENS, NO, FEATURES)
    with pytest.raises(ValueError, match="call set_null_caption first"):
        text(TOKENS, SOME, FEATURES)
    text.load_state_dict(_text().state_dict())
    assert torch.equal(text(TOKENS, SOME, FEATURES).pooled[1], torch.full((3,), 0.25))
    assert text.bfloat16().null_sequence.dtype == torch.float32 and text.null_tokens.dtype == torch.int64


def test_both_kinds_of_text_are_built_and_read_alike() -> None:
    own = build_text(TextEncoderConfig(context_length=5, width=4, layers=1, heads=2, vocab_size=20), 3)
    assert isinstance(own, TextEncoder) and isinstance(build_text(CONFIG, 3), ClipText)
    encoding = encode_captions(own, TOKENS, NO, None)
    assert encoding.sequence.shape == (2, 5, 4) and encoding.pooled.shape == (2, 4) and encoding.visible is None


def test_features_come_from_a_batch_that_has_them() -> None:
    assert features_of({"text_embedding": FEATURES.embedding}) is None
    found = features_of({"text_embedding": FEATURES.embedding, "text_sequence": FEATURES.sequence})
    assert found is not None and found.sequence is FEATURES.sequence and found.embedding is FEATURES.embedding


def test_another_clips_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence is \(2, 5, 6\) where \(2, 5, 4\) is needed"):
        _text()(TOKENS, NO, ClipTextFeatures(torch.zeros(2, 5, 6), FEATURES.embedding))
    with pytest.raises(ValueError, match=r"null_embedding is \(4,\), needed \(3,\)"):
        ClipText(CONFIG, 3).set_null_caption(TOKENS[0], torch.zeros(5, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="start and end tokens"):
        ClipText(CONFIG, 3).set_null_caption(torch.zeros(5, dtype=torch.int64), torch.zeros(5, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"text\.context_length is 1"):
        ClipTextConfig(context_length=1)
