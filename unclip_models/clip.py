"""CLIP: the frozen encoder pair of unCLIP. The only file that imports open_clip.

A :class:`ClipModel` is an open_clip model together with what must never drift apart from its weights: the architecture
(with its activation, QuickGELU or GELU), the image preprocessing and the tokenizer's settings. They are saved in one
safetensors file and restored together. It can be a published model or a small one trained here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_models.checkpoint import read_metadata, read_weights, write_weights

if TYPE_CHECKING:
    from unclip_models.randomness import SampleRandom

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
ARCHITECTURE, ARCHITECTURE_VERSION = "clip", "1"
MAX_LOGIT_SCALE = 100.0
RESIZE_MODES = ("shortest", "squash")
SELF_CONTAINED = ("hf-hub:", "local-dir:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipPreprocess:
    """How an image becomes the vision tower's input (bicubic, antialiased resize)."""

    image_size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resize_mode: Literal["shortest", "squash"] = "shortest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipModelConfig:
    """A CLIP to be trained here: a ViT and a causal text transformer of open_clip's own classes.

    The defaults are the small model of the quickstart. unCLIP's own (Appendix C): image_size 256, patch_size 16,
    vision 32 layers of width 1280, text 24 layers of width 1024, embedding_dim 1024.

    Attributes:
        embedding_dim: entries of the shared embedding.
        image_size: side of its images, pixels.
        patch_size: side of a patch, pixels.
        vision_width: of the image tower.
        vision_layers: of the image tower.
        vision_heads: of the image tower.
        context_length: tokens of a caption.
        vocab_size: of the tokenizer.
        text_width: of the text tower.
        text_layers: of the text tower.
        text_heads: of the text tower.
        quick_gelu: OpenAI's faster approximation of GELU.
    """

    embedding_dim: int = 64
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    context_length: int = 16
    vocab_size: int = 49408
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    quick_gelu: bool = False

    def __post_init__(self) -> None:
        for field, part in (("vision_width", self.vision_heads), ("text_width", self.text_heads)):
            if part < 1 or getattr(self, field) % part:
                raise ValueError(f"clip.{field}: {getattr(self, field)} is not a multiple of its {part} heads")
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"clip.image_size: {self.image_size} px is no multiple of patch_size {self.patch_size}")

    def open_clip_config(self) -> dict[str, Any]:
        """Return the model config in open_clip's own JSON form."""
        return {
            "embed_dim": self.embedding_dim,
            "quick_gelu": self.quick_gelu,
            # Sharded training moves parameters as vectors; a scalar is not one.
            "nonscalar_logit_scale": True,
            "vision_cfg": {
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "width": self.vision_width,
                "layers": self.vision_layers,
                "head_width": self.vision_width // self.vision_heads,
            },
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": self.vocab_size,
                "width": self.text_width,
                "layers": self.text_layers,
                "heads": self.text_heads,
            },
        }


@functools.lru_cache(maxsize=4)
def _tokenizer(clean: str) -> Any:
    # The file alone: importing open_clip, with its model zoo, takes many seconds where only tokens are needed.
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(clean=clean)


def tokenize(captions: Sequence[str], context_length: int, *, clean: str = "lower") -> Tensor:
    """Turn captions into CLIP byte-pair tokens.

    Args:
        captions: B strings; the empty string gives start and end tokens only.
        context_length: tokens per row; longer captions are cut, keeping the end token.
        clean: open_clip's text cleaning (``lower``, ``whitespace`` or ``canonicalize``).

    Returns:
        int64 ``(B, context_length)``: start, caption, end, then zeros as padding.
    """
    if isinstance(captions, str):
        raise ValueError("tokenize: got one string; give a sequence of captions")
    if context_length < 2:
        raise ValueError(f"tokenize: context_length {context_length}; start and end tokens alone need 2")
    if not captions:
        return torch.zeros(0, context_length, dtype=torch.long)
    return cast(Tensor, _tokenizer(clean)(list(captions), context_length=context_length))


def preprocess_images(images: Tensor | Sequence[Tensor], config: ClipPreprocess) -> Tensor:
    """Resize, centre-crop and normalise images as the vision tower expects.

    Args:
        images: a batch ``(B, 3, H, W)``, or a sequence of ``(3, H, W)`` of differing sides; uint8, or floating point
            in [-1, 1] (the range of the generators).
        config: side, crop and statistics.

    Returns:
        float32 ``(B, 3, image_size, image_size)``.

    Raises:
        ValueError: if the images are not RGB or of another dtype.
    """
    if not isinstance(images, Tensor):
        return torch.cat([preprocess_images(image[None], config) for image in images])
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"preprocess_images: shape {tuple(images.shape)}; give RGB images (B, 3, H, W)")
    if images.dtype == torch.uint8:
        x = images.float()
    elif images.is_floating_point():
        x = (images.float() + 1) * 127.5
    else:
        raise ValueError(f"preprocess_images: dtype {images.dtype}; give uint8, or floating point in [-1, 1]")
    x = resize_and_crop(x, config)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (config.mean, config.std))
    return (x / 255 - mean) / std


def resize_and_crop(x: Tensor, config: ClipPreprocess) -> Tensor:
    """Resize images to the side of the vision tower and cut out their centre.

    Args:
        x: images ``(B, 3, H, W)`` of values from 0 to 255, of any floating point; or uint8 on a CPU: that is five times
            as fast and nearer to Pillow, with which published models were trained, for Pillow too rounds twice.
        config: side and crop.

    Returns:
        Whole numbers from 0 to 255, ``(B, 3, image_size, image_size)``, of the dtype of ``x``.
    """
    size, (height, width) = config.image_size, x.shape[-2:]
    if (height, width) == (size, size):
        return x
    target = (size, size)
    if config.resize_mode == "shortest":
        short = min(height, width)
        target = (int(size * height / short), int(size * width / short))
    x = F.interpolate(x, size=target, mode="bicubic", antialias=True, align_corners=False)
    if x.is_floating_point():
        x = x.clamp(0, 255).round()  # published models were trained on 8-bit images after the resize
    top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return x[:, :, top : top + size, left : left + size]


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
        return cls(_build_open_clip(model_config), model_config, preprocess, "trained here")

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
        import open_clip

        if weights is None and not name.startswith(SELF_CONTAINED) and "/" in name:
            name, weights = name.split("/", 1)
        model_config, origin = _published_config(name, weights, quick_gelu)
        try:
            model = open_clip.create_model(
                name,
                pretrained=weights,
                device=device,
                force_quick_gelu=model_config["quick_gelu"],
                cache_dir=cache_dir,
                require_pretrained=True,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"clip {origin}: could not load its weights: {error}") from error
        return cls(model, model_config, _preprocess_of(model, origin), origin).freeze()

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
        model = _build_open_clip(model_config).to(device)
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
        scale = cast(Tensor, self.model.logit_scale).float().exp().clamp(max=MAX_LOGIT_SCALE)
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


def golden_embeddings(clip: ClipModel) -> tuple[Tensor, Tensor]:
    """Embed a fixed probe: four synthetic images and four captions, two float32 ``(4, D)`` on the CPU.

    Two CLIPs that agree here share weights, activation, preprocessing and tokenizer; whatever drifts shows. The probe
    images are not square and larger than the input, so that resize and crop count.
    """
    y, x = torch.meshgrid(torch.linspace(0, 1, 360), torch.linspace(0, 1, 480), indexing="ij")
    waves = torch.stack([torch.sin(7 * x), torch.cos(11 * y), torch.sin(5 * (x + y))])  # (3, 360, 480)
    images = torch.stack([waves, -waves, waves.roll(1, 0), torch.sign(waves)])
    captions = ["a photo of a cat", "a red square on a white background", "", "Two dogs, 3 trees & an île!"]
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    was_training = clip.training
    clip.eval()
    out = clip.encode_image(pixels).cpu(), clip.encode_text(clip.tokenize(captions)).cpu()
    clip.train(was_training)
    return out


def is_clip_file(path: str | Path) -> bool:
    """Say whether a local file was written by :meth:`ClipModel.save`."""
    try:
        return read_metadata(path).get("architecture") == ARCHITECTURE
    except ValueError:
        return False


def _build_open_clip(model_config: Mapping[str, Any]) -> nn.Module:
    """Build an open_clip model from its JSON config, with the class open_clip itself would choose."""
    from open_clip.model import CLIP, CustomTextCLIP

    values = {key: value for key, value in model_config.items() if key != "custom_text"}
    if "multimodal_cfg" in values:
        raise ValueError("clip: a model with a caption decoder (CoCa) cannot be rebuilt here; choose a plain CLIP")
    return cast(nn.Module, (CustomTextCLIP if model_config.get("custom_text") else CLIP)(**values))


def _published_config(name: str, weights: str | None, quick_gelu: bool | None) -> tuple[dict[str, Any], str]:
    """Look an open_clip architecture up and decide its activation; return its config and a name for messages."""
    from open_clip.factory import get_model_config

    origin = f"{name}/{weights}" if weights else name
    try:
        config = get_model_config(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"clip.name: no open_clip model at {name!r}: {error}") from error
    if config is None:
        raise ValueError(f"clip.name: open_clip has no architecture {name!r}; see open_clip.list_models()")
    of_config = bool(config.get("quick_gelu", False))
    if name.startswith(SELF_CONTAINED):
        if weights:
            raise ValueError(f"clip.weights: {weights!r} would be ignored, {name} brings its own; remove it")
        of_weights = of_config
    else:
        of_weights = _activation_of_weights(name, weights, of_config, quick_gelu)
    if of_config and not of_weights:
        raise ValueError(f"clip.name: {origin} was trained with GELU, {name} has QuickGELU; use the plain name")
    if quick_gelu is not None and quick_gelu != of_weights:
        raise ValueError(f"clip.quick_gelu: {quick_gelu}, but {origin} was trained with {of_weights}; remove it")
    return {**config, "quick_gelu": of_weights}, origin


def _activation_of_weights(name: str, weights: str | None, of_config: bool, quick_gelu: bool | None) -> bool:
    """Say whether weights were trained with QuickGELU: a tag knows, a file must come with the answer."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if not weights:
        raise ValueError(f"clip.weights: missing for {name!r}; give a tag of open_clip.list_pretrained() or a file")
    if tag := get_pretrained_cfg(name, weights):
        return bool(tag.get("quick_gelu", False))
    if not Path(weights).is_file():
        known = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"clip.weights: {weights!r} is neither a file nor a tag of {name}; its tags: {known}")
    if of_config:
        return True
    if quick_gelu is None:
        raise ValueError(
            f"clip.quick_gelu: undecided for {name} with {weights}; a weights file does not say which activation it "
            "was trained with, and the wrong one gives wrong embeddings without any error. Set it to true (OpenAI, "
            "DFN, MetaCLIP) or false (most others)"
        )
    return quick_gelu


def _preprocess_of(model: nn.Module, origin: str) -> ClipPreprocess:
    """Take over the preprocessing that open_clip recorded on the loaded model."""
    recorded = cast(Any, model).visual.preprocess_cfg
    size = recorded["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1 or recorded["interpolation"] != "bicubic" or recorded["resize_mode"] not in RESIZE_MODES:
        raise ValueError(f"clip {origin}: unsupported preprocessing {recorded}; choose a square, bicubic model")
    return ClipPreprocess(
        image_size=sides.pop(),
        mean=tuple(recorded["mean"]),
        std=tuple(recorded["std"]),
        resize_mode=recorded["resize_mode"],
    )
