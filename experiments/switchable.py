"""Networks for small images whose normalisation can be left out: a small convolutional one, and ResNet-18."""

from itertools import pairwise

import jax
from flax import nnx

from experiments.models import Shape, max_pool

# Kept apart, so that feedback can be drawn as the weights are.
INITIALIZER = nnx.initializers.he_normal()


class Convolution(nnx.Module):
    """A convolution with batch normalisation, or in its place with biases.

    Args:
      channels: of the input.
      width: channels of the output.
      window: the kernel's height and width.
      stride: of the output's pixels.
      normalised: whether batch normalisation follows.
      rngs: keys for the weights.
    """

    def __init__(
        self, channels: int, width: int, window: int = 3, stride: int = 1, *, normalised: bool, rngs: nnx.Rngs
    ):
        self.conv = nnx.Conv(
            channels,
            width,
            (window, window),
            strides=stride,
            use_bias=not normalised,
            kernel_init=INITIALIZER,
            rngs=rngs,
        )
        # Statistics forget at PyTorch's default rate, which short trainings need.
        self.norm = nnx.data(nnx.BatchNorm(width, momentum=0.9, rngs=rngs) if normalised else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H / stride, W / stride, width)``."""
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class CNN(nnx.Module):
    """3x3 convolutions with ReLU, each followed by 2x2 max-pooling, and a linear head.

    Args:
      shape: an image's ``(H, W, C)``.
      classes: number of outputs.
      widths: channels of the convolutions.
      normalised: whether batch normalisation stands before every ReLU.
      rngs: keys for the weights.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        widths: tuple[int, ...] = (32, 64, 128, 128),
        *,
        normalised: bool,
        rngs: nnx.Rngs,
    ):
        channels = (shape[2], *widths)
        self.layers = nnx.List([Convolution(n, m, normalised=normalised, rngs=rngs) for n, m in pairwise(channels)])
        pixels = (shape[0] >> len(widths)) * (shape[1] >> len(widths))
        self.head = nnx.Linear(pixels * widths[-1], classes, kernel_init=INITIALIZER, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        for layer in self.layers:
            x = max_pool(nnx.relu(layer(x)))
        return self.head(x.reshape(x.shape[0], -1))


class Block(nnx.Module):
    """Two convolutions around a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, *, normalised: bool, rngs: nnx.Rngs):
        self.first = Convolution(channels, width, stride=stride, normalised=normalised, rngs=rngs)
        self.second = Convolution(width, width, normalised=normalised, rngs=rngs)
        changes = stride != 1 or channels != width
        self.shortcut = nnx.data(
            Convolution(channels, width, 1, stride, normalised=normalised, rngs=rngs) if changes else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H / stride, W / stride, width)``."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return nnx.relu(self.second(nnx.relu(self.first(x))) + shortcut)


class ResNet18(nnx.Module):
    """ResNet-18 for small images: a 3x3 stem without pooling; arguments as :class:`CNN`, but for the widths.

    Args:
      shape: an image's ``(H, W, C)``.
      classes: number of outputs.
      widths: channels of the stages, two blocks each; every stage but the first halves the image.
      normalised: whether batch normalisation follows every convolution.
      rngs: keys for the weights.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, https://arxiv.org/abs/1512.03385
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        *,
        normalised: bool,
        rngs: nnx.Rngs,
    ):
        self.stem = Convolution(shape[2], widths[0], normalised=normalised, rngs=rngs)
        channels = [widths[0], *(width for width in widths for _ in range(2))]
        strides = [1, 1, *([2, 1] * (len(widths) - 1))]
        pairs = zip(pairwise(channels), strides, strict=True)
        self.blocks = nnx.List([Block(n, m, stride, normalised=normalised, rngs=rngs) for (n, m), stride in pairs])
        self.head = nnx.Linear(widths[-1], classes, kernel_init=INITIALIZER, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))
