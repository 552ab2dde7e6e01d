"""A model of the retina and the visual cortex behind it."""

from itertools import pairwise

import jax
from flax import nnx


class Retina(nnx.Module):
    """Convolutions that are a retina, convolutions that are a cortex, two fully connected layers.

    Args:
      side: of an image, in pixels.
      classes: number of outputs.
      retina: the channels of the retina's convolutions.
      cortex: the channels of the cortex's.
      hidden: units of the first fully connected layer.
      window: side of every kernel, in pixels.
      rngs: keys for the weights and for dropout.

    Source: after Lindsey, Ocko, Ganguli, Deny, "A Unified Theory of Early Visual Representations from Retina to Cortex
    through Anatomically Constrained Deep CNNs", 2019, https://arxiv.org/abs/1901.00945
    """

    def __init__(
        self,
        side: int,
        classes: int,
        *,
        retina: tuple[int, ...],
        cortex: tuple[int, ...],
        hidden: int,
        window: int,
        rngs: nnx.Rngs,
    ):
        def stage(*channels: int) -> nnx.List:
            return nnx.List([nnx.Conv(n, m, (window, window), rngs=rngs) for n, m in pairwise(channels)])

        self.retina, self.cortex = stage(1, *retina), stage(retina[-1], *cortex)
        self.hidden = nnx.Linear(cortex[-1] * side**2, hidden, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, 1)`` to logits ``(N, classes)``."""
        x = nnx.relu(self.ganglion(x))
        for conv in self.cortex:
            x = nnx.relu(conv(x))
        return self.head(self.dropout(nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))))

    def ganglion(self, x: jax.Array) -> jax.Array:
        """The retina's output before its ReLU, ``(N, H, W, channels)``."""
        *first, last = self.retina
        for conv in first:
            x = nnx.relu(conv(x))
        return last(x)
