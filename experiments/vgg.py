"""A VGG-like network: 3x3 convolutions with batch normalisation, average pooling, and a small classifier."""

from itertools import pairwise

import jax
from flax import nnx

from experiments.models import Shape, max_pool


class VGG(nnx.Module):
    """Pairs of 3x3 convolutions with max-pooling between the pairs, then two fully connected layers.

    Args:
      shape: an image's ``(H, W, C)``; halved between the pairs.
      classes: number of outputs.
      widths: the channels of each pair of convolutions.
      dropout: how much of the classifier's hidden layer is dropped.
      rngs: keys for the weights and for dropout.

    Source: after Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014,
    https://arxiv.org/abs/1409.1556
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        dropout: float = 0.4,
        rngs: nnx.Rngs,
    ):
        channels = (shape[2], *(width for width in widths for _ in range(2)))
        self.convs = nnx.List([nnx.Conv(n, m, (3, 3), rngs=rngs) for n, m in pairwise(channels)])
        self.norms = nnx.List([nnx.BatchNorm(m, momentum=0.9, rngs=rngs) for m in channels[1:]])
        self.classifier = nnx.Linear(widths[-1], max(widths[-1] // 2, classes), rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(self.classifier.out_features, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = max_pool(x) if i % 2 == 0 and i else x
            x = nnx.relu(norm(conv(x)))
        x = nnx.relu(self.classifier(x.mean((1, 2))))
        return self.head(self.dropout(x))
