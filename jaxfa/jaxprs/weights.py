"""Weights on their way through a traced program, from a parameter to where an activation is contracted with them.

A layer that JAX's own operations make, such as ``x @ w``, an einsum or a tied head, has no place where a rule could be
put; the program that the model traces to has one, the contraction. What stands there is seldom the parameter itself: it
is transposed, cast, masked, one of a stack, or chosen by an index. A :class:`Weight` says which function of which
parameter it is, so that the contraction is linear in something that feedback can be made for.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

# What moves the entries of an array and changes none.
_MOVES = ("transpose", "reshape", "squeeze", "slice", "rev", "copy")
# What changes every entry alike, whatever the shape.
_SCALES = ("convert_element_type", "neg", "reduce_precision", "mul", "div")
# What is linear in one operand where the others are constants.
_LINEAR = ("mul", "div", "select_n", "dynamic_slice", "gather", "dot_general", "broadcast_in_dim", "reduce_sum")


class Weight(NamedTuple):
    """A value that is linear in a base, which is made of parameters alone.

    Attributes:
      name: the parameter, of several the largest.
      mark: which function of the parameters the base is; the same mark, the same base, in every call.
      levels: for each ``scan`` that runs over a stack of bases, the mark of the stack.
      shape: the base's shape, in here.
      dtype: the parameter's.
      root: makes the base with all layers of its stacks in front; None if it cannot be made outside of a loop.
      here: the base in here.
      tail: ``(base, *constants) -> value``; None where an activation changes the weights.
      constants: what the tail takes.
      thin: whether the tail acts on every entry alike, and so on a base with another number of outputs.
      axes: for each axis of the value, the base's axes that lie on it.
    """

    name: str
    mark: str
    levels: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    root: Callable[[], jax.Array] | None
    here: Callable[[], jax.Array]
    tail: Callable[..., jax.Array] | None
    constants: tuple["Value", ...]
    thin: bool
    axes: tuple[frozenset[int], ...]

    def stacked(self) -> jax.Array:
        """The base with all layers of its stacks in front, where it can be made."""
        assert self.root is not None
        return self.root()

    def valued(self, w: Any, *constants: Any) -> jax.Array:
        """The value that a base makes, where no activation changes it."""
        assert self.tail is not None
        return self.tail(w, *constants)


class Value(NamedTuple):
    """What is known of a value in a program.

    Attributes:
      here: the value in here; None while a program is only looked through.
      full: makes it, if it is made of parameters and constants outside of loops.
      data: whether it depends on the data.
      learns: whether it depends on a parameter.
      weight: what it is as weights, if it is any.
      products: the contractions of parameters with parameters, by their ids, that it is made of.
    """

    here: Any = None
    full: Callable[[], Any] | None = None
    data: bool = False
    learns: bool = False
    weight: Weight | None = None
    products: frozenset[int] = frozenset()

    def made(self) -> Any:
        """The value, where it is made of parameters and constants."""
        assert self.full is not None
        return self.full()


def base(name: str, mark: str, aval: Any, here: Callable[[], Any], root: Callable[[], Any] | None) -> Weight:
    """A value as its own base."""
    axes = tuple(frozenset([axis]) for axis in range(len(aval.shape)))
    return Weight(name, mark, (), aval.shape, aval.dtype, root, here, lambda w: w, (), True, axes)


def over_stack(run: Callable[..., Any], levels: tuple[str, ...]) -> Callable[..., Any]:
    """A function of one layer's weights as one of those of all layers of its stacks."""
    for _ in levels:
        run = jax.vmap(run)
    return run


def shape_of(var: Any) -> tuple[int, ...]:
    """The shape of a variable of a program."""
    return tuple(var.aval.shape)


def is_float(var: Any) -> bool:
    """Whether a variable of a program is of floats, which alone have derivatives."""
    return hasattr(var.aval, "dtype") and bool(jnp.issubdtype(var.aval.dtype, jnp.inexact))


def moved(eqn: JaxprEqn, ins: list[Value], bind: Callable[..., Any]) -> Weight | None:
    """What the result of an equation is as weights, where one operand is; None if it is not linear in that.

    Args:
      eqn: an equation with one result.
      ins: its operands.
      bind: ``(*operands) -> result``.
    """
    [at] = [i for i, value in enumerate(ins) if value.weight is not None and value.learns]
    weight: Any = ins[at].weight
    others = tuple(value for i, value in enumerate(ins) if i != at)
    name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])

    def step(w: Any, *constants: Any) -> Any:
        return bind(*constants[:at], w, *constants[at:])

    if any(value.learns for value in others):
        # Scaled by an activation: where that is contracted, too, nobody can follow it.
        scaled = name == "mul" or (name == "div" and at == 0)
        return weight._replace(tail=None, thin=False) if scaled else None
    if name in _MOVES or (name == "broadcast_in_dim" and math.prod(shape) == math.prod(shape_of(eqn.invars[at]))):
        if weight.thin:
            return _moved_base(weight, eqn, step)
    elif name not in _SCALES + _LINEAR or (name == "div" and at == 1):
        return None
    axes = _axes(eqn, at, weight.axes)
    thin = weight.thin and name in _SCALES and all(shape_of(v) == () for i, v in enumerate(eqn.invars) if i != at)
    if weight.tail is None:
        return weight._replace(axes=axes)
    before, count = weight.tail, len(weight.constants)

    def tail(w: jax.Array, *constants: Any) -> jax.Array:
        return step(before(w, *constants[:count]), *constants[count:])

    return weight._replace(tail=tail, constants=(*weight.constants, *others), thin=thin, axes=axes)


def _moved_base(weight: Weight, eqn: JaxprEqn, step: Callable[[Any], Any]) -> Weight:
    """The same tail on a base whose entries have moved."""
    root, shape = weight.root, shape_of(eqn.outvars[0])

    def stacked() -> jax.Array:
        return over_stack(step, weight.levels)(weight.stacked())

    return weight._replace(
        mark=marked(eqn, weight.mark),
        shape=shape,
        root=root and stacked,
        here=lambda: step(weight.here()),
        axes=tuple(frozenset([axis]) for axis in range(len(shape))),
    )


def marked(eqn: JaxprEqn, *marks: str) -> str:
    """The mark of an equation's result, from its operands': short, and the same in every process."""
    kinds = bool | int | float | str | tuple
    settings = sorted((key, repr(value)) for key, value in eqn.params.items() if isinstance(value, kinds))
    told = repr((eqn.primitive.name, settings, [getattr(var.aval, "shape", None) for var in eqn.outvars], marks))
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _axes(eqn: JaxprEqn, at: int, axes: tuple[frozenset[int], ...]) -> tuple[frozenset[int], ...]:
    """The axes of an equation's result on which those of one operand's base lie."""
    params, none = eqn.params, frozenset[int]()
    shape = shape_of(eqn.outvars[0])
    found: Any = axes
    match eqn.primitive.name:
        case "transpose":
            found = [axes[axis] for axis in params["permutation"]]
        case "squeeze":
            found = [axis for i, axis in enumerate(axes) if i not in params["dimensions"]]
        case "reduce_sum":
            found = [axis for i, axis in enumerate(axes) if i not in params["axes"]]
        case "broadcast_in_dim":
            lies = dict(zip(params["broadcast_dimensions"], axes, strict=True))
            found = [lies.get(axis, none) for axis in range(len(shape))]
        case "reshape":
            found = _regrouped(shape_of(eqn.invars[at]), shape, axes)
        case "gather":
            numbers = params["dimension_numbers"]
            gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
            left = iter([axis for i, axis in enumerate(axes) if i not in gone])
            found = [next(left) if i in numbers.offset_dims else none for i in range(len(shape))]
        case "dot_general":
            contracted, batch = (sides[at] for sides in params["dimension_numbers"])
            first = [axes[axis] for axis in batch]
            own = [axis for i, axis in enumerate(axes) if i not in (*contracted, *batch)]
            rest = [none] * (len(shape) - len(first) - len(own))
            found = [*first, *own, *rest] if at == 0 else [*first, *rest, *own]
    return tuple(found)


def _regrouped(before: Any, after: Any, axes: tuple[frozenset[int], ...]) -> tuple[frozenset[int], ...]:
    """Axes after a reshape: each new one has all those of the group of old ones that it is made of."""
    found: list[frozenset[int]] = []
    i = j = 0
    while j < len(after):
        group, new, old = frozenset[int](), after[j], 1
        start, j = j, j + 1
        while old != new:
            if old < new:
                group, old, i = group | axes[i], old * before[i], i + 1
            else:
                new, j = new * after[j], j + 1
        found += [group] * (j - start)
    return tuple(found)
