"""AlexNet for small images: five convolutions and three fully connected layers, no normalisation."""

from itertools import pairwise

import jax
from flax import nnx

from experiments.models.networks import Shape, max_pool


class AlexNet(nnx.Module):
    """3x3 convolutions with three max-poolings, then two wide layers behind dropout.

    Args:
      shape: an image's ``(H, W, C)``; halved three times.
      classes: number of outputs.
      widths: the channels of the convolutions.
      hidden: units of each wide layer.
      dropout: how much of what each wide layer gets is dropped.
      rngs: keys for the weights and for dropout.

    Source: after Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
    2012, https://papers.nips.cc/paper/4824
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        widths: tuple[int, ...] = (64, 192, 384, 256, 256),
        hidden: int = 1024,
        dropout: float = 0.5,
        rngs: nnx.Rngs,
    ):
        pairs = pairwise((shape[2], *widths))
        flat = widths[-1] * (shape[0] // 8) * (shape[1] // 8)
        # Without normalisation the signal has to keep its size by the weights alone.
        he = nnx.initializers.he_normal()
        self.convs = nnx.List([nnx.Conv(n, m, (3, 3), kernel_init=he, rngs=rngs) for n, m in pairs])
        self.fc1 = nnx.Linear(flat, hidden, kernel_init=he, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, hidden, kernel_init=he, rngs=rngs)
        self.head = nnx.Linear(hidden, classes, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        for i, conv in enumerate(self.convs):
            x = nnx.relu(conv(x))
            x = max_pool(x) if i in (0, 1, 4) else x
        x = self.dropout(x.reshape(len(x), -1))
        x = self.dropout(nnx.relu(self.fc1(x)))
        return self.head(nnx.relu(self.fc2(x)))
