"""A recurrent network that reads an image row by row."""

import jax
import jax.numpy as jnp
from flax import nnx


class RNN(nnx.Module):
    """``h_t = tanh(W_in x_t + W h_{t-1} + b)`` over an image's rows, and a linear head on the last ``h``.

    Args:
      shape: an image's ``(H, W, C)``.
      classes: number of outputs.
      width: units of the state.
      rngs: keys for the weights.

    Source: Elman, "Finding Structure in Time", 1990, https://doi.org/10.1207/s15516709cog1402_1
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, *, rngs: nnx.Rngs):
        self.read = nnx.Linear(shape[1] * shape[2], width, rngs=rngs)
        orthogonal = nnx.initializers.orthogonal()
        self.recur = nnx.Linear(width, width, use_bias=False, kernel_init=orthogonal, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        rows = self.read(x.reshape(*x.shape[:2], -1))
        h = jnp.tanh(rows[:, 0])
        for row in range(1, x.shape[1]):
            h = jnp.tanh(rows[:, row] + self.recur(h))
        return self.head(h)
