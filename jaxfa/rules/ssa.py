"""SSA, learning in SVD space: layers kept as ``u diag(s) v^T``, factored feedback, local losses, Stiefel steps.

Roy, Apolinario, Das Biswas, Roy, "Feedback Alignment Meets Low-Rank Manifolds: A Structured Recipe for Local Learning",
2025, https://arxiv.org/abs/2510.25594, whose weights are ``(outputs, inputs)``: its ``U`` is our ``v``. Its rank falls
during training by :func:`jaxfa.factored.hoyer_penalty` and :func:`jaxfa.factored.prune`.
"""

from dataclasses import field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import initializers

from jaxfa.base import DirectFeedback, DirectRule, Layer, LayerFeedback, LayerRule, Operation, Rule, register, transpose
from jaxfa.factored.local_losses import learn_aligned, orthogonal
from jaxfa.factored.manifold import orthonormal, stiefel
from jaxfa.factored.svd import Factors, factorise, is_factors, orthonormal_factors, rank_of
from jaxfa.rules.shared.projection import direct_matrix, project


@register
class FactoredFeedback(LayerFeedback):
    """Factors in the place of the weights' factors, for an error from the layer above: ``dx = ((d b_v) * b_s) b_u^T``.

    Attributes:
      b: feedback weights, :class:`jaxfa.factored.Factors` of ``w``'s shape.
    """

    learns: ClassVar[str] = "fixed"
    b: Factors

    def matrix(self, w: Any) -> Any:
        return self.b


@register
class TransportedFactors(FactoredFeedback):
    """The same, pulled towards the weights' factors: weight transport, under its own name."""

    learns: ClassVar[str] = "from the weights"


@register
class LiftedFeedback(DirectFeedback):
    """The output error, lifted to a layer's outputs by a fixed matrix, then through the layer's feedback factors.

    Attributes:
      b: feedback weights, :class:`jaxfa.factored.Factors` of the layer's shape.
      lift: from the outputs, the layer's own axes then theirs; None for a layer as wide as they are, whose error is
        ``e`` itself.
      op: the layer's operation ``(x, w) -> y``.
    """

    learns: ClassVar[str] = "fixed"
    b: Factors
    lift: jax.Array | None
    op: Operation = field(metadata={"static": True})

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        b = self.b.astype(h.dtype)
        y = jax.eval_shape(self.op, h, b)
        delta = e if self.lift is None else project(self.lift, y, e)
        return transpose(lambda x: self.op(x, b), h, delta.astype(y.dtype))


@register
class TransportedLift(LiftedFeedback):
    """The same with factors pulled towards the weights' own: weight transport, under its own name."""

    learns: ClassVar[str] = "from the weights"


def ssa(
    *,
    parallel: bool = True,
    rank: float | None = None,
    alpha: float = 1.0,
    beta: float = 1e-3,
    gamma: float = 0.0,
    pull_weights: bool = True,
    pull_feedback: bool = False,
    project: bool = True,
    retract: bool = True,
    distribution: Any = None,
    scale: float = 1.0,
) -> Rule:
    """SSA: each layer learns its factors ``u, s, v`` from ``alpha L_CE + beta L_align + gamma L_ortho``.

    With an error ``d`` at a layer's output, ``x`` at its input, ``L_CE``'s pseudo-gradients are the true local ones,
    ``g_u = x^T (d v * s)``, ``g_s = sum (x u) * (d v)``, ``g_v = d^T (x u * s)``. The others' are exact,
    ``L_align = |u - b_u|^2 + |s - b_s|^2 + |v - b_v|^2`` and ``L_ortho = |u^T u - 1|^2 + |v^T v - 1|^2`` (Frobenius);
    :func:`jaxfa.optimizer` adds them before its optimizer and takes its steps of ``u`` and ``v`` along the Stiefel
    manifold, so that any optax optimizer will do.

    The paper does not say how the output error of ``C`` numbers gets to a layer whose feedback has the shape of its
    weights. Two readings:

    - ``parallel=True``: ``dx = lift(e) b^T``, the output error lifted by a fixed random matrix to the layer's outputs
      and returned through its feedback factors. A direct rule: no layer waits for another. Alignment makes ``b`` that
      layer's own, but not the lift those of the layers above: it is backpropagation at ``b = w`` for the last hidden
      layer alone.
    - ``parallel=False``: ``dx = d b^T``, feedback alignment through factors, layer after layer. The reading in which
      alignment leads to backpropagation.

    Nor does it say what alignment moves. Literally, the weights, towards fixed random factors: their rest is at
    ``b - g / 2 beta``, so that a large ``beta`` freezes the network there, and a small one does next to nothing: below
    .03 or so it is a few per cent of the cross-entropy's gradient along the manifold (1 to 3 % at 1e-3, in a network of
    three convolutions). ``pull_feedback`` moves the feedback towards the weights, which is weight transport, and shows
    as such in ``coverage()``; its own gradient is alignment's alone, so that under Adam, which no scale changes,
    ``beta`` is all the same to it. In the sequential reading it is what aligns all layers (35, 39 and 43 degrees from
    the true gradient in that network, direct feedback alignment 81, 85 and 92: ``experiments/ssa_alignment``).

    "Project the updates on the Stiefel manifold" can mean their tangent part alone, ``retract=False``, beside which
    ``L_ortho`` keeps the drift small, or the way back onto it, where ``L_ortho`` is zero. Gradients are projected
    before the optimizer sees them, since Adam's step of a gradient across the manifold has a part along it, and so does
    not vanish at an optimum; ``L_ortho``'s gradient, which is all across, joins them after that.

    All layers that the rule is put on are factored, the first, the last and those of shortcuts included; biases and
    norms learn by ``alpha L_CE`` as ever. The feedback is ``w`` turned at random: random orthonormal ``b_u`` and
    ``b_v``, and the singular values with which the layer starts.

    Args:
      parallel: how the error gets to a layer, as above.
      rank: of every layer at the start, as for :func:`jaxfa.factored.factorise`; None is full rank, or, for a layer
        that is factored already, its own.
      alpha: of the loss whose gradient is taken, for every parameter.
      beta: of the alignment.
      gamma: of the orthogonality; Yang et al. (2020) divide by ``r^2``.
      pull_weights: whether alignment moves the weights.
      pull_feedback: whether it moves the feedback, by the same optimizer.
      project: whether gradients of ``u`` and ``v``, and the steps to retract, are projected on the tangent space.
      retract: whether the steps end on the manifold, as for :func:`jaxfa.factored.stiefel`.
      distribution: of the lift, an initializer ``(key, shape, dtype)`` for ``(m, C)``; as for :func:`jaxfa.dfa`.
      scale: factor on the feedback's singular values, positive.

    Returns:
      A :class:`jaxfa.DirectRule` if ``parallel``, else a :class:`jaxfa.LayerRule`. Its layers' weights must be factors,
      which :func:`jaxfa.nn.attach` and :func:`jaxfa.factored.factorise` make.

    Raises:
      ValueError: if ``alpha``, ``beta`` or ``gamma`` is negative, ``scale`` is not positive or ``rank`` is none; by
        ``init``, if a layer starts at zero; by the optimizer, if a feedback that alignment knows has no weights.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> w, rule = jaxfa.factored.factorise(jnp.eye(4, 3)), jaxfa.ssa(parallel=False)
      >>> feedback = rule.init(jax.random.key(0), w)
      >>> jaxfa.linear(jnp.ones((5, 4)), w, feedback).shape
      (5, 3)

    Source: Roy, Apolinario, Das Biswas, Roy, "Feedback Alignment Meets Low-Rank Manifolds: A Structured Recipe for
    Local Learning", 2025, https://arxiv.org/abs/2510.25594; the defaults are ours, since it names no number.
    """
    if min(alpha, beta, gamma) < 0:
        raise ValueError(f"ssa needs alpha, beta and gamma >= 0, got {alpha}, {beta} and {gamma}.")
    if scale <= 0:
        raise ValueError(f"ssa needs scale > 0, or no error passes a layer; got {scale}.")
    rank_of(rank, 1)  # refuses what is no rank
    draw = distribution or initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    def init(key: jax.Array, w: Factors) -> FactoredFeedback:
        b = _turned(key, w, scale)
        return TransportedFactors(b) if pull_feedback else FactoredFeedback(b)

    def init_parallel(key: jax.Array, h: Any, logits: Any, *, layer: Layer | None = None) -> LiftedFeedback:
        if layer is None:
            raise ValueError(
                "Parallel SSA delivers errors to the inputs of factored layers alone: give rule.init the layer=Layer("
                "op, x, w) that h enters; with jaxfa.nn.attach, at= names the layers to factor, not where to tap."
            )
        key_b, key_lift = jax.random.split(key)
        b, y = _turned(key_b, layer.w, scale), jax.eval_shape(layer.op, h, layer.w)
        lift = None if y.shape == logits.shape else direct_matrix(key_lift, draw, y, logits)
        return (TransportedLift if pull_feedback else LiftedFeedback)(b, lift, layer.op)

    def learn(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        nothing = optax.identity()
        gradients = optax.masked(stiefel(retract=False) if project else nothing, orthonormal_factors)
        steps = optax.masked(stiefel(project=project) if retract else nothing, orthonormal_factors)
        around = optax.chain(gradients, orthogonal(gamma)), steps
        return learn_aligned(tx, around, alpha, (beta if pull_weights else 0.0, beta if pull_feedback else None))

    def weights(w: jax.Array | Factors, path: str) -> Factors:
        return factorise(w, rank, name=path)

    if parallel:
        return DirectRule(init_parallel, transform=learn, weights=weights)
    return LayerRule(init, transform=learn, weights=weights)


def _turned(key: jax.Array, w: Factors, scale: float) -> Factors:
    """Weights of the same singular values with random singular vectors."""
    if not is_factors(w):
        raise ValueError(
            f"ssa needs factored weights, jaxfa.factored.factorise(w), got {type(w).__name__} of shape {w.shape}."
        )
    if not isinstance(w.s, jax.core.Tracer) and not np.any(np.asarray(w.s)):
        raise ValueError(
            f"The weights of {w.name!r} are all zero, so that its feedback would have no singular values, and nothing "
            f"below would ever learn. Initialise the layer otherwise, such as by nnx.initializers.lecun_normal()."
        )
    wide = jnp.promote_types(w.dtype, jnp.float32)
    key_u, key_v = jax.random.split(key)
    drawn = jax.random.normal(key_u, w.u.shape, wide), jax.random.normal(key_v, w.v.shape, wide)
    u, v = (orthonormal(one).astype(w.dtype) for one in drawn)
    return replace(w, u=u, s=scale * w.s, v=v)
