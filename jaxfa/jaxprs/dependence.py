"""Runs a program, and tells which of its results depend on some of its arguments, as far as its scalars decide it.

A product with a scalar that is zero depends on nothing, nor does what a scalar has not chosen. Entries that are zero or
chosen one by one are not looked at: what depends on an argument in one entry depends on it.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from jaxfa.jaxprs.versions import alone, opened

Depends = Any  # False, True, or a boolean scalar


class Seen(NamedTuple):
    """A value while its program runs.

    Attributes:
      value: the array.
      depends: whether it depends on the arguments that were asked for.
      each: the scalar that all of its entries are; None if they may differ.
    """

    value: Any
    depends: Depends = False
    each: Any = None

    @property
    def is_zero(self) -> Depends:
        """Whether all entries are known to be zero."""
        if self.each is None:
            return False
        return self.each == 0 if isinstance(self.each, jax.core.Tracer) else bool(self.each == 0)

    def like(self, value: Any) -> "Seen":
        """An array of the same entries in another shape or type."""
        return _seen(
            value, self.depends, None if self.each is None else lax.convert_element_type(self.each, value.dtype)
        )


def dependent(function: Callable[..., Any], asked: Any, *others: Any) -> tuple[Any, Any]:
    """``function(asked, *others)``, and of each array in it whether it depends on ``asked``, as boolean scalars."""
    program, returned = jax.make_jaxpr(function, return_shape=True)(asked, *others)
    values = [_seen(leaf, True) for leaf in jax.tree.leaves(asked)]
    outs = _run(program, [*values, *map(_seen, jax.tree.leaves(others))])
    structure = jax.tree.structure(returned)
    found = jax.tree.unflatten(structure, [out.value for out in outs])
    return found, jax.tree.unflatten(structure, [jnp.asarray(out.depends) for out in outs])


def _seen(value: Any, depends: Depends = False, each: Any = None) -> Seen:
    return Seen(value, depends, value if jnp.ndim(value) == 0 else each)


def _run(program: Any, values: Sequence[Seen]) -> list[Seen]:
    jaxpr = opened(program)
    known = dict(zip(jaxpr.invars, values, strict=True))
    known |= dict(zip(jaxpr.constvars, map(_seen, getattr(program, "consts", ())), strict=True))

    def read(atom: Any) -> Seen:
        return _seen(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        known |= dict(zip(eqn.outvars, _equation(jaxpr, eqn, [read(var) for var in eqn.invars]), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(jaxpr: Any, eqn: JaxprEqn, ins: list[Seen]) -> list[Seen]:
    name = eqn.primitive.name
    if name in ("jit", "pjit", "closed_call"):
        return _run(eqn.params["jaxpr"], ins)
    if name == "cond":
        return _branch(eqn.params["branches"], *ins)
    values = alone(jaxpr, eqn)(*(one.value for one in ins))
    if name in ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type"):
        return [ins[0].like(values[0])]
    depends = [one.depends for one in ins]
    if name == "mul":
        a, b = ins
        depends = [_unless(a.depends, b.is_zero), _unless(b.depends, a.is_zero)]
    elif name == "select_n" and ins[0].each is not None:
        depends = [_chosen(ins[0].each, depends[1:])]
    return [_seen(value, _any(depends)) for value in values]


def _branch(branches: Sequence[Any], index: Seen, *ins: Seen) -> list[Seen]:
    """The values that one of several programs returns."""

    def runner(branch: Any) -> Callable[..., Any]:
        def run(values: list[Any], depends: list[Any]) -> Any:
            outs = _run(branch, list(map(_seen, values, depends)))
            return [out.value for out in outs], [jnp.asarray(out.depends) for out in outs]

        return run

    given = [one.value for one in ins], [jnp.asarray(one.depends) for one in ins]
    return list(map(_seen, *lax.switch(index.value, [runner(branch) for branch in branches], *given)))


def _any(depends: Sequence[Depends]) -> Depends:
    if any(one is True for one in depends):
        return True
    open_ = [one for one in depends if one is not False]
    return reduce(jnp.logical_or, open_) if open_ else False


def _unless(depends: Depends, zero: Depends) -> Depends:
    if depends is False or zero is True:
        return False
    return depends if zero is False else jnp.logical_and(depends, jnp.logical_not(zero))


def _chosen(which: Any, cases: Sequence[Depends]) -> Depends:
    if all(case is cases[0] for case in cases):
        return cases[0]
    return jnp.stack([jnp.asarray(case) for case in cases])[jnp.asarray(which).astype(jnp.int32)]
