"""A fully connected autoencoder whose outputs are as many as an image's pixels."""

import math

import jax
from flax import nnx

from experiments.models.networks import MLP, Shape


class Autoencoder(nnx.Module):
    """Fully connected layers with a narrow one in the middle, from an image to two logits for each of its pixels.

    Args:
      shape: an image's ``(H, W, C)``.
      hidden: the widths of the hidden layers.
      rngs: keys for the weights.
    """

    def __init__(self, shape: Shape, hidden: tuple[int, ...], *, rngs: nnx.Rngs):
        self.layers = MLP(shape, 2 * math.prod(shape), hidden, normalised=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, pixels, 2)``: dark and light."""
        return self.layers(x).reshape(len(x), -1, 2)
