"""A causal transformer that predicts the next token."""

import jax
import jax.numpy as jnp
from flax import nnx


class Embedding(nnx.Module):
    """A vector per token plus one per position, both learned.

    Args:
      vocabulary: how many tokens there are.
      context: the most positions.
      width: features of a token.
      rngs: keys for the weights.
    """

    def __init__(self, vocabulary: int, context: int, width: int, *, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (1, context, width)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """``(N, T)`` to ``(N, T, width)``."""
        return self.tokens(tokens) + self.positions[:, : tokens.shape[1]]


class Block(nnx.Module):
    """Attention and a two-layer network, each beside a shortcut and before layer normalisation.

    Args:
      width: features of a token.
      heads: of the attention.
      ratio: hidden units per feature.
      dropout: rate for attention's weights and for what each branch adds.
      rngs: keys for the weights and for dropout.
    """

    def __init__(self, width: int, heads: int, ratio: int, dropout: float, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(
            heads, width, dropout_rate=dropout, broadcast_dropout=False, deterministic=False, decode=False, rngs=rngs
        )
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.fc1 = nnx.Linear(width, ratio * width, rngs=rngs)
        self.fc2 = nnx.Linear(ratio * width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(N, T, width)`` to the same shape; ``mask`` ``(T, T)`` says which token sees which."""
        x = self.norm1(x + self.dropout(self.attention(x, mask=mask)))
        return self.norm2(x + self.dropout(self.fc2(nnx.gelu(self.fc1(x)))))


class GPT(nnx.Module):
    """Tokens with learned positions, blocks that see no later token, and a linear head on every token.

    Blocks end in their normalisation, as the first transformers' did: feedback that is delivered to a block's output
    tells it a direction and no size, so that a sum which nothing normalises would grow without end.

    Args:
      vocabulary: how many tokens there are.
      context: the most positions.
      width: features of a token.
      depth: how many blocks.
      heads: of each attention.
      ratio: hidden units per feature in a block.
      dropout: rate of the blocks' every dropout.
      rngs: keys for the weights and for dropout.

    Source: Radford, Narasimhan, Salimans, Sutskever, "Improving Language Understanding by Generative Pre-Training",
    2018, https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int,
        width: int = 512,
        depth: int = 6,
        heads: int = 8,
        ratio: int = 4,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.context = context
        self.embedding = Embedding(vocabulary, context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, ratio, dropout, rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens ``(N, T)`` to the next one's logits ``(N, T, vocabulary)``.

        Raises:
          ValueError: if the tokens are more than the context, or no whole numbers.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.context or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"A GPT expects whole numbers (N, T) with T up to {self.context}, got {tokens.dtype} {tokens.shape}."
            )
        mask = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)
