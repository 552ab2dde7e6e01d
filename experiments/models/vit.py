"""A vision transformer for small images."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.networks import Shape


class Block(nnx.Module):
    """Attention and a two-layer network, each behind layer normalisation and beside a shortcut.

    Args:
      width: features of a token.
      heads: of the attention.
      ratio: hidden units per feature.
      dropout: rate for attention's weights, for what each branch adds, and for whole branches (stochastic depth).
      rngs: keys for the weights and for dropout.
    """

    def __init__(self, width: int, heads: int, ratio: int, dropout: float, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, dropout_rate=dropout, broadcast_dropout=False, deterministic=False, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.fc1 = nnx.Linear(width, ratio * width, rngs=rngs)
        self.fc2 = nnx.Linear(ratio * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.drop_path = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, tokens, width)`` to the same shape."""
        x = x + self.drop_path(self.dropout(self.attention(self.norm1(x))))
        hidden = self.dropout(nnx.gelu(self.fc1(self.norm2(x))))
        return x + self.drop_path(self.dropout(self.fc2(hidden)))


class ViT(nnx.Module):
    """Patches as tokens, a class token, learned positions, blocks, and a linear head on the class token.

    Args:
      shape: an image's ``(H, W, C)``, a multiple of the patch.
      classes: number of outputs.
      patch: the side of a patch in pixels.
      width: features of a token.
      depth: how many blocks.
      heads: of each attention.
      ratio: hidden units per feature in a block.
      dropout: rate of every dropout.
      rngs: keys for the weights and for dropout.

    Raises:
      ValueError: if the image is not made of whole patches.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, https://arxiv.org/abs/2010.11929
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        patch: int = 4,
        width: int = 384,
        depth: int = 8,
        heads: int = 8,
        ratio: int = 2,
        dropout: float = 0.1,
        rngs: nnx.Rngs,
    ):
        height, across, channels = shape
        if height % patch or across % patch:
            raise ValueError(f"A ViT needs images of whole patches of {patch} pixels, got {height} x {across}.")
        tokens = (height // patch) * (across // patch)
        small = nnx.initializers.truncated_normal(0.02)
        self.patch = patch
        self.embedding = nnx.Linear(patch * patch * channels, width, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(small(rngs.params(), (1, tokens + 1, width)))
        self.blocks = nnx.List([Block(width, heads, ratio, dropout, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        # A convolution whose stride is its window, written as the matrix product that it is.
        x = x.reshape(len(x), x.shape[1] // self.patch, self.patch, x.shape[2] // self.patch, self.patch, -1)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), x.shape[1] * x.shape[3], -1)
        x = self.embedding(x)
        first = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], 1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
