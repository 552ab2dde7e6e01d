"""PredSim: every layer predicts the classes, and makes its examples as similar to each other as their targets are.

Nokland, Eidnes, "Training Neural Networks with Local Error Signals", 2019, https://arxiv.org/abs/1901.06656

Similarity is the cosine of centred vectors, ``S(z)_ij``, of which examples have one each: a linear map of the
activation; of a feature map, the standard deviations over its pixels after a 3 x 3 convolution. The paper's code takes
activations before dropout, a tap what the block returns.

Needs hard targets, which the output error tells, and a batch. Costs a product or a convolution as large as the layer's
own, and the ``N x N`` similarities. An example's error depends on the others of its batch.

Activations wait for the error, so that memory grows with depth; by ``schedule=jaxfa.stacks.stream`` none beyond a block
is kept.
"""

import itertools
import string
from dataclasses import field
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.nn import initializers

from jaxfa.base import DirectRule, feedback_dataclass
from jaxfa.rules.shared.local import LocalLoss, affine, classifier, cross_entropy, features, own_axes, pooled_size
from jaxfa.varying import refuse_shards


@feedback_dataclass
class PredSimHeads(LocalLoss):
    """A linear classifier and a map whose outputs are compared among examples.

    Attributes:
      w: the classifier's weights, ``(features, C)``.
      b: its biases, ``(C,)``.
      s: the map's weights, ``(n, n)`` or ``(3, 3, n, n)``.
      sides: how many windows are left of each axis of pixels for the classifier.
      beta: the similarity's part of the loss.
    """

    w: jax.Array
    b: jax.Array
    s: jax.Array
    sides: tuple[int, ...] = field(metadata={"static": True})
    beta: float = field(metadata={"static": True})

    def learn(self, h: jax.Array, e: jax.Array) -> tuple[jax.Array, Self]:
        refuse_shards(
            "predsim compares all examples of a batch, of which a device sees its own part alone. Shard the arrays "
            "under jit instead, where they are one batch, or take jaxfa.local_classifier."
        )
        if e[..., 0].size < 2:
            raise ValueError(
                "predsim compares the examples of a batch, and got one error alone. Give the model a batch; vmap over "
                "seeds or layers, not over examples; or take jaxfa.local_classifier."
            )
        return super().learn(h, e)

    def loss(self, h: jax.Array, y: jax.Array, c: jax.Array) -> jax.Array:
        predicted = cross_entropy(affine(features(h, self.sides), self.w, self.b), y, c)
        apart = similarity(self._mapped(h)) - similarity(y.reshape(-1, y.shape[-1]))
        # A pair counts as its examples do: of a mean over N, 1 / N^2.
        c, total = c.reshape(-1), c.sum()
        pairs = c[:, None] * c[None] / jnp.where(total == 0, 1, total)
        return (1 - self.beta) * predicted + self.beta * jnp.sum(pairs * jnp.square(apart))

    def _mapped(self, h: jax.Array) -> jax.Array:
        """One vector for each example."""
        spatial = len(self.sides)
        h = h.reshape(-1, *h.shape[h.ndim - 1 - spatial :])
        if not spatial:
            return h @ self.s
        axes = string.digits[:spatial]
        h = lax.conv_general_dilated(
            h, self.s.astype(h.dtype), (1,) * spatial, "SAME", dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C")
        )
        pixels = h.reshape(h.shape[0], -1, h.shape[-1])
        # As in the code: too few channels to compare, or one pixel, are taken as they are.
        return deviation(pixels) if pixels.shape[2] > 3 and pixels.shape[1] > 1 else pixels.reshape(len(pixels), -1)


def similarity(z: jax.Array) -> jax.Array:
    """The cosines of all pairs of rows, each centred; of a row that is constant they are zero."""
    z = z - z.mean(1, keepdims=True)
    squares = jnp.sum(jnp.square(z), 1, keepdims=True)
    z = jnp.where(squares > 0, z / (1e-8 + jnp.sqrt(jnp.where(squares > 0, squares, 1))), 0)
    return jnp.clip(z @ z.T, -1, 1)


def deviation(pixels: jax.Array) -> jax.Array:
    """The standard deviations over pixels, ``(N, P, n)`` to ``(N, n)``; of a channel that is constant, zero."""
    variance = pixels.var(1, ddof=1)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def predsim(*, beta: float = 0.99, pooled: int = 4096, learning_rate: float = 5e-4) -> DirectRule:
    """PredSim: ``dh = dL / dh`` with ``L = (1 - beta) CE(pool(h) w + b, y) + beta |S(s h) - S(y)|^2 / N^2``.

    For classification by softmax cross-entropy with hard labels, a mean, a sum or weighted: the output error tells the
    targets, and examples count as they do there. Any other loss is refused, under ``jit`` by gradients that are NaN.
    What is above the last tap learns from the loss itself.

    Args:
      beta: the similarity's part: 0 is prediction alone, 1 similarity matching alone.
      pooled: how many features the classifier reads at most: a larger map is halved, axis after axis, by means.
      learning_rate: of the heads' Adam; the paper's is that of the network.

    Returns:
      A :class:`jaxfa.DirectRule`.

    Raises:
      ValueError: if ``beta`` is not in [0, 1] or ``pooled`` not positive; by the backward pass, if the error does not
        tell the targets, if there is one example alone, or in a ``shard_map``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> h, logits = jnp.ones((5, 8, 8, 4)), jnp.ones((5, 10))
      >>> feedback = jaxfa.predsim(pooled=64).init(jax.random.key(0), h, logits)
      >>> feedback.w.shape, feedback.s.shape
      ((64, 10), (3, 3, 4, 4))

    Source: Nokland, Eidnes, "Training Neural Networks with Local Error Signals", 2019, https://arxiv.org/abs/1901.06656
    """
    if not 0 <= beta <= 1 or pooled < 1:
        raise ValueError(f"predsim needs beta in [0, 1] and pooled >= 1, got {beta} and {pooled}.")

    def init(key: jax.Array, h: Any, logits: Any) -> PredSimHeads:
        *axes, channels = own_axes(h, logits)
        sides = halved(tuple(axes), channels, pooled)
        w, b = classifier(key, pooled_size(sides, channels), h, logits, initializers.zeros)
        # PyTorch's own distribution: uniform on +-1/sqrt(fan-in).
        draw = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        s = draw(key, (*(3 for _ in axes), channels, channels), w.dtype)
        return PredSimHeads(w, b, s, sides, beta)

    return DirectRule(init, transform=optax.adam(learning_rate))


def halved(axes: tuple[int, ...], channels: int, most: int) -> tuple[int, ...]:
    """The sides of a map whose axes are halved in turn, rounded up, until it has no more features than that."""
    sides, halvings = list(axes), [0] * len(axes)
    for axis in itertools.cycle(range(len(axes))):
        if pooled_size(tuple(sides), channels) <= most or max(sides) == 1:
            break
        halvings[axis] += 1
        sides[axis] = -(-axes[axis] // 2 ** halvings[axis])
    return tuple(sides)
