"""Direct random target projection: a layer learns from the target alone, before the output is known.

Frenkel, Lefebvre, Bol, "Learning Without Feedback: Fixed Random Learning Signals Allow for Feedforward Training of Deep
Neural Networks", 2021, https://arxiv.org/abs/1909.01311
"""

from dataclasses import field
from typing import Any

import jax
from jax.nn import initializers

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass
from jaxfa.rules.shared.projection import direct_matrix, project
from jaxfa.rules.shared.targets import check_examples, examples_in, signed_targets


@feedback_dataclass
class TargetProjection(DirectFeedback):
    """A fixed matrix from the classes to one layer, driven by the target instead of the error.

    Attributes:
      b: feedback weights, the layer's own axes then the outputs'.
      examples: how many the loss averages over; None is as many as the error has.
    """

    b: jax.Array
    examples: float | None = field(default=None, metadata={"static": True})

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        # With a softmax or sigmoid output e = prediction - target is negative exactly where the target is one: the
        # sign of the error is known from the label, which is the paper's argument. (A target fitted to the last bit
        # has e = 0 and teaches nothing.) The signs do not tell by what the loss was divided.
        examples = examples_in(h, e, self.examples, "drtp")
        return project(self.b, h, -signed_targets(e, examples).astype(e.dtype) / examples)


def drtp(*, examples: float | None = None, distribution: Initializer | None = None, scale: float = 1.0) -> DirectRule:
    """Direct random target projection: ``dh_l = -y* B_l^T / N`` with the one-hot target ``y*``.

    For classification by cross-entropy of one softmax, or of sigmoids, with hard targets (no label smoothing, no mixing
    of examples): the target is read off the error's sign, which is the same whatever the loss is multiplied by. So the
    loss must be the mean over the examples in the array at hand, or ``examples`` must say what it is. What the error
    shows to be a sum, or of soft labels, is refused, under ``jit`` by gradients that are NaN.

    Args:
      examples: ``N``, by which the loss divides its sum over the examples, or tokens: 1 for a sum; under ``shard_map``,
        where it must be given, those of all devices if ``pmean`` is in the loss. None is the number in the array.
      distribution: an initializer ``(key, shape, dtype) -> B`` for shape ``(n, C)``; by default uniform on
        +-sqrt(6 / n) (He's), as in the paper's code.
      scale: factor on the drawn matrix.

    Returns:
      A :class:`jaxfa.DirectRule`.

    Raises:
      ValueError: if ``examples`` is not positive; by the backward pass, under ``shard_map`` without ``examples``, and
        if the error does not tell the targets.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> h, e = jnp.ones((1, 4)), jnp.array([[0.1, -0.3, 0.2]])
      >>> feedback = jaxfa.drtp().init(jax.random.key(0), h, e)
      >>> bool(jnp.allclose(feedback.deliver(h, e)[0], -feedback.b[:, 1]))
      True

    Source: Frenkel, Lefebvre, Bol, "Learning Without Feedback", 2021, https://arxiv.org/abs/1909.01311
    """
    check_examples(examples, "drtp")
    draw = distribution or initializers.he_uniform()

    def init(key: jax.Array, h: Any, logits: Any) -> TargetProjection:
        return TargetProjection(scale * direct_matrix(key, draw, h, logits), examples)

    return DirectRule(init)
