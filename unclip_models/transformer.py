"""The transformer of the text encoder and both priors: pre-LN blocks, GELU, fused attention, a KV cache."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class KVCache:
    """Keys and values of the positions a transformer has already read, one pair per layer.

    Valid only for causal attention: an earlier position never sees a later one, so its keys and values stand.
    """

    def __init__(self, num_layers: int) -> None:
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Number of positions held."""
        keys = self._keys[0] if self._keys else None
        return 0 if keys is None else keys.shape[2]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values ``(B, H, held + L, D)`` with the new ones ``(B, H, L, D)`` at the end."""
        old_keys, old_values = self._keys[layer], self._values[layer]
        if old_keys is not None and old_values is not None:
            keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
        self._keys[layer], self._values[layer] = keys, values
        return keys, values

    def repeated(self, times: int) -> "KVCache":
        """Return a cache for a batch in which every row appears ``times`` times in a row."""
        if times == 1:
            return self.fork()
        other = KVCache(len(self._keys))
        other._keys = [None if keys is None else keys.repeat_interleave(times, dim=0) for keys in self._keys]
        other._values = [None if values is None else values.repeat_interleave(times, dim=0) for values in self._values]
        return other

    def fork(self) -> "KVCache":
        """Return a cache that shares what is held so far but grows on its own."""
        other = KVCache(len(self._keys))
        other._keys, other._values = list(self._keys), list(self._values)
        return other


class SelfAttention(nn.Module):
    """Multi-head self-attention on fused kernels.

    Args:
        width: channels, divisible by ``heads``.
        heads: number of heads.
        causal: whether a position sees only itself and earlier ones.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if width % heads != 0:
            raise ValueError(f"transformer width {width} is not divisible by heads {heads}; change one of them")
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0, visible: Tensor | None = None) -> Tensor:
        """Attend within ``x`` ``(B, L, C)``, and to the cached positions before it; see ``Transformer``."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, C / H)
        held = 0
        if cache is not None:
            keys, values = cache.extend(layer, keys, values)
            held = keys.shape[2] - length
        mask = None
        square_causal = self.causal and held == 0 and length > 1 and visible is None
        if self.causal and length > 1 and not square_causal:
            # Row i of this piece is position held + i of the whole sequence.
            mask = torch.ones(length, held + length, dtype=torch.bool, device=x.device).tril(held)
        if visible is not None:
            keys_seen = visible[:, None, None, :]  # (B, 1, 1, held + L)
            mask = keys_seen if mask is None else mask & keys_seen
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=square_causal)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return projected


class Block(nn.Module):
    """One pre-LN block: attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0, visible: Tensor | None = None) -> Tensor:
        """Map ``(B, L, C)`` to ``(B, L, C)``."""
        x = x + self.attention(self.norm_1(x), cache, layer, visible)
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class Transformer(nn.Module):
    """A stack of blocks; embeddings and the final LayerNorm belong to whoever owns it.

    Args:
        width: channels.
        layers: number of blocks; 0 makes it the identity.
        heads: heads per block.
        causal: whether attention is causal.
        checkpoint_activations: recompute each block in the backward pass instead of storing its activations.
    """

    def __init__(
        self, width: int, layers: int, heads: int, *, causal: bool, checkpoint_activations: bool = False
    ) -> None:
        super().__init__()
        self.causal = causal
        self.checkpoint_activations = checkpoint_activations
        self.blocks = nn.ModuleList(Block(width, heads, causal=causal) for _ in range(layers))
        self._initialise(width, layers)

    def _initialise(self, width: int, layers: int) -> None:
        """Scale the weights as CLIP and GLIDE do, so that the residual stream keeps its size through the depth."""
        residual_std = width**-0.5 * (2 * max(layers, 1)) ** -0.5
        stds = {
            "attention.qkv": width**-0.5,
            "attention.proj": residual_std,
            "mlp.0": (2 * width) ** -0.5,
            "mlp.2": residual_std,
        }
        for block in self.blocks:
            for name, std in stds.items():
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def new_cache(self) -> KVCache:
        """Return an empty cache for this stack.

        Raises:
            ValueError: if attention is not causal, where a cache would give wrong answers.
        """
        if not self.causal:
            raise ValueError("a KV cache needs causal attention; this transformer is not causal")
        return KVCache(len(self.blocks))

    def forward(self, x: Tensor, cache: KVCache | None = None, visible: Tensor | None = None) -> Tensor:
        """Map ``(B, L, C)`` to ``(B, L, C)``.

        Args:
            x: the sequence; with a cache, only the positions after the cached ones.
            cache: what was read before, extended by this call.
            visible: bool ``(B, held + L)``, False for positions that nobody may attend to, such as padding; None shows
                all. Every position must be left with one to attend to.
        """
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, None, layer, visible, use_reentrant=False)
            else:
                x = block(x, cache, layer, visible)
        return x
