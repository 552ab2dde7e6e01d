"""Sparse calibration: now and then a step of the true gradient in the place of the rule's."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfa.base import is_feedback
from jaxfa.optim.steps import OptimizerState
from jaxfa.optim.trees import nodes_of, unboxed


class CalibrationState(NamedTuple):
    """The state of :func:`calibrate`.

    Attributes:
      step: updates so far.
      calibrations: how many of them took the true gradient.
      inner: the optimizer's own state.
      own: the state of the calibrations' optimizer, if they have one.
    """

    step: jax.Array
    calibrations: jax.Array
    inner: Any
    own: Any = None


def calibrate(
    tx: optax.GradientTransformation,
    *,
    every: int,
    below: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sparse calibration: at every ``every``-th update the parameters step by the true gradient; feedback stands still.

    That step replaces the rule's where the paper inserts one: in an epoch of 200 updates the two differ by one. It
    composes with any rule. The control to run beside it is the same number of steps of backpropagation and no rule:
    ``jaxfa.backprop()`` with ``optax.conditionally_mask(tx, lambda step, **_: (step + 1) % every == 0)``.

    Args:
      tx: what :func:`jaxfa.optimizer` made.
      every: updates from one calibration to the next; the paper's ``T`` epochs are ``T`` times the steps of one.
      below: calibrate only where the feedback's mean cosine with the Jacobian is lower, as ``grape(watch=True)`` finds
        it in forward mode: no true gradient is computed to decide. None calibrates always.
      optimizer: an optimizer for the true gradients alone, while ``tx`` stands still. By default they go through
        ``tx``, where momentum and second moments are mostly the rule's, so that under Adam one of many weighs little.

    Returns:
      A transformation whose ``update`` takes one argument more, ``true_gradient``: a function of no arguments that
        returns the parameters' true gradient on this batch, run at these steps only; under ``jax.vmap``, such as over
        seeds, it runs at every step, and is used at these. Its leaves, in order, stand for the parameters among the
        updates': ``jax.grad(loss)(params, None)``, or ``nnx.grad(loss)(jaxfa.nn.plain(model))``.

    Raises:
      ValueError: if ``every`` is below 1; by ``update``, if ``below`` is given and no feedback measures its cosine.
      TypeError: by ``init``, if ``tx`` was not made by :func:`jaxfa.optimizer`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa, optax
      >>> rule, w = jaxfa.fa(), jnp.ones((3, 2))
      >>> both = w, rule.init(jax.random.key(0), w)
      >>> tx = jaxfa.calibrate(jaxfa.optimizer(optax.sgd(1.0), rule), every=1)
      >>> updates, state = tx.update(both, tx.init(both), both, true_gradient=lambda: w)
      >>> float(updates[0][0, 0]), int(state.calibrations)
      (-1.0, 1)

    Source: Caillon, Fagnou, Delattre, Allauzen, "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees",
    2026, https://openreview.net/forum?id=kasbbmwk3s; calibrating on measured alignment answers a question it leaves.
    """
    if every < 1:
        raise ValueError(f"calibrate needs every >= 1 updates from one calibration to the next, got {every}.")
    tx = optax.with_extra_args_support(tx)

    def init(tree: Any) -> CalibrationState:
        inner = tx.init(tree)
        if not isinstance(inner, OptimizerState):
            raise TypeError("calibrate(tx) expects what jaxfa.optimizer(tx, rule) made; wrap that, not what it wraps.")
        own = optimizer.init(_weights(tree)) if optimizer else None
        return CalibrationState(jnp.zeros((), int), jnp.zeros((), int), inner, own)

    def update(
        updates: Any, state: CalibrationState, params: Any = None, *, true_gradient: Callable[[], Any], **extra: Any
    ) -> tuple[Any, CalibrationState]:
        pseudo, now = _weights(updates), (state.step + 1) % every == 0
        if below is not None:
            now &= _alignment(params) < below
        choose = partial(jax.tree.map, lambda new, old: jnp.where(now, new, old))
        true = lax.cond(now, lambda: _like(jax.tree.leaves(true_gradient()), pseudo), lambda: pseudo)
        chosen = pseudo if optimizer else choose(true, pseudo)
        found, inner = tx.update(_with_weights(updates, chosen), state.inner, params, **extra)
        ours, own = _weights(found), state.own
        if optimizer:
            theirs, own = optimizer.update(true, state.own, None if params is None else _weights(params))
            ours, own, inner = choose(theirs, ours), choose(own, state.own), choose(state.inner, inner)
        inner = inner._replace(feedback=choose(state.inner.feedback, inner.feedback))
        still = _with_weights(jax.tree.map(lambda update: jnp.where(now, 0, update), found), ours)
        return still, CalibrationState(state.step + 1, state.calibrations + now, inner, own)

    return optax.GradientTransformationExtraArgs(init, update)


def _like(true: list[jax.Array], pseudo: list[jax.Array]) -> list[jax.Array]:
    shapes = [[leaf.shape for leaf in leaves] for leaves in (true, pseudo)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"true_gradient() must return the parameters' gradients: expected {shapes[1]}, got {shapes[0]}."
        )
    return [t.astype(p.dtype) for t, p in zip(true, pseudo, strict=True)]


def _alignment(tree: Any) -> jax.Array:
    """The mean over layers of what the feedback says of its cosine with the Jacobian."""
    known = [getattr(node, "alignment", None) for node in nodes_of(unboxed(tree)) if is_feedback(node)]
    found = [jnp.ravel(one) for one in known if one is not None]
    if not found:
        raise ValueError(
            "calibrate(below=) reads a cosine that the feedback measures: expected a rule such as "
            "grape(watch=True) and update(updates, state, params), got no feedback that does."
        )
    return jnp.mean(jnp.concatenate(found))


def _are_weights(tree: Any) -> list[bool]:
    return [not is_feedback(node) for node in nodes_of(unboxed(tree)) for _ in jax.tree.leaves(node)]


def _weights(tree: Any) -> list[jax.Array]:
    """The leaves that are parameters, not feedback."""
    pairs = zip(jax.tree.leaves(tree), _are_weights(tree), strict=True)
    return [leaf for leaf, is_weight in pairs if is_weight]


def _with_weights(tree: Any, weights: list[jax.Array]) -> Any:
    """The tree with other leaves in the places of its parameters."""
    leaves, structure = jax.tree.flatten(tree)
    given = iter(weights)
    pairs = zip(leaves, _are_weights(tree), strict=True)
    return jax.tree.unflatten(structure, [next(given) if is_weight else leaf for leaf, is_weight in pairs])
