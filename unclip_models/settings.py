"""The settings of every model: plain values, checked where they are made.

They stand apart from the models because whoever plans, shows or resumes a pipeline reads them, and needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

EmbeddingScaling = Literal["paper", "sqrt_dim", "mean_std"]
SCALINGS: tuple[EmbeddingScaling, ...] = ("paper", "sqrt_dim", "mean_std")
Degradation = Literal["none", "blur", "bsr_light", "bsr"]


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Settings of a text encoder; the paper's is 256 / 2048 / 24 / 32 (Table 3).

    Attributes:
        kind: always ``own``; tells it from the frozen CLIP's text (``clip_text.py``) in a config file.
        context_length: tokens per caption, padding included.
        width: channels.
        layers: transformer blocks; 0 leaves the embeddings and the final LayerNorm.
        heads: attention heads, dividing ``width``.
        vocab_size: tokens known; 49408 is CLIP's.
        checkpoint_activations: trade compute for memory in the backward pass.
    """

    kind: Literal["own"] = "own"
    context_length: int = 77
    width: int = 512
    layers: int = 6
    heads: int = 8
    vocab_size: int = 49408
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("context_length", "width", "heads", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"text.{name} is {getattr(self, name)}; use 1 or more")
        if self.layers < 0:
            raise ValueError(f"text.layers is {self.layers}; use 0 or more")
        if self.width % self.heads != 0:
            raise ValueError(f"text.width {self.width} is not divisible by text.heads {self.heads}; change one of them")


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """The shape of the text tower whose hidden states are read; it must be that of the CLIP in use.

    Attributes:
        kind: always ``clip``; tells it from an encoder of the model's own in a config file.
        context_length: tokens per caption, padding included (77 in published CLIPs).
        width: channels of the text tower (768 in ViT-L/14).
    """

    kind: Literal["clip"] = "clip"
    context_length: int = 77
    width: int = 768

    def __post_init__(self) -> None:
        if self.context_length < 2 or self.width < 1:
            raise ValueError(
                f"text.context_length is {self.context_length} and text.width {self.width}; give those of the CLIP's "
                "text tower, 2 or more and 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
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
        for name, part in (("vision_width", self.vision_heads), ("text_width", self.text_heads)):
            if part < 1 or getattr(self, name) % part:
                raise ValueError(f"clip.{name}: {getattr(self, name)} is not a multiple of its {part} heads")
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


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Settings of a diffusion process.

    Attributes:
        schedule: ``cosine`` (improved DDPM, Eq. 17) or ``linear`` (DDPM); the paper uses linear for 256 -> 1024 only.
        num_timesteps: T.
        prediction: what the network predicts: the noise, the clean data, or v (Salimans and Ho 2022).
        variance: ``fixed_small`` (posterior variance), ``fixed_large`` (beta), or ``learned_range`` (improved DDPM,
            Eq. 15: the network has twice the channels, and the loss gains the variational term).
    """

    schedule: Literal["cosine", "linear"] = "cosine"
    num_timesteps: int = 1000
    prediction: Literal["epsilon", "x_start", "v"] = "epsilon"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"

    def __post_init__(self) -> None:
        _require("schedule", self.schedule, ("cosine", "linear"))
        _require("prediction", self.prediction, ("epsilon", "x_start", "v"))
        _require("variance", self.variance, ("fixed_small", "fixed_large", "learned_range"))
        # Below 21 steps the scaled linear schedule passes beta = 1 and x_T would no longer be defined.
        minimum = 21 if self.schedule == "linear" else 2
        if self.num_timesteps < minimum:
            raise ValueError(
                f"diffusion.num_timesteps is {self.num_timesteps}; the {self.schedule} schedule needs {minimum} or more"
            )


def _require(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"diffusion.{field} is {value!r}; use one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of an ADM U-Net; image side and input/output channels belong to the model that owns it.

    Attributes:
        model_channels: width of the highest resolution, and of the sinusoidal timestep embedding.
        channel_mult: width multiplier of every level, highest resolution first; each level halves the side.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: image sides (px) with attention; empty makes the network purely convolutional, also in
            the middle, so that it can be trained on crops and applied at any size.
        head_channels: channels per attention head; a level narrower than this gets one head.
        dropout: probability inside each residual block.
        use_scale_shift_norm: the embedding scales and shifts the second norm (AdaGN); else it is added before it.
        resblock_updown: resample inside a residual block; else by a strided convolution or upsample + convolution.
        norm_groups: most groups of a group norm.
        norm_group_min_channels: fewest channels of a group; see :func:`num_norm_groups`.
        checkpoint_activations: recompute blocks in the backward pass instead of storing them.
    """

    model_channels: int
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: tuple[int, ...] = ()
    head_channels: int = 64
    dropout: float = 0.0
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    norm_groups: int = 32
    norm_group_min_channels: int = 4
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.model_channels < 2 or self.model_channels % 2:
            raise ValueError(f"unet.model_channels: {self.model_channels}; it must be even and positive")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"unet.channel_mult: {self.channel_mult}; give one positive integer per level")
        if self.num_res_blocks < 1:
            raise ValueError(f"unet.num_res_blocks: {self.num_res_blocks}; at least 1 is needed")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"unet.dropout: {self.dropout}; it must be in [0, 1)")
        if self.norm_groups < 1 or self.norm_group_min_channels < 1:
            raise ValueError("unet.norm_groups and unet.norm_group_min_channels must be at least 1")

    @property
    def embedding_channels(self) -> int:
        """Width of the timestep embedding after its MLP (4 x model_channels)."""
        return 4 * self.model_channels

    @property
    def min_multiple_px(self) -> int:
        """The image side must be a multiple of this (one halving between neighbouring levels)."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True, kw_only=True)
class DiffusionPriorConfig:
    """Settings of a diffusion prior.

    The paper's 1B prior is one 24 x 2048 transformer over a 256-token caption: ``text.layers`` 0, ``width`` 2048,
    ``layers`` 24, ``heads`` 32. A caption transformer of its own (``text.layers`` > 0) is useful for small models.

    Attributes:
        kind: always ``diffusion``; tells it from the autoregressive prior in a config file.
        embedding_dim: D of the CLIP.
        text: the caption's embedding and, with layers, its encoder; or, with ``kind: clip``, the hidden states of the
            frozen CLIP's text tower (Karlo).
        width: channels of the causal transformer.
        layers: its blocks.
        heads: its attention heads.
        caption_dropout: probability of withholding caption and text embedding together (paper: 0.1).
        embedding_scaling: how embeddings are scaled inside the model; see ``embedding_scaling.py``.
        embedding_scale: a factor of one's own in place of that of ``embedding_scaling``.
        raw_embeddings: whether CLIP's embeddings come un-normalised, as in Karlo; for imported models.
        diffusion: the process; the variance must be fixed.
        checkpoint_activations: trade compute for memory in the backward pass.
    """

    kind: Literal["diffusion"] = "diffusion"
    embedding_dim: int = 768
    text: TextEncoderConfig | ClipTextConfig = field(default_factory=lambda: TextEncoderConfig(layers=0))
    width: int = 512
    layers: int = 6
    heads: int = 8
    caption_dropout: float = 0.1
    embedding_scaling: EmbeddingScaling = "paper"
    embedding_scale: float | None = None
    raw_embeddings: bool = False
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(prediction="x_start"))
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"prior.{name} is {getattr(self, name)}; use 1 or more")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"prior.caption_dropout is {self.caption_dropout}; use a probability in [0, 1)")
        if self.embedding_scaling not in SCALINGS:
            raise ValueError(f"prior.embedding_scaling is {self.embedding_scaling!r}; use one of {', '.join(SCALINGS)}")
        if self.embedding_scale is not None and self.embedding_scale <= 0:
            raise ValueError(f"prior.embedding_scale is {self.embedding_scale}; use a positive number, or leave it out")
        if self.embedding_scale is not None and self.embedding_scaling == "mean_std":
            raise ValueError("prior.embedding_scale: mean_std measures its factors; leave one of the two out")
        if self.diffusion.variance == "learned_range":
            raise ValueError("prior.diffusion.variance is 'learned_range'; embeddings need a fixed variance")


@dataclass(frozen=True, kw_only=True)
class ARPriorConfig:
    """Settings of an autoregressive prior; the paper's decoder is 24 layers, width 1664, 26 heads (Table 3).

    Attributes:
        kind: always ``autoregressive``; tells it from the diffusion prior in a config file.
        embedding_dim: D of the CLIP.
        num_codes: k, principal components kept (paper: 319 of 1024; measure it for another CLIP).
        num_buckets: buckets per component (paper: 1024).
        num_dot_buckets: buckets of the dot product (not in the paper).
        text: the caption's encoder (paper: 256 / 2048 / 24 / 32).
        text_prefix: whether the caption enters as a ``sequence`` or as one ``pooled`` vector.
        width: channels of the causal transformer.
        layers: its blocks.
        heads: its attention heads.
        caption_dropout: probability of withholding caption and text embedding together (paper: 0.1).
        dot_percentile: the dot product is sampled from above this fraction of its distribution (paper: 0.5).
        temperature: of the codes when sampling (not in the paper).
        checkpoint_activations: trade compute for memory in the backward pass.
    """

    kind: Literal["autoregressive"] = "autoregressive"
    embedding_dim: int = 768
    num_codes: int = 319
    num_buckets: int = 1024
    num_dot_buckets: int = 64
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    text_prefix: Literal["sequence", "pooled"] = "sequence"
    width: int = 512
    layers: int = 6
    heads: int = 8
    caption_dropout: float = 0.1
    dot_percentile: float = 0.5
    temperature: float = 1.0
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "num_codes", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"prior.{name} is {getattr(self, name)}; use 1 or more")
        for name in ("num_buckets", "num_dot_buckets"):
            if getattr(self, name) < 2:
                raise ValueError(f"prior.{name} is {getattr(self, name)}; use 2 or more")
        if self.num_codes > self.embedding_dim:
            raise ValueError(f"prior.num_codes is {self.num_codes}, above embedding_dim {self.embedding_dim}; lower it")
        if self.text_prefix not in ("sequence", "pooled"):
            raise ValueError(f"prior.text_prefix is {self.text_prefix!r}; use 'sequence' or 'pooled'")
        for name in ("caption_dropout", "dot_percentile"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"prior.{name} is {getattr(self, name)}; use a number in [0, 1)")
        if self.temperature <= 0:
            raise ValueError(f"prior.temperature is {self.temperature}; use a positive number")

    @property
    def num_prefix_positions(self) -> int:
        """Positions before the dot product: the caption's and the text embedding's."""
        return (self.text.context_length if self.text_prefix == "sequence" else 1) + 1


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of a decoder; the paper's is 64 px, 512 channels, attention at 32, 16 and 8 px (Table 3).

    Attributes:
        image_size: side of the image in px.
        embedding_dim: dimension D of CLIP's embeddings.
        num_image_tokens: context tokens made from z_i.
        unet: the U-Net.
        text: the caption encoder (paper: GLIDE's transformer of its own), or, with ``kind: clip``, the hidden states
            of the frozen CLIP's text tower (Karlo).
        context_width: with ``kind: clip``, width of the context tokens that they are projected to (Karlo: 1536); None
            is their own width.
        condition_on: the embedding that the decoder is trained on and fed with. ``text_embedding`` is the paper's
            text-embedding decoder, a baseline that needs no prior.
        caption_dropout: probability that a training caption is withheld.
        embedding_dropout: probability that z_i is withheld; 1 trains a text-only decoder (the GLIDE baseline).
        null_embedding: what stands for a withheld z_i. The paper leaves it open (UNVERIFIED which one it used).
        embedding_scale: factor on the unit-norm z_i; None is sqrt(D), which gives every component unit variance and so
            lets z_i weigh as much as the timestep from the first step. The paper names no factor for the decoder.
        raw_embeddings: whether CLIP's embeddings come un-normalised, as in Karlo; for imported models.
        diffusion: the process; the paper learns the variance.
    """

    image_size: int
    embedding_dim: int
    num_image_tokens: int = 4
    unet: UNetConfig
    text: TextEncoderConfig | ClipTextConfig = field(default_factory=TextEncoderConfig)
    context_width: int | None = None
    condition_on: Literal["image_embedding", "text_embedding"] = "image_embedding"
    caption_dropout: float = 0.5
    embedding_dropout: float = 0.1
    null_embedding: Literal["zero", "learned"] = "zero"
    embedding_scale: float | None = None
    raw_embeddings: bool = False
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(variance="learned_range"))

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "embedding_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"decoder.{name}: {getattr(self, name)} is no probability; use 0 to 1")
        if self.null_embedding not in ("zero", "learned"):
            raise ValueError(f"decoder.null_embedding: {self.null_embedding!r}; use 'zero' or 'learned'")
        if self.embedding_dim < 1 or self.num_image_tokens < 0:
            raise ValueError("decoder.embedding_dim must be positive and decoder.num_image_tokens not negative")
        if self.condition_on not in ("image_embedding", "text_embedding"):
            raise ValueError(f"decoder.condition_on: {self.condition_on!r}; use 'image_embedding' or 'text_embedding'")
        if self.context_width is not None and (self.text.kind == "own" or self.context_width < 1):
            raise ValueError(
                f"decoder.context_width: {self.context_width}; it goes with text.kind 'clip' and is positive. An "
                "encoder of its own has its width in text.width"
            )

    @property
    def factor(self) -> float:
        """What embeddings are multiplied by."""
        return math.sqrt(self.embedding_dim) if self.embedding_scale is None else self.embedding_scale

    @property
    def uses_embedding(self) -> bool:
        """Whether the embedding was ever shown in training; a text-only decoder is not shown it in sampling either."""
        return self.embedding_dropout < 1.0

    @property
    def uses_caption(self) -> bool:
        """Whether captions were ever shown in training."""
        return self.caption_dropout < 1.0


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Settings of an upsampler; the paper's are 64 -> 256 (blur, cosine) and 256 -> 1024 (BSR, linear), Table 3.

    Attributes:
        image_size: side of the output in px.
        input_size: side of the low-resolution input in px; divides ``image_size``.
        crop_fraction: side of the training crop over ``image_size``; 1 trains on whole images.
        degradation: how the low-resolution image is corrupted in training.
        degradation_probability: fraction of the samples that are corrupted; the others are only shrunk. The paper
            names none; Ho et al. 2022 (cascaded diffusion) found one half best for blur.
        enlarge_mode: interpolation of the low-resolution image to ``image_size``. GLIDE: bilinear. Karlo: bicubic, with
            torch's antialias. Enlarging aliases nothing, but torch's antialiased kernel is another one: the cubic with
            a = -1/2 (Keys; that of Pillow and MATLAB), renormalised at the border, where its plain bicubic has
            a = -3/4 and repeats the border. Bilinear is the same with and without.
        max_noise_level: noise-conditioning augmentation (Ho et al. 2022, section 4): in training, the low-resolution
            image is mixed with noise of a level s drawn uniformly from [0, max_noise_level) for each sample, as
            sqrt(1 - s^2) x + s noise, and the network is told s. 0, as in the paper, switches it off.
        unet: the U-Net, without attention.
        diffusion: the process; the paper's second upsampler uses the linear schedule.
    """

    image_size: int
    input_size: int
    crop_fraction: float = 0.25
    degradation: Degradation = "blur"
    degradation_probability: float = 1.0
    enlarge_mode: Literal["bilinear", "bicubic"] = "bilinear"
    max_noise_level: float = 0.0
    unet: UNetConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        if self.input_size < 1 or self.image_size % self.input_size or self.image_size == self.input_size:
            raise ValueError(
                f"upsampler.image_size: {self.image_size} px must be a multiple, 2 or more, of input_size "
                f"{self.input_size} px"
            )
        if self.unet.attention_resolutions:
            raise ValueError("upsampler.unet.attention_resolutions: must be empty, or crops could not train it")
        if self.degradation not in ("none", "blur", "bsr_light", "bsr"):
            raise ValueError(f"upsampler.degradation: {self.degradation!r}; use none, blur, bsr_light or bsr")
        if self.enlarge_mode not in ("bilinear", "bicubic"):
            raise ValueError(f"upsampler.enlarge_mode: {self.enlarge_mode!r}; use bilinear or bicubic")
        if not 0.0 <= self.max_noise_level < 1.0:
            raise ValueError(
                f"upsampler.max_noise_level: {self.max_noise_level}; use 0 (off) or more, below 1, where nothing but "
                "noise is left"
            )
        if not 0.0 <= self.degradation_probability <= 1.0:
            raise ValueError(f"upsampler.degradation_probability: {self.degradation_probability}; use 0 to 1")
        self._check_crop()

    def _check_crop(self) -> None:
        if not 0.0 < self.crop_fraction <= 1.0:
            raise ValueError(f"upsampler.crop_fraction: {self.crop_fraction}; it must be in (0, 1]")
        multiple = self.unet.min_multiple_px
        if self.crop_px % multiple or self.crop_px % self.factor or self.crop_px // self.factor < 2:
            raise ValueError(
                f"upsampler.crop_fraction: {self.crop_fraction} of {self.image_size} px is a crop of {self.crop_px} "
                f"px; it must be a multiple of {multiple} (levels of the U-Net) and {self.factor} (enlargement), and "
                "at least 2 low-resolution px wide"
            )

    @property
    def factor(self) -> int:
        """How many times larger the output is."""
        return self.image_size // self.input_size

    @property
    def crop_px(self) -> int:
        """Side of the training crop in px."""
        return round(self.image_size * self.crop_fraction)
