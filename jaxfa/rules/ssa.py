"""SSA, learning in SVD space: layers kept as ``u diag(s) v^T``, factored feedback, local losses, Stiefel steps.

Roy, Apolinario, Das Biswas, Roy, "Feedback Alignment Meets Low-Rank Manifolds: A Structured Recipe for Local Learning",
2025, https://arxiv.org/abs/2510.25594, whose weights are ``(outputs, inputs)``: its ``U`` is our ``v``. Its rank falls
during training by :func:`jaxfa.factored.hoyer_penalty` and :func:`jaxfa.factored.prune`. The feedback starts as ``w``
with random singular vectors. A decomposition leaves its columns' order and signs open, and ``L_align`` depends on them:
the feedback's are those nearest to the weights', which where these are decomposed anew keep their own.

The paper does not say how an output error of ``C`` numbers reaches a layer whose feedback has the shape of its weights.
Lifted to the layer's outputs by a fixed random matrix, no layer waits for another; alignment then makes ``b`` that
layer's own, but not the lift those of the layers above. Handed on from layer to layer, alignment leads to
backpropagation. Nor does it say what alignment moves. Literally that is the weights, which then rest at
``b - g / 2 beta``, and on the manifold a square factor of the other determinant stops with one column turned around.
Moved towards the weights instead, the feedback is weight transport, and ``coverage()`` says so.

"Project the updates on the Stiefel manifold" can mean their tangent part alone, beside which ``L_ortho`` keeps the
drift small, or the way back onto the manifold, where ``L_ortho`` is zero. Gradients are projected before the optimizer
sees them, since Adam's step of a gradient across the manifold has a part along it; ``L_ortho``'s gradient, which is all
across, joins them after that. The paper names no number: the defaults are ours.
"""

from dataclasses import field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from jaxfa.base import (
    DirectFeedback,
    DirectRule,
    Layer,
    LayerFeedback,
    LayerRule,
    Local,
    Operation,
    Rule,
    feedback_dataclass,
    transpose,
)
from jaxfa.factored.manifold import kept, random_orthonormal
from jaxfa.factored.svd import Factors, factorise, is_factors, matched, rank_of
from jaxfa.rules.shared.projection import direct_matrix, project


@feedback_dataclass
class FactoredFeedback(LayerFeedback):
    """Factors in the place of the weights' factors, for an error from the layer above: ``dx = ((d b_v) * b_s) b_u^T``.

    Attributes:
      b: feedback weights, :class:`jaxfa.factored.Factors` of ``w``'s shape.
    """

    learns: ClassVar[str] = "fixed"
    b: Factors

    def matrix(self, w: Any) -> Any:
        return self.b


@feedback_dataclass
class TransportedFactors(FactoredFeedback):
    """The same, pulled towards the weights' factors: weight transport, under its own name."""

    learns: ClassVar[str] = "from the weights"


@feedback_dataclass
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


@feedback_dataclass
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

    With an error ``d`` at a layer's output, ``x`` at its input, ``L_CE``'s pseudo-gradients are
    ``g_u = x^T (d v * s)``, ``g_s = sum (x u) * (d v)``, ``g_v = d^T (x u * s)``. The others' are exact,
    ``L_align = |u - b_u|^2 + |s - b_s|^2 + |v - b_v|^2`` and ``L_ortho = |u^T u - 1|^2 + |v^T v - 1|^2``;
    :func:`jaxfa.optimizer` adds them. What the paper leaves open is in the module's docstring.

    Args:
      parallel: True lifts the output error by a fixed random matrix, ``dx = lift(e) b^T``; False is feedback alignment
        through factors, ``dx = d b^T``.
      rank: each layer's at the start, as for :func:`jaxfa.factored.factorise`; None is full rank.
      alpha: weight of the loss whose gradient is taken, for every parameter.
      beta: weight of the alignment.
      gamma: weight of the orthogonality; Yang et al. (2020) divide it by ``r^2``.
      pull_weights: whether alignment moves the weights.
      pull_feedback: whether alignment moves the feedback, by the same optimizer: weight transport.
      project: whether gradients of ``u`` and ``v``, and their steps, are projected on the tangent space.
      retract: whether their steps end on the manifold, as for :func:`jaxfa.factored.stiefel`.
      distribution: the initializer ``(key, shape, dtype)`` of the lift, ``(m, C)``; as for :func:`jaxfa.dfa`.
      scale: factor on the feedback's singular values, positive.

    Returns:
      A :class:`jaxfa.DirectRule` if ``parallel``, else a :class:`jaxfa.LayerRule`, for weights that are factors.

    Raises:
      ValueError: if a number is out of range; by ``init``, if a layer is not factored or, as far as its values are
        known, starts at zero.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> w, rule = jaxfa.factored.factorise(jnp.eye(4, 3)), jaxfa.ssa(parallel=False)
      >>> jaxfa.linear(jnp.ones((5, 4)), w, rule.init(jax.random.key(0), w)).shape
      (5, 3)

    Source: Roy et al., "Feedback Alignment Meets Low-Rank Manifolds", 2025, https://arxiv.org/abs/2510.25594
    """
    _check(alpha, beta, gamma, scale)
    rank_of(rank, 1)  # refuses what is no rank
    draw = distribution or initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    def init(key: jax.Array, w: Factors) -> FactoredFeedback:
        return (TransportedFactors if pull_feedback else FactoredFeedback)(_turned(key, w, scale))

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

    def weights(w: jax.Array | Factors, path: str) -> Factors:
        return _not_zero(factorise(w, rank, name=path))

    learn = _learn(alpha, beta, gamma, project=project, retract=retract, pull=(pull_weights, pull_feedback))
    rule, make = (DirectRule, init_parallel) if parallel else (LayerRule, init)
    return rule(make, transform=learn, weights=weights)


def _check(alpha: float, beta: float, gamma: float, scale: float) -> None:
    if min(alpha, beta, gamma) < 0:
        raise ValueError(f"ssa needs alpha, beta and gamma >= 0, got {alpha}, {beta} and {gamma}.")
    if scale <= 0:
        raise ValueError(f"ssa needs scale > 0, or no error passes a layer; got {scale}.")


def _learn(alpha: float, beta: float, gamma: float, *, project: bool, retract: bool, pull: tuple[bool, bool]) -> Local:
    """The three losses and the steps on the manifold; ``pull`` says whether alignment moves weights and feedback."""

    def gradient(g: Any, w: Any, b: Factors | None) -> Any:
        g = jax.tree.map(lambda leaf: alpha * leaf, g)
        if not is_factors(w):
            return g
        if b is not None:
            g = jax.tree.map(jnp.add, g, towards(w, b))
        if project:
            g = _columns(lambda d, u: kept(d, u, retract=False), g, w)
        return _columns(lambda d, u: d + gamma * _orthogonality(u), g, w) if gamma else g

    def step(steps: list[Factors], weights: list[Factors]) -> list[Factors]:
        if not retract:
            return steps
        columns = kept(*([(one.u, one.v) for one in ones] for ones in (steps, weights)), retract=True, project=project)
        return [replace(d, u=u, v=v) for d, (u, v) in zip(steps, columns, strict=True)]

    def towards(w: Factors, to: Factors) -> Factors:
        return jax.tree.map(lambda a, b: 2 * beta * (a - b.astype(a.dtype)), w, to)

    return Local(is_factors, gradient, step, towards if pull[1] else None, aligns=pull[0] and beta > 0)


def _columns(change: Any, d: Factors, w: Factors) -> Factors:
    """The same change of ``u`` and of ``v``; by jax.tree, since optax may have masked them."""
    return replace(d, u=jax.tree.map(change, d.u, w.u), v=jax.tree.map(change, d.v, w.v))


def _orthogonality(u: jax.Array) -> jax.Array:
    """The gradient of ``|u^T u - 1|^2``."""
    return 4 * u @ (u.mT @ u - jnp.eye(u.shape[-1], dtype=u.dtype))


def _not_zero(w: Factors) -> Factors:
    """The factors, refused if they are all zero, where their values are known."""
    if not isinstance(w.s, jax.core.Tracer) and not np.any(np.asarray(w.s)):
        raise ValueError(
            f"The weights of {w.name!r} are all zero, so that its feedback would have no singular values, and nothing "
            f"below would ever learn. Initialise the layer otherwise, such as by nnx.initializers.lecun_normal()."
        )
    return w


def _turned(key: jax.Array, w: Factors, scale: float) -> Factors:
    """Weights of the same singular values with random singular vectors, each in the place of the weights' nearest."""
    if not is_factors(w):
        raise ValueError(
            f"ssa needs factored weights, jaxfa.factored.factorise(w), got {type(w).__name__} of shape {w.shape}."
        )
    # Layers of one shape are traced once: their names differ.
    return replace(_turned_alike(key, replace(_not_zero(w), name=""), scale), name=w.name)


@jax.jit
def _turned_alike(key: jax.Array, w: Factors, scale: float) -> Factors:
    keys = jax.random.split(key)
    u, v = (
        random_orthonormal(key, one.shape, w.dtype).astype(w.dtype) for key, one in zip(keys, (w.u, w.v), strict=True)
    )
    return matched(replace(w, u=u, s=scale * -jnp.sort(-jnp.abs(w.s)), v=v), w)
