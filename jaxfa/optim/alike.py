"""Weights and feedback that learn alike: the user's optimizer steps on both, and both decay with its steps."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfa.base import is_feedback
from jaxfa.optim.steps import (
    OptimizerState,
    init_on,
    own_state,
    refuse_accumulation,
    refuse_inside,
    stepped,
    whole_state,
    with_extra,
)
from jaxfa.optim.trees import nodes_of

Shape = Callable[[Any], tuple[int, ...]]


def alike(
    tx: optax.GradientTransformation, name: str, weight_decay: float, shape: Shape | None, learning_rate: float
) -> optax.GradientTransformationExtraArgs:
    """``w <- w + u - lambda w`` and ``q <- q + v - lambda q`` with ``tx``'s steps ``u`` and ``v``, where it takes them.

    ``tx`` learns ``v`` from the parameters' own tree with ``q`` and its signal in the places of ``w`` and its gradient:
    so it sees the weights' paths, and all that it may measure of a whole tree. Only what differs has a state of its
    own; counts and rates are the weights'. What has one axis does not decay.

    Args:
      tx: the optimizer of the parameters.
      name: the attribute ``q`` of the feedback; as all that follow, of :class:`jaxfa.base.Alike`.
      weight_decay: ``lambda``.
      shape: the shape of the weights that a feedback stands for; where that is None, ``tx`` is shown the feedback by
        itself.
      learning_rate: the rate of what else the feedback learns.

    Returns:
      A transformation of the pair ``(params, feedback)``.
    """
    tx = with_extra(tx)

    def init(both: Any) -> OptimizerState:
        begun = _begin(tx, both, name, shape)
        if learning_rate:
            refuse_accumulation(begun.params)
        return begun

    def update(updates: Any, state: OptimizerState, both: Any, **extra: Any) -> tuple[Any, OptimizerState]:
        (gradients, signals), (params, feedback) = updates, both
        if params is None:
            raise ValueError("This rule's weights and feedback decay: call update(updates, state, (params, feedback)).")
        put, take, paths = _seats(params, feedback, name, shape)
        found, after, steps = stepped(tx, gradients, state.params, params, **extra)
        full = whole_state(state.feedback, state.params)
        second = put(gradients, signals), full, put(params, feedback)
        if shape is None:
            learned, kept, own = stepped(tx, *second, **extra)
        else:
            (learned, kept), own = tx.update(*second, **extra), steps
        learns = zip(take(learned), take(own), strict=True)

        def learn(node: Any, signal: Any) -> Any:
            (step, steps), q = next(learns), getattr(node, name)
            rest = jax.tree.map(lambda leaf: jnp.where(steps, -learning_rate * leaf, 0).astype(leaf.dtype), signal)
            return replace(rest, **{name: _decayed(step.reshape(q.shape), q, steps, weight_decay)})

        def decay(step: jax.Array, w: jax.Array, steps: jax.Array) -> jax.Array:
            return _decayed(step, w, steps, weight_decay) if w.ndim > 1 else step

        news = jax.tree.map(learn, feedback, signals, is_leaf=is_feedback)
        return (jax.tree.map(decay, found, params, steps), news), OptimizerState(after, own_state(kept, after, paths))

    return optax.GradientTransformationExtraArgs(init, update)


def _begin(tx: Any, both: Any, name: str, shape: Shape | None) -> OptimizerState:
    """The first state, with an error if ``tx`` steps on weights, but not on what learns as they do."""
    params, feedback = both
    state = init_on(tx, params)
    refuse_inside(state)
    put, _, paths = _seats(params, feedback, name, shape)
    try:
        full = tx.init(put(params, feedback))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"The optimizer steps on the weights, but not on the {name} of their feedback, which it was shown at "
            f"{[jax.tree_util.keystr(path) for path in paths]}: give it masks and labels as functions of a tree, "
            f"which go by names or numbers of axes, in the place of trees."
        ) from error
    return OptimizerState(state, own_state(full, state, paths))


def _decayed(step: jax.Array, w: jax.Array, steps: jax.Array, weight_decay: float) -> jax.Array:
    return jnp.where(steps, step - weight_decay * w, step).astype(step.dtype)


def _seats(params: Any, feedback: Any, name: str, shape: Shape | None) -> tuple[Any, Any, list[Any]]:
    """How to ``put`` feedback into the tree that ``tx`` is shown, how to ``take`` it from such a one, and its paths."""
    if shape is None:

        def alone(tree: Any, feedback: Any) -> Any:
            return jax.tree.map(lambda node: _only(node, name), feedback, is_leaf=is_feedback)

        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(alone(params, feedback))]
        return alone, jax.tree.leaves, paths

    leaves = jax.tree_util.tree_leaves_with_path(params)
    seats = _places(leaves, feedback, name, shape)
    sizes = [getattr(node, name).size for node in nodes_of(feedback)]

    def put(tree: Any, feedback: Any) -> Any:
        filled, structure = jax.tree.flatten(tree)
        parts: dict[int, list[jax.Array]] = {}
        for i, node in zip(seats, nodes_of(feedback), strict=True):
            parts.setdefault(i, []).append(getattr(node, name))
        for i, own in parts.items():
            filled[i] = _joined(own, filled[i])
        return jax.tree.unflatten(structure, filled)

    def take(tree: Any) -> list[Any]:
        filled, taken, found = jax.tree.leaves(tree), dict.fromkeys(seats, 0), []
        for i, size in zip(seats, sizes, strict=True):
            whole, start = filled[i], taken[i]
            found.append(whole.ravel()[start : start + size] if whole.ndim else whole)
            taken[i] += size
        return found

    return put, take, [leaves[i][0] for i in dict.fromkeys(seats)]


def _joined(parts: list[jax.Array], like: jax.Array) -> jax.Array:
    """What stands for one array of weights; feedback for parts of them side by side."""
    if sum(part.size for part in parts) == like.size:
        return jnp.concatenate([part.ravel() for part in parts]).reshape(like.shape)
    return parts[0] if len(parts) == 1 else jnp.concatenate([part.reshape(1, -1) for part in parts], 1)


def _only(node: Any, name: str) -> Any:
    masked = jax.tree.map(lambda _: optax.MaskedNode(), node)
    return replace(masked, **{name: getattr(node, name)})


def _places(weights: list[Any], feedback: Any, name: str, shape: Shape) -> list[int]:
    """The weights that each feedback stands for: those of its shape nearest to it, or that its path names.

    Raises:
      ValueError: if there is none, or more than one.
    """
    places: list[int] = []
    for path, node in jax.tree_util.tree_leaves_with_path(feedback, is_leaf=is_feedback):
        wanted = shape(node)
        if named := _named(path, weights):
            places.append(named[0])
            continue
        found = _nearest(path, wanted, weights)
        if len(found) != 1 or found[0] in places:
            near = [jax.tree_util.keystr(weights[i][0]) for i in found]
            raise ValueError(
                f"The feedback at {jax.tree_util.keystr(path)!r} learns as the weights {wanted} that it stands for do, "
                f"but there {'are ' + str(near) if near else 'are none'} beside it. Give the optimizer each feedback "
                f"with its weights, at the same path in the two trees or in one Flax layer. Freeze both of a frozen "
                f"layer: for a Flax layer 'name', with learned = (nnx.Param, nnx.All(jaxfa.nn.Feedback, "
                f"nnx.Not(nnx.PathContains('name')))) as wrt= of the optimizer and of the gradient."
            )
        places += found
    return places


def _named(path: Any, weights: list[Any]) -> list[int]:
    """The weights whose path stands as one key on a feedback's, as that of a Flax model's own contraction does."""
    keys = {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}
    names = ["/".join(str(getattr(key, "key", "")) for key in other[1:]) for other, _ in weights]
    return [
        i
        for i, (name, (other, _)) in enumerate(zip(names, weights, strict=True))
        if name in keys and other[:1] != path[:1]
    ]


def _nearest(path: Any, shape: tuple[int, ...], weights: list[Any]) -> list[int]:
    for length in range(len(path), -1, -1):
        under = [i for i, (other, _) in enumerate(weights) if other[:length] == path[:length]]
        if under:
            break
    same = [i for i in under if weights[i][1].shape == shape]
    return same or [i for i in under if weights[i][1].ndim > 1 and weights[i][1].size == math.prod(shape)]
