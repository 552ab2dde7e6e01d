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
from jaxfa.rules.shared.targets import check_examples, examples_in


@feedback_dataclass
class LocalClassifier(LocalLoss):
    """A linear classifier on one layer's pooled activation.

    Attributes:
      w: its weights, ``(features, C)``.
      b: its biases, ``(C,)``.
      sides: how many windows are left of each axis of pixels.
      examples: how many the loss averages over; None is as many as the error has.
    """

    w: jax.Array
    b: jax.Array
    sides: tuple[int, ...] = field(metadata={"static": True})
    examples: float | None = field(default=None, metadata={"static": True})

    def examples_in(self, h: jax.Array, e: jax.Array) -> float:
        return examples_in(h, e, self.examples, "local_classifier")

    def loss(self, h: jax.Array, y: jax.Array, examples: float) -> jax.Array:
        return cross_entropy(affine(features(h, self.sides), self.w, self.b), y, examples)


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
    examples: float | None = None,
    distribution: Initializer | None = None,
) -> DirectRule:
    """A classifier for each layer: ``dh_l = d CE(pool(h_l) w_l + b_l, y) / d h_l``, and ``w_l, b_l`` learn the same.

    For classification by softmax cross-entropy with hard labels, averaged over the batch: the target is where the
    output error is negative. Any other loss is refused, under ``jit`` by gradients that are NaN. What is above the last
    tap learns from the loss itself.

    Args:
      pool: into how many windows, on each axis of pixels or tokens, the activation is averaged: 1 is its mean.
      fixed: whether the classifiers keep their random weights (Mostafa 2018).
      learning_rate: of the classifiers' Adam; ours.
      examples: ``N``, by which the loss divides its sum over the examples, as for :func:`jaxfa.drtp`; None is the
        number in the array.
      distribution: an initializer ``(key, shape, dtype) -> w``; LeCun's normal one by default.

    Returns:
      A :class:`jaxfa.DirectRule`.

    Raises:
      ValueError: if an argument is out of range; by the backward pass, if the error does not tell the targets.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, h, e = jaxfa.local_classifier(pool=2), jnp.ones((1, 8, 8, 4)), jnp.array([[0.1, -0.3, 0.2]])
      >>> feedback = rule.init(jax.random.key(0), h, e)
      >>> feedback.w.shape, feedback.deliver(h, e).shape
      ((16, 3), (1, 8, 8, 4))

    Source: Mostafa, Ramesh, Cauwenberghs, "Deep Supervised Learning Using Local Errors", 2018,
    https://doi.org/10.3389/fnins.2018.00608
    """
    check_examples(examples, "local_classifier")
    if pool < 1:
        raise ValueError(f"local_classifier needs pool >= 1, how many windows are left of an axis; got {pool}.")

    def init(key: jax.Array, h: Any, logits: Any) -> LocalClassifier:
        *axes, channels = own_axes(h, logits)
        sides = tuple(min(pool, size) for size in axes)
        w, b = classifier(key, pooled_size(sides, channels), h, logits, distribution)
        return (FixedClassifier if fixed else LocalClassifier)(w, b, sides, examples)

    return DirectRule(init, transform=None if fixed else optax.adam(learning_rate))
