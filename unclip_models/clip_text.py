"""The frozen CLIP's text as the captions of a prior or decoder, in the manner of Karlo.

Instead of encoding captions itself, a model may read the last hidden states of the CLIP's text tower. They are computed
by whoever has the CLIP (the training stage, ``UnCLIP``) and handed in beside the tokens. A withheld caption is the
empty caption, whose encoding never changes: it is kept in buffers, so that the model needs no CLIP to drop captions.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from unclip_models.float32_buffers import Float32Buffers
from unclip_models.settings import ClipTextConfig, TextEncoderConfig
from unclip_models.text_encoder import TextEncoder, caption_mask


class CaptionEncoding(NamedTuple):
    """A batch of captions as a model reads them.

    Attributes:
        sequence: ``(B, L, W)``.
        pooled: one vector per caption: the encoder's last position ``(B, W)``, or the CLIP's text embedding ``(B, D)``.
        visible: bool ``(B, L)``, False in the padding; None where padding is visible, being learned.
    """

    sequence: Tensor
    pooled: Tensor
    visible: Tensor | None


class ClipTextFeatures(NamedTuple):
    """What the frozen CLIP's text tower says of a batch of captions.

    Attributes:
        sequence: its last hidden states ``(B, L, W)``.
        embedding: the text embedding z_t ``(B, D)``.
    """

    sequence: Tensor
    embedding: Tensor


class ClipText(Float32Buffers):
    """Gives the frozen CLIP's hidden states, and those of the empty caption where the caption is withheld.

    The buffers ``null_tokens`` ``(L,)`` int64, ``null_sequence`` ``(L, W)`` and ``null_embedding`` ``(D,)`` float32
    describe the empty caption; they are zero until ``set_null_caption`` fills them.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ("null_sequence", "null_embedding")
    null_tokens: Tensor
    null_sequence: Tensor
    null_embedding: Tensor

    def __init__(self, config: ClipTextConfig, embedding_dim: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("null_tokens", torch.zeros(config.context_length, dtype=torch.int64))
        self.register_buffer("null_sequence", torch.zeros(config.context_length, config.width))
        self.register_buffer("null_embedding", torch.zeros(embedding_dim))
        self._has_null = False

    def set_null_caption(self, tokens: Tensor, sequence: Tensor, embedding: Tensor) -> None:
        """Keep the encoding of the empty caption; call it once before training.

        Args:
            tokens: int64 ``(L,)``, from the CLIP's tokenizer.
            sequence: last hidden states of the text tower ``(L, W)``.
            embedding: the text embedding ``(D,)``, scaled as those of the captions will be.

        Raises:
            ValueError: if a shape is wrong or the caption has no token at all.
        """
        given = {"null_tokens": tokens, "null_sequence": sequence, "null_embedding": embedding}
        for name, value in given.items():
            expected = tuple(self.get_buffer(name).shape)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"set_null_caption: {name} is {tuple(value.shape)}, needed {expected}; use this CLIP's"
                )
        if not bool(caption_mask(tokens[None]).any()):
            raise ValueError("set_null_caption: the empty caption needs its start and end tokens; tokenize it")
        for name, value in given.items():
            self.get_buffer(name).copy_(value)
        self._has_null = True

    def forward(self, tokens: Tensor, drop: Tensor, features: ClipTextFeatures | None) -> CaptionEncoding:
        """Choose between each caption and the empty one.

        Args:
            tokens: the CLIP's ``(B, L)``, int64, 0 after the caption's end.
            drop: bool ``(B,)``, True where the caption is withheld.
            features: of the captions; may be left out where all of them are withheld.

        Raises:
            ValueError: if the features are missing or have another shape, or captions are dropped before
                ``set_null_caption``.
        """
        if features is None:
            if not bool(drop.all()):
                raise ValueError("text.kind is 'clip', but no features are given; encode the captions with the CLIP")
            features = ClipTextFeatures(
                self.null_sequence.expand(len(tokens), -1, -1), self.null_embedding.expand(len(tokens), -1)
            )
        self._check(tokens, features)
        self._require_null(drop)
        tokens = torch.where(drop[:, None], self.null_tokens, tokens)
        null_sequence, null_embedding = self.null_sequence, self.null_embedding
        sequence = torch.where(drop[:, None, None], null_sequence.to(features.sequence.dtype), features.sequence)
        pooled = torch.where(drop[:, None], null_embedding.to(features.embedding.dtype), features.embedding)
        return CaptionEncoding(sequence, pooled, caption_mask(tokens))

    def _check(self, tokens: Tensor, features: ClipTextFeatures) -> None:
        wanted = {"tokens": self.null_tokens, "sequence": self.null_sequence, "embedding": self.null_embedding}
        given = {"tokens": tokens, "sequence": features.sequence, "embedding": features.embedding}
        for name, null in wanted.items():
            expected = (len(tokens), *null.shape)
            if tuple(given[name].shape) != expected:
                raise ValueError(
                    f"CLIP text: {name} is {tuple(given[name].shape)} where {expected} is needed; use the CLIP that "
                    "the model was made for"
                )

    def _require_null(self, drop: Tensor) -> None:
        if self._has_null or not bool(drop.any()):
            return
        # A loaded checkpoint fills the buffers without set_null_caption; look once, for looking waits for the GPU.
        if not bool(self.null_tokens.any()):
            raise ValueError("captions are withheld, but the empty caption is not known; call set_null_caption first")
        self._has_null = True


TextConfig = TextEncoderConfig | ClipTextConfig


def build_text(config: TextConfig, embedding_dim: int) -> TextEncoder | ClipText:
    """Build what reads a model's captions: an encoder of its own, or the frozen CLIP's text."""
    return ClipText(config, embedding_dim) if isinstance(config, ClipTextConfig) else TextEncoder(config)


def encode_captions(
    text: TextEncoder | ClipText, tokens: Tensor, drop: Tensor, features: ClipTextFeatures | None
) -> CaptionEncoding:
    """Encode captions with what ``build_text`` gave; an encoder of its own needs the tokens alone."""
    if isinstance(text, ClipText):
        encoding: CaptionEncoding = text(tokens, drop, features)
        return encoding
    sequence, pooled = text(tokens, drop)
    return CaptionEncoding(sequence, pooled, None)


def features_of(batch: Mapping[str, Tensor]) -> ClipTextFeatures | None:
    """Take the features from a training batch that holds ``text_sequence`` beside ``text_embedding``."""
    if "text_sequence" not in batch:
        return None
    return ClipTextFeatures(batch["text_sequence"], batch["text_embedding"])
