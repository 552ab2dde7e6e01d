"""Trees that hold parameters and feedback together: what of them an optimizer is shown, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxfa.base import DirectFeedback, LayerFeedback, is_feedback

_GONE = object()


def unboxed(tree: Any) -> Any:
    """The tree with values in the places of Flax's variables, which are boxes around them.

    ``nnx.Optimizer`` shows the boxes to ``init`` and not to ``update``, ``nnx.split`` to both.
    """

    def is_box(node: Any) -> bool:
        return hasattr(node, "get_value")

    return jax.tree.map(lambda node: node.get_value() if is_box(node) else node, tree, is_leaf=is_box)


def nodes_of(tree: Any) -> list[Any]:
    """The leaves of a tree, a whole feedback being one of them."""
    return jax.tree.leaves(tree, is_leaf=is_feedback)


def learns_from_gradients(feedback: Any) -> bool:
    """Whether a feedback is of a class that the batch tells something, or that is changed at every update."""
    signals = type(feedback).signal not in (LayerFeedback.signal, DirectFeedback.signal)
    return signals or type(feedback).learns not in ("", "fixed")


def maker_of(function: Any) -> str:
    """The name of the rule that a function was made for."""
    return str(getattr(function, "__qualname__", "this rule")).partition(".")[0]


def is_pair(tree: Any) -> bool:
    """Whether a tree is ``(params, feedback)``; either may be empty."""
    if type(tree) is not tuple or len(tree) != 2:
        return False
    return not any(map(is_feedback, nodes_of(tree[0]))) and all(map(is_feedback, nodes_of(tree[1])))


def split(tree: Any) -> tuple[Any, Any]:
    """The parameters, in the structure that they have without any feedback, and the feedback likewise.

    A feedback whose arrays a wrapper has masked is as masked as they are.
    """
    tree = jax.tree.map(_or_masked, tree, is_leaf=is_feedback)
    if is_pair(tree):
        return tree
    parts = (_part(tree, feedback) for feedback in (False, True))
    params, feedback = (None if part is _GONE else part for part in parts)
    return params, feedback


def join(tree: Any, params: Any, feedback: Any) -> Any:
    """The inverse of :func:`split`: a tree structured as ``tree``, of other parameters and feedback."""
    if is_pair(tree):
        return params, feedback
    nodes, structure = jax.tree.flatten(jax.tree.map(_or_masked, tree, is_leaf=is_feedback), is_leaf=is_feedback)
    weights, rest = iter(jax.tree.leaves(params)), iter(nodes_of(feedback))
    return jax.tree.unflatten(structure, [next(rest if is_feedback(node) else weights) for node in nodes])


def _or_masked(node: Any) -> Any:
    return node if jax.tree.leaves(node) else optax.MaskedNode()


def _part(tree: Any, feedback: bool) -> Any:
    """The feedback of a tree, or all else: a mapping loses its other entries, other containers keep None for them."""
    if is_feedback(tree) or jax.tree_util.all_leaves([tree]):
        return tree if is_feedback(tree) == feedback else _GONE
    entries, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    parts = [_part(child, feedback) for _, child in entries]
    if parts and all(part is _GONE for part in parts):
        return _GONE
    if isinstance(tree, Mapping):
        named = zip((path[0].key for path, _ in entries), parts, strict=True)
        made: Any = type(tree)
        return made({key: part for key, part in named if part is not _GONE})
    return jax.tree.unflatten(structure, [None if part is _GONE else part for part in parts])
