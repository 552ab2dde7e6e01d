"""Traces a model's gradient for the audit, with the model's own names for what is in it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import DictKey

from jaxfa.base import is_direct
from jaxfa.jaxprs.audit import Audit, Outputs, audit
from jaxfa.jaxprs.follow import with_local_products
from jaxfa.nn.model.leaves import error_in, named_floats
from jaxfa.nn.model.program import Example, Program, method_of
from jaxfa.nn.model.variables import Feedback, structs, value_of
from jaxfa.nn.taps.tap import plain_of, taps_of
from jaxfa.nn.weights.contraction import audited
from jaxfa.paths import path_name

_STATE = (nnx.Param, nnx.BatchStat, nnx.Cache, nnx.RngState, Feedback)


def trace(model: nnx.Module, method: str, example: Example, *, local: bool = False) -> Audit:
    """Audits the gradient of all outputs of a model; ``local``: see :func:`traced`."""
    return _audit(_traced(model, method, example), local=local)


def _audit(found: tuple[Any, ...], *, local: bool) -> Audit:
    forward, *rest = found
    return audit(with_local_products(forward) if local else forward, *rest)


def _traced(
    model: nnx.Module, method: str, example: Example, *, skip: int = 0, of: Callable[[Any], Outputs] | None = None
) -> tuple[Any, ...]:
    """What an audit asks for: a function, its parameters, its other state, its data, and the names of the first two.

    The first ``skip`` segments of every path are left out of the names; ``of`` sorts what the model returns.
    """
    program = Program(model, method_of(method), *example.arguments(), _own(nnx.Param), _own(Feedback), _own(object))
    params, feedback, rest, data = structs(program.states)

    def forward(params: Any, states: Any, data: Any) -> Any:
        outputs, changed = program.run(params, *states, data, prepare=audited)
        returned, attributes = nnx.merge(program.result, outputs)
        error, beside = of(returned) if of else (_arrays(returned), [])
        return Outputs(error, [beside, _arrays(attributes), _written(changed)])

    def own(path: Any, leaf: Any) -> str:
        return "/".join(_segments(path)[1 + skip :]) if jnp.issubdtype(leaf.dtype, jnp.inexact) else ""

    def replaced(path: Any, _: Any) -> str:
        if _segments(path)[1] == "own" and skip:
            return _segments(path)[2]
        segments = _segments(path)[1 + skip :]
        of_tap = any(
            segment.startswith("feedback_tap") for segment in segments
        )  # what comes after may be a tree's keys
        return "" if of_tap else "/".join([*segments[:-2], "kernel"])

    # State is named, too: weights that are frozen in a variable of another type carry errors all the same.
    names_of = jax.tree_util.tree_map_with_path
    names = names_of(own, params), (names_of(replaced, feedback), names_of(own, rest))
    return forward, params, (feedback, rest), data, names


def _arrays(tree: Any) -> list[Any]:
    return jax.tree.leaves(nnx.split((tree,))[1])


def _written(changed: Any) -> list[Any]:
    """The state that a model writes and a loss may read, such as a penalty; not its statistics and caches."""
    return [
        value_of(leaf) for path, leaf in nnx.to_flat_state(changed) if path[0] == 0 and not isinstance(leaf, _STATE)
    ]


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


def traced(attached: Any, example: Example, *, local: bool = False) -> Audit:
    """The audit of an attached model.

    Args:
      attached: the model.
      example: a call of it.
      local: whether to take products of parameters alone, such as a spectral norm, for a part of the weights.
    """
    # Layer-wise rules are in the model itself; a direct one, and a model's own contractions, need its root.
    if is_direct(attached.rule):
        if local:
            attached = nnx.clone(attached)
            attached.is_local = True
        of = partial(_sorted, attached.logits)
        return _audit(_traced(attached, "__call__", example, skip=1, of=of), local=False)
    if attached.own:
        return _audit(_traced(attached, "__call__", example, skip=1), local=local)
    return trace(attached.model, attached.method, example, local=local)


def _sorted(logits: Any, returned: Any) -> Outputs:
    """What a model returns: the logits, and what is beside them."""
    error = [leaf for leaf in named_floats(returned if logits is None else logits(returned)).values() if leaf.ndim]
    of_error = set(map(id, error))
    beside = [leaf for leaf in named_floats(returned).values() if id(leaf) not in of_error]
    return Outputs(error_in(returned, logits), beside)


def terms_beside(attached: Any, example: Example) -> set[str]:
    """The parameters that numbers beside the logits would teach without the rule: what a model writes or returns."""
    of = partial(_sorted, attached.logits)
    forward, *rest = _traced(plain_of(attached.model), attached.method, example, of=of)

    def terms(*args: Any) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(forward(*args).beside) if not leaf.ndim]

    return {name for name, way in audit(terms, *rest).arrivals.items() if way}


def _segments(path: Any) -> list[str]:
    return [path_name([key.key]) for key in path if isinstance(key, DictKey)]
