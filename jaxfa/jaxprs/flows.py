"""What flows through a traced gradient: the labels of every value, and the walk that gives them."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jaxfa.jaxprs.versions import bodies, scan_parts, while_parts
from jaxfa.ops import ACTIVATION, CHOICE, DIFFERENCE, DIRECT, FORWARD, INNER, LOCAL, MODULATED, TRANSPORT

CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
# Where an operand only says which entries are meant, the result is data no more than the others are.
# (Not of a gather: what is looked up in a table is an embedding, an activation.)
CHOICES = {"dynamic_slice": slice(0, 1), "select_n": slice(1, None)}
_TAP = re.compile(r"tap\[(.*?)\]")
# What hands a sum of errors on as it is.
_SAME = ("reshape", "transpose", "squeeze", "convert_element_type", "copy")
ERROR = "jaxfa.error"  # the scope in which an output becomes its error
NONE: frozenset[Any] = frozenset()


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


class Flow(NamedTuple):
    """The label of a value.

    Attributes:
      names: the parameters that it was made of.
      data: whether it depends on data.
      is_error: whether it depends on an error.
      way: what that error passed.
      ways: of a sum of errors what each of them passed.
    """

    names: frozenset[str] = NONE
    data: bool = False
    is_error: bool = False
    way: frozenset[Passage] = NONE
    ways: frozenset[frozenset[Passage]] = NONE

    @property
    def is_weight(self) -> bool:
        return bool(self.names) and not self.data and not self.is_error

    @property
    def summands(self) -> frozenset[frozenset[Passage]]:
        """What each of the errors passed that are summed here."""
        return self.ways or (frozenset([self.way]) if self.is_error else NONE)


class Ref:
    """What a mutable array holds, at any time."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow


class Walker:
    """An abstract interpreter of jaxprs over :class:`Flow`."""

    def __init__(self) -> None:
        self.uses: dict[frozenset[str], Use] = {}
        self.passages: set[Passage] = set()

    def walk(self, jaxpr: Jaxpr, flows: Sequence[Flow], scope: str) -> list[Flow]:
        known: dict[Any, Flow] = dict(zip(jaxpr.invars, flows, strict=True))

        def read(atom: Any) -> Flow:
            return Flow() if isinstance(atom, Literal) else known.get(atom, Flow())

        for eqn in jaxpr.eqns:
            inner = f"{scope}/{eqn.source_info.name_stack}"
            for var, flow in zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars], inner), strict=True):
                # Whole numbers carry no error.
                known[var] = flow if _is_float(var) else flow._replace(names=NONE)
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, flows: list[Flow], scope: str) -> list[Flow]:
        handlers = {
            "scan": self.scan,
            "while": self.loop,
            "cond": self.branches,
            "optimization_barrier": self.barrier,
            "name": self.named,
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

    def branches(self, eqn: JaxprEqn, flows: list[Flow], scope: str) -> list[Flow]:
        # The predicate is left out: weights that data chose among are weights.
        results = [self.walk(branch, flows[1:], scope) for branch in bodies(eqn)]
        return [_join(outs) for outs in zip(*results, strict=True)]

    def barrier(self, eqn: JaxprEqn, flows: list[Flow], scope: str) -> list[Flow]:
        del eqn
        error = Flow(data=True, is_error=True, way=frozenset([OUTPUT]))
        return [error] * len(flows) if ERROR in scope else flows

    def named(self, eqn: JaxprEqn, flows: list[Flow], scope: str) -> list[Flow]:
        del scope
        return [flow._replace(data=flow.data or eqn.params["name"] == ACTIVATION) for flow in flows]

    def new_ref(self, eqn: JaxprEqn, flows: list[Flow], scope: str) -> list[Any]:
        del eqn, scope
        return [Ref(flows[0])]

    def used_ref(self, eqn: JaxprEqn, flows: list[Any], scope: str) -> list[Flow]:
        del scope
        ref, before = flows[0], flows[0].flow
        if eqn.primitive.name != "get":
            ref.flow = _join([before, flows[1]])
        return [before] * len(eqn.outvars)

    def primitive(self, eqn: JaxprEqn, flows: list[Flow], scope: str) -> Flow:
        name = eqn.primitive.name
        out = _join(flows)._replace(data=any(flow.data for flow in flows[CHOICES.get(name, slice(None))]))
        if name not in ("add_any", *_SAME):
            out = out._replace(ways=NONE)
        if CHOICE in scope and not out.is_error:
            return out._replace(data=False)  # weights that data chose, where a rule takes them for weights
        out = Flow(data=True) if MODULATED in scope else out._replace(is_error=out.is_error or DIFFERENCE in scope)
        if (DIRECT in scope and out.is_error) or DIFFERENCE in scope:
            tap = _TAP.findall(scope)
            return self.passed(out, "direct", frozenset(tap[-1:]) or frozenset(["?"]), way=NONE)
        if name not in CONTRACTIONS or is_pointwise(eqn, flows):
            return out
        if INNER in scope or (out.is_error and LOCAL in scope):
            return out  # a weight gradient, even where the input was a parameter; or inside a layer of two factors
        if out.is_error:
            weights = NONE.union(*(flow.names for flow in flows if flow.is_weight))
            return self.passed(out, "rule" if TRANSPORT in scope else "weights", weights, way=out.way)
        covered = FORWARD in scope
        if covered or out.data:
            left, right, *_ = flows
            _ = self.use(left, right, covered) or self.use(right, left, covered)
        # What leaves a layer with feedback is an activation, even if no data went in.
        return out._replace(data=out.data or covered)

    def use(self, x: Flow, w: Flow, covered: bool) -> bool:
        """Records a contraction whose second operand is the weights; in a layer with feedback the first may be, too."""
        if not w.is_weight or (x.is_weight and not covered):
            return False
        before = self.uses.get(w.names, Use(w.names, first=True))
        self.uses[w.names] = before._replace(first=before.first and not x.names)
        return True

    def passed(self, out: Flow, kind: str, names: frozenset[str], way: frozenset[Passage]) -> Flow:
        passages = frozenset(Passage(kind, name) for name in names)
        self.passages |= passages
        return out._replace(way=way | passages, ways=NONE)

    def scan(self, eqn: JaxprEqn, flows: list[Flow], scope: str) -> list[Flow]:
        body, consts, carries = scan_parts(eqn)
        fixed, carry, xs = flows[:consts], flows[consts : consts + carries], flows[consts + carries :]
        while True:
            outs = self.walk(body, [*fixed, *carry, *xs], scope)
            grown = [_join(pair) for pair in zip(carry, outs[:carries], strict=True)]
            if grown == carry:
                return outs
            carry = grown

    def loop(self, eqn: JaxprEqn, flows: list[Flow], scope: str) -> list[Flow]:
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


def is_pointwise(eqn: JaxprEqn, flows: Sequence[Any]) -> bool:
    """Whether a product takes weights entry by entry, as a norm's scale: all their axes are batch axes."""
    if eqn.primitive.name != "dot_general":
        return False
    batch = eqn.params["dimension_numbers"][1]
    avals: list[Any] = [var.aval for var in eqn.invars]
    return any(flow.is_weight and len(b) == a.ndim for flow, b, a in zip(flows, batch, avals, strict=True))


def _join(flows: Sequence[Flow]) -> Flow:
    return Flow(
        NONE.union(*(flow.names for flow in flows)),
        any(flow.data for flow in flows),
        any(flow.is_error for flow in flows),
        NONE.union(*(flow.way for flow in flows)),
        NONE.union(*(flow.summands for flow in flows)),
    )
