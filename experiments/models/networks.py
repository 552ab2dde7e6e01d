"""Plain NNX networks that know nothing of jaxfa, and for each where direct rules tap it."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

ModelName = Literal["mlp", "lenet", "convnet", "resnet20"]
Shape = tuple[int, int, int]
DEFAULT = nnx.initializers.lecun_normal()  # Flax's own


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
    """Three convolutions with batch normalisation; arguments as :class:`MLP`, ``widths`` are those of the channels."""

    def __init__(self, shape: Shape, classes: int, widths: tuple[int, ...] = (16, 32, 64), *, rngs: nnx.Rngs):
        channels = (shape[2], *widths)
        self.convs = nnx.List([nnx.Conv(n, m, (3, 3), use_bias=False, rngs=rngs) for n, m in pairwise(channels)])
        # Statistics forget at PyTorch's default rate, which short trainings need.
        self.norms = nnx.List([nnx.BatchNorm(m, momentum=0.9, rngs=rngs) for m in channels[1:]])
        self.head = nnx.Linear(widths[-1] * (shape[0] // 4) * (shape[1] // 4), classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = nnx.relu(norm(conv(x)))
            x = max_pool(x) if i < 2 else x
        return self.head(x.reshape(x.shape[0], -1))


class Convolution(nnx.Module):
    """A convolution with batch normalisation, or in its place with biases.

    Args:
      channels: of the input.
      width: channels of the output.
      window: the kernel's height and width.
      stride: of the output's pixels.
      normalised: whether batch normalisation follows.
      kernel_init: how the kernel is drawn.
      rngs: keys for the weights.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        window: int = 3,
        stride: int = 1,
        *,
        normalised: bool,
        kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        sizes = {"kernel_size": (window, window), "strides": stride}
        self.conv = nnx.Conv(channels, width, **sizes, use_bias=not normalised, kernel_init=kernel_init, rngs=rngs)
        # Statistics forget at PyTorch's default rate, which short trainings need.
        self.norm = nnx.data(nnx.BatchNorm(width, momentum=0.9, rngs=rngs) if normalised else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H / stride, W / stride, width)``."""
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


class Block(nnx.Module):
    """Two convolutions around a shortcut, which is a strided 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int, **options: Any):
        self.first = Convolution(channels, width, stride=stride, **options)
        self.second = Convolution(width, width, **options)
        changes = stride != 1 or channels != width
        self.shortcut = nnx.data(Convolution(channels, width, 1, stride, **options) if changes else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H / stride, W / stride, width)``."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return nnx.relu(self.second(nnx.relu(self.first(x))) + shortcut)


class ResNet(nnx.Module):
    """ResNet for small images: a 3x3 stem without pooling, then stages of equally many blocks.

    By default ResNet-20; five repeats make ResNet-32, nine ResNet-56, widths of 64 to 512 and two repeats ResNet-18.

    Args:
      shape: an image's ``(H, W, C)``.
      classes: number of outputs.
      widths: channels of the stages; every stage but the first halves the image.
      repeats: how many blocks each stage has.
      normalised: whether batch normalisation follows every convolution.
      kernel_init: how kernels are drawn.
      rngs: keys for the weights.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, https://arxiv.org/abs/1512.03385
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        widths: tuple[int, ...] = (16, 32, 64),
        *,
        repeats: int = 3,
        normalised: bool = True,
        kernel_init: nnx.Initializer = DEFAULT,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"normalised": normalised, "kernel_init": kernel_init, "rngs": rngs}
        # With its ReLU, so that direct rules tap it as they tap a block: where the next layer reads.
        self.stem = nnx.Sequential(Convolution(shape[2], widths[0], **options), nnx.relu)
        channels = (widths[0], *(width for width in widths for _ in range(repeats)))
        strides = [2 if i and i % repeats == 0 else 1 for i in range(repeats * len(widths))]
        pairs = zip(pairwise(channels), strides, strict=True)
        self.blocks = nnx.List([Block(n, m, stride, **options) for (n, m), stride in pairs])
        self.head = nnx.Linear(widths[-1], classes, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, H, W, C)`` to logits ``(N, classes)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling of ``(N, H, W, C)``; an odd last row or column is dropped.

    Maxima of pairs: XLA:CPU's gradient of a windowed one is far slower, and that of a maximum over axes divides
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
