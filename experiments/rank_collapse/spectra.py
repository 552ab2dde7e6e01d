"""What changes the singular values of an optimizer's updates, and what remembers gradients: optax transformations.

``hidden`` is from :func:`experiments.common.optimizers.hidden_kernels`; updates of all other parameters pass unchanged.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.custom_batching import sequential_vmap

from experiments.common.optimizers import is_hidden, is_numbers

Hidden = Callable[[Any], Any]


def by_matrix(function: Callable[..., jax.Array], hidden: Hidden, updates: Any, *others: Any) -> Any:
    """Applies a function of matrices ``(inputs, outputs)`` to every hidden layer's update, and to others' beside it.

    Args:
      function: of one matrix of each tree, to a matrix of the same shape.
      hidden: which updates are matrices.
      updates: a tree.
      *others: trees of the same structure.

    Returns:
      The first tree with what the function made of its matrices.
    """

    def one(numbers: Any, *leaves: jax.Array) -> jax.Array:
        if numbers is None:
            return leaves[0]
        shape, inputs, outputs = leaves[0].shape, len(numbers.reduction_axis), len(numbers.output_axis)
        n, m = math.prod(shape[-inputs - outputs : -outputs]), math.prod(shape[-outputs:])
        return jax.vmap(function)(*(leaf.reshape(-1, n, m) for leaf in leaves)).reshape(shape)

    return jax.tree.map(one, hidden(updates), updates, *others, is_leaf=is_numbers)


def truncated(rank: int, hidden: Hidden) -> optax.GradientTransformation:
    """Each matrix's best approximation of a rank, scaled to the matrix's own Frobenius norm."""

    # LAPACK's SVD of many matrices at once can hang a machine of two cores: layers and seeds take turns.
    @sequential_vmap
    def cut(matrix: jax.Array) -> jax.Array:
        u, sigma, v = jnp.linalg.svd(matrix, full_matrices=False)
        return _sized((u[:, :rank] * sigma[None, :rank]) @ v[:rank], matrix)

    return optax.stateless(lambda updates, _: by_matrix(cut, hidden, updates))


def flattened(hidden: Hidden) -> optax.GradientTransformation:
    """Each matrix with the spectrum that Muon gives it, nearly flat, scaled to the matrix's own Frobenius norm.

    By Newton and Schulz's steps, which leave singular values that are nearly zero nearly zero: no direction is made up.
    """
    # Without momentum nothing is left of Muon but its orthogonalisation.
    orthogonal = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=hidden)
    orthogonal = optax.masked(orthogonal, lambda params: is_hidden(hidden, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found, state = orthogonal.update(updates, state, params)
        return by_matrix(_sized, hidden, found, updates), state

    return optax.GradientTransformation(orthogonal.init, update)


def _sized(matrix: jax.Array, like: jax.Array) -> jax.Array:
    """A matrix scaled to the Frobenius norm of another; a zero one stays."""
    norm = jnp.linalg.norm(matrix)
    return matrix * jnp.where(norm == 0, 0, jnp.linalg.norm(like) / jnp.where(norm == 0, 1, norm))


class Trajectory(NamedTuple):
    """The last updates of every hidden layer.

    Attributes:
      step: how many there were.
      rows: for each hidden layer ``(window, width)``, a row per update in no order, zero where there was none yet.
    """

    step: jax.Array
    rows: Any


def remember(window: int, width: int, hidden: Hidden) -> optax.GradientTransformation:
    """Passes updates on unchanged and keeps a sketch of the last ones of each hidden layer in its state.

    A layer's update is flattened, its entries get random signs, the same at every step, and those whose index is the
    same modulo ``width`` are added up, which keeps inner products in the mean, with an error of ``1 / sqrt(width)``.
    Layers of up to ``width`` weights are kept as they are.

    Args:
      window: how many updates are kept.
      width: numbers kept of each.
      hidden: which updates are kept.

    Returns:
      An optax transformation whose state is a :class:`Trajectory`.

    Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", 2002,
    https://doi.org/10.1007/3-540-45465-9_59
    """

    def kept(updates: Any) -> Any:
        chosen = is_hidden(hidden, updates)
        return jax.tree.map(lambda here, leaf: sketch(leaf, width) if here else None, chosen, updates)

    def init(params: Any) -> Trajectory:
        rows = jax.tree.map(lambda row: jnp.zeros((window, *row.shape), row.dtype), kept(params))
        return Trajectory(jnp.zeros((), jnp.int32), rows)

    def update(updates: Any, state: Trajectory, params: Any = None) -> tuple[Any, Trajectory]:
        del params
        rows = jax.tree.map(lambda old, new: old.at[state.step % window].set(new), state.rows, kept(updates))
        return updates, Trajectory(state.step + 1, rows)

    return optax.GradientTransformation(init, update)


def sketch(update: jax.Array, width: int) -> jax.Array:
    """An array's entries with random signs, added up by their index modulo ``width``."""
    flat = update.ravel()
    if flat.size <= width:
        return flat
    flat = jnp.pad(flat, (0, -flat.size % width)).reshape(-1, width)
    return (flat * jax.random.rademacher(jax.random.key(0), flat.shape, flat.dtype)).sum(0)
