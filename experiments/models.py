"""Plain NNX networks that know nothing of jaxfa, and for each where direct rules tap it."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

ModelName = Literal["mlp", "lenet", "convnet", "resnet20"]
Shape = tuple[int, int, int]


class MLP(nnx.Module):
    """Fully connected layers with ReLU.

    Args:
      shape: an image's ``(H, W, C)``.
      classes: number of outputs.
      hidden: the widths of the hidden layers.
      normalised: whether batch normalisation stands before every ReLU.
      rngs: keys for the weights.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        hidden: tuple[int, ...] = (256, 256, 256),
        *,
        normalised: bool = False,
        rngs: nnx.Rngs,
    ):
        sizes = (shape[0] * shape[1] * shape[2], *hidden)
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in pairwise(sizes)])
        # Statistics forget at PyTorch's default rate, which short trainings need.
        self.norms = nnx.List([nnx.BatchNorm(m, momentum=0.9, rngs=rngs) for m in hidden] if normalised else [])
        self.head = nnx.Linear(sizes[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        x = x.reshape(x.shape[0], -1)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = nnx.relu(self.norms[i](x) if self.norms else x)
        return self.head(x)


class LeNet(nnx.Module):
    """LeNet-5 with ReLU and max-pooling; arguments as :class:`MLP`.

    LeCun et al., "Gradient-based learning applied to document recognition", 1998, https://doi.org/10.1109/5.726791
    """

    def __init__(self, shape: Shape, classes: int, *, rngs: nnx.Rngs):
        height, width, channels = shape
        flat = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
        self.conv1 = nnx.Conv(channels, 6, (5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(flat, 120, rngs=rngs)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs)
        self.head = nnx.Linear(84, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        x = max_pool(nnx.relu(self.conv1(x)))
        x = max_pool(nnx.relu(self.conv2(x)))
        x = x.reshape(x.shape[0], -1)
        return self.head(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


class ConvNet(nnx.Module):
    """Three convolutions with batch normalisation; arguments as :class:`MLP`."""

    def __init__(self, shape: Shape, classes: int, *, rngs: nnx.Rngs):
        channels = (shape[2], 16, 32, 64)
        self.convs = nnx.List([nnx.Conv(n, m, (3, 3), use_bias=False, rngs=rngs) for n, m in pairwise(channels)])
        self.norms = nnx.List([nnx.BatchNorm(m, rngs=rngs) for m in channels[1:]])
        self.head = nnx.Linear(64 * (shape[0] // 4) * (shape[1] // 4), classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = nnx.relu(norm(conv(x)))
            x = max_pool(x) if i < 2 else x
        return self.head(x.reshape(x.shape[0], -1))


class Stem(nnx.Module):
    """The first convolution of a ResNet, with normalisation and ReLU."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H, W, width)``."""
        return nnx.relu(self.norm(self.conv(x)))


class Block(nnx.Module):
    """Two convolutions around a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(channels, width, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.has_projection = stride != 1 or channels != width
        if self.has_projection:
            self.projection = nnx.Conv(channels, width, (1, 1), strides=stride, use_bias=False, rngs=rngs)
            self.projection_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H / stride, W / stride, width)``."""
        shortcut = self.projection_norm(self.projection(x)) if self.has_projection else x
        x = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(x)) + shortcut)


class ResNet(nnx.Module):
    """ResNet for small images: three stages of equally many blocks; other arguments as :class:`MLP`.

    Args:
      shape: as :class:`MLP`.
      classes: likewise.
      depth: how many layers, ``6 k + 2``: 20, 32, 56.
      width: the channels of the first stage.
      rngs: likewise.

    Raises:
      ValueError: if the depth is not ``6 k + 2``.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, shape: Shape, classes: int, *, depth: int = 20, width: int = 16, rngs: nnx.Rngs):
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"A ResNet for small images has 6 k + 2 layers, such as 20 or 56, got depth={depth}.")
        widths = (width, *(width * scale for scale in (1, 2, 4) for _ in range(blocks)))
        self.stem = Stem(shape[2], width, rngs=rngs)
        self.blocks = nnx.List([Block(n, m, m // n, rngs=rngs) for n, m in pairwise(widths)])
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling of ``(N, H, W, C)``; an odd last row or column is dropped.

    Maxima of pairs: XLA:CPU's gradient of a windowed one is eight times slower, and that of a maximum over axes divides
    by how many are equal to it, which is none where XLA computes the input twice and rounds it otherwise.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


class Architecture(NamedTuple):
    """How to make a network, and what it asks for.

    Attributes:
      make: ``(shape, classes, *, rngs) -> module``.
      smallest: the least height and width of an image.
      taps: the sub-modules whose outputs direct rules tap; None taps the input of every weight layer but the first,
        which needs a network without shortcuts.
    """

    make: Callable[..., nnx.Module]
    smallest: int
    taps: tuple[str, ...] | None = None


MODELS: dict[ModelName, Architecture] = {
    "mlp": Architecture(MLP, 1),
    "lenet": Architecture(LeNet, 12),
    "convnet": Architecture(ConvNet, 8),
    "resnet20": Architecture(ResNet, 16, ("stem", "blocks/*")),
}


def architecture(name: ModelName, shape: Shape) -> Architecture:
    """The architecture of a name, if it fits the images.

    Raises:
      ValueError: if the name is unknown or the images are too small for the network.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}; choose one of {', '.join(get_args(ModelName))}.")
    if min(shape[:2]) < MODELS[name].smallest:
        fitting = [other for other, found in MODELS.items() if found.smallest <= min(shape[:2])]
        raise ValueError(
            f"The model {name} needs images of at least {MODELS[name].smallest} x {MODELS[name].smallest} pixels, got "
            f"{shape[0]} x {shape[1]}. Choose one of {', '.join(fitting)}, or another data set."
        )
    return MODELS[name]
