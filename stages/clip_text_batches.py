"""The frozen CLIP's text, added to batches as they are used; storing it would take 100 kB a caption."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from stages.training import model_loss
from unclip_models.clip import ClipModel
from unclip_models.randomness import SampleRandom


def with_clip_text(batch: Mapping[str, Tensor], clip: ClipModel) -> dict[str, Tensor]:
    """Add the CLIP's last hidden states ``text_sequence`` ``(B, ctx, W)`` to a batch that has ``tokens``."""
    return {**batch, "text_sequence": clip.encode_text_sequence(batch["tokens"])[0]}


class LossWithClipText:
    """The model's loss on batches to which the frozen CLIP's text is added."""

    def __init__(self, clip: ClipModel) -> None:
        self._clip = clip

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], random: SampleRandom
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See ``stages.engine.LossFunction``."""
        return model_loss(model, with_clip_text(batch, self._clip), random)
