"""VGG-like networks: 3x3 convolutions with batch normalisation, average pooling, and a small classifier."""

from itertools import accumulate, pairwise

import jax
from flax import nnx

from experiments.models.networks import Shape, max_pool


class Layer(nnx.Module):
    """A convolution, batch normalisation, ReLU, and at a stage's end max-pooling: a block that direct rules tap.

    Args:
      conv: the convolution.
      norm: of its channels.
      pools: whether the image is halved.
    """

    def __init__(self, conv: nnx.Conv, norm: nnx.BatchNorm, *, pools: bool):
        self.conv, self.norm, self.pools = conv, norm, pools

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, D)``, or half as high and wide."""
        x = nnx.relu(self.norm(self.conv(x)))
        return max_pool(x) if self.pools else x


class VGG(nnx.Module):
    """Stages of 3x3 convolutions with max-pooling between them, then two fully connected layers.

    Args:
      shape: an image's ``(H, W, C)``; halved between the stages.
      classes: number of outputs.
      widths: the channels of each stage.
      repeats: how many convolutions each stage has; by default two. VGG-16 has ``(2, 2, 3, 3, 3)``.
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
        repeats: tuple[int, ...] | None = None,
        dropout: float = 0.4,
        rngs: nnx.Rngs,
    ):
        repeats = repeats or (2,) * len(widths)
        channels = (shape[2], *(width for width, count in zip(widths, repeats, strict=True) for _ in range(count)))
        ends = set(accumulate(repeats[:-1]))  # the last stage is averaged over, whole
        convs = [nnx.Conv(n, m, (3, 3), rngs=rngs) for n, m in pairwise(channels)]
        norms = [nnx.BatchNorm(m, momentum=0.9, rngs=rngs) for m in channels[1:]]
        both = enumerate(zip(convs, norms, strict=True), 1)
        self.blocks = nnx.List([Layer(conv, norm, pools=i in ends) for i, (conv, norm) in both])
        self.classifier = nnx.Linear(widths[-1], max(widths[-1] // 2, classes), rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(self.classifier.out_features, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.classifier(x.mean((1, 2))))
        return self.head(self.dropout(x))
