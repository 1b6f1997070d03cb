"""The caption encoder of the decoder and the priors, in GLIDE's style (Nichol et al. 2022).

Token plus positional embeddings, a learned padding embedding per position where the caption has ended, a non-causal
transformer, a final LayerNorm. A dropped caption is an all-padding row, so the padding embeddings are also what the
model learns as "no caption".
"""

import torch
from torch import Tensor, nn

from unclip_models.settings import TextEncoderConfig
from unclip_models.transformer import Transformer

PADDING_TOKEN = 0
"""What open_clip's tokenizer fills a caption up with."""


def caption_mask(tokens: Tensor) -> Tensor:
    """Return True where a caption's own tokens are and False in its padding, bool of the shape of ``tokens``.

    Padding is the run of zeros at the end. A zero before the last token is a real one: id 0 is also CLIP's "!".
    """
    from_here_on = tokens.ne(PADDING_TOKEN).flip(-1).long().cumsum(-1).flip(-1)
    return from_here_on > 0


class TextEncoder(nn.Module):
    """Encode captions to a sequence and one pooled vector."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.padding_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(
            config.width,
            config.layers,
            config.heads,
            causal=False,
            checkpoint_activations=config.checkpoint_activations,
        )
        self.final_norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.padding_embedding, std=0.02)

    def forward(self, tokens: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode a batch of captions.

        Args:
            tokens: int64 ``(B, context_length)``, 0 after the caption's end.
            drop: bool ``(B,)``, True where the caption is withheld (classifier-free guidance).

        Returns:
            The sequence ``(B, context_length, width)``, and its last position ``(B, width)`` (GLIDE's pooling).

        Raises:
            ValueError: if the captions have another length.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.config.context_length:
            raise ValueError(
                f"text encoder: tokens are {tuple(tokens.shape)} where (batch, {self.config.context_length}) is "
                "needed; tokenize with the model's context_length"
            )
        present = caption_mask(tokens)  # (B, L)
        if drop is not None:
            present = present & ~drop[:, None]
        embedded = self.token_embedding(tokens) + self.positional_embedding
        embedded = torch.where(present[..., None], embedded, self.padding_embedding)  # (B, L, C)
        sequence = self.final_norm(self.transformer(embedded))
        return sequence, sequence[:, -1]
