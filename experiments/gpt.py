"""A causal transformer that predicts the next token."""

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.vit import Block


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


class GPT(nnx.Module):
    """Tokens with learned positions, blocks that see no later token, and a linear head on every token.

    Args:
      vocabulary: how many tokens there are.
      context: the most positions.
      width: features of a token.
      depth: how many blocks.
      heads: of each attention.
      ratio: hidden units per feature in a block.
      dropout: rate of the blocks' every dropout.
      rngs: keys for the weights and for dropout.

    Source: Radford, Wu, Child, Luan, Amodei, Sutskever, "Language Models are Unsupervised Multitask Learners", 2019,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
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
        self.norm = nnx.LayerNorm(width, rngs=rngs)
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
        return self.head(self.norm(x))
