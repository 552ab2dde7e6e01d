"""What rules share whose layers learn from losses of their own: auxiliary heads, trained as feedback is."""

import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from jaxfa.base import DirectFeedback
from jaxfa.rules.shared.projection import shared_axes
from jaxfa.rules.shared.targets import check_classes, softmax_targets, weighted


class LocalLoss(DirectFeedback):
    """An activation's error is the gradient of a loss ``L(h, y)`` of its own, whose targets the output error tells.

    The heads that the loss needs are the feedback: their signal is ``dL / d head``. An example counts as in the model's
    loss, by its weight ``c``: ``1 / N`` in a mean.
    """

    local = True
    reads = staticmethod(softmax_targets)

    def loss(self, h: jax.Array, y: jax.Array, c: jax.Array) -> jax.Array:
        """The loss of an activation with one-hot targets, ``(N, ..., C)``, and weights ``(N, ...)`` of the examples."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(h, y, c).")

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return self.learn(h, e)[0]

    def signal(self, h: jax.Array, e: jax.Array) -> Self:
        return self.learn(h, e)[1]

    def learn(self, h: jax.Array, e: jax.Array) -> tuple[jax.Array, Self]:
        check_classes(h, e)
        y, c = weighted(e.astype(jnp.promote_types(e.dtype, jnp.float32)))
        wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        return jax.grad(lambda h, own: own.loss(h, y, c), (0, 1))(wide, self)


def cross_entropy(logits: jax.Array, y: jax.Array, c: jax.Array) -> jax.Array:
    """The softmax cross-entropy, summed over the examples with their weights."""
    return -jnp.sum(c[..., None] * y * jax.nn.log_softmax(logits))


def affine(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """``x w + b``."""
    y = x @ w
    return y + jnp.broadcast_to(b, y.shape)


def classifier(key: jax.Array, features: int, h: Any, logits: Any, draw: Any = None) -> tuple[jax.Array, jax.Array]:
    """Weights ``(features, C)`` and biases of a classifier; never below single precision."""
    check_classes(h, logits)
    dtype, classes = jnp.promote_types(h.dtype, jnp.float32), logits.shape[-1]
    return (draw or initializers.lecun_normal())(key, (features, classes), dtype), jnp.zeros(classes, dtype)


def own_axes(h: Any, logits: Any) -> tuple[int, ...]:
    """The axes of an activation that it does not share with the logits: pixels, or tokens, then channels."""
    return tuple(h.shape[shared_axes(h, logits) :])


def pooled_size(sides: tuple[int, ...], channels: int) -> int:
    """How many features there are in a map of these sides."""
    return math.prod(sides) * channels


def pool(h: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """Means over windows of the axes before the last, of which that many are left, as ``AdaptiveAvgPool`` has them."""
    for axis, side in enumerate(sides, h.ndim - 1 - len(sides)):
        size = h.shape[axis]
        if side < size:
            windows = np.arange(size) * side // size == np.arange(side)[:, None]
            mean = jnp.asarray(windows / windows.sum(1, keepdims=True), h.dtype)
            h = jnp.moveaxis(jnp.tensordot(mean, h, (1, axis)), 0, axis)
    return h


def features(h: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """The pooled activation as one vector for each example."""
    leading = h.shape[: h.ndim - 1 - len(sides)]
    return pool(h, sides).reshape(*leading, pooled_size(sides, h.shape[-1]))
