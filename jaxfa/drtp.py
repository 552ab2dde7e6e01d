"""Direct random target projection: a layer learns from the target alone, before the output is known.

Frenkel, Lefebvre, Bol, "Learning Without Feedback: Fixed Random Learning Signals Allow for Feedforward Training of Deep
Neural Networks", 2021, https://arxiv.org/abs/1909.01311
"""

import math
from typing import Any

import jax
from jax.nn import initializers

from jaxfa.base import DirectFeedback, Initializer, Rule, register
from jaxfa.projection import direct_matrix, project, shared_axes


@register
class TargetProjection(DirectFeedback):
    """A fixed matrix from the classes to one layer, driven by the target instead of the error.

    Attributes:
      b: feedback weights, the layer's own axes then the outputs'.
    """

    b: jax.Array

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        # With a softmax or sigmoid output e = prediction - target is negative exactly where the target is one: the
        # sign of the error is known from the label, which is the paper's argument. (A target fitted to the last bit
        # has e = 0 and teaches nothing.) The mean over the examples makes it commensurate with a mean loss.
        examples = math.prod(e.shape[: shared_axes(h, e)])
        target = (e < 0).astype(e.dtype) / examples
        return project(self.b, h, -target)


def drtp(*, distribution: Initializer | None = None, scale: float = 1.0) -> Rule:
    """Direct random target projection: ``dh_l = -y* B_l^T / N`` with the one-hot target ``y*``.

    For classification by softmax or sigmoid cross-entropy with hard targets (no label smoothing, no mixing of
    examples) and a mean loss: the target is read off the error's sign. Loss scaling, as in gradient accumulation, does
    not reach it: ``N`` is the number of examples in the array at hand.

    Args:
      distribution: an initializer ``(key, shape, dtype) -> B`` for shape ``(n, C)``; by default uniform on
        +-sqrt(6 / n) (He's), as in the paper's code.
      scale: factor on the drawn matrix.

    Returns:
      A direct :class:`jaxfa.Rule`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> h, e = jnp.ones((1, 4)), jnp.array([[0.1, -0.3, 0.2]])
      >>> feedback = jaxfa.drtp().init(jax.random.key(0), h, e)
      >>> bool(jnp.allclose(feedback.deliver(h, e)[0], -feedback.b[:, 1]))
      True

    Source: Frenkel, Lefebvre, Bol, "Learning Without Feedback", 2021, https://arxiv.org/abs/1909.01311
    """
    draw = distribution or initializers.he_uniform()

    def init(key: jax.Array, h: Any, logits: Any) -> TargetProjection:
        return TargetProjection(scale * direct_matrix(key, draw, h, logits))

    return Rule(init)
