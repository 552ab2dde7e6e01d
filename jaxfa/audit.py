"""Follows the error through a traced gradient: which rule, if any, carried it, and through whose weights.

A gradient is a program. Every value in it is labelled with the parameters it was made of, whether it depends on the
data, and how an error came to it. A contraction of an error with something made of parameters alone is how an error
passes a layer; inside one of the two primitives of :mod:`jaxfa.ops` that is the rule at work, outside it is
backpropagation. So what this finds is what the program does, whatever the modules are called.

Its limits: a contraction is JAX's ``dot_general`` or convolution. One that is spelled out as a product and a sum, a
linear solve or an FFT, and one inside a Pallas kernel, a callback or another opaque primitive, are not seen; nor are
weights that were multiplied by data or looked up by it (a mixture's experts), which look like activations: these
:mod:`jaxfa.follow` tells apart, in the forward pass.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from jaxfa._jaxprs import bodies, opened, scan_parts, while_parts
from jaxfa.ops import CHOICE, DIRECT, FORWARD, INNER, LOCAL, TRANSPORT

_CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
# Where an operand only says which entries are meant, the result is data no more than the others are.
# (Not of a gather: what is looked up in a table is an embedding, an activation.)
_CHOICES = {"dynamic_slice": slice(0, 1), "select_n": slice(1, None)}
_TAP = re.compile(r"tap\[(.*?)\]")
_ERROR = "jaxfa.error"  # the scope in which an output becomes its error
_NONE: frozenset[Any] = frozenset()


class Passage(NamedTuple):
    """One passage of an error through a layer.

    Attributes:
      kind: ``"output"`` (where every error starts), ``"direct"`` (delivered from there), ``"rule"`` (through a
        feedback) or ``"weights"`` (backpropagation).
      name: the parameter it passed, or the tap it was delivered to.
    """

    kind: str
    name: str


class Use(NamedTuple):
    """One contraction of the forward pass with weights; the same weights used again are one use.

    Attributes:
      weights: the parameters that its weight operand is made of.
      first: whether its input depends on no parameter, so that nothing below it learns.
    """

    weights: frozenset[str]
    first: bool


OUTPUT = Passage("output", "")


class Audit(NamedTuple):
    """What a gradient program does.

    Attributes:
      uses: the forward pass's contractions with weights, in order.
      arrivals: for each parameter, every passage on an error's ways from the output to that parameter's gradient.
        A delivery starts a new way. The output alone: the error came exactly, through no weights.
      passages: every passage in the program.
    """

    uses: list[Use]
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


class _Ref:
    """What a mutable array holds, at any time."""

    def __init__(self, flow: _Flow) -> None:
        self.flow = flow


def audit(forward: Callable[..., Any], params: Any, rest: Any, data: Any, names: tuple[Any, Any]) -> Audit:
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
      [Passage(kind='output', name=''), Passage(kind='weights', name='last')]
    """

    def program(params: Any, rest: Any, data: Any) -> Any:
        outputs, vjp = jax.vjp(lambda params: _floats(forward(params, rest, data)), params)
        with jax.named_scope(_ERROR):
            errors = [lax.optimization_barrier(output) for output in outputs]
        return vjp(errors), outputs  # with the outputs, lest the forward pass be taken for dead

    walker, ends = _walked(program, params, rest, data, names)
    arrivals = dict(zip(jax.tree.leaves(names[0]), (end.way for end in ends), strict=False))
    return Audit(list(walker.uses.values()), arrivals, frozenset(walker.passages))


def uses(forward: Callable[..., Any], params: Any, rest: Any, data: Any, names: tuple[Any, Any]) -> list[Use]:
    """The uses alone, of which the forward pass tells; arguments as for :func:`audit`."""
    walker, _ = _walked(lambda *args: _floats(forward(*args)), params, rest, data, names)
    return list(walker.uses.values())


def _walked(program: Callable[..., Any], params: Any, rest: Any, data: Any, names: Any) -> tuple["_Walker", Any]:
    jaxpr = opened(jax.make_jaxpr(program)(params, rest, data))
    # Without what nothing uses: a tap ignores the error that comes from above.
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    flows = [_Flow(frozenset([name]) if name else _NONE) for name in jax.tree.leaves(names)]
    flows += [_Flow(data=True)] * len(jax.tree.leaves(data))
    walker = _Walker()
    return walker, walker.walk(jaxpr, flows, "")


def _floats(outputs: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


class _Walker:
    """An abstract interpreter of jaxprs over :class:`_Flow`."""

    def __init__(self) -> None:
        self.uses: dict[frozenset[str], Use] = {}
        self.passages: set[Passage] = set()

    def walk(self, jaxpr: Jaxpr, flows: Sequence[_Flow], scope: str) -> list[_Flow]:
        known: dict[Any, _Flow] = dict(zip(jaxpr.invars, flows, strict=True))

        def read(atom: Any) -> _Flow:
            return _Flow() if isinstance(atom, Literal) else known.get(atom, _Flow())

        for eqn in jaxpr.eqns:
            inner = f"{scope}/{eqn.source_info.name_stack}"
            for var, flow in zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars], inner), strict=True):
                # Whole numbers carry no error.
                known[var] = flow if _is_float(var) else flow._replace(names=_NONE)
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[_Flow]:
        handlers = {
            "scan": self.scan,
            "while": self.loop,
            "cond": self.branches,
            "optimization_barrier": self.barrier,
            "new_ref": self.new_ref,
            **dict.fromkeys(("get", "swap", "addupdate"), self.used_ref),
        }
        handle = handlers.get(eqn.primitive.name)
        if handle is not None:
            return handle(eqn, flows, scope)
        for body in bodies(eqn):
            if len(body.invars) == len(flows):
                return self.walk(body, flows, scope)
        return [self.primitive(eqn, flows, scope)] * len(eqn.outvars)

    def branches(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[_Flow]:
        # The predicate is left out: weights that data chose among are weights.
        results = [self.walk(branch, flows[1:], scope) for branch in bodies(eqn)]
        return [_join(outs) for outs in zip(*results, strict=True)]

    def barrier(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[_Flow]:
        del eqn
        error = _Flow(data=True, is_error=True, way=frozenset([OUTPUT]))
        return [error] * len(flows) if _ERROR in scope else flows

    def new_ref(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[Any]:
        del eqn, scope
        return [_Ref(flows[0])]

    def used_ref(self, eqn: JaxprEqn, flows: list[Any], scope: str) -> list[_Flow]:
        del scope
        ref, before = flows[0], flows[0].flow
        if eqn.primitive.name != "get":
            ref.flow = _join([before, flows[1]])
        return [before] * len(eqn.outvars)

    def primitive(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> _Flow:
        out = _join(flows)._replace(
            data=any(flow.data for flow in flows[_CHOICES.get(eqn.primitive.name, slice(None))])
        )
        if CHOICE in scope and not out.is_error:
            return out._replace(data=False)  # weights that data chose, where a rule takes them for weights
        if DIRECT in scope and out.is_error:
            tap = _TAP.findall(scope)
            return self.passed(out, "direct", frozenset(tap[-1:]) or frozenset(["?"]), way=_NONE)
        if eqn.primitive.name not in _CONTRACTIONS or _is_pointwise(eqn, flows):
            return out
        if INNER in scope or (out.is_error and LOCAL in scope):
            return out  # a weight gradient, even where the input was a parameter; or inside a layer of two factors
        if out.is_error:
            weights = _NONE.union(*(flow.names for flow in flows if flow.is_weight))
            return self.passed(out, "rule" if TRANSPORT in scope else "weights", weights, way=out.way)
        covered = FORWARD in scope
        if covered or out.data:
            left, right, *_ = flows
            _ = self.use(left, right, covered) or self.use(right, left, covered)
        # What leaves a layer with feedback is an activation, even if no data went in.
        return out._replace(data=out.data or covered)

    def use(self, x: _Flow, w: _Flow, covered: bool) -> bool:
        """Records a contraction whose second operand is the weights; in a layer with feedback the first may be, too."""
        if not w.is_weight or (x.is_weight and not covered):
            return False
        before = self.uses.get(w.names, Use(w.names, first=True))
        self.uses[w.names] = before._replace(first=before.first and not x.names)
        return True

    def passed(self, out: _Flow, kind: str, names: frozenset[str], way: frozenset[Passage]) -> _Flow:
        passages = frozenset(Passage(kind, name) for name in names)
        self.passages |= passages
        return out._replace(way=way | passages)

    def scan(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[_Flow]:
        body, consts, carries = scan_parts(eqn)
        fixed, carry, xs = flows[:consts], flows[consts : consts + carries], flows[consts + carries :]
        while True:
            outs = self.walk(body, [*fixed, *carry, *xs], scope)
            grown = [_join(pair) for pair in zip(carry, outs[:carries], strict=True)]
            if grown == carry:
                return outs
            carry = grown

    def loop(self, eqn: JaxprEqn, flows: list[_Flow], scope: str) -> list[_Flow]:
        body, skip, consts = while_parts(eqn)
        fixed, carry = flows[skip : skip + consts], flows[skip + consts :]
        while True:
            outs = self.walk(body, [*fixed, *carry], scope)
            grown = [_join(pair) for pair in zip(carry, outs, strict=True)]
            if grown == carry:
                return carry
            carry = grown


def _is_float(var: Any) -> bool:
    return jnp.issubdtype(getattr(var.aval, "dtype", jnp.float32), jnp.inexact)


def _is_pointwise(eqn: JaxprEqn, flows: list[_Flow]) -> bool:
    """Whether a product takes weights entry by entry, as a norm's scale: all their axes are batch axes."""
    if eqn.primitive.name != "dot_general":
        return False
    batch = eqn.params["dimension_numbers"][1]
    avals: list[Any] = [var.aval for var in eqn.invars]
    return any(flow.is_weight and len(b) == a.ndim for flow, b, a in zip(flows, batch, avals, strict=True))


def _join(flows: Sequence[_Flow]) -> _Flow:
    return _Flow(
        _NONE.union(*(flow.names for flow in flows)),
        any(flow.data for flow in flows),
        any(flow.is_error for flow in flows),
        _NONE.union(*(flow.way for flow in flows)),
    )
