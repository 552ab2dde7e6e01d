"""Convolutional networks of single papers: the shallow one of forward gradients, and one that pools every layer."""

from itertools import pairwise
from typing import Any

import jax
from flax import nnx

from experiments.models.networks import DEFAULT, Convolution, Shape, max_pool


class ShallowCNN(nnx.Module):
    """15 and 40 filters of 5x5, a max-pooling, 128 hidden units; batch normalisation before every ReLU.

    Args:
      shape: an image's ``(H, W, C)``.
      classes: number of outputs.
      rngs: keys for the weights.

    Source: Bacho, Chu, "Low-variance Forward Gradients using Direct Feedback Alignment and momentum", 2024,
    https://arxiv.org/abs/2212.07282
    """

    def __init__(self, shape: Shape, classes: int, *, rngs: nnx.Rngs):
        flat = 40 * ((shape[0] - 8) // 2) * ((shape[1] - 8) // 2)
        self.conv1 = nnx.Conv(shape[2], 15, (5, 5), padding="VALID", use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(15, 40, (5, 5), padding="VALID", use_bias=False, rngs=rngs)
        self.hidden = nnx.Linear(flat, 128, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(128, classes, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in (15, 40, 128)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        first, second, third = self.norms
        x = nnx.relu(first(self.conv1(x)))
        x = max_pool(nnx.relu(second(self.conv2(x))))
        return self.head(nnx.relu(third(self.hidden(x.reshape(len(x), -1)))))


class PoolingCNN(nnx.Module):
    """3x3 convolutions with ReLU, each followed by 2x2 max-pooling, and a linear head.

    Args:
      shape: an image's ``(H, W, C)``.
      classes: number of outputs.
      widths: channels of the convolutions.
      normalised: whether batch normalisation stands before every ReLU.
      kernel_init: how kernels are drawn.
      rngs: keys for the weights.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        widths: tuple[int, ...] = (32, 64, 128, 128),
        *,
        normalised: bool,
        kernel_init: nnx.Initializer = DEFAULT,
        rngs: nnx.Rngs,
    ):
        channels = (shape[2], *widths)
        options: dict[str, Any] = {"normalised": normalised, "kernel_init": kernel_init, "rngs": rngs}
        self.layers = nnx.List([Convolution(n, m, **options) for n, m in pairwise(channels)])
        pixels = (shape[0] >> len(widths)) * (shape[1] >> len(widths))
        self.head = nnx.Linear(pixels * widths[-1], classes, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        for layer in self.layers:
            x = max_pool(nnx.relu(layer(x)))
        return self.head(x.reshape(x.shape[0], -1))
