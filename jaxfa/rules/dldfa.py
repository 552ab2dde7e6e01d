"""Low-dimensional direct feedback: ``B_l = q_l p_l^T``, the output's or a later layer's error through ``r`` numbers.

Hanut, Kadmon, "Training Large Neural Networks With Low-Dimensional Error Feedback", 2025,
https://arxiv.org/abs/2502.20580
"""

import math
from dataclasses import field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass
from jaxfa.factored.manifold import random_orthonormal
from jaxfa.rules.shared.lowrank import Rank, check_rank, factors_learn, globs_of, oja, rank_at
from jaxfa.rules.shared.projection import direct_matrix, project, shared_axes
from jaxfa.rules.shared.topography import keep_zeros


@feedback_dataclass
class FixedLowRankDirect(DirectFeedback):
    """A matrix of rank ``r`` from the output, or from a later layer, to one layer, kept and used as its factors.

    Attributes:
      p: from the error, its own axes then ``r``, such as ``(C, r)``.
      q: to the layer, its own axes then ``r``, such as ``(n, r)`` or ``(H, W, n, r)``.
    """

    p: jax.Array
    q: jax.Array

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return project(self.q, h, self._thin(e))

    def _thin(self, e: jax.Array) -> jax.Array:
        return jnp.tensordot(e, self.p.astype(e.dtype), self.p.ndim - 1)


@feedback_dataclass
class LowRankDirect(FixedLowRankDirect):
    """The same with factors that learn.

    Attributes:
      learn_p: whether ``p`` learns.
      learn_q: whether ``q`` learns.
      structured: whether what is zero in a factor stays so.
    """

    learn_p: bool = field(default=True, metadata={"static": True})
    learn_q: bool = field(default=True, metadata={"static": True})
    structured: bool = field(default=False, metadata={"static": True})

    def signal(self, h: jax.Array, e: jax.Array) -> "LowRankDirect":
        own = self.p.ndim - 1
        rows = e.reshape(*e.shape[: e.ndim - own], -1)
        dp = -oja(self.p.reshape(-1, self.p.shape[-1]), rows) if self.learn_p else jnp.zeros_like(self.p)
        batch = tuple(range(e.ndim - own))
        dq = jnp.tensordot(h, self._thin(e), (batch, batch)) if self.learn_q else jnp.zeros_like(self.q)
        dp = dp.reshape(self.p.shape)
        if self.structured:
            dp, dq = keep_zeros(self.p, dp), keep_zeros(self.q, dq)
        return replace(self, p=dp, q=dq)


def dldfa(
    rank: Rank,
    *,
    source: str | None = None,
    learn_p: bool = True,
    learn_q: bool = True,
    learning_rate: float = 0.03,
    weight_decay: float = 1e-3,
    distribution: Initializer | None = None,
    projection: Initializer | None = None,
    structured: bool = False,
    scale: float = 1.0,
) -> DirectRule:
    """Low-dimensional direct feedback: ``dh_l = (e p_l) q_l^T``, with both factors learned from the batch.

    ``p`` follows Oja's rule on ``e`` and ``q`` Hebb's, ``dq = -h_l^T (e p)``, by the weights' own optimizer and decay.
    So under SGD the last hidden layer's ``q`` comes to be ``w p``; the other layers' are those of direct
    Kolen-Pollack. What :func:`jaxfa.ldfa` says of rates and optimizers holds here, too. The paper's code takes ``e``
    at the last hidden layer, where it is wider than at the logits: without ``at=`` that is the path of the last layer.

    Args:
      rank: ``r``, of the error at the source: as for :func:`jaxfa.ldfa`, globs being of tapped paths.
      source: where the error is taken: None, the logits; else the path of a later module, read by
        :func:`jaxfa.nn.attach`: its input without ``at=``, its output with it. What is above it learns by
        backpropagation. Without Flax, lay a wire there: ``jaxfa.error_wire(h)``, added to that ``h``.
      learn_p: whether ``p`` learns.
      learn_q: whether ``q`` learns. The rule then decays the weights, too.
      learning_rate: ``eta`` of ``p``, stable below 1; ours.
      weight_decay: ``lambda`` of ``q`` and the weights, per step, not multiplied by a learning rate.
      distribution: an initializer ``(key, shape, dtype) -> q`` for shape ``(n, r)``; uniform on +-1/sqrt(n), as DFA's.
      projection: the same for ``p``; a random orthonormal one by default. See :func:`jaxfa.rules.topographic`.
      structured: whether what is zero in ``p`` or ``q`` at the start stays so.
      scale: factor on the drawn ``q``.

    Returns:
      A :class:`jaxfa.DirectRule`.

    Raises:
      ValueError: if the rank is none, or ``weight_decay`` is not in [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> feedback = jaxfa.dldfa(4).init(jax.random.key(0), jnp.ones((5, 8)), jnp.ones((5, 10)))
      >>> feedback.p.shape, feedback.q.shape
      ((10, 4), (8, 4))

    Source: Hanut, Kadmon, "Training Large Neural Networks With Low-Dimensional Error Feedback", 2025,
    https://arxiv.org/abs/2502.20580
    """
    check_rank(rank)
    draw = distribution or initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    def init(key: jax.Array, h: Any, logits: Any, *, path: str = "") -> FixedLowRankDirect:
        k = shared_axes(h, logits)
        own = logits.shape[k:]
        r = rank_at(rank, path, math.prod(h.shape[k:]), math.prod(own))
        p_key, q_key = jax.random.split(key)
        kind = jnp.promote_types(h.dtype, jnp.float32)
        p = (projection or random_orthonormal)(p_key, (math.prod(own), r), kind).reshape(*own, r)
        thin = jax.ShapeDtypeStruct((*logits.shape[:k], r), logits.dtype)
        q = scale * direct_matrix(q_key, draw, h, thin)
        return LowRankDirect(p, q, learn_p, learn_q, structured) if learn_p or learn_q else FixedLowRankDirect(p, q)

    transform = factors_learn(learn_p, learn_q, learning_rate, weight_decay)
    return DirectRule(init, transform=transform, source=source, globs=globs_of(rank))
