"""Kolen-Pollack: feedback and weights make the same steps and both decay, so that they become one.

Kolen, Pollack, "Backpropagation without weight transport", 1994, https://doi.org/10.1109/ICNN.1994.374486; for deep
networks Akrout, Wilson, Humphreys, Lillicrap, Tweed, "Deep Learning without Weight Transport", 2019,
https://arxiv.org/abs/1904.05391
"""

import jax
from jax.nn import initializers

from jaxfa.base import Alike, Initializer, LayerFeedback, LayerRule, feedback_dataclass


@feedback_dataclass
class KolenPollackFeedback(LayerFeedback):
    """A matrix in the place of the weights whose learning signal is the weights' own gradient.

    Attributes:
      b: feedback weights, of ``w``'s shape.
    """

    b: jax.Array

    def matrix(self, w: jax.Array) -> jax.Array:
        return self.b

    def signal(self, x: jax.Array, w: jax.Array, delta: jax.Array, dw: jax.Array) -> "KolenPollackFeedback":
        return KolenPollackFeedback(dw)


def kolen_pollack(
    *, weight_decay: float = 1e-3, distribution: Initializer | None = None, scale: float = 1.0
) -> LayerRule:
    """Kolen-Pollack learning: ``w <- w + u - lambda w``, ``b <- b + u - lambda b`` with the same step ``u``.

    The difference obeys ``w - b <- (1 - lambda) (w - b)`` whatever the data, under SGD and, when both have the same
    optimizer state, under Adam. So the rule needs both to learn alike: :func:`jaxfa.optimizer` runs the parameters'
    own transformation on the feedback, in the places of its weights and under their paths, and decays both in the steps
    that it takes. Arrays of one axis, such as biases and norms, do not decay; those of stacked layers have two, and do.
    A transformation whose step depends on the parameters otherwise than linearly, such as LAMB's, breaks the law.

    Args:
      weight_decay: ``lambda``, per step, not multiplied by the learning rate. The alignment takes about ``1 / lambda``
        steps. The default is ours: the paper's was tuned per network.
      distribution: an initializer ``(key, shape, dtype) -> b``; Glorot's uniform one by default.
      scale: factor on the drawn ``b``.

    Returns:
      A :class:`jaxfa.LayerRule`.

    Raises:
      ValueError: if ``weight_decay`` is not in (0, 1).

    Example:
      >>> import optax, jaxfa
      >>> tx = jaxfa.optimizer(optax.sgd(0.1), jaxfa.kolen_pollack(weight_decay=1e-3))

    Source: Akrout et al., "Deep Learning without Weight Transport", 2019, https://arxiv.org/abs/1904.05391
    """
    if not 0.0 < weight_decay < 1.0:
        raise ValueError(
            f"kolen_pollack needs weight_decay in (0, 1): without decay w - b never shrinks; got {weight_decay}."
        )
    draw = distribution or initializers.glorot_uniform()

    def init(key: jax.Array, w: jax.Array) -> KolenPollackFeedback:
        return KolenPollackFeedback(scale * draw(key, w.shape, w.dtype))

    return LayerRule(init, transform=Alike("b", weight_decay, lambda feedback: feedback.b.shape))
