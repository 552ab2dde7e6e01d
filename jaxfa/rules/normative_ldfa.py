"""Low-dimensional feedback fitted to the weights themselves: weight transport, a bound for what a local rule finds.

Hanut, Kadmon, "Training Large Neural Networks With Low-Dimensional Error Feedback", 2025,
https://arxiv.org/abs/2502.20580; the preconditioned step is from Tong, Ma, Chi, "Accelerating Ill-Conditioned Low-Rank
Matrix Estimation via Scaled Gradient Descent", 2021, https://arxiv.org/abs/2005.08898
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.base import Layer, LayerRule, feedback_dataclass, is_layer
from jaxfa.rules.shared.lowrank import LowRank, Rank, check_rank, globs_of, rank_at


@feedback_dataclass
class TransportedLowRank(LowRank):
    """The same with factors that ``refine`` fits to the weights themselves: weight transport, under its own name."""


def normative_ldfa(rank: Rank, *, learning_rate: float = 1.0) -> LayerRule:
    """Low-dimensional feedback whose factors are fitted to the weights, ``min |q p^T - w|_F^2``: weight transport.

    This is what the paper's vision transformers were trained with; it shows what rank ``r`` can do at best, not what a
    local rule finds. Before each step ``refine`` moves each factor down the gradient of half that distance, the other
    held, divided by the other's Gram matrix: ``q <- q - eta (q p^T - w) p (p^T p)^-1``. So a rate from 0 to 1 never
    increases the distance, whatever the weights' size; 1 is alternating least squares. The factors start from the
    weights' singular value decomposition, which solves the problem. On a CPU do not ``vmap`` it over seeds: two of
    jaxlib 0.10's batched decompositions can wait for each other for ever.

    Args:
      rank: as for :func:`jaxfa.ldfa`.
      learning_rate: ``eta``. The paper's code runs Adam and factorises anew twice an epoch.

    Returns:
      A :class:`jaxfa.LayerRule` whose ``refine`` must run to follow the weights.

    Raises:
      ValueError: if the rank is none, or ``learning_rate`` is not in (0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, w = jaxfa.normative_ldfa(2), jnp.eye(4, 3)
      >>> feedback = rule.init(jax.random.key(0), w)
      >>> bool(jnp.allclose(feedback.matrix(w).sum(), 2))
      True

    Source: as :func:`jaxfa.ldfa`; the preconditioned step is from Tong, Ma, Chi, "Accelerating Ill-Conditioned Low-Rank
    Matrix Estimation via Scaled Gradient Descent", 2021, https://arxiv.org/abs/2005.08898
    """
    check_rank(rank)
    if not 0.0 < learning_rate <= 1.0:
        raise ValueError(f"normative_ldfa needs a learning_rate in (0, 1], got {learning_rate}.")

    def init(key: jax.Array, w: jax.Array, *, path: str = "") -> TransportedLowRank:
        n, m = w.size // w.shape[-1], w.shape[-1]
        r = rank_at(rank, path, n, m)
        wide = jnp.promote_types(w.dtype, jnp.float32)
        u, s, vt = jnp.linalg.svd(w.reshape(n, m).astype(wide), full_matrices=False)
        # All of the size is in q: from p = q = 0, as for weights of zero, no gradient leads anywhere.
        q = (u[:, :r] * jnp.expand_dims(s[:r], 0)).reshape(*w.shape[:-1], r)
        return TransportedLowRank(vt[:r].T, q)

    def fit(layer: Layer, feedback: TransportedLowRank) -> TransportedLowRank:
        p, stack = feedback.p, feedback.p.shape[:-2]  # layers stacked by nnx.vmap are fitted side by side
        w = layer.w.reshape(*stack, -1, layer.w.shape[-1]).astype(p.dtype)
        q = feedback.q.reshape(*stack, -1, p.shape[-1])
        q = q - learning_rate * _divided(q @ (p.mT @ p) - w @ p, p)
        p = p - learning_rate * _divided(p @ (q.mT @ q) - w.mT @ q, q)
        return TransportedLowRank(p, q.reshape(feedback.q.shape))

    def refine(forward: Any, feedback: Any, key: jax.Array) -> Any:
        return jax.tree.map(fit, forward, feedback, is_leaf=is_layer)

    return LayerRule(init, refine, globs=globs_of(rank))


def _divided(a: jax.Array, factor: jax.Array) -> jax.Array:
    """``a (F^T F)^-1``, with a ridge below rounding for factors that have lost rank."""
    gram = factor.mT @ factor
    trace = jnp.trace(gram, axis1=-2, axis2=-1)
    ridge = jnp.finfo(gram.dtype).eps * trace + jnp.finfo(gram.dtype).tiny
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return jnp.linalg.solve(gram + ridge[..., None, None] * identity, a.mT).mT
