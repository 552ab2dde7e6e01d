"""Reading jaxprs: the one place that knows how JAX's versions write them.

JAX calls them an internal of its own and renames what is in them: ``ClosedJaxpr`` is ``Jaxpr`` since 0.12, and ``scan``
counts its operands by trees there that were numbers before. So what can be read off the shapes is.
"""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn


def opened(program: Any) -> Any:
    """The ``Jaxpr`` of a closed one, or of one that is open already; anything else as it is."""
    return getattr(program, "jaxpr", program)


def bodies(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs that are parameters of an equation, such as the branches of a ``cond``."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(opened(part), Jaxpr):
                yield opened(part)


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """All equations of a program and of those nested in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


def constants(jaxpr: Jaxpr) -> Iterator[Any]:
    """The arrays that programs nested in a program have and that are not its operands."""
    for eqn in equations(jaxpr):
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                yield from getattr(part, "consts", ()) if isinstance(opened(part), Jaxpr) else ()


def scan_parts(eqn: JaxprEqn) -> tuple[Jaxpr, int, int]:
    """The body of a ``scan``, how many operands are constants, and how many are carried from step to step.

    The body sees one entry of what it runs over, and so one axis less; and it returns what is carried as it is.
    """
    (body,) = bodies(eqn)

    def alike(outside: Any, inside: Any) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))

    carried = alike(eqn.outvars, body.outvars)
    return body, alike(eqn.invars, body.invars) - carried, carried


def while_parts(eqn: JaxprEqn) -> tuple[Jaxpr, int, int]:
    """The body of a ``while``, and how many operands are its condition's own and its body's; the rest is carried."""
    condition, body = (opened(eqn.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    carried = len(eqn.outvars)
    return body, len(condition.invars) - carried, len(body.invars) - carried
