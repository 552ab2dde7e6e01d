"""FDFA: direct feedback that is a running mean of the Jacobian's estimates, GrAPE's ancestor.

Bacho, Chu, "Low-variance Forward Gradients using Direct Feedback Alignment and momentum", 2024,
https://arxiv.org/abs/2212.07282
"""

import jax

from jaxfa.base import DirectRule, Initializer
from jaxfa.rules.shared.jacobian import JacobianFeedback, jacobian_rule
from jaxfa.rules.shared.noise import random_signs


def fdfa(
    *,
    learning_rate: float = 0.03,
    tile: int | None = None,
    perturbation: Initializer = random_signs,
    scaling: float = 0.0,
    separate: bool = False,
) -> DirectRule:
    """Forward direct feedback: ``dh_l = e B_l^T`` with ``B_l`` the running mean of the Jacobian's estimates.

    GrAPE's ancestor: ``B_l <- B_l - eta (B_l - <p_l y'^T>)`` with the same perturbations. It keeps the Jacobian's size
    beside its direction. ``B`` starts at zero, so that the hidden layers stand still at first.

    Args:
      learning_rate: ``eta``, how far one batch moves ``B``; ours.
      tile: as for :func:`jaxfa.grape`.
      perturbation: as for :func:`jaxfa.grape`.
      scaling: as for :func:`jaxfa.grape`, but by default 0, the paper's.
      separate: as for :func:`jaxfa.grape`.

    Returns:
      A :class:`jaxfa.DirectRule` whose ``refine`` must run to learn.

    Raises:
      ValueError: as for :func:`jaxfa.grape`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, h = jaxfa.fdfa(learning_rate=1.0), jnp.ones((9999, 1))
      >>> feedback = [rule.init(jax.random.key(0), h, h)]
      >>> (feedback,) = rule.refine(lambda taps: 3 * (h + taps[0]), feedback, jax.random.key(1))
      >>> 2.8 < float(feedback.b[0, 0]) < 3.2
      True

    Source: Bacho, Chu, "Low-variance Forward Gradients using Direct Feedback Alignment and momentum", 2024,
    https://arxiv.org/abs/2212.07282
    """

    def follow(feedback: JacobianFeedback, estimate: jax.Array) -> jax.Array:
        return feedback.b + learning_rate * (estimate - feedback.b)

    return jacobian_rule(
        "fdfa",
        follow,
        jax.nn.initializers.zeros,
        tile=tile,
        perturbation=perturbation,
        separate=separate,
        scaling=scaling,
    )
