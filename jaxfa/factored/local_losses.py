"""SSA's local losses, alignment and orthogonality, and how weights and feedback learn by them.

Roy, Apolinario, Das Biswas, Roy, "Feedback Alignment Meets Low-Rank Manifolds: A Structured Recipe for Local Learning",
2025, https://arxiv.org/abs/2510.25594; the orthogonality is from Yang et al. (2020), as for :mod:`jaxfa.factored`.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfa.base import is_feedback
from jaxfa.factored.svd import Factors, by_name, is_factors, orthonormal_factors
from jaxfa.optim.steps import OptimizerState, init_on, moved, own_state, refuse_inside, whole_state, with_extra


def check_names(params: Any, feedback: Any) -> None:
    """Refuses a feedback without weights of its name; weights may have no feedback.

    Raises:
      ValueError: if there is one.
    """
    weights = {name for name, w in by_name(params).items() if jax.tree.leaves(w)}  # the others are masked
    lost = sorted(by_name(feedback).keys() - weights)
    if lost:
        raise ValueError(
            f"Alignment found feedback for {lost} but factored weights for {sorted(weights)} alone. Give the optimizer "
            f"the weights of every feedback, by the same name, or leave the feedback of fixed layers out, too."
        )


def towards(w: Factors, target: Factors, strength: float) -> Any:
    """The gradient of ``strength |w - target|^2``, factor by factor."""
    return jax.tree.map(lambda a, b: 2 * strength * (a - b.astype(a.dtype)), w, target)


def aligned(gradients: Any, params: Any, feedback: Any, alpha: float, beta: float) -> Any:
    """``alpha g`` and, for factors, the gradient of ``beta L_align``."""
    if beta:
        check_names(params, feedback)
    named = by_name(feedback) if beta else {}

    def learn(g: Any, w: Any) -> Any:
        g = jax.tree.map(lambda leaf: alpha * leaf, g)
        pulled = is_factors(w) and w.name in named
        return jax.tree.map(jnp.add, g, towards(w, named[w.name], beta)) if pulled else g

    return jax.tree.map(learn, gradients, params, is_leaf=is_factors)


def orthogonal(gamma: float) -> optax.GradientTransformation:
    """The gradient of ``gamma L_ortho``, ``4 u (u^T u - 1)`` for each factor but ``s``."""
    if gamma == 0:
        return optax.identity()

    def add(g: jax.Array, u: jax.Array) -> jax.Array:
        return g + 4 * gamma * u @ (u.mT @ u - jnp.eye(u.shape[-1], dtype=u.dtype))

    return optax.masked(optax.stateless(lambda g, params: jax.tree.map(add, g, params)), orthonormal_factors)


def learn_aligned(
    tx: optax.GradientTransformation, around: tuple[Any, Any], alpha: float, beta: tuple[float, float | None]
) -> optax.GradientTransformationExtraArgs:
    """Weights by all losses, in a chain with what is ``around`` ``tx``; feedback by its alignment through ``tx``."""
    tx, (before, after), (weights_beta, feedback_beta) = with_extra(tx), around, beta

    def init(both: Any) -> OptimizerState:
        params, feedback = both
        state = init_on(tx, params)
        refuse_inside(state)
        if feedback_beta is None:
            return OptimizerState(state, optax.EmptyState())
        targets = _beside(params, feedback, lambda w, b: b)
        return OptimizerState(state, own_state(tx.init(targets), state, _paths(targets)))

    def update(updates: Any, state: OptimizerState, both: Any, **extra: Any) -> tuple[Any, OptimizerState]:
        params, feedback = both
        if params is None:
            raise ValueError("ssa needs the parameters: call update(updates, state, (params, feedback)).")
        gradients = aligned(updates[0], params, feedback, alpha, weights_beta)
        gradients, _ = before.update(gradients, before.init(params), params)
        found, weights = tx.update(gradients, state.params, params, **extra)
        back, _ = after.update(found, after.init(params), params)
        # A step of zero, such as of frozen or accumulating weights, ends where it began.
        found = jax.tree.map(lambda step, back: jnp.where(moved(step), back, step), found, back)
        still = jax.tree.map(jnp.zeros_like, updates[1])
        if feedback_beta is None:
            return (found, still), OptimizerState(weights, state.feedback)
        targets = _beside(params, feedback, lambda w, b: b)
        pulls = _beside(params, feedback, lambda w, b: towards(b, w, feedback_beta))
        learned, own = tx.update(pulls, whole_state(state.feedback, state.params), targets, **extra)
        named = by_name(learned)
        learned = jax.tree.map(
            lambda node: replace(node, b=named[node.b.name]) if node.b.name in named else node,
            still,
            is_leaf=is_feedback,
        )
        return (found, learned), OptimizerState(weights, own_state(own, weights, _paths(targets)))

    return optax.GradientTransformationExtraArgs(init, update)


def _beside(params: Any, feedback: Any, make: Any) -> Any:
    """The parameters' tree with ``make(w, b)`` in the places of factors that have feedback; all else is masked."""
    check_names(params, feedback)
    named = by_name(feedback)

    def place(w: Any) -> Any:
        has = is_factors(w) and w.name in named
        return make(w, named[w.name]) if has else jax.tree.map(lambda _: optax.MaskedNode(), w)

    return jax.tree.map(place, params, is_leaf=is_factors)


def _paths(tree: Any) -> list[Any]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
