"""SSA's local losses, alignment and orthogonality, as optax transformations that add their gradients.

Roy, Apolinario, Das Biswas, Roy, "Feedback Alignment Meets Low-Rank Manifolds: A Structured Recipe for Local Learning",
2025, https://arxiv.org/abs/2510.25594; the orthogonality is from Yang et al. (2020), as :func:`jaxfa.factorise`.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfa.base import is_feedback
from jaxfa.svd import Factors, by_name, is_factors, orthonormal_factors


def _split_by_name(both: Any) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """The factors of weights and of feedback, each by the name of its layer; weights may have no feedback.

    Raises:
      ValueError: if a feedback has no weights.
    """
    nodes = jax.tree.leaves(both, is_leaf=lambda node: is_feedback(node) or is_factors(node))
    weights = by_name([node for node in nodes if is_factors(node)])
    feedback = by_name([node for node in nodes if is_feedback(node)])
    lost = sorted(feedback.keys() - weights.keys())
    if lost:
        raise ValueError(
            f"Alignment found feedback for {lost} but factored weights for {sorted(weights)} alone. Give the optimizer "
            f"the weights of every feedback, by the same name, or leave the feedback of fixed layers out, too."
        )
    return weights, feedback


def _towards(w: Factors, target: Factors, strength: float) -> Any:
    return jax.tree.map(lambda a, b: 2 * strength * (a - b.astype(a.dtype)), w, target)


def aligned(alpha: float, beta: float) -> optax.GradientTransformationExtraArgs:
    """``alpha g`` and, for factors, the gradient of ``beta L_align``."""

    def update(updates: Any, state: Any, params: Any = None, *, both: Any, **_: Any) -> tuple[Any, Any]:
        feedback = _split_by_name(both)[1] if beta else {}

        def learn(g: Any, w: Any) -> Any:
            g = jax.tree.map(lambda leaf: alpha * leaf, g)
            pulled = is_factors(w) and w.name in feedback
            return jax.tree.map(jnp.add, g, _towards(w, feedback[w.name], beta)) if pulled else g

        return jax.tree.map(learn, updates, params, is_leaf=is_factors), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def orthogonal(gamma: float) -> optax.GradientTransformation:
    """The gradient of ``gamma L_ortho``, ``4 u (u^T u - 1)`` for each factor but ``s``."""
    if gamma == 0:
        return optax.identity()

    def add(g: jax.Array, u: jax.Array) -> jax.Array:
        return g + 4 * gamma * u @ (u.mT @ u - jnp.eye(u.shape[-1], dtype=u.dtype))

    return optax.masked(optax.stateless(lambda g, params: jax.tree.map(add, g, params)), orthonormal_factors)


def pull(beta: float) -> optax.GradientTransformationExtraArgs:
    """The gradient of ``beta L_align`` for the feedback's factors."""

    def update(updates: Any, state: Any, params: Any = None, *, both: Any, **_: Any) -> tuple[Any, Any]:
        weights, _ = _split_by_name(both)

        def learn(g: Any, b: Any) -> Any:
            return replace(g, b=_towards(b.b, weights[b.b.name], beta)) if is_feedback(b) else g

        return jax.tree.map(learn, updates, params, is_leaf=is_feedback), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
