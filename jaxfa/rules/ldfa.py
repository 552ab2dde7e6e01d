"""Low-dimensional feedback: ``b = q p^T`` in the place of ``w``, so that an error of ``m`` numbers goes back as ``r``.

Hanut, Kadmon, "Training Large Neural Networks With Low-Dimensional Error Feedback", 2025,
https://arxiv.org/abs/2502.20580, whose vectors are columns: its ``P`` is our ``p^T``, its ``W`` our ``w^T``.

Four variants: Hebbian, in which ``p`` and ``q`` learn; local, ``learn_q=False``, in which ``q`` stays random;
``learn_p=False``, in which ``q`` follows the weights behind a random projection; and fixed, with neither, feedback
alignment of low rank, which gets stuck where ``r`` is below the dimension of the task. The Hebbian one tends to
backpropagation with the error projected on its own ``r`` principal directions.

Oja's rule divides the batch's covariance by its trace. So the signal has no scale, and a ``p`` used once a step
converges under plain SGD for every ``eta < 1``. Signals add up over uses, each with its own covariance: for a layer
used ``u`` times a step, as a recurrent one over time, the bound is ``1 / u``. Where ``r`` is small, ``p`` must also
turn slower than ``q`` follows, which takes about ``1 / lambda`` steps. One example has no covariance, so that the rule
raises under ``vmap`` over examples, not seeds, and under ``shard_map``, not on arrays that are sharded under ``jit``.

``q``'s law needs steps that are linear in the gradient. Adam's step of ``dw p`` is not its step of ``dw`` times ``p``,
so that under Adam ``q`` follows roughly; clipping belongs around :func:`jaxfa.optimizer`, not inside. The paper's code
starts both factors as PyTorch's layers do, divides the error by its largest unit's deviation, sums over the batch and
leaves the step's size to Adam.
"""

from collections.abc import Callable
from dataclasses import field, replace

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxfa.base import Initializer, LayerRule, Operation, feedback_dataclass, transpose
from jaxfa.factored.manifold import random_orthonormal
from jaxfa.rules.shared.lowrank import (
    LowRank,
    Rank,
    check_rank,
    factors_learn,
    globs_of,
    is_at,
    oja,
    rank_at,
)
from jaxfa.rules.shared.topography import keep_zeros


@feedback_dataclass
class LearnedLowRank(LowRank):
    """The same with factors that learn from what passes: ``p`` by Oja's rule, ``q`` by Hebb's.

    Attributes:
      learn_p: whether ``p`` learns.
      learn_q: whether ``q`` learns.
      labels: whether ``p`` learns from the labels in the place of the error.
      structured: whether what is zero in a factor stays so.
    """

    learn_p: bool = field(default=True, metadata={"static": True})
    learn_q: bool = field(default=True, metadata={"static": True})
    labels: bool = field(default=False, metadata={"static": True})
    structured: bool = field(default=False, metadata={"static": True})

    @property
    def projects(self) -> bool:
        return self.learn_p and not self.labels

    def signal(self, x: jax.Array, w: jax.Array, delta: jax.Array, dw: jax.Array) -> "LearnedLowRank":
        # Hebb's x^T (delta p) is dw p, since op is linear in w: no second pass over the batch.
        return self._signal(delta, lambda p: jnp.tensordot(dw, p, 1))

    def learn(
        self, op: Operation, x: jax.Array, w: jax.Array, delta: jax.Array, dw: jax.Array
    ) -> tuple[jax.Array, "LearnedLowRank"]:
        if delta.size // delta.shape[-1] >= delta.shape[-1]:
            return super().learn(op, x, w, delta, dw)

        # Where there are fewer errors than units, a second pass is the smaller product: delta p is there already.
        def hebb(p: jax.Array) -> jax.Array:
            return transpose(lambda q: op(x, q), self.q.astype(w.dtype), jnp.tensordot(delta, p, 1))

        return self.transport(op, x, w, delta), self._signal(delta, hebb)

    def _signal(self, delta: jax.Array, hebb: Callable[[jax.Array], jax.Array]) -> "LearnedLowRank":
        # softmax - onehot is negative at the label alone.
        target = (delta < 0) if self.labels else delta
        dp = -oja(self.p, target) if self.learn_p else jnp.zeros_like(self.p)
        dq = hebb(self.p.astype(delta.dtype)) if self.learn_q else jnp.zeros_like(self.q)
        if self.structured:
            dp, dq = keep_zeros(self.p, dp), keep_zeros(self.q, dq)
        return replace(self, p=dp, q=dq)


def ldfa(
    rank: Rank,
    *,
    learn_p: bool = True,
    learn_q: bool = True,
    labels: str | None = None,
    learning_rate: float = 0.03,
    weight_decay: float = 1e-3,
    distribution: Initializer | None = None,
    projection: Initializer | None = None,
    structured: bool = False,
    scale: float = 1.0,
) -> LayerRule:
    """Low-dimensional feedback, layer by layer: ``dx = (delta p) q^T``, in which ``r`` numbers stand for an error.

    Oja's rule turns ``p`` to the error's principal subspace, ``dp = eta (1 - p p^T) C p`` with the batch's covariance
    ``C``. Hebb's rule makes ``q`` follow the weights, ``dq = u p - lambda q`` beside ``dw = u - lambda w`` with the
    same step ``u``, so that ``q - w p`` shrinks by ``1 - lambda`` a step. ``p`` starts as a random orthonormal
    projection, ``q`` as ``b p`` with a random ``b`` like feedback alignment's. For limits see the module.

    Args:
      rank: ``r``; a whole number, a fraction of each layer's outputs in (0, 1], or either by globs of layer paths, such
        as ``{"head": 10, "*": 0.25}``, the first that matches.
      learn_p: whether ``p`` learns.
      learn_q: whether ``q`` learns. The rule then decays the weights, too.
      labels: a glob of the layers whose ``p`` learns from the labels, in the paper's code the last one: the signs of
        softmax cross-entropy's error tell them if they are hard.
      learning_rate: ``eta`` of ``p``; ours.
      weight_decay: ``lambda`` of ``q`` and the weights, per step, not multiplied by a learning rate.
      distribution: an initializer ``(key, shape, dtype) -> b`` for the shape of ``w``; Glorot's uniform by default.
      projection: the same for ``p``; a random orthonormal one by default. See :func:`jaxfa.rules.topographic`.
      structured: whether what is zero in ``p`` or ``q`` at the start stays so.
      scale: factor on the drawn ``b``.

    Returns:
      A :class:`jaxfa.LayerRule`.

    Raises:
      ValueError: if the rank is none, or ``weight_decay`` is not in [0, 1); by the backward, for one example.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> feedback = jaxfa.ldfa(4).init(jax.random.key(0), jnp.ones((3, 3, 16, 32)))
      >>> feedback.p.shape, feedback.q.shape
      ((32, 4), (3, 3, 16, 4))

    Source: Hanut, Kadmon, "Training Large Neural Networks With Low-Dimensional Error Feedback", 2025,
    https://arxiv.org/abs/2502.20580
    """
    check_rank(rank)
    draw = distribution or initializers.glorot_uniform()

    def init(key: jax.Array, w: jax.Array, *, path: str = "") -> LowRank:
        p_key, q_key = jax.random.split(key)
        n, m, kind = w.size // w.shape[-1], w.shape[-1], jnp.promote_types(w.dtype, jnp.float32)
        p = (projection or random_orthonormal)(p_key, (m, rank_at(rank, path, n, m)), kind)
        q = jnp.tensordot(scale * draw(q_key, w.shape, w.dtype), p.astype(w.dtype), 1)
        # A square orthonormal p spans all there is: Oja's step is zero, and none is taken.
        turns = learn_p and (projection is not None or p.shape[1] < m)
        if not (turns or learn_q):
            return LowRank(p, q)
        return LearnedLowRank(p, q, turns, learn_q, labels is not None and is_at(path, labels), structured)

    def shape(feedback: LowRank) -> tuple[int, ...]:
        return (*feedback.q.shape[:-1], feedback.p.shape[-2])

    transform = factors_learn(learn_p, learn_q, learning_rate, weight_decay, shape)
    return LayerRule(init, transform=transform, globs=globs_of(rank, labels))
