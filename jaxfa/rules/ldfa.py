"""Low-dimensional feedback: ``b = q p^T`` in the place of ``w``, so that an error of ``m`` numbers goes back as ``r``.

Hanut, Kadmon, "Training Large Neural Networks With Low-Dimensional Error Feedback", 2025,
https://arxiv.org/abs/2502.20580, whose vectors are columns: its ``P`` is our ``p^T``, its ``W`` our ``w^T``.
"""

from dataclasses import field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxfa.base import Initializer, Layer, LayerFeedback, LayerRule, Operation, is_layer, register, transpose
from jaxfa.rules.shared.lowrank import (
    Rank,
    check_outputs_last,
    check_rank,
    factors_learn,
    globs_of,
    is_at,
    oja,
    orthonormal,
    rank_at,
)


@register
class LowRank(LayerFeedback):
    """A fixed matrix of rank ``r`` in the place of the weights, kept and used as its two factors.

    Attributes:
      p: from the error, ``(m, r)``.
      q: to the input, as ``w`` with ``r`` outputs: ``(n, r)``, for a convolution HWIr.
    """

    p: jax.Array
    q: jax.Array

    def matrix(self, w: jax.Array) -> jax.Array:
        """The product that no backward pass forms; to compare it with the weights."""
        return jnp.tensordot(self.q, self.p.astype(w.dtype), (-1, -1))

    def transport(self, op: Operation, x: jax.Array, w: jax.Array, delta: jax.Array) -> jax.Array:
        check_outputs_last(op, x, w, self.q, delta)
        thin = jnp.tensordot(delta, self.p.astype(delta.dtype), 1)
        # A convolution's p is a 1x1 projection of the channels, and q keeps the window, the stride and the padding.
        return transpose(lambda x: op(x, self.q.astype(w.dtype)), x, thin)


@register
class LearnedLowRank(LowRank):
    """The same with factors that learn from what passes: ``p`` by Oja's rule, ``q`` by Hebb's.

    Attributes:
      learn_p: whether ``p`` learns.
      learn_q: whether ``q`` learns.
      labels: whether ``p`` learns from the labels in the place of the error.
    """

    learn_p: bool = field(default=True, metadata={"static": True})
    learn_q: bool = field(default=True, metadata={"static": True})
    labels: bool = field(default=False, metadata={"static": True})

    def signal(self, x: jax.Array, w: jax.Array, delta: jax.Array, dw: jax.Array) -> "LearnedLowRank":
        # softmax - onehot is negative at the label alone.
        target = (delta < 0) if self.labels else delta
        dp = -oja(self.p, target) if self.learn_p else jnp.zeros_like(self.p)
        # Hebb's x^T (delta p) is dw p, since op is linear in w: no second pass over the batch.
        dq = jnp.tensordot(dw, self.p.astype(dw.dtype), 1) if self.learn_q else jnp.zeros_like(self.q)
        return replace(self, p=dp, q=dq)


@register
class TransportedLowRank(LowRank):
    """The same with factors that ``refine`` fits to the weights themselves: weight transport, under its own name."""


def ldfa(
    rank: Rank,
    *,
    learn_p: bool = True,
    learn_q: bool = True,
    labels: str | None = None,
    learning_rate: float = 0.03,
    weight_decay: float = 1e-3,
    distribution: Initializer | None = None,
    scale: float = 1.0,
) -> LayerRule:
    """Low-dimensional feedback, layer by layer: ``dx = (delta p) q^T``, never more than ``r`` numbers wide.

    Oja's rule turns the projection to the error's principal subspace, ``dp = eta (1 - p p^T) C p``; Hebb's rule makes
    ``q`` follow the weights, ``dq = u p - lambda q`` beside ``dw = u - lambda w`` with the same step ``u``, so that
    under SGD with a ``p`` that stands still ``q - w p`` shrinks by ``1 - lambda`` a step. Together they tend to
    backpropagation with the error projected on its own ``r`` principal directions. Four variants:

    - Hebbian, the default: ``p`` and ``q`` learn;
    - local: ``learn_q=False``, ``q`` stays random;
    - ``learn_p=False``: ``q`` follows the weights behind a random projection;
    - fixed: ``learn_p=False, learn_q=False``, feedback alignment of low rank, which gets stuck where ``r`` is below the
      dimension of the task.

    ``C`` is the batch's centred covariance divided by its trace. So the signal has no scale, and a ``p`` used once a
    step converges under plain SGD for every ``eta < 1``, the stability bound being ``eta lambda_max(C) < 1``. Signals
    add up over uses, each with its own covariance: for a layer used ``u`` times a step, as a recurrent one over time,
    the bound is ``1 / u``, so divide ``learning_rate`` by ``u``. Where ``r`` is small, ``p`` must also turn
    slower than ``q`` follows, which takes about ``1 / lambda`` steps. A whole batch is needed: one example has no
    covariance, so that this raises under ``vmap`` over examples, not seeds, and under ``shard_map``, not on arrays that
    are sharded under ``jit``.

    ``q``'s law needs steps that are linear in the gradient. Adam's step of ``dw p`` is not its step of ``dw`` times
    ``p``, so that under Adam ``q`` follows roughly; clipping belongs around :func:`jaxfa.optimizer`, not inside.

    ``p`` starts as a random orthonormal projection and ``q`` as ``b p`` with a random ``b`` like feedback alignment's,
    so that training starts as feedback alignment through ``r`` dimensions of the error. The paper's code starts both
    as PyTorch's layers do, divides the error by its largest unit's deviation, sums over the batch and leaves the step's
    size to Adam.

    Args:
      rank: ``r``; a whole number, a fraction of each layer's outputs in (0, 1] (``1.0`` is all of them, ``1`` is
        one), or either of these by globs of layer paths, such as ``{"head": 10, "*": 0.25}``, of which the first that
        matches counts. Never more than a layer's inputs or outputs.
      learn_p: whether ``p`` learns.
      learn_q: whether ``q`` learns. The rule then decays the weights, too.
      labels: a glob of the layers whose ``p`` learns from the labels in the place of the error: the last one, as in
        the paper's code. It takes them from the signs of softmax cross-entropy's error, so they must be hard; an
        example that is learned to the last bit, whose error is zero, counts as one without a label.
      learning_rate: ``eta`` of ``p``; ours. In wide layers with batch normalisation .5 was better (CIFAR-10, on the
        validation split); in narrow ones without, at a rank below the number of classes, .1 was far worse.
      weight_decay: ``lambda`` of ``q`` and the weights, per step, not multiplied by a learning rate.
      distribution: an initializer ``(key, shape, dtype) -> b`` for the shape of ``w``; Glorot's uniform by default.
      scale: factor on the drawn ``b``.

    Returns:
      A :class:`jaxfa.LayerRule`.

    Raises:
      ValueError: if the rank is none, or ``weight_decay`` is not in [0, 1).

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
        n, m = w.size // w.shape[-1], w.shape[-1]
        p = orthonormal(p_key, (m, rank_at(rank, path, n, m)), w.dtype)
        q = jnp.tensordot(scale * draw(q_key, w.shape, w.dtype), p.astype(w.dtype), 1)
        if not (learn_p or learn_q):
            return LowRank(p, q)
        return LearnedLowRank(p, q, learn_p, learn_q, labels is not None and is_at(path, labels))

    def shape(feedback: LowRank) -> tuple[int, ...]:
        return (*feedback.q.shape[:-1], feedback.p.shape[-2])

    transform = factors_learn(learn_p, learn_q, learning_rate, weight_decay, shape)
    return LayerRule(init, transform=transform, globs=globs_of(rank, labels))


def normative_ldfa(rank: Rank, *, learning_rate: float = 1.0) -> LayerRule:
    """Low-dimensional feedback whose factors are fitted to the weights, ``min |q p^T - w|_F^2``: weight transport.

    This is what the paper's vision transformers were trained with; it shows what rank ``r`` can do at best, not what a
    local rule finds. Before each step ``refine`` moves each factor down the gradient of half that distance, the other
    held, divided by the other's Gram matrix: ``q <- q - eta (q p^T - w) p (p^T p)^-1``. So a rate from 0 to 1 never
    increases the distance, whatever the weights' size; 1 is alternating least squares. The factors start from the
    weights' singular value decomposition, which solves the problem. On a CPU do not ``vmap`` it over seeds: of jaxlib
    0.10's batched decompositions two at once can wait for each other for ever.

    Args:
      rank: as for :func:`ldfa`.
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

    Source: as :func:`ldfa`; the preconditioned step is from Tong, Ma, Chi, "Accelerating Ill-Conditioned Low-Rank
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
