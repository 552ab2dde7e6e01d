"""Functions of a state whose backward pass is given: which of their cotangents are zero, and what the state learns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxfa.delivery import is_zero
from jaxfa.nn.model.variables import Feedback, value_of


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def relearned(keep: Callable[[Any], Any], backward: Callable[[Any, Any], Any], tree: Any) -> Any:
    """The outputs of ``keep(tree) -> (outputs, kept)``; what the tree learns is ``backward(kept, cotangents)``.

    Cotangents of outputs that no loss reads are symbols: see :func:`jaxfa.delivery.filled`.
    """
    del backward
    return keep(tree)[0]


relearned.defvjp(
    lambda keep, backward, tree: keep(jax.tree.map(lambda leaf: leaf.value, tree)),
    lambda keep, backward, *rest: (backward(*rest),),
    symbolic_zeros=True,
)


def split_floats(state: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """The floats of a state by their paths, but for feedback, and the function that puts others in their places."""
    flat = nnx.to_flat_state(state)
    names = {path: "/".join(map(str, path)) for path, _ in flat}
    floats = {names[path]: value_of(leaf) for path, leaf in flat if is_float(leaf) and not isinstance(leaf, Feedback)}

    def put(leaf: Any, value: Any) -> Any:
        return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value

    def rebuild(values: dict[str, Any]) -> Any:
        return nnx.from_flat_state(
            [(path, put(leaf, values[names[path]]) if names[path] in values else leaf) for path, leaf in flat]
        )

    return floats, rebuild


def floats_of(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any], Callable[[list[Any]], Any]]:
    """The floats of a tree; the functions that put others in their places, and that make a cotangent of them."""
    leaves, structure = jax.tree.flatten(tree)

    def put(values: list[Any], other: Callable[[Any], Any]) -> Any:
        given = iter(values)
        return jax.tree.unflatten(structure, [next(given) if is_float(one) else other(one) for one in leaves])

    def cotangent(values: list[Any]) -> Any:
        return put(values, lambda one: np.zeros(one.shape, jax.dtypes.float0))

    return [leaf for leaf in leaves if is_float(leaf)], lambda values: put(values, lambda one: one), cotangent


def products(fixed: Any, values: Any) -> list[jax.Array]:
    """The inner products of two trees' leaves; what is no number, or known to be zero, is left out."""
    pairs = zip(jax.tree.leaves(fixed), jax.tree.leaves(values), strict=True)
    numbers = [(one, other) for one, other in pairs if not is_zero(one) and is_float(other)]
    return [jnp.vdot(lax.stop_gradient(one), other) for one, other in numbers]


def is_float(leaf: Any) -> bool:
    """Whether a leaf, or a variable's value, is of floats alone."""
    return all(jnp.issubdtype(one.dtype, jnp.inexact) for one in jax.tree.leaves(leaf))
