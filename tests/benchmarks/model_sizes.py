"""What the benchmark of the models measures, and at what size; standard library only.

Both sides of a comparison, and the driver, import this module; one side may live in another project's environment.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of all models; both sides of a comparison have the same.

    Attributes:
        embedding_dim: width of the embeddings, of the captions' hidden states and of the prior.
        context_length: tokens per caption.
        prior_layers: transformer blocks, of ``head_channels`` per head.
        channels: of the U-Nets' highest resolution.
        channel_mult: width multiplier per level.
        num_res_blocks: per level.
        head_channels: per attention head.
        decoder_px: side of the decoder's images.
        attention_px: sides with attention.
        upsampler_px: side of the upsampler's crops.
        batch: images or embeddings per forward pass or training step, by model.
        sample_batch: the same when sampling.
        steps: sampling steps.
    """

    embedding_dim: int = 512
    context_length: int = 77
    prior_layers: int = 6
    channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    head_channels: int = 64
    decoder_px: int = 64
    attention_px: tuple[int, ...] = (32, 16, 8)
    upsampler_px: int = 64
    batch: dict[str, int] = field(default_factory=lambda: {"prior": 4, "decoder": 1, "upsampler": 1})
    sample_batch: dict[str, int] = field(default_factory=lambda: {"prior": 2, "decoder": 1})
    steps: dict[str, int] = field(default_factory=lambda: {"prior": 10, "decoder": 2})

    @property
    def prior_heads(self) -> int:
        """Attention heads of the prior."""
        return self.embedding_dim // self.head_channels


SIZES = {
    "cpu": Sizes(),
    "gpu": Sizes(
        embedding_dim=768,
        prior_layers=12,
        channels=192,
        batch={"prior": 128, "decoder": 32, "upsampler": 32},
        sample_batch={"prior": 64, "decoder": 16},
        steps={"prior": 25, "decoder": 25},
    ),
    "tiny": Sizes(
        embedding_dim=32,
        context_length=8,
        prior_layers=1,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        head_channels=8,
        decoder_px=8,
        attention_px=(4,),
        upsampler_px=8,
        steps={"prior": 2, "decoder": 2},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process measures.

    Attributes:
        model: ``prior``, ``decoder`` or ``upsampler``.
        rival: ``diffusers``, ``dalle2``, a ``bare`` training loop or, as a control, ``ours`` once more: whom ours is
            compared with.
        operation: ``forward``, ``train``, ``sample``, or ``loop``: steps of a whole training loop.
        side: ``ours`` or ``theirs``.
        folder: where the exported weights lie.
        sizes: of the model and its inputs.
        num_threads: of torch.
        device: ``cpu`` or ``cuda``; the latter computes in bfloat16 by autocast.
        min_seconds: a repetition makes as many calls as fit into this time, one at least.
        engine: of our training loop: ``torch``, or ``zero 0`` to ``zero 3``.
    """

    model: str
    rival: str
    operation: str
    side: str
    folder: str
    sizes: Sizes
    num_threads: int
    device: str = "cpu"
    min_seconds: float = 0.2
    engine: str = "torch"

    @property
    def batch_size(self) -> int:
        """Images or embeddings of one call."""
        sizes = self.sizes
        return sizes.sample_batch[self.model] if self.operation == "sample" else sizes.batch[self.model]

    def to_json(self) -> str:
        """Write all of it on one line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        """Read what ``to_json`` wrote."""
        values = json.loads(text)
        sizes: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values["sizes"].items()
        }
        return Task(**{**values, "sizes": Sizes(**sizes)})
