"""Follows the error through a traced gradient: which rule, if any, carried it, and through whose weights.

A gradient is a program. Every value in it is labelled with the parameters it was made of, whether it depends on the
data, and how an error came to it. A contraction of an error with something made of parameters alone is how an error
passes a layer; inside one of the two primitives of :mod:`jaxfa.ops` that is the rule at work, outside it is
backpropagation. So what this finds is what the program does, whatever the modules are called.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxfa.ops import DIRECT, TRANSPORT

_CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_TAP = re.compile(r"tap\[(.*?)\]")
_NONE: frozenset[Any] = frozenset()


class Passage(NamedTuple):
    """One passage of an error through a layer.

    Attributes:
      kind: ``"rule"`` (through a feedback), ``"direct"`` (delivered from the output) or ``"weights"``
        (backpropagation).
      name: the parameter it passed, or the tap it was delivered to.
    """

    kind: str
    name: str


class Contraction(NamedTuple):
    """One contraction of the forward pass with weights.

    Attributes:
      weights: the parameters that its weight operand is made of.
      operation: the JAX primitive.
      first: whether its input depends on no parameter, so that nothing below it learns.
    """

    weights: frozenset[str]
    operation: str
    first: bool


class Audit(NamedTuple):
    """What a gradient program does.

    Attributes:
      contractions: the forward pass's contractions with weights, in order.
      arrivals: for each parameter, every passage on an error's ways from the output to that parameter's gradient.
        A delivery starts a new way. Empty: the error came exactly, through no weights.
      passages: every passage in the program.
    """

    contractions: list[Contraction]
    arrivals: dict[str, frozenset[Passage]]
    passages: frozenset[Passage]


class _Flow(NamedTuple):
    names: frozenset[str] = _NONE
    data: bool = False
    is_error: bool = False
    way: frozenset[Passage] = _NONE

    @property
    def is_weight(self) -> bool:
        return bool(self.names) and not self.data and not self.is_error


def audit(forward: Callable[..., Any], params: Any, rest: Any, data: Any, *, names: tuple[Any, Any]) -> Audit:
    """Traces a network's gradient and reports how the error reaches every parameter.

    Args:
      forward: ``(params, rest, data) -> outputs``, a pure function.
      params: the tree that the gradient is taken in, arrays or ``ShapeDtypeStruct``s.
      rest: feedback and state.
      data: one batch.
      names: two trees of strings, shaped as ``params`` and ``rest``: the parameter that each array stands for, ``""``
        for none. A feedback goes by the name of the weights whose place it takes.

    Returns:
      An :class:`Audit`. Kernels written outside JAX's own primitives (Pallas, callbacks) are opaque to it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxfa.audit import audit
      >>> result = audit(lambda w, rest, x: x @ w[0] @ w[1], [jnp.ones((3, 4)), jnp.ones((4, 2))], (),
      ...                jnp.ones((5, 3)), names=(["first", "last"], ()))
      >>> sorted(result.arrivals["first"])
      [Passage(kind='weights', name='last')]
    """
    floats = jax.eval_shape(lambda *args: _floats(forward(*args)), params, rest, data)

    def program(params: Any, rest: Any, data: Any, errors: Any) -> Any:
        _, vjp = jax.vjp(lambda params: _floats(forward(params, rest, data)), params)
        return vjp(errors)

    jaxpr = jax.make_jaxpr(program)(params, rest, data, floats)
    flows = [_Flow(frozenset([name]) if name else _NONE) for name in jax.tree.leaves(names)]
    flows += [_Flow(data=True)] * len(jax.tree.leaves(data))
    flows += [_Flow(data=True, is_error=True)] * len(floats)
    walker = _Walker()
    ends = walker.walk(jaxpr.jaxpr, flows, "")
    arrivals = dict(zip(jax.tree.leaves(names[0]), (end.way for end in ends), strict=True))
    return Audit(list(walker.contractions.values()), arrivals, frozenset(walker.passages))


def _floats(outputs: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


class _Walker:
    """An abstract interpreter of jaxprs over :class:`_Flow`."""

    def __init__(self) -> None:
        self.contractions: dict[int, Contraction] = {}
        self.passages: set[Passage] = set()

    def walk(self, jaxpr: Jaxpr, flows: Sequence[_Flow], scope: str) -> list[_Flow]:
        known: dict[Any, _Flow] = dict(zip(jaxpr.invars, flows, strict=True))

        def read(atom: Any) -> _Flow:
            return _Flow() if isinstance(atom, Literal) else known.get(atom, _Flow())

        for eqn in jaxpr.eqns:
            inner = f"{scope}/{eqn.source_info.name_stack}"
            for var, flow in zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars], inner), strict=True):
                known[var] = flow
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[_Flow]:
        if eqn.primitive.name == "scan":
            return self.scan(eqn, flows, scope)
        if eqn.primitive.name == "while":
            return self.loop(eqn, flows, scope)
        if eqn.primitive.name == "cond":
            branches = [self.walk(branch.jaxpr, flows[1:], scope) for branch in eqn.params["branches"]]
            # The predicate is left out: weights that data chose among are weights.
            return [_join(outs) for outs in zip(*branches, strict=True)]
        for value in eqn.params.values():
            body = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(body, Jaxpr) and len(body.invars) == len(flows):
                return self.walk(body, flows, scope)
        return [self.primitive(eqn, flows, scope)] * len(eqn.outvars)

    def primitive(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> _Flow:
        out = _join(flows)
        contraction = eqn.primitive.name in _CONTRACTIONS
        if DIRECT in scope and out.is_error:
            tap = _TAP.findall(scope)
            return self.passed(out, "direct", frozenset(tap[-1:]) or frozenset(["?"]), way=_NONE)
        if contraction and out.is_error:
            weights = _NONE.union(*(flow.names for flow in flows if flow.is_weight))
            return self.passed(out, "rule" if TRANSPORT in scope else "weights", weights, way=out.way)
        if contraction and TRANSPORT not in scope and out.data:
            for w, x in ((flows[1], flows[0]), (flows[0], flows[1])):
                if w.is_weight and not x.is_weight:
                    self.contractions[id(eqn)] = Contraction(w.names, eqn.primitive.name, not x.names)
        return out

    def passed(self, out: _Flow, kind: str, names: frozenset[str], way: frozenset[Passage]) -> _Flow:
        passages = frozenset(Passage(kind, name) for name in names)
        self.passages |= passages
        return out._replace(way=way | passages)

    def scan(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[_Flow]:
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        fixed, carry, xs = flows[:consts], flows[consts : consts + carries], flows[consts + carries :]
        while True:
            outs = self.walk(eqn.params["jaxpr"].jaxpr, [*fixed, *carry, *xs], scope)
            grown = [_join(pair) for pair in zip(carry, outs[:carries], strict=True)]
            if grown == carry:
                return outs
            carry = grown

    def loop(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[_Flow]:
        skip, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        fixed, carry = flows[skip : skip + consts], flows[skip + consts :]
        while True:
            outs = self.walk(eqn.params["body_jaxpr"].jaxpr, [*fixed, *carry], scope)
            grown = [_join(pair) for pair in zip(carry, outs, strict=True)]
            if grown == carry:
                return carry
            carry = grown


def _join(flows: Sequence[_Flow]) -> _Flow:
    return _Flow(
        _NONE.union(*(flow.names for flow in flows)),
        any(flow.data for flow in flows),
        any(flow.is_error for flow in flows),
        _NONE.union(*(flow.way for flow in flows)),
    )
