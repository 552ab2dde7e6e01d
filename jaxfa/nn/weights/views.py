"""How a rule sees a layer's kernel: as ``(n, m)`` or ``(window..., n, m)``, and the layer's operation to match.

A rule is written for an operation ``y = op(x, w)`` whose weights count their outputs on the last axis, as ``y`` does.
Layers with other kernels are turned to that form; where a kernel has batch axes or groups, each index is a layer of its
own, with a feedback of its own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfa.base import Operation


class Call(NamedTuple):
    """One call of a layer's operation on ``(x, kernel)``, with what stands around these two."""

    operation: Callable[..., jax.Array]
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The layer's own operation."""
        return self.operation(*self.before, x, kernel, *self.after, **dict(self.options))


class Bound(NamedTuple):
    """A call in a rule's terms.

    Attributes:
      op: for one index of the batch axes, ``(x, w) -> y`` with any number of outputs, which come last.
      split: the layer's input with its batch axes first.
      join: the results, batch axes first, as the layer's output.
    """

    op: Operation
    split: Callable[[jax.Array], jax.Array]
    join: Callable[[jax.Array], jax.Array]


class Whole(NamedTuple):
    """The kernel as it is, but for the order of its axes."""

    permutation: tuple[int, ...]
    batch: int = 0

    def matrices(self, kernel: jax.Array) -> jax.Array:
        return kernel.transpose(self.permutation)

    def bind(self, call: Call, x: jax.Array) -> Bound:
        del x
        inverse = tuple(sorted(range(len(self.permutation)), key=self.permutation.__getitem__))
        return Bound(lambda x, w: call(x, w.transpose(inverse)), _same, _same)


class Groups(NamedTuple):
    """The kernel of a convolution in groups: a convolution for each of them."""

    groups: int
    batch: int = 1

    def matrices(self, kernel: jax.Array) -> jax.Array:
        *window, n, m = kernel.shape
        return jnp.moveaxis(kernel.reshape(*window, n, self.groups, m // self.groups), -2, 0)

    def bind(self, call: Call, x: jax.Array) -> Bound:
        del x
        one = call._replace(options=(*call.options, ("feature_group_count", 1)))  # in the place of the layer's own

        def split(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(*x.shape[:-1], self.groups, -1), -2, 0)

        def join(y: jax.Array) -> jax.Array:
            return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], -1)

        return Bound(one.__call__, split, join)


class Factorised(NamedTuple):
    """A kernel of factors, which the layer's operation takes as they are."""

    batch: int = 0

    def matrices(self, kernel: Any) -> Any:
        return kernel

    def bind(self, call: Call, x: jax.Array) -> Bound:
        del x
        return Bound(call.__call__, _same, _same)


class Matrices(NamedTuple):
    """A kernel of many axes as matrices ``(inputs, outputs)``, one for each index of its batch axes.

    Attributes:
      permutation: the kernel's axes, first the batch, then the inputs, then the outputs.
      permuted: their sizes, in that order.
      batch: how many are batch axes.
      outputs: how many are outputs.
      subscripts: an einsum's, ``"input,kernel->result"``; None for a ``dot_general``.
    """

    permutation: tuple[int, ...]
    permuted: tuple[int, ...]
    batch: int
    outputs: int
    subscripts: str | None = None

    def matrices(self, kernel: jax.Array) -> jax.Array:
        inputs, outputs = self._sizes()
        matrices = (*self.permuted[: self.batch], math.prod(inputs), math.prod(outputs))
        return kernel.transpose(self.permutation).reshape(matrices)

    def bind(self, call: Call, x: jax.Array) -> Bound:
        inputs, outputs = self._sizes()
        x_batch, y_axes = self._axes(call, x.ndim)
        inverse = tuple(sorted(range(len(self.permutation)), key=self.permutation.__getitem__))

        def op(x: jax.Array, w: jax.Array) -> jax.Array:
            # All the operation minds of the outputs is their letters: r of them lie on the first output's axis.
            count = outputs if w.shape[-1] == math.prod(outputs) else (w.shape[-1], *[1] * (self.outputs - 1))
            kernel = w.reshape(*[1] * self.batch, *inputs, *count).transpose(inverse)
            y = call(jnp.expand_dims(x, x_batch), kernel)
            y = y.transpose(y_axes(y.ndim))
            return y.reshape(*y.shape[self.batch : y.ndim - self.outputs], -1)

        def join(y: jax.Array) -> jax.Array:
            y = y.reshape(*y.shape[:-1], *outputs)
            axes = y_axes(y.ndim)
            return y.transpose(sorted(range(y.ndim), key=axes.__getitem__))

        return Bound(op, lambda x: jnp.moveaxis(x, x_batch, range(self.batch)), join)

    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.permuted[self.batch : -self.outputs], self.permuted[-self.outputs :]

    def _axes(self, call: Call, ndim: int) -> tuple[tuple[int, ...], Callable[[int], tuple[int, ...]]]:
        """The batch axes of ``x``; and the axes of ``y`` with the batch first and the outputs last."""
        if self.subscripts is None:
            dimension_numbers = call.after[0] if call.after else dict(call.options)["dimension_numbers"]
            return tuple(dimension_numbers[1][0]), lambda ndim: tuple(range(ndim))
        operands, _, result = self.subscripts.partition("->")
        lhs, kernel = operands.split(",")
        letters = [kernel[i] for i in self.permutation]
        first, last = letters[: self.batch], letters[-self.outputs :]

        def y_axes(ndim: int) -> tuple[int, ...]:
            batch, outputs = _positions(result, first, ndim), _positions(result, last, ndim)
            rest = (axis for axis in range(ndim) if axis not in batch + outputs)
            return (*batch, *rest, *outputs)

        return _positions(lhs, first, ndim), y_axes


View = Whole | Groups | Matrices | Factorised


def of_einsum(subscripts: str, shape: tuple[int, ...]) -> Whole | Matrices:
    """How to see an einsum's kernel; as it is, where an ellipsis hides its axes or none of them is an output."""
    whole = Whole(tuple(range(len(shape))))
    operands, _, result = subscripts.replace(" ", "").partition("->")
    lhs, kernel = operands.split(",")
    if len(set(kernel)) != len(shape) or "." in kernel:
        return whole
    batch = [i for i, axis in enumerate(kernel) if axis in lhs and axis in result]
    inputs = [i for i, axis in enumerate(kernel) if axis not in result]
    outputs = [i for i, axis in enumerate(kernel) if axis in result and axis not in lhs]
    if not outputs:
        return whole
    order = (*batch, *inputs, *outputs)
    return Matrices(order, tuple(shape[i] for i in order), len(batch), len(outputs), f"{lhs},{kernel}->{result}")


def bias_shape(view: Matrices, ndim: int) -> tuple[int, ...]:
    """The shape in which an einsum's bias, one number for each output, is added to a result of so many axes."""
    operands, _, result = str(view.subscripts).partition("->")
    kernel = operands.split(",")[1]
    shape = [1] * ndim
    for axis, size in list(zip(view.permutation, view.permuted, strict=True))[-view.outputs :]:
        shape[_positions(result, [kernel[axis]], ndim)[0]] = size
    return tuple(shape)


def roles(view: Any) -> Any:
    """What a view says of its kernel alone, whatever the input's and the result's axes are called."""
    return view._replace(subscripts=None) if isinstance(view, Matrices) else view


def _positions(spec: str, letters: list[str], ndim: int) -> tuple[int, ...]:
    head, _, tail = spec.partition("...")
    where = {letter: i for i, letter in enumerate(head)}
    where |= {letter: ndim - len(tail) + i for i, letter in enumerate(tail)}
    return tuple(where[letter] for letter in letters)


def _same(array: jax.Array) -> jax.Array:
    return array
