"""The gradient of numbers that are made one after the other, taken piece by piece of their program.

Where errors are delivered to the inputs of layers, what one of them teaches is no module's call but whatever stands
between two taps. So the program is traced, and cut wherever nothing that learns goes on: each piece is differentiated
as it runs, and its activations are dropped before the next piece runs. What a shortcut joins past a tap, as in residual
networks, is one piece, whose gradient is right and whose activations are all kept. Dropout's masks the compiler may
draw for all pieces first.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jaxfa.jaxprs.versions import opened
from jaxfa.order import after
from jaxfa.varying import zeros_of

# The gradients that a piece waits for; those before were waited for by the pieces that made these.
_MANY = 16


class Piece(NamedTuple):
    """A part of a program.

    Attributes:
      run: ``values of ins -> values of outs``.
      ins: what it reads.
      outs: what it makes that others read, the numbers among them.
      numbers: how many of ``outs``, the first ones, are the numbers whose gradient is taken.
    """

    run: Callable[..., list[Any]]
    ins: list[Any]
    outs: list[Any]
    numbers: int


def gradient_by_pieces(function: Callable[[list[Any]], list[jax.Array]], floats: list[Any], known: Any) -> list[Any]:
    """The gradient of the sum of the numbers that a function returns.

    Args:
      function: ``floats -> numbers``.
      floats: arrays.
      known: what the first piece waits for; each of the others waits for the gradient of the one before.

    Returns:
      Arrays like ``floats``.
    """
    program = jax.make_jaxpr(function)(floats)
    jaxpr = opened(program)
    values: dict[Any, Any] = dict(zip(jaxpr.invars, floats, strict=True))
    values |= dict(zip(jaxpr.constvars, program.consts, strict=True))
    gradients = {var: zeros_of(jax.typeof(value)) for var, value in zip(jaxpr.invars, floats, strict=True)}
    for piece in pieces(jaxpr):
        # Without this the compiler would find what the forward pass has made, of weights alone, too, and keep it.
        values |= dict(zip(piece.ins, after([values[var] for var in piece.ins], known), strict=True))
        own = [var for var in piece.ins if var in gradients]
        numbers, pull, others = jax.vjp(partial(_run, piece, own, values), [values[var] for var in own], has_aux=True)
        (found,) = pull([zeros_of(jax.typeof(one)) + 1 for one in numbers])
        gradients |= {var: gradients[var] + one for var, one in zip(own, found, strict=True)}
        known = [*jax.tree.leaves(known), *found][-_MANY:]
        values |= dict(zip(piece.outs, [*numbers, *others], strict=True))
    return [gradients[var] for var in jaxpr.invars]


def _run(piece: Piece, own: list[Any], values: dict[Any, Any], given: list[Any]) -> tuple[list[Any], list[Any]]:
    every = values | dict(zip(own, given, strict=True))
    outs = piece.run(*(every[var] for var in piece.ins))
    return outs[: piece.numbers], outs[piece.numbers :]


def pieces(jaxpr: Any) -> Iterator[Piece]:
    """The parts of a program between which nothing that learns goes on, each of them with a number."""
    numbers = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    teaching = [eqn.primitive.name != "stop_gradient" for eqn in jaxpr.eqns]
    uses = [(var, i) for i, eqn in enumerate(jaxpr.eqns) if teaching[i] for var in eqn.invars]
    ends = {var: i for var, i in uses if not isinstance(var, Literal)}
    learns, start, joined = {*jaxpr.invars}, 0, 0
    for i, eqn in enumerate(jaxpr.eqns):
        if teaching[i] and any(not isinstance(var, Literal) and var in learns for var in eqn.invars):
            floats = [var for var in eqn.outvars if jnp.issubdtype(var.aval.dtype, jnp.inexact)]
            learns |= {*floats}
            joined = max([joined, *(ends.get(var, 0) for var in floats)])
        if (i >= joined and numbers & {*eqn.outvars}) or i + 1 == len(jaxpr.eqns):
            yield _piece(jaxpr, slice(start, i + 1), numbers)
            start = i + 1


def _piece(jaxpr: Any, part: slice, numbers: set[Any]) -> Piece:
    eqns, later = jaxpr.eqns[part], jaxpr.eqns[part.stop :]
    made = list(dict.fromkeys(var for eqn in eqns for var in eqn.outvars))
    read = dict.fromkeys(var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal))
    wanted = {var for eqn in later for var in eqn.invars if not isinstance(var, Literal)}
    outs = [var for var in made if var in numbers]
    count = len(outs)
    outs += [var for var in made if var in wanted and var not in numbers]
    ins = [var for var in read if var not in {*made}]
    own = jaxpr.replace(constvars=[], invars=ins, outvars=outs, eqns=eqns)
    return Piece(jaxpr_as_fun(ClosedJaxpr(own, ())), ins, outs, count)
