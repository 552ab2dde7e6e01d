"""What varies over the axes of a device mesh, inside of ``jax.shard_map``."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.base import LAYER


def vary_alike(arrays: Any, *others: Any) -> Any:
    """Under ``shard_map``, lets every array vary over the mesh axes that one of them, or of the others, varies over.

    Cotangents must vary as their primals do; autodiff sums over the devices where it transposes this cast.
    """
    union: frozenset[Any] = frozenset().union(*(varying_axes(jax.typeof(a)) for a in jax.tree.leaves((arrays, others))))

    def vary(array: jax.Array) -> jax.Array:
        return lax.pcast(array, tuple(sorted(union - varying_axes(jax.typeof(array)), key=repr)), to="varying")

    return jax.tree.map(vary, arrays)


def varying_axes(kind: Any) -> frozenset[Any]:
    """The mesh axes over which an array of a type varies, or what a ref holds."""
    return getattr(kind, "inner_aval", kind).manual_axis_type.varying


def zeros_of(kind: Any) -> jax.Array:
    """Zeros of a type, as ``jax.typeof`` tells it, inside ``jax.shard_map``, too."""
    return lax.pcast(jnp.zeros(kind.shape, kind.dtype), tuple(sorted(varying_axes(kind), key=repr)), to="varying")


def refuse_shards(reason: str) -> None:
    """Refuses, for a reason, to run inside a ``shard_map`` that may have split the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [axis for axis in mesh.manual_axes if axis != LAYER and mesh.shape[axis] > 1]
    if axes:
        raise ValueError(f"Inside shard_map over {axes}: {reason}")
