"""Traces a model's gradient for the audit, with the model's own names for what is in it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import DictKey

from jaxfa.base import is_direct
from jaxfa.jaxprs.audit import Audit, audit, uses
from jaxfa.jaxprs.flows import Use
from jaxfa.jaxprs.follow import with_local_products
from jaxfa.nn.contraction import audited
from jaxfa.nn.describe import layer_name
from jaxfa.nn.leaves import error_in
from jaxfa.nn.program import Example, Program, method_of
from jaxfa.nn.tap import taps_of
from jaxfa.nn.variables import Feedback, structs


def uses_of(model: nnx.Module, method: str, example: Example) -> dict[str, Use]:
    """The weight contractions of a model's forward pass, by the path of the layer that owns the weights."""
    found = uses(*_traced(model, method, example))
    # A model that is itself a layer has the empty path.
    return {"" if name == "kernel" else layer_name(name): use for use in found for name in sorted(use.weights)}


def trace(model: nnx.Module, method: str, example: Example, *, local: bool = False) -> Audit:
    """Audits the gradient of all outputs of a model; ``local``: see :func:`traced`."""
    return _audit(_traced(model, method, example), local=local)


def _audit(found: tuple[Any, ...], *, local: bool) -> Audit:
    forward, *rest = found
    return audit(with_local_products(forward) if local else forward, *rest)


def _traced(
    model: nnx.Module, method: str, example: Example, *, skip: int = 0, of: Callable[[Any], Any] | None = None
) -> tuple[Any, ...]:
    """What an audit asks for: a function, its parameters, its other state, its data, and the names of the first two.

    The first ``skip`` segments of every path are left out of the names; ``of`` says which outputs are meant.
    """
    program = Program(model, method_of(method), *example.arguments(), _own(nnx.Param), _own(Feedback), _own(object))
    params, feedback, rest, data = structs(program.states)

    def forward(params: Any, states: Any, data: Any) -> Any:
        outputs = program.run(params, *states, data, prepare=audited)[0]
        return outputs if of is None else of(program.returned(outputs))

    def own(path: Any, leaf: Any) -> str:
        return "/".join(_segments(path)[1 + skip :]) if jnp.issubdtype(leaf.dtype, jnp.inexact) else ""

    def replaced(path: Any, _: Any) -> str:
        if _segments(path)[1] == "own" and skip:
            return _segments(path)[2]
        *owner, holder, _ = _segments(path)[1 + skip :]
        return "" if holder.startswith("feedback_tap") else "/".join([*owner, "kernel"])

    # State is named, too: weights that are frozen in a variable of another type carry errors all the same.
    names_of = jax.tree_util.tree_map_with_path
    names = names_of(own, params), (names_of(replaced, feedback), names_of(own, rest))
    return forward, params, (feedback, rest), data, names


def _own(kind: type) -> Any:
    """The filter of a model's own state of a kind, not its arguments'."""
    return lambda path, value: path[0] == 0 and isinstance(value, kind)


def weights_above(model: nnx.Module, method: str, tapped: Any, source: str, example: Example) -> list[str]:
    """The weights through which the error comes to a rule's source: where a shift of its activation would be felt."""
    program = Program(model, method_of(method), *example.arguments(), _own(object))

    def forward(shift: jax.Array, state: Any, data: Any) -> Any:
        def prepare(copy: Any) -> None:
            taps_of(copy)[source].shift = nnx.Variable({"": shift})

        return program.run(state, data, prepare=prepare)[0]

    def own(path: Any, leaf: Any) -> str:
        return "/".join(_segments(path)[1:]) if jnp.issubdtype(leaf.dtype, jnp.inexact) else ""

    state, data = structs(program.states)
    found = audit(forward, tapped, state, data, (source, jax.tree_util.tree_map_with_path(own, state)))
    return [step.name for step in found.arrivals[source] if step.kind == "weights"]


def traced(aligned: Any, example: Example, *, local: bool = False) -> Audit:
    """The audit of an attached model.

    Args:
      aligned: the model.
      example: a call of it.
      local: whether to take products of parameters alone, such as a spectral norm, for a part of the weights.
    """
    # Layer-wise rules are in the model itself; a direct one, and a model's own contractions, need its root.
    if is_direct(aligned.rule):
        of, copy = partial(error_in, logits=aligned.logits), nnx.clone(aligned)
        copy.is_local = local
        return _audit(_traced(copy, "__call__", example, skip=1, of=of), local=False)
    if aligned.own:
        return _audit(_traced(aligned, "__call__", example, skip=1), local=local)
    return trace(aligned.model, aligned.method, example, local=local)


def _segments(path: Any) -> list[str]:
    return [str(key.key) for key in path if isinstance(key, DictKey)]
