"""Follows the error through a traced gradient: which rule, if any, carried it, and through whose weights.

A gradient is a program. Every value in it is labelled with the parameters it was made of, whether it depends on the
data, and how an error came to it. A contraction of an error with something made of parameters alone is how an error
passes a layer; inside one of the two primitives of :mod:`jaxfa.ops` that is the rule at work, outside it is
backpropagation. So what this finds is what the program does, whatever the modules are called.

Its limits: a contraction is JAX's ``dot_general`` or convolution. One that is spelled out as a product and a sum, a
linear solve or an FFT, and one inside a Pallas kernel, a callback or another opaque primitive, are not seen; nor are
weights that were multiplied by data or looked up by it (a mixture's experts), which look like activations: these
:mod:`jaxfa.jaxprs.follow` tells apart, in the forward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters.partial_eval import dce_jaxpr

from jaxfa.jaxprs.flows import ERROR, Flow, Passage, Use, Walker
from jaxfa.jaxprs.versions import opened


class Outputs(NamedTuple):
    """What a network returns, where not all of it is the error's source.

    Attributes:
      error: the arrays whose error it learns from.
      beside: arrays that other terms of a loss may read.
    """

    error: Any
    beside: Any


class Audit(NamedTuple):
    """What a gradient program does.

    Attributes:
      uses: the forward pass's contractions with weights, in order.
      arrivals: for each parameter, every passage on an error's ways from the output to that parameter's gradient.
        A delivery starts a new way. The output alone: the error came exactly, through no weights.
      passages: every passage in the program.
      beside: the arrivals of errors that set out from what is beside the output; of parameters that none reaches, none.
      ways: for each parameter the same as ``arrivals``, for each of its uses by itself.
    """

    uses: list[Use]
    arrivals: dict[str, frozenset[Passage]]
    passages: frozenset[Passage]
    beside: dict[str, frozenset[Passage]]
    ways: dict[str, frozenset[frozenset[Passage]]]


def audit(forward: Callable[..., Any], params: Any, rest: Any, data: Any, names: tuple[Any, Any]) -> Audit:
    """Traces a network's gradient and reports how the error reaches every parameter.

    Args:
      forward: ``(params, rest, data) -> outputs``, a pure function; of :class:`Outputs` one part is the source.
      params: the tree that the gradient is taken in, arrays or ``ShapeDtypeStruct``s.
      rest: feedback and state.
      data: one batch.
      names: two trees of strings, shaped as ``params`` and ``rest``: the parameter that each array stands for, ``""``
        for none. A feedback goes by the name of the weights whose place it takes.

    Returns:
      An :class:`Audit`. Kernels written outside JAX's own primitives (Pallas, callbacks) are opaque to it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxfa.jaxprs.audit import audit
      >>> result = audit(lambda w, rest, x: x @ w[0] @ w[1], [jnp.ones((3, 4)), jnp.ones((4, 2))], (),
      ...                jnp.ones((5, 3)), names=(["first", "last"], ()))
      >>> sorted(result.arrivals["first"])
      [Passage(kind='output', name=''), Passage(kind='weights', name='last')]
    """

    kinds: list[bool] = []

    def program(params: Any, rest: Any, data: Any) -> Any:
        outputs, vjp = jax.vjp(lambda params: list(map(_floats, _parts(forward(params, rest, data)))), params)
        with jax.named_scope(ERROR):
            error, beside = lax.optimization_barrier(outputs)
        kinds.append(bool(beside))
        none = jax.tree.map(jnp.zeros_like, outputs)
        # With the outputs, lest the forward pass be taken for dead.
        return vjp([error, none[1]]), vjp([none[0], beside]) if beside else (), outputs

    traced = jax.make_jaxpr(program)(params, rest, data)
    walker, ends = _walked(traced, [*jax.tree.leaves(names), *[None] * len(jax.tree.leaves(data))])
    keys = jax.tree.leaves(names[0])
    own, others = dict(zip(keys, ends, strict=False)), ends[len(keys) :] if kinds[0] else []
    arrivals = {name: end.way for name, end in own.items()}
    ways = {name: end.summands for name, end in own.items()}
    beside = {name: end.way for name, end in zip(keys, others, strict=False)}
    return Audit(list(walker.uses.values()), arrivals, frozenset(walker.passages), beside, ways)


def uses(program: Any, names: Sequence[str | None]) -> list[Use]:
    """The uses alone, of which the forward pass tells: a traced one whose arguments have these names, data None."""
    return list(_walked(program, names)[0].uses.values())


def _walked(program: Any, names: Sequence[str | None]) -> tuple["Walker", Any]:
    # Without what nothing uses: a tap ignores the error that comes from above.
    jaxpr, _ = dce_jaxpr(opened(program), [True] * len(opened(program).outvars), instantiate=True)
    flows = [Flow(frozenset(filter(None, [name])), data=name is None) for name in names]
    walker = Walker()
    return walker, walker.walk(jaxpr, flows, "")


def _parts(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, Outputs) else Outputs(outputs, ())


def _floats(outputs: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
