"""The names that diffusers' classes give to the tensors of our networks.

``UNet2DConditionModel`` holds the decoder's U-Net, ``UNet2DModel`` an upsampler's, ``PriorTransformer`` the diffusion
prior, and ``UnCLIPTextProjModel`` what the decoder makes of CLIP's embeddings.
"""

from __future__ import annotations

from unclip_models.settings import DecoderConfig, DiffusionPriorConfig, UNetConfig
from unclip_models.weight_rules import Rule, affine, copy, reshaped, scaled, split_rows

_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}


def attention_levels(config: UNetConfig, image_size: int) -> list[bool]:
    """Say for every level, highest resolution first, whether it has attention."""
    return [image_size // 2**level in config.attention_resolutions for level in range(len(config.channel_mult))]


def unet_rules(config: UNetConfig, image_size: int, prefix: str = "unet.") -> list[Rule]:
    """Map a U-Net; ``prefix`` stands before our names."""
    return [
        Rule(f"{prefix}{rule.ours}", rule.theirs, rule.to_theirs, rule.to_ours)
        for rule in _UNetMap(config, image_size).rules()
    ]


class _UNetMap:
    """Walks the blocks of a U-Net in order."""

    def __init__(self, config: UNetConfig, image_size: int) -> None:
        self.config = config
        self.attention = attention_levels(config, image_size)
        self.num_levels = len(config.channel_mult)

    def rules(self) -> list[Rule]:
        """Return the rules of the whole network."""
        rules = [*affine(copy, "time_embed.0", "time_embedding.linear_1")]
        rules += affine(copy, "time_embed.2", "time_embedding.linear_2")
        rules += affine(copy, "input_blocks.0.0", "conv_in")
        rules += self._down() + self._middle() + self._up()
        return rules + affine(copy, "out.0", "conv_norm_out") + affine(copy, "out.2", "conv_out")

    def _width(self, level: int) -> int:
        return self.config.model_channels * self.config.channel_mult[level]

    def _down(self) -> list[Rule]:
        rules: list[Rule] = []
        block, channels = 1, self._width(0)
        for level in range(self.num_levels):
            theirs = f"down_blocks.{level}"
            for index in range(self.config.num_res_blocks):
                rules += self._resnet(f"input_blocks.{block}.0", f"{theirs}.resnets.{index}", channels, level)
                rules += self._attention_at(f"input_blocks.{block}.1", f"{theirs}.attentions.{index}", level)
                channels, block = self._width(level), block + 1
            if level + 1 < self.num_levels:
                rules += self._resnet(f"input_blocks.{block}.0", f"{theirs}.downsamplers.0", channels, level)
                block += 1
        return rules

    def _middle(self) -> list[Rule]:
        last = self.num_levels - 1
        width = self._width(last)
        has_attention = bool(self.config.attention_resolutions)
        rules = self._resnet("middle_block.0", "mid_block.resnets.0", width, last)
        if has_attention:
            rules += self._attention("middle_block.1", "mid_block.attentions.0", last)
        return rules + self._resnet(f"middle_block.{2 if has_attention else 1}", "mid_block.resnets.1", width, last)

    def _up(self) -> list[Rule]:
        rules: list[Rule] = []
        block = 0
        for position, level in enumerate(reversed(range(self.num_levels))):
            theirs = f"up_blocks.{position}"
            for index in range(self.config.num_res_blocks + 1):
                ours = f"output_blocks.{block}"
                # The skip that is joined makes the input wider than the output, always.
                rules += self._resnet(f"{ours}.0", f"{theirs}.resnets.{index}", -1, level)
                rules += self._attention_at(f"{ours}.1", f"{theirs}.attentions.{index}", level)
                block += 1
            if level:
                place = 2 if self.attention[level] else 1
                rules += self._resnet(f"{ours}.{place}", f"{theirs}.upsamplers.0", self._width(level), level)
        return rules

    def _resnet(self, ours: str, theirs: str, in_channels: int, level: int) -> list[Rule]:
        rules = [
            rule for own, other in _RES_BLOCK.items() for rule in affine(copy, f"{ours}.{own}", f"{theirs}.{other}")
        ]
        if in_channels != self._width(level):
            rules += affine(copy, f"{ours}.skip_connection", f"{theirs}.conv_shortcut")
        return rules

    def _attention_at(self, ours: str, theirs: str, level: int) -> list[Rule]:
        return self._attention(ours, theirs, level) if self.attention[level] else []

    def _attention(self, ours: str, theirs: str, level: int) -> list[Rule]:
        heads = max(1, self._width(level) // self.config.head_channels)
        rules = affine(copy, f"{ours}.norm", f"{theirs}.group_norm")
        rules += affine(split_rows, f"{ours}.qkv", [f"{theirs}.to_{part}" for part in "qkv"], heads)
        rules += affine(split_rows, f"{ours}.encoder_kv", [f"{theirs}.add_{part}_proj" for part in "kv"], heads)
        return rules + affine(copy, f"{ours}.proj_out", f"{theirs}.to_out.0")


def prior_rules(config: DiffusionPriorConfig, text_scale: float) -> list[Rule]:
    """Map a diffusion prior; the text embedding's factor goes into the weight that reads it."""
    width = config.width
    rules = affine(copy, "time_embed.0", "time_embedding.linear_1")
    rules += affine(copy, "time_embed.2", "time_embedding.linear_2")
    rules += affine(copy, "image_proj", "proj_in")
    rules.append(scaled("text_embedding_proj.weight", "embedding_proj.weight", text_scale))
    rules.append(copy("text_embedding_proj.bias", "embedding_proj.bias"))
    rules += affine(copy, "text_proj", "encoder_hidden_states_proj")
    num_positions = config.text.context_length + 4
    rules.append(reshaped("positional_embedding", "positional_embedding", (1, num_positions, width)))
    rules.append(reshaped("final_query", "prd_embedding", (1, 1, width)))
    for layer in range(config.layers):
        ours, theirs = f"transformer.blocks.{layer}", f"transformer_blocks.{layer}"
        rules += affine(copy, f"{ours}.norm_1", f"{theirs}.norm1")
        rules += affine(split_rows, f"{ours}.attention.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"], 1)
        rules += affine(copy, f"{ours}.attention.proj", f"{theirs}.attn1.to_out.0")
        rules += affine(copy, f"{ours}.norm_2", f"{theirs}.norm3")
        rules += affine(copy, f"{ours}.mlp.0", f"{theirs}.ff.net.0.proj")
        rules += affine(copy, f"{ours}.mlp.2", f"{theirs}.ff.net.2")
    rules += affine(copy, "final_norm", "norm_out") + affine(copy, "out_proj", "proj_to_clip_embeddings")
    for ours, theirs in (("scaling.mean", "clip_mean"), ("scaling.std", "clip_std")):
        rules.append(reshaped(ours, theirs, (1, config.embedding_dim)))
    return rules


def text_proj_rules(config: DecoderConfig) -> list[Rule]:
    """Map what a decoder that reads CLIP's text makes of both embeddings; its factor goes into the weights."""
    rules = affine(copy, "text_to_context.0", "encoder_hidden_states_proj")
    rules += affine(copy, "text_to_context.1", "text_encoder_hidden_states_norm")
    rules += affine(copy, "text_to_time", "embedding_proj")
    names = {
        "image_to_tokens": "clip_extra_context_tokens_proj",
        "image_to_time": "clip_image_embeddings_project_to_time_embeddings",
    }
    for ours, theirs in names.items():
        rules.append(scaled(f"{ours}.weight", f"{theirs}.weight", config.factor))
        rules.append(copy(f"{ours}.bias", f"{theirs}.bias"))
    if config.null_embedding == "learned":
        # Ours stands behind the factor, theirs before it.
        rules.append(scaled("null_image_embedding", "learned_classifier_free_guidance_embeddings", 1 / config.factor))
    return rules
