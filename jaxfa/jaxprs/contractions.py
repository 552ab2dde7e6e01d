"""What is a contraction of an activation with weights, and what is not."""

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from jaxfa.jaxprs.versions import opened
from jaxfa.jaxprs.weights import Value, Weight, base, marked, moved
from jaxfa.ops import FORWARD

CONTRACTIONS = ("dot_general", "conv_general_dilated")
_LAYER = re.compile(r"layer\[(.*?)\]")


class Contraction(NamedTuple):
    """An activation contracted with weights.

    Attributes:
      eqn: the equation.
      at: which operand the weights are.
      weight: the weights.
      x: the activation.
    """

    eqn: JaxprEqn
    at: int
    weight: Weight
    x: Value

    def roles(self) -> tuple[frozenset[int], frozenset[int]]:
        """The base's axes over which it contracts, and those that count outputs."""
        params, at, axes = self.eqn.params, self.at, self.weight.axes
        none = frozenset[int]()
        if self.eqn.primitive.name == "dot_general":
            contracted, batch = (sides[at] for sides in params["dimension_numbers"])
            free = [axis for axis in range(len(axes)) if axis not in (*contracted, *batch)]
            return none.union(*(axes[i] for i in contracted)), none.union(*(axes[i] for i in free))
        outputs, *inputs = params["dimension_numbers"].rhs_spec if at == 1 else params["dimension_numbers"].lhs_spec
        return none.union(*(axes[i] for i in inputs)), axes[outputs]


def contraction(eqn: JaxprEqn, ins: list[Value]) -> Contraction | None:
    """The contraction of an activation with weights that an equation is, if it is any.

    Weights that data chose, such as an expert's, are weights if a matrix of them was chosen: if both what is contracted
    and what remains are axes of the parameter. What is looked up in a table is an activation.
    """
    if eqn.primitive.name not in CONTRACTIONS:
        return None
    for at in (1, 0):
        w, x = ins[at], ins[1 - at]
        if w.weight is None or not (x.learns and x.data):
            continue
        found = Contraction(eqn, at, w.weight, x)
        contracted, outputs = found.roles()
        pointwise = not contracted and not outputs
        if not pointwise and (not w.data or (contracted and outputs)):
            return found
    return None


def weight_of(eqn: JaxprEqn, ins: list[Value], out: Value, bind: Callable[..., Any]) -> Weight | None:
    """What an equation's result is as weights."""
    weights = [value.weight for value in ins if value.weight is not None]
    if len(weights) == 1:
        found = moved(eqn, ins, bind)
        if found is not None:
            return found
    if out.data or not weights:
        return None
    # A function of parameters alone, such as a norm: the derivative of weights that are made so is their own.
    largest = max(weights, key=lambda weight: len(weight.shape))
    mark = marked(eqn, *(weight.mark for weight in weights))
    made = base(largest.name, mark, eqn.outvars[0].aval, lambda: out.here, out.full)
    return made._replace(dtype=largest.dtype)


def scaled_and_summed(eqn: JaxprEqn, ins: list[Value]) -> str | None:
    """The name of weights whose products with activations this sums over one of their axes, while another remains."""
    weight = ins[0].weight if eqn.primitive.name == "reduce_sum" else None
    if weight is None or weight.tail is not None:
        return None
    gone = [weight.axes[axis] for axis in eqn.params["axes"]]
    kept = [axes for i, axes in enumerate(weight.axes) if i not in eqn.params["axes"]]
    return weight.name if any(gone) and any(kept) else None


def layer_scope(path: str) -> str:
    """The name scope of a layer that may get feedback."""
    return f"layer[{path}]"


def is_covered(eqn: JaxprEqn, layers: Collection[str]) -> bool:
    """Whether an equation is of a layer that has feedback already, or that is one of these, by path, in its scope."""
    if eqn.primitive.name == "custom_vjp_call":
        body = opened(eqn.params["call_jaxpr"])
        return any(FORWARD in str(inner.source_info.name_stack) for inner in body.eqns)
    return bool(layers) and any(path in layers for path in _LAYER.findall(str(eqn.source_info.name_stack)))
