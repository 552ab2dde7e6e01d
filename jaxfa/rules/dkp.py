"""Direct Kolen-Pollack: direct feedback that learns from the product of its layer's activity and the output error.

Webster, Choi, Ahn, "Learning the Connections in Direct Feedback Alignment", 2020,
https://openreview.net/forum?id=zgGmAx9ZcY
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.nn import initializers

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass
from jaxfa.rules.shared.projection import direct_matrix, project, shared_axes


@feedback_dataclass
class DirectKolenPollackFeedback(DirectFeedback):
    """A matrix from the outputs to one layer whose signal is ``h_l^T e``.

    Attributes:
      b: feedback weights, the layer's own axes then the outputs'.
    """

    b: jax.Array

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return project(self.b, h, e)

    def signal(self, h: jax.Array, e: jax.Array) -> "DirectKolenPollackFeedback":
        shared = tuple(range(shared_axes(h, e)))
        return DirectKolenPollackFeedback(jnp.tensordot(h, e, axes=(shared, shared)))


def dkp(
    *,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-6,
    distribution: Initializer = initializers.zeros,
    scale: float = 1.0,
) -> DirectRule:
    """Direct Kolen-Pollack: ``dh_l = e B_l^T`` and ``B_l <- B_l - eta Adam(h_l^T e + lambda B_l)``.

    For the last hidden layer the signal is the output weights' own gradient: that ``B`` learns as ``W`` does. With the
    default zero ``B`` the hidden layers stand still at the first step and start as ``B`` grows.

    Args:
      learning_rate: ``eta`` of the feedback's Adam.
      weight_decay: ``lambda``, added to the signal before Adam.
      distribution: an initializer ``(key, shape, dtype) -> B``; zero by default, as in the FDFA code.
      scale: factor on the drawn matrix.

    Returns:
      A :class:`jaxfa.DirectRule`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> feedback = jaxfa.dkp().init(jax.random.key(0), jnp.ones((5, 8)), jnp.ones((5, 10)))
      >>> feedback.signal(jnp.ones((5, 8)), jnp.ones((5, 10))).b.shape
      (8, 10)

    Source: Webster, Choi, Ahn, "Learning the Connections in Direct Feedback Alignment", 2020,
    https://openreview.net/forum?id=zgGmAx9ZcY; defaults from Bacho, Chu, "Low-variance Forward Gradients using Direct
    Feedback Alignment and momentum", 2024, https://arxiv.org/abs/2212.07282
    """

    def init(key: jax.Array, h: Any, logits: Any) -> DirectKolenPollackFeedback:
        return DirectKolenPollackFeedback(scale * direct_matrix(key, distribution, h, logits))

    tx = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))
    return DirectRule(init, transform=tx)
