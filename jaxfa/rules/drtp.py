"""Direct random target projection: a layer learns from the target alone, before the output is known.

Frenkel, Lefebvre, Bol, "Learning Without Feedback: Fixed Random Learning Signals Allow for Feedforward Training of Deep
Neural Networks", 2021, https://arxiv.org/abs/1909.01311
"""

from typing import Any

import jax
from jax.nn import initializers

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass
from jaxfa.rules.shared.projection import direct_matrix, project
from jaxfa.rules.shared.targets import check_targets, sigmoid_targets, softmax_targets


@feedback_dataclass
class TargetProjection(DirectFeedback):
    """A fixed matrix from the classes to one layer, driven by the target instead of the error.

    Attributes:
      b: feedback weights, the layer's own axes then the outputs'.
    """

    b: jax.Array
    reads = staticmethod(softmax_targets)

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return project(self.b, h, check_targets(e))


@feedback_dataclass
class LabelsProjection(TargetProjection):
    """The same of sigmoids, each of which has a label of its own."""

    reads = staticmethod(sigmoid_targets)


def drtp(*, sigmoid: bool = False, distribution: Initializer | None = None, scale: float = 1.0) -> DirectRule:
    """Direct random target projection: ``dh_l = -c y* B_l^T`` with the targets ``y*``; ``c`` is ``1 / N`` in a mean.

    For classification by softmax or sigmoid cross-entropy with hard targets (no label smoothing, no mixing of
    examples): of its error ``e = c (p - y*)`` one part alone is projected, which is known before the output is. An
    example counts as in the loss, a mean, a sum or weighted, also under ``shard_map``. What the error shows to be of
    soft labels, or of another loss, is refused, under ``jit`` by gradients that are NaN. An example that is fitted but
    for rounding teaches nothing.

    Args:
      sigmoid: whether the loss is a sigmoid's for each class, of which an example may have several, not one softmax's.
      distribution: an initializer ``(key, shape, dtype) -> B`` for shape ``(n, C)``; by default uniform on
        +-sqrt(6 / n) (He's), as in the paper's code.
      scale: factor on the drawn matrix.

    Returns:
      A :class:`jaxfa.DirectRule`.

    Raises:
      ValueError: by the backward pass, if the error does not tell the targets.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> h, t = jnp.ones((1, 4)), jnp.array([[0.0, -1.0, 0.0]])
      >>> feedback = jaxfa.drtp().init(jax.random.key(0), h, t)
      >>> bool(jnp.allclose(feedback.deliver(h, t)[0], -feedback.b[:, 1]))
      True

    Source: Frenkel, Lefebvre, Bol, "Learning Without Feedback", 2021, https://arxiv.org/abs/1909.01311
    """
    draw = distribution or initializers.he_uniform()

    def init(key: jax.Array, h: Any, logits: Any) -> TargetProjection:
        return (LabelsProjection if sigmoid else TargetProjection)(scale * direct_matrix(key, draw, h, logits))

    return DirectRule(init)
