"""The order of independent computations in a compiled program, and with it the memory that they take."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jaxfa.varying import varying_axes


def after(values: Any, known: Any) -> Any:
    """The values, bit for bit, but not before those in ``known`` are, for all that the compiler can tell.

    On a GPU or TPU an ``optimization_barrier`` says so, since a ``cond`` would cost much; in a ``shard_map`` a value
    waits there for what varies over no more axes of the mesh. On a CPU a ``cond`` says so, whose other branch never
    runs: XLA drops a barrier there before it looks for common subexpressions, and would fuse elementwise operations
    with all that leads to them. Which it is depends on what the program is compiled for, which need not be the machine
    that compiles it.
    """
    floats = [leaf for leaf in jax.tree.leaves(known) if leaf.size and jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return lax.platform_dependent(values, floats, cpu=_chosen, default=_barred)


def _barred(values: Any, floats: list[jax.Array]) -> Any:
    leaves, structure = jax.tree.flatten(values)
    groups: dict[frozenset[Any], list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(varying_axes(jax.typeof(leaf)), []).append(i)
    for axes, places in groups.items():
        # What varies over more axes of a mesh would make all else behind the same barrier vary as it does.
        known = [one for one in floats if varying_axes(jax.typeof(one)) <= axes]
        held, _ = lax.optimization_barrier(([leaves[i] for i in places], known))
        for i, leaf in zip(places, held, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def _chosen(values: Any, floats: list[jax.Array]) -> Any:
    first = sum(jnp.ravel(leaf)[0] for leaf in floats)
    # Never true, which the compiler does not see.
    return lax.cond(jnp.isnan(first) & (first == 0), partial(jax.tree.map, jnp.zeros_like), lambda tree: tree, values)


def from_memory(x: jax.Array) -> jax.Array:
    """The activation, bit for bit, read from where the forward pass has left it.

    On a CPU XLA computes it again inside of what reads it, from all that leads to it without a contraction: in a
    residual network from every layer below. Programs for other devices are left as they are, since there convolutions
    and products are calls of a library, whose operands are in memory. With jaxlib 0.10 that for a CPU stays as it is,
    too: XLA drops the barrier before it fuses.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def one_by_one(function: Callable[[Any], Any], ref: Any) -> Any:
    """``function(ref)``, whose parts that read the ref each wait for the results that are made before them.

    Errors are delivered in this way because no tap's gradient needs another's: the compiler would deliver to all of
    them first, and keep all that is delivered.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(ref)
    jaxpr: Any = getattr(program, "jaxpr", program)  # closed before JAX 0.12
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, ref], strict=True))
    (own,), results = jaxpr.invars, {id(var) for var in jaxpr.outvars}
    made: list[Any] = []
    readers = [i for i, eqn in enumerate(jaxpr.eqns) if own in eqn.invars]
    for start, stop in pairwise([0, *readers, len(jaxpr.eqns)]):
        if made:
            values[own], made = _renewed(values[own], made), []
        eqns = jaxpr.eqns[start:stop]
        new = [var for eqn in eqns for var in eqn.outvars]
        read = [*dict.fromkeys(var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal))]
        ins = [var for var in read if var in values]
        part = ClosedJaxpr(jaxpr.replace(constvars=[], invars=ins, outvars=new, eqns=eqns), ())
        values |= dict(zip(new, jaxpr_as_fun(part)(*(values[var] for var in ins)), strict=True))
        made += [values[var] for var in new if id(var) in results]
    found = [var.val if isinstance(var, Literal) else values[var] for var in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _renewed(ref: Any, known: list[jax.Array]) -> Any:
    """Another ref that holds the same, after what is known; it varies over no more axes of a mesh than before."""
    value = ref[...]
    axes = varying_axes(jax.typeof(value))
    return jax.new_ref(after(value, [one for one in known if varying_axes(jax.typeof(one)) <= axes]))
