"""The error wire, which brings the output error to the layers of a network that is a function of arrays.

(A Flax model may run its layers on copies, in loops and maps: there taps take the place of the wire, see ``delivery``.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.base import DirectFeedback, is_feedback
from jaxfa.ops import backward_alone, check_family, deliver
from jaxfa.varying import vary_alike

Reading = Callable[[jax.Array, jax.Array], jax.Array]


def error_wire(logits: Any) -> jax.Array:
    """The wire that carries the output error ``e = d loss / d logits``: zeros of the logits' shape and dtype.

    Pass it through every :func:`direct`, and join it to the logits at the end by :func:`with_wire`.

    Args:
      logits: an array or a ``jax.ShapeDtypeStruct``, ``(N, ..., C)``, as the wire is.

    Example:
      >>> import jax, jaxfa
      >>> jaxfa.error_wire(jax.ShapeDtypeStruct((2, 3), "float32")).shape
      (2, 3)

    Source: as :func:`direct`.
    """
    return jnp.zeros(logits.shape, logits.dtype)


def direct(h: jax.Array, wire: jax.Array, feedback: DirectFeedback | None) -> tuple[jax.Array, jax.Array]:
    """Hands an activation its error straight from the output: ``dh = feedback.deliver(h, e)``, for DFA ``e B^T``.

    Nothing comes back from the layers above, to which ``h`` is a constant.

    Args:
      h: an activation after its nonlinearity, ``(N, ..., n)``.
      wire: the error wire, ``(N, ..., C)``, from :func:`error_wire` or the layer below.
      feedback: a direct feedback made by ``rule.init(key, h, logits)``; None is ordinary autodiff.

    Returns:
      ``(h, wire)``, unchanged in value.

    Raises:
      TypeError: if the feedback is not a :class:`jaxfa.DirectFeedback`.
      ValueError: if a rule delivers an error of another shape than ``h``'s.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> h, wire = jnp.ones((5, 4)), jaxfa.error_wire(jnp.zeros((5, 3)))
      >>> feedback = jaxfa.dfa().init(jax.random.key(0), h, wire)
      >>> h, wire = jaxfa.direct(h, wire, feedback)
      >>> logits = jaxfa.with_wire(h @ jnp.ones((4, 3)), wire, feedback)

    Source: Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016,
    https://arxiv.org/abs/1609.01596
    """
    if feedback is None:
        return h, wire
    check_family(feedback, DirectFeedback, "direct", "jaxfa.linear(x, w, feedback)")
    return lax.stop_gradient(h), listen(deliver, wire, (h, feedback))


def with_wire(logits: jax.Array, wire: jax.Array, feedback: Any) -> jax.Array:
    """The logits, from whose error the wire takes what the feedback is given: ``logits + wire``.

    That is the error ``e`` itself; for rules that learn from targets ``-c y``, the targets with their weights in the
    loss, read off ``e`` and the logits.

    Args:
      logits: ``(N, ..., C)``.
      wire: the error wire, of the same shape.
      feedback: a tree of all feedbacks along the wire; None, or none in it, is ordinary autodiff.

    Returns:
      The logits, unchanged in value.

    Raises:
      ValueError: if some of the feedbacks need the error and others the targets; by the backward pass, if the error
        does not tell the targets.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> logits = jnp.ones((5, 3))
      >>> feedback = jaxfa.drtp().init(jax.random.key(0), jnp.ones((5, 4)), logits)
      >>> jaxfa.with_wire(logits, jaxfa.error_wire(logits), feedback).shape
      (5, 3)

    Source: as :func:`direct`.
    """
    nodes = [one for one in jax.tree.leaves(feedback, is_leaf=is_feedback) if isinstance(one, DirectFeedback)]
    reads = reading(nodes)
    if reads is None:
        return logits + wire
    logits, wire = vary_alike((logits, wire))
    with backward_alone():
        return logits + _read(reads, lax.stop_gradient(logits), wire)


def reading(feedbacks: Sequence[DirectFeedback]) -> Reading | None:
    """What all of them are given in the place of the output error, by their class; None is the error itself.

    Raises:
      ValueError: if that is not the same.
    """
    kinds = {one.reads for one in feedbacks}
    if len(kinds) > 1:
        names = ", ".join(sorted({type(one).__name__ for one in feedbacks}))
        raise ValueError(
            f"All layers are given the same, and of {names} some need the output error, others the targets, or targets "
            f"of another kind: take one rule for all layers or, in functional code, a wire for each kind."
        )
    return kinds.pop() if kinds else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(reads: Reading, logits: jax.Array, wire: jax.Array) -> jax.Array:
    return wire


_read.defvjp(
    lambda reads, logits, wire: (wire, logits),
    lambda reads, logits, e: (jnp.zeros_like(logits), reads(logits, e)),
)


def listen(backward: Callable[[Any, jax.Array], Any], wire: jax.Array, tree: Any) -> jax.Array:
    """The wire, unchanged; a tree's cotangent is then ``backward(tree, e)``, whatever the tree was used for.

    ``backward`` may close over no traced value. The tree's arrays are kept until the error comes.
    """
    wire, tree = vary_alike((wire, tree))
    # The error that reaches an unbatched wire would be summed over a vmap's axis: in grad(vmap(loss)) every example
    # would learn from the errors of all.
    with backward_alone():
        return _listen(backward, wire + _zeros_batched_alike(*lax.stop_gradient((wire, tree))), tree)


@jax.custom_batching.custom_vmap
def _zeros_batched_alike(wire: jax.Array, tree: Any) -> jax.Array:
    """Zeros like the wire, which under ``vmap`` are batched where an array of the tree is."""
    return jnp.zeros_like(wire)


@_zeros_batched_alike.def_vmap
def _batched_zeros(size: int, batched: Any, wire: jax.Array, tree: Any) -> tuple[jax.Array, bool]:
    one = jax.tree.map(lambda leaf, has: leaf[0] if has else leaf, (wire, tree), tuple(batched))
    zeros = _zeros_batched_alike(*one)
    return jnp.broadcast_to(zeros, (size, *zeros.shape)), True


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _listen(backward: Any, wire: jax.Array, tree: Any) -> jax.Array:
    return wire


def _listen_forward(backward: Any, wire: jax.Array, tree: Any) -> tuple[jax.Array, Any]:
    return wire, tree


def _listen_backward(backward: Any, tree: Any, e: jax.Array) -> Any:
    return e, backward(tree, e)


_listen.defvjp(_listen_forward, _listen_backward)
