"""Local classifiers: every layer learns to make its classes linearly separable, by a classifier of its own.

Mostafa, Ramesh, Cauwenberghs, "Deep Supervised Learning Using Local Errors", 2018,
https://doi.org/10.3389/fnins.2018.00608

The paper's classifiers are random and fixed, ``local_classifier(fixed=True)``. That they learn, too, is what came after
it (Nokland, Eidnes 2019; Belilovsky, Eickenberg, Oyallon 2020).

Needs hard targets, which the output error tells. Costs one small product for each layer. Nothing is handed on from
layer to layer, in either direction, but activations; inside a tapped block of several layers errors go backward.

Activations wait for the error, so that memory grows with depth; by ``schedule=jaxfa.stacks.stream`` none beyond a block
is kept.
"""

from dataclasses import field
from typing import Any, Self

import jax
import optax

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass
from jaxfa.rules.shared.local import LocalLoss, affine, classifier, cross_entropy, features, own_axes, pooled_size


@feedback_dataclass
class LocalClassifier(LocalLoss):
    """A linear classifier on one layer's pooled activation.

    Attributes:
      w: its weights, ``(features, C)``.
      b: its biases, ``(C,)``.
      sides: how many windows are left of each axis of pixels.
    """

    w: jax.Array
    b: jax.Array
    sides: tuple[int, ...] = field(metadata={"static": True})

    def loss(self, h: jax.Array, y: jax.Array, c: jax.Array) -> jax.Array:
        return cross_entropy(affine(features(h, self.sides), self.w, self.b), y, c)


@feedback_dataclass
class FixedClassifier(LocalClassifier):
    """One that does not learn."""

    signal = DirectFeedback.signal

    def learn(self, h: jax.Array, e: jax.Array) -> tuple[jax.Array, Self]:
        return super().learn(h, e)[0], self.signal(h, e)


def local_classifier(
    *,
    pool: int = 1,
    fixed: bool = False,
    learning_rate: float = 1e-3,
    distribution: Initializer | None = None,
) -> DirectRule:
    """A classifier for each layer: ``dh_l = d CE(pool(h_l) w_l + b_l, y) / d h_l``, and ``w_l, b_l`` learn the same.

    For classification by softmax cross-entropy with hard labels, a mean, a sum or weighted: the output error tells the
    targets, and examples count as they do there. Any other loss is refused, under ``jit`` by gradients that are NaN.
    What is above the last tap learns from the loss itself.

    Args:
      pool: into how many windows, on each axis of pixels or tokens, the activation is averaged: 1 is its mean.
      fixed: whether the classifiers keep their random weights (Mostafa 2018).
      learning_rate: of the classifiers' Adam; ours.
      distribution: an initializer ``(key, shape, dtype) -> w``; LeCun's normal one by default.

    Returns:
      A :class:`jaxfa.DirectRule`.

    Raises:
      ValueError: if an argument is out of range; by the backward pass, if the error does not tell the targets.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, h, t = jaxfa.local_classifier(pool=2), jnp.ones((1, 8, 8, 4)), jnp.array([[0.0, -1.0, 0.0]])
      >>> feedback = rule.init(jax.random.key(0), h, t)
      >>> feedback.w.shape, feedback.deliver(h, t).shape
      ((16, 3), (1, 8, 8, 4))

    Source: Mostafa, Ramesh, Cauwenberghs, "Deep Supervised Learning Using Local Errors", 2018,
    https://doi.org/10.3389/fnins.2018.00608
    """
    if pool < 1:
        raise ValueError(f"local_classifier needs pool >= 1, how many windows are left of an axis; got {pool}.")

    def init(key: jax.Array, h: Any, logits: Any) -> LocalClassifier:
        *axes, channels = own_axes(h, logits)
        sides = tuple(min(pool, size) for size in axes)
        w, b = classifier(key, pooled_size(sides, channels), h, logits, distribution)
        return (FixedClassifier if fixed else LocalClassifier)(w, b, sides)

    return DirectRule(init, transform=None if fixed else optax.adam(learning_rate))
