"""Weights that learn from losses of their own layer beside the batch's, and feedback that learns beside them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfa.base import Local, is_feedback
from jaxfa.optim.steps import OptimizerState, init_on, moved, own_state, refuse_inside, whole_state, with_extra


def local(tx: optax.GradientTransformation, rule: Local) -> optax.GradientTransformationExtraArgs:
    """Parameters by ``tx`` between the rule's ``gradient`` and ``step``; feedback by ``tx`` with its ``pull``.

    ``tx`` learns the feedback's steps from the parameters' tree with each ``b`` in the place of its weights, so that it
    sees their paths; all else is masked. Only what differs has a state of its own; counts and rates are the weights'.

    Args:
      tx: the optimizer of the parameters.
      rule: what the weights' layers learn from.

    Returns:
      A transformation of the pair ``(params, feedback)``.
    """
    tx = with_extra(tx)

    def init(both: Any) -> OptimizerState:
        params, feedback = both
        state = init_on(tx, params)
        refuse_inside(state)
        if rule.pull is None:
            return OptimizerState(state, optax.EmptyState())
        targets = _beside(params, feedback, rule.is_weights, lambda b, w: b)
        return OptimizerState(state, own_state(tx.init(targets), state, _paths(targets)))

    def update(updates: Any, state: OptimizerState, both: Any, **extra: Any) -> tuple[Any, OptimizerState]:
        params, feedback = both
        if params is None:
            raise ValueError("This rule's weights learn locally: call update(updates, state, (params, feedback)).")
        gradients = _gradients(rule, updates[0], params, feedback)
        found, weights = tx.update(gradients, state.params, params, **extra)
        found = _stepped(rule, found, params)
        still = jax.tree.map(jnp.zeros_like, updates[1])
        if rule.pull is None:
            return (found, still), OptimizerState(weights, state.feedback)
        targets, pulls = (_beside(params, feedback, rule.is_weights, make) for make in (lambda b, w: b, rule.pull))
        steps, own = tx.update(pulls, whole_state(state.feedback, state.params), targets, **extra)
        moves = named(steps, rule.is_weights)

        def learned(node: Any) -> Any:
            return replace(node, b=moves[node.b.name]) if node.b.name in moves else node

        kept = OptimizerState(weights, own_state(own, weights, _paths(targets)))
        return (found, jax.tree.map(learned, still, is_leaf=is_feedback)), kept

    return optax.GradientTransformationExtraArgs(init, update)


def _gradients(rule: Local, gradients: Any, params: Any, feedback: Any) -> Any:
    targets = _checked(params, feedback, rule.is_weights) if rule.aligns else {}

    def learn(g: Any, w: Any) -> Any:
        return rule.gradient(g, w, targets.get(w.name) if rule.is_weights(w) else None)

    return jax.tree.map(learn, gradients, params, is_leaf=rule.is_weights)


def _stepped(rule: Local, steps: Any, params: Any) -> Any:
    """The weights' steps by the rule. One of zero, such as of frozen or accumulating weights, ends where it began."""
    structure: Any
    weights, structure = jax.tree.flatten(params, is_leaf=rule.is_weights)
    found = structure.flatten_up_to(steps)
    own = [i for i, w in enumerate(weights) if rule.is_weights(w)]
    for i, after in zip(own, rule.step([found[i] for i in own], [weights[i] for i in own]), strict=True):
        found[i] = jax.tree.map(lambda step, after: jnp.where(moved(step), after, step), found[i], after)
    return jax.tree.unflatten(structure, found)


def _beside(params: Any, feedback: Any, is_weights: Callable[[Any], bool], make: Callable[[Any, Any], Any]) -> Any:
    """The parameters' tree with ``make(b, w)`` in the places of weights that have feedback; all else is masked."""
    targets = _checked(params, feedback, is_weights)

    def place(w: Any) -> Any:
        has = is_weights(w) and w.name in targets
        return make(targets[w.name], w) if has else jax.tree.map(lambda _: optax.MaskedNode(), w)

    return jax.tree.map(place, params, is_leaf=is_weights)


def _checked(params: Any, feedback: Any, is_weights: Callable[[Any], bool]) -> dict[str, Any]:
    """The feedback's ``b`` by name; refuses any without weights of its name. Weights may have no feedback."""
    weights = {name for name, w in named(params, is_weights).items() if jax.tree.leaves(w)}  # the others are masked
    targets = named(feedback, is_weights)
    if lost := sorted(targets.keys() - weights):
        raise ValueError(
            f"Alignment found feedback for {lost} but factored weights for {sorted(weights)} alone. Give the optimizer "
            f"the weights of every feedback, by the same name, or leave the feedback of fixed layers out, too."
        )
    return targets


def named(tree: Any, is_weights: Callable[[Any], bool]) -> dict[str, Any]:
    """The weights in a tree by name.

    Raises:
      ValueError: if two have one name.
    """
    found = [node for node in jax.tree.leaves(tree, is_leaf=is_weights) if is_weights(node)]
    nodes = {node.name: node for node in found}
    if len(nodes) < len(found):
        names = [node.name for node in found]
        raise ValueError(f"Every factored layer needs a name of its own, factorise(w, name=...); got {names}.")
    return nodes


def _paths(tree: Any) -> list[Any]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
