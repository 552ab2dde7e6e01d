"""Which results of a traced program depend on which of its arguments, as far as that is known before it runs.

What depends on an argument in one entry depends on it. Of loops, products of matrices and others that are not named
here it is only said what may depend.
"""

from collections.abc import Sequence
from functools import reduce
from operator import and_, or_
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from jaxfa.jaxprs.versions import opened

# What has a result that depends on whatever an operand does.
_PASSES = (
    "abs", "add", "add_any", "broadcast_in_dim", "convert_element_type", "copy", "exp", "integer_pow", "log", "max",
    "min", "neg", "reduce_max", "reduce_sum", "reshape", "rsqrt", "sign", "sqrt", "square", "squeeze", "sub", "tanh",
    "transpose",
)  # fmt: skip
_SAME = ("broadcast_in_dim", "reshape", "squeeze")


class Depends(NamedTuple):
    """Sets of arguments, as bits.

    Attributes:
      must: those on which a value depends, whatever the values are.
      may: those on which it may depend.
      number: the number that all of its entries are, an array without axes, if the program says so.
    """

    must: int = 0
    may: int = 0
    number: Any = None


def depend(program: Any) -> list[Depends]:
    """Of each result of a program, on which of its arguments it depends."""
    return _run(program, [Depends(1 << i, 1 << i) for i in range(len(opened(program).invars))])


def _run(program: Any, values: Sequence[Depends]) -> list[Depends]:
    jaxpr = opened(program)
    known = dict.fromkeys(jaxpr.constvars, Depends()) | dict(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Depends:
        if not isinstance(atom, Literal):
            return known[atom]
        return Depends(number=np.asarray(atom.val) if np.ndim(atom.val) == 0 else None)

    for eqn in jaxpr.eqns:
        known |= dict(zip(eqn.outvars, _equation(eqn, [read(var) for var in eqn.invars]), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(eqn: JaxprEqn, ins: list[Depends]) -> list[Depends]:
    name = eqn.primitive.name
    if eqn.effects:  # on what was written to a ref, and by whom, is not followed
        return [Depends(may=-1)] * len(eqn.outvars)
    if name in ("jit", "pjit", "closed_call"):
        return _run(eqn.params["jaxpr"], ins)
    if name in ("cond", "select_n"):
        which, *ins = ins
        cases = [_run(one, ins) for one in eqn.params["branches"]] if name == "cond" else [[one] for one in ins]
        return [_one_of(which, each) for each in zip(*cases, strict=True)]
    if name in ("mul", "div"):
        a, b = ins
        return [_product(a, b if name == "mul" else b._replace(number=np.ones(())))]
    must, may = (reduce(or_, each, 0) for each in zip(*(one[:2] for one in ins), strict=True)) if ins else (0, 0)
    number = ins[0].number if name in (*_SAME, "convert_element_type") else None
    if number is not None:
        aval: Any = eqn.outvars[0].aval
        number = number.astype(aval.dtype)
    return [Depends(must if name in _PASSES else 0, may, number)] * len(eqn.outvars)


def _one_of(which: Depends, cases: Sequence[Depends]) -> Depends:
    """One of several values, as another one says, on which the choice depends."""
    return Depends(reduce(and_, (one.must for one in cases)), reduce(or_, (one.may for one in cases), which.may))


def _product(a: Depends, b: Depends) -> Depends:
    """A product: it must depend on a factor if the other is not zero, which what depends itself is taken not to be."""
    if any(one.number is not None and one.number == 0 for one in (a, b)):
        return Depends()
    first, second = (bool(one.must) or one.number is not None for one in (a, b))
    return Depends((a.must if second else 0) | (b.must if first else 0), a.may | b.may)
