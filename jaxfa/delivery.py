"""The output error for taps that read it in their backward pass, wherever in a program they are.

A wire (:func:`jaxfa.direct`) has to be carried by the forward pass from tap to tap. Here nothing is: while the program
is linearised every tap holds a mutable array (a ref), whose value it will read in its backward. When the output's
error is known a new ref with it is put in that one's place. So a tap may be inside any transformation, and no ref
crosses from a forward to a backward pass, which JAX would refuse.

JAX's documentation, "Ref: mutable arrays for data plumbing and memory control", https://docs.jax.dev/en/latest/array_refs.html
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxfa.base import DirectFeedback
from jaxfa.ops import check_family, deliver, deliver_for_all
from jaxfa.order import one_by_one
from jaxfa.varying import vary_alike, zeros_of

Run = Callable[[Any, Any], Any]  # (tree, ref) -> outputs


@dataclasses.dataclass(frozen=True)
class At:
    """How an error is delivered at a place, which a refusal names with a hint."""

    how: Callable[..., Any]
    place: str
    hint: str

    def __call__(self, tree: Any, e: jax.Array) -> Any:
        """What the activation and its feedback learn."""
        try:
            return self.how(tree, e)
        except (TypeError, ValueError) as error:
            raise ValueError(f"At the tap {self.place!r}: {error} {self.hint}".strip()) from error


def other_size(here: tuple[int, ...], example: tuple[int, ...] | None) -> str:
    """What to do about an activation of another size than the example's."""
    if example in (None, here):
        return ""
    return (
        f"An example's activation has the shape {here} here and {example} in the example of attach(); a feedback with "
        f"entries for every position is for one size. Give attach() an example of that size, or pad the batch to the "
        f"example's."
    )


def receive(h: jax.Array, feedback: DirectFeedback, ref: Any, place: str, hint: str = "") -> jax.Array:
    """``h``; its backward ignores the layers above and delivers the error that the ref holds by then."""
    return _received(At(deliver, place, hint), h, feedback, ref)


def receive_for_all(p: jax.Array, feedback: DirectFeedback, ref: Any, place: str, hint: str = "") -> jax.Array:
    """As :func:`receive`, for one activation that all examples have in common: it learns the sum of their errors.

    An example's error is delivered to ``p`` without its leading axes of size 1, in which it may have been broadcast.
    """
    return _received(At(deliver_for_all, place, hint), p, feedback, ref)


def _received(how: Callable[..., Any], h: jax.Array, feedback: DirectFeedback, ref: Any) -> jax.Array:
    check_family(feedback, DirectFeedback, "direct", "jaxfa.linear(x, w, feedback)")
    h, feedback = vary_alike((h, feedback), ref)
    return _receive(how, h, feedback, ref)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _receive(how: Callable[..., Any], h: jax.Array, feedback: Any, ref: Any) -> jax.Array:
    del how, feedback, ref
    return h


def _receive_forward(how: Callable[..., Any], h: jax.Array, feedback: Any, ref: Any) -> tuple[jax.Array, Any]:
    del how
    return h, (h, feedback, ref)


def _receive_backward(how: Callable[..., Any], residuals: Any, _: jax.Array) -> Any:
    h, feedback, ref = residuals
    return *how((h, feedback), ref[...]), None


_receive.defvjp(_receive_forward, _receive_backward)


@jax.custom_vjp
def send(h: jax.Array, ref: Any) -> jax.Array:
    """``h``; its backward writes the error that arrives at it into the ref."""
    del ref
    return h


def _send_forward(h: jax.Array, ref: Any) -> tuple[jax.Array, Any]:
    return h, ref


def _send_backward(ref: Any, error: jax.Array) -> tuple[jax.Array, None]:
    ref[...] = vary_alike(error, ref)
    return error, None


send.defvjp(_send_forward, _send_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hole:
    """Stands in a pullback where the ref with the error will be. One is like another."""


class Error(NamedTuple):
    """How the error of a run is found and read.

    Attributes:
      keep: what of the outputs is kept until their cotangents come; None is nothing.
      of: the error, from what was kept and the cotangents.
      kind: its likely type, or None: for that, or where it is another one, the run is traced once more.
      in_turn: whether taps wait for each other, which saves memory; not where they share a product with the error that
        is smaller than the error, which is made once.
    """

    keep: Callable[[Any], Any]
    of: Callable[[Any, Any], jax.Array]
    kind: Any
    in_turn: bool


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_error(run: Run, error: Error, tree: Any) -> Any:
    """``run(tree, None)``, differentiated as ``run(tree, ref)`` whose ref holds the error in the backward pass.

    Args:
      run: ``(tree, ref) -> outputs``; it may close over no value that is differentiated.
      error: how the error is found.
      tree: what is differentiated.

    Returns:
      The outputs.
    """
    del error
    return run(tree, None)


def _forward(run: Run, error: Error, tree: Any) -> tuple[Any, Any]:
    kind = error.kind
    if kind is None:
        values = jax.tree.map(lambda leaf: leaf.value, tree)
        kind = _kind(error, lambda tree: run(tree, None), values)
    outputs, pullback = _linearised(run, kind, tree)
    if (found := _kind(error, lambda outputs: outputs, outputs)) != kind:
        outputs, pullback = _linearised(run, found, tree)
    return outputs, (pullback, error.keep(outputs))


def _linearised(run: Run, kind: Any, tree: Any) -> tuple[Any, Any]:
    """The outputs, and a pullback with a hole for a ref of that type."""
    ref = jax.new_ref(zeros_of(kind))

    def moving(learning: Any) -> Any:
        return run(jax.tree.map(lambda leaf, own: leaf.value if own is None else own, tree, learning), ref)

    # None of what is not differentiated is, such as the model's input.
    outputs, pullback = jax.vjp(moving, jax.tree.map(lambda leaf: leaf.value if leaf.perturbed else None, tree))
    return outputs, jax.tree.map(lambda leaf: Hole() if leaf is ref else leaf, pullback)


def _kind(error: Error, run: Callable[[Any], Any], tree: Any) -> Any:
    """The type of the error that a run's outputs would have; of what is not computed, no rule can refuse the values."""
    kinds = []

    def look(tree: Any) -> None:
        outputs = run(tree)
        kinds.append(jax.typeof(error.of(error.keep(outputs), outputs)))

    jax.eval_shape(look, tree)
    return kinds[0]


def _backward(run: Run, error: Error, residuals: Any, cotangents: Any) -> Any:
    del run
    (pullback, kept), cotangents = residuals, filled(cotangents)

    def is_hole(leaf: Any) -> bool:
        return isinstance(leaf, Hole)

    def pull(ref: Any) -> Any:
        return jax.tree.map(lambda leaf: ref if is_hole(leaf) else leaf, pullback, is_leaf=is_hole)(cotangents)

    e = error.of(kept, cotangents)
    undifferentiated(_SECOND, e)
    in_turn = error.in_turn and isinstance(e, jax.core.Tracer)
    return one_by_one(pull, jax.new_ref(e)) if in_turn else pull(jax.new_ref(e))


_SECOND = (
    "A pseudo-gradient is the derivative of no function, so that second derivatives (jax.hessian, jax.grad of a "
    "gradient) are none: take the plain network, jaxfa.nn.plain(model), whose derivatives are true."
)


def is_zero(cotangent: Any) -> bool:
    """Whether a cotangent is known to be zero while its program is traced."""
    return isinstance(cotangent, SymbolicZero) or cotangent.dtype == jax.dtypes.float0


def filled(cotangents: Any) -> Any:
    """Cotangents as arrays."""

    def fill(one: Any) -> Any:
        if not is_zero(one):
            return one
        return np.zeros(one.shape, one.dtype) if one.dtype == jax.dtypes.float0 else zeros_of(one.aval)

    return jax.tree.map(fill, cotangents)


with_error.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def undifferentiated(reason: str, h: jax.Array) -> jax.Array:
    """``h``, whose gradient is refused for a reason."""
    del reason
    return h


def _refuse(reason: str, h: jax.Array) -> Any:
    del h
    raise RuntimeError(reason)


undifferentiated.defvjp(_refuse, _refuse)
