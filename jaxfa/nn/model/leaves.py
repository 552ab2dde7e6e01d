"""The arrays of floats in what a module is given or returns: where a tap reads an error, and where it comes from."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def named_floats(tree: Any) -> dict[str, jax.Array]:
    """The arrays of floats in a tree by their places in it, ``""`` for one alone; modules are not looked into."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    return {_name(path): leaf for path, leaf in leaves if _is_float(leaf)}


def at_leaves(tree: Any, functions: dict[str, Callable[[jax.Array], jax.Array]]) -> Any:
    """The tree with functions applied to the arrays of floats at some places."""

    def one(path: Any, leaf: Any) -> Any:
        name = _name(path)
        return functions[name](leaf) if name in functions and _is_float(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_node)


def first_input(own_call: Callable[..., Any], args: Any, kwargs: Any, function: Callable[[Any], Any]) -> Any:
    """Arguments, with a function applied to the first of them."""
    if args:
        return (function(args[0]), *args[1:]), kwargs
    name = next((name for name in inspect.signature(own_call).parameters if name in kwargs), None)
    return args, kwargs if name is None else kwargs | {name: function(kwargs[name])}


def is_node(leaf: Any) -> bool:
    """Whether a node of a tree is a module or a variable."""
    return isinstance(leaf, nnx.Module | nnx.Rngs | nnx.RngStream | nnx.Variable)


def error_in(outputs: Any, logits: Callable[[Any], Any] | None) -> jax.Array:
    """A model's logits, or, of its outputs' cotangents, their error: ``(N, ..., C)``.

    Several arrays lie side by side: what is not in the axes that they have in common is one axis, the last.
    """
    arrays = list(named_floats(outputs if logits is None else logits(outputs)).values())
    arrays = [array for array in arrays if array.ndim]  # a penalty is no logits
    shapes = [array.shape[:-1] if array.ndim > 1 else array.shape for array in arrays]
    common = (
        0
        if not shapes
        else next(
            (axis for axis, sizes in enumerate(zip(*shapes, strict=False)) if len(set(sizes)) > 1),
            min(map(len, shapes)),
        )
    )
    if common == 0:
        raise ValueError(
            f"A direct rule needs the model's logits, of shape (N, ..., C), or several arrays with one batch axis; got "
            f"{[array.shape for array in arrays]}. Say with logits= which of the outputs they are, such as lambda "
            f"out: out[0], or with method= which method returns them."
        )
    if len(arrays) == 1 and arrays[0].ndim > 1:
        return arrays[0]
    flat = [array.reshape(*array.shape[:common], math.prod(array.shape[common:])) for array in arrays]
    return jnp.concatenate(flat, -1)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_float(leaf: Any) -> bool:
    return not is_node(leaf) and hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
