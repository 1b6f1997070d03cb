"""CLIP: the frozen encoder pair of unCLIP.

A :class:`ClipModel` is an open_clip model together with what must never drift apart from its weights: the architecture
(with its activation, QuickGELU or GELU), the image preprocessing and the tokenizer's settings. They are saved in one
safetensors file and restored together. It can be a published model or a small one trained here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_models.checkpoint import read_weights, write_weights
from unclip_models.clip_input import ClipPreprocess, preprocess_images, tokenize
from unclip_models.open_clip_models import build_open_clip, load_published
from unclip_models.settings import ClipModelConfig

if TYPE_CHECKING:
    from unclip_models.randomness import SampleRandom

ARCHITECTURE, ARCHITECTURE_VERSION = "clip", "1"
MAX_LOGIT_SCALE = 100.0


class ClipModel(nn.Module):
    """An open_clip model with its preprocessing and tokenizer.

    Args:
        model: the open_clip module.
        model_config: its architecture in open_clip's JSON form (``embed_dim``, ``vision_cfg``, ``text_cfg``,
            ``quick_gelu``).
        preprocess: how images become its input.
        origin: where the weights came from, for the record.
    """

    def __init__(
        self, model: nn.Module, model_config: Mapping[str, Any], preprocess: ClipPreprocess, origin: str
    ) -> None:
        super().__init__()
        text = model_config["text_cfg"]
        if text.get("hf_tokenizer_name") or text.get("hf_model_name"):
            raise ValueError(f"clip {origin}: its text tower does not use CLIP's own tokenizer; choose another model")
        self.model = model
        self.model_config = json.loads(json.dumps(model_config))
        self.preprocess_config = preprocess
        self.origin = origin

    @classmethod
    def from_config(cls, config: ClipModelConfig | Mapping[str, Any]) -> ClipModel:
        """Build an untrained model (open_clip's initialisation, drawn from torch's global generator).

        Args:
            config: its shape, or open_clip's own JSON form (``embed_dim``, ``vision_cfg``, ``text_cfg``).
        """
        model_config = config.open_clip_config() if isinstance(config, ClipModelConfig) else dict(config)
        preprocess = ClipPreprocess(image_size=int(model_config["vision_cfg"]["image_size"]))
        return cls(build_open_clip(model_config), model_config, preprocess, "trained here")

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        weights: str | None = None,
        *,
        quick_gelu: bool | None = None,
        cache_dir: str | None = None,
        device: torch.device | str = "cpu",
    ) -> ClipModel:
        """Load a published or own model, frozen and in eval mode.

        Args:
            name: a file written by :meth:`save`; or an open_clip architecture (``ViT-L-14``), also with its tag
                (``ViT-L-14/openai``); or ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``.
            weights: open_clip's tag or a local weights file, for an architecture given without a tag.
            quick_gelu: the activation the weights were trained with. A tag knows it; a file does not, so it must be
                given where both kinds of weights exist: the wrong one loads silently and gives wrong embeddings.
            cache_dir: where downloads go.
            device: where the model goes.

        Raises:
            ValueError: if the model is unknown, or its activation is undecided or contradicts the tag.
        """
        if Path(name).is_file():
            return cls.load(name, device)
        return cls(*load_published(name, weights, quick_gelu, cache_dir, device)).freeze()

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ClipModel:
        """Load a file written by :meth:`save`, frozen and in eval mode.

        Raises:
            ValueError: if the file is damaged, of another kind or version, or its weights do not fit.
        """
        header, tensors = read_weights(path, device)
        kind = (header.get("architecture"), header.get("architecture_version"))
        if kind != (ARCHITECTURE, ARCHITECTURE_VERSION):
            raise ValueError(
                f"{path}: holds {kind[0]} version {kind[1]}, not {ARCHITECTURE} version {ARCHITECTURE_VERSION}; for "
                "weights of open_clip give the architecture as name and this file as weights"
            )
        model_config = json.loads(header["model_config"])
        values = json.loads(header["preprocess"])
        values |= {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
        model = build_open_clip(model_config).to(device)
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{path}: weights do not fit their config: {error}") from error
        return cls(model, model_config, ClipPreprocess(**values), header["origin"]).freeze()

    def save(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        """Write weights, architecture, activation and preprocessing to one local .safetensors file, atomically."""
        header = {
            **(metadata or {}),
            "architecture": ARCHITECTURE,
            "architecture_version": ARCHITECTURE_VERSION,
            "model_config": json.dumps(self.model_config, sort_keys=True),
            "preprocess": json.dumps(dataclasses.asdict(self.preprocess_config), sort_keys=True),
            "origin": self.origin,
        }
        write_weights(Path(path), self.model.state_dict(), header)

    def freeze(self) -> ClipModel:
        """Stop gradients and dropout; return the model."""
        self.requires_grad_(False)
        return self.eval()

    def keep_text(self) -> ClipModel:
        """Let go of the vision tower, where captions alone are encoded; return the model."""
        del self.model.visual
        return self

    @property
    def image_size(self) -> int:
        """Side of the vision tower's input in px."""
        return self.preprocess_config.image_size

    @property
    def embedding_dim(self) -> int:
        """Dimension D of both embeddings."""
        return int(self.model_config["embed_dim"])

    @property
    def context_length(self) -> int:
        """Tokens the text tower takes."""
        return int(self.model_config["text_cfg"].get("context_length", 77))

    @property
    def text_width(self) -> int:
        """Width of the text tower's sequence output."""
        return int(self.model_config["text_cfg"].get("width", 512))

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is QuickGELU (OpenAI's weights) instead of GELU."""
        return bool(self.model_config.get("quick_gelu", False))

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Tokenize captions for this text tower: int64 ``(B, context_length)``; see :func:`tokenize`."""
        settings = self.model_config["text_cfg"].get("tokenizer_kwargs") or {}
        return tokenize(captions, self.context_length, clean=settings.get("clean", "lower"))

    def preprocess(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Prepare uint8 or [-1, 1] images for the vision tower; see :func:`preprocess_images`."""
        return preprocess_images(images, self.preprocess_config)

    def forward(self, images: Tensor | Sequence[Tensor], tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed with gradients: images and captions, unit-norm float32 ``(B, D)``; and the logit scale, up to 100."""
        scale = cast(Tensor, _CappedExp.apply(cast(Tensor, self.model.logit_scale).float()))
        return self._image_embedding(images), self._text_embedding(tokens), scale

    @torch.no_grad()
    def encode_image(self, images: Tensor | Sequence[Tensor], *, normalize: bool = True) -> Tensor:
        """Embed images.

        Args:
            images: as in :func:`preprocess_images`, raw (not yet preprocessed).
            normalize: False leaves the embeddings their norm, as Karlo does.

        Returns:
            z_i, float32 ``(B, D)``, unit norm unless told otherwise.
        """
        return self._image_embedding(images, normalize)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, *, normalize: bool = True, trim: bool = False) -> Tensor:
        """Embed captions.

        Args:
            tokens: int64 ``(B, context_length)``, from :meth:`tokenize`.
            normalize: False leaves the embeddings their norm.
            trim: compute no position behind the longest caption's end. Where the tower is causal and is read at the
                end token, nothing there could change the embedding; other towers compute all positions nevertheless.

        Returns:
            z_t, float32 ``(B, D)``.
        """
        return self._text_embedding(tokens, normalize, trim)

    @torch.no_grad()
    def encode_text_sequence(self, tokens: Tensor, *, normalize: bool = True) -> tuple[Tensor, Tensor]:
        """Return the text tower's last hidden states and z_t (conditioning in the manner of Karlo).

        Args:
            tokens: int64 ``(B, context_length)``.
            normalize: False leaves z_t its norm.

        Returns:
            float32 ``(B, context_length, text_width)`` after the final layer norm, and z_t, float32 ``(B, D)``.

        Raises:
            ValueError: if the text tower is not open_clip's plain transformer.
        """
        tower: Any = self.model if hasattr(self.model, "ln_final") else getattr(self.model, "text", None)
        if tower is None or not hasattr(tower, "ln_final") or getattr(tower, "cls_emb", None) is not None:
            raise ValueError(f"clip {self.origin}: its text tower has no plain token sequence; use encode_text")
        sequences: list[Tensor] = []
        hook = tower.ln_final.register_forward_hook(lambda _module, _inputs, output: sequences.append(output))
        try:
            embedding = self._text_embedding(tokens, normalize)
        finally:
            hook.remove()
        return sequences[0].float(), embedding

    def loss(self, batch: Mapping[str, Any], random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Contrast matching against other pairs of the batch (Radford et al. 2021), with the generators' signature.

        Pairs whose captions are equal are not each other's negatives: the target is spread evenly over them.

        Args:
            batch: ``"image"`` as in :func:`preprocess_images` and ``"tokens"`` int64 ``(B, context_length)``.
            random: unused; the loss draws nothing.
        """
        image_embedding, text_embedding, scale = self(batch["image"], batch["tokens"])
        return contrastive_loss(image_embedding, text_embedding, scale, batch["tokens"])

    def _image_embedding(self, images: Tensor | Sequence[Tensor], normalize: bool = True) -> Tensor:
        weight = next(self.model.parameters())
        pixels = self.preprocess(images).to(device=weight.device, dtype=weight.dtype)
        embedding = cast(Tensor, cast(Any, self.model).encode_image(pixels)).float()
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def _text_embedding(self, tokens: Tensor, normalize: bool = True, trim: bool = False) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[1] != self.context_length:
            raise ValueError(
                f"clip {self.origin}: tokens of shape {tuple(tokens.shape)}, its text tower takes "
                f"(B, {self.context_length}); make them with ClipModel.tokenize"
            )
        device = next(self.model.parameters()).device
        found = _causal_tower(self.model) if trim and len(tokens) else None
        if found is None:
            embedding = cast(Tensor, cast(Any, self.model).encode_text(tokens.to(device))).float()
        else:
            place, tower = found
            length = int(tokens.argmax(dim=-1).max()) + 1  # the end token has the highest number
            shorter = {
                f"{place}.positional_embedding": tower.positional_embedding[:length],
                f"{place}.attn_mask": tower.attn_mask[:length, :length],
            }
            arguments = (tokens[:, :length].to(device),)
            embedding = torch.func.functional_call(_TextEncoder(self.model), shorter, arguments).float()
        return F.normalize(embedding, dim=-1) if normalize else embedding


class _CappedExp(torch.autograd.Function):
    """The exponential, at most ``MAX_LOGIT_SCALE`` (Radford et al. 2021).

    At the cap its gradient still leads down, and only down: a cap alone would keep the scale there for good.
    """

    @staticmethod
    def forward(ctx: Any, logarithm: Tensor) -> Tensor:
        """Compute it."""
        free = logarithm.exp()
        ctx.save_for_backward(free)
        return free.clamp(max=MAX_LOGIT_SCALE)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Descend along ``gradient``, unless that leads further beyond the cap."""
        (free,) = ctx.saved_tensors
        beyond = (free > MAX_LOGIT_SCALE) & (gradient < 0)
        return torch.where(beyond, torch.zeros_like(gradient), gradient * free.clamp(max=MAX_LOGIT_SCALE))


class _TextEncoder(nn.Module):
    """The text side of an open_clip model as a module that is called, as ``functional_call`` needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens; the embeddings keep their norm."""
        return cast(Tensor, cast(Any, self.model).encode_text(tokens))


def _causal_tower(model: nn.Module) -> tuple[str, Any] | None:
    """Find the text tower and its place in :class:`_TextEncoder`; None if it is not causal or read elsewhere."""
    place, tower = ("model", model) if hasattr(model, "ln_final") else ("model.text", getattr(model, "text", None))
    causal = isinstance(getattr(tower, "attn_mask", None), Tensor)
    read_at = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    more_tokens = getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False)
    return (place, tower) if causal and read_at == "argmax" and not more_tokens else None


def contrastive_loss(
    image_embedding: Tensor, text_embedding: Tensor, scale: Tensor, tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the symmetric cross-entropy of a batch of pairs, with targets shared by equal captions.

    Args:
        image_embedding: unit-norm ``(B, D)``.
        text_embedding: unit-norm ``(B, D)``.
        scale: factor of the cosine similarities, scalar.
        tokens: ``(B, L)``; rows that are equal are the same caption.

    Returns:
        The loss, scalar, and detached metrics: ``accuracy`` (fraction of images whose best caption is theirs) and
        ``logit_scale``.
    """
    logits = scale * image_embedding @ text_embedding.T  # (B, B), images by captions
    same = (tokens[:, None] == tokens[None]).all(dim=-1)
    target = same.float() / same.sum(dim=1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    best = same[torch.arange(len(same), device=same.device), logits.argmax(dim=1)]
    return loss, {"accuracy": best.float().mean(), "logit_scale": scale.detach()}


def golden_images() -> Tensor:
    """Return the images of the probe, uint8 ``(4, 3, 360, 480)``."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 360), torch.linspace(0, 1, 480), indexing="ij")
    waves = torch.stack([torch.sin(7 * x), torch.cos(11 * y), torch.sin(5 * (x + y))])  # (3, 360, 480)
    images = torch.stack([waves, -waves, waves.roll(1, 0), torch.sign(waves)])
    return ((images + 1) * 127.5).round().to(torch.uint8)


def golden_embeddings(clip: ClipModel) -> tuple[Tensor, Tensor]:
    """Embed a fixed probe: four synthetic images and four captions, two float32 ``(4, D)`` on the CPU.

    Two CLIPs that agree here share weights, activation, preprocessing and tokenizer; whatever drifts shows. The probe
    images are not square and larger than the input, so that resize and crop count.
    """
    captions = ["a photo of a cat", "a red square on a white background", "", "Two dogs, 3 trees & an île!"]
    was_training = clip.training
    clip.eval()
    out = clip.encode_image(golden_images()).cpu(), clip.encode_text(clip.tokenize(captions)).cpu()
    clip.train(was_training)
    return out
