"""How errors go back through feedback: through one layer to the layer below, and from the output to an activation."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.base import DirectFeedback, LayerFeedback, Operation, transpose
from jaxfa.order import from_memory
from jaxfa.varying import vary_alike

# The names under which these operations appear in a jaxpr, where the audit finds them, and in a profile.
FORWARD = "jaxfa.forward"
LOCAL = "jaxfa.local"
TRANSPORT = "jaxfa.transport"
DIRECT = "jaxfa.direct"
MODULATED = "jaxfa.modulated"  # an input that an error changes: an activation, as what is computed from it
DIFFERENCE = "jaxfa.difference"  # what two passes differ by: an error that begins there
CHOICE = "jaxfa.choice"  # what chooses or masks the weights, which are weights still
ACTIVATION = "jaxfa.activation"  # the name of a parameter that is taken for an activation
INNER = "jaxfa.inner"  # a factored layer's second contraction: with the first it is one use of its weights


def with_feedback(op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Gives an operation a backward pass of its own: true weight gradients, errors through the feedback.

    ``dw = (d op / d w)^T delta``, ``dx = feedback.transport(op, x, w, delta)``; for a feedback matrix ``b`` of ``w``'s
    shape that is ``(d op(x, b) / d x)^T delta``, so that ``b = w`` is backpropagation.

    Args:
      op: a function ``(x, w) -> y``, linear in ``x`` and linear in ``w``; where ``w`` is a tree, such as
        :class:`jaxfa.factored.Factors`, differentiable in it.

    Returns:
      A function ``(x, w, feedback=None, *constants) -> y``. The cotangent of ``feedback`` is the rule's own learning
      signal; None is ``op`` with ordinary autodiff. Constants, such as a mask, get no gradient.

    Raises:
      TypeError: if the feedback is not a :class:`jaxfa.LayerFeedback`.
      ValueError: if a rule sends back an error of another shape than ``x``'s.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> op = jaxfa.with_feedback(lambda x, w: jnp.einsum("nhi,hij->nhj", x, w))
      >>> x, w, b = jnp.ones((4, 2, 3)), jnp.ones((2, 3, 5)), jnp.zeros((2, 3, 5))
      >>> float(jax.grad(lambda x: op(x, w, jaxfa.FixedFeedback(b)).sum())(x).sum())
      0.0

    Source: Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error backpropagation for
    deep learning", 2016, https://doi.org/10.1038/ncomms13276
    """

    def run(x: jax.Array, w: jax.Array, constants: Any) -> jax.Array:
        with jax.named_scope(FORWARD):
            return op(x, w, *constants)

    @jax.custom_vjp
    def forward(x: jax.Array, w: jax.Array, feedback: LayerFeedback, constants: Any) -> jax.Array:
        return run(x, w, constants)

    def keep_residuals(x: jax.Array, w: jax.Array, feedback: LayerFeedback, constants: Any) -> tuple[jax.Array, Any]:
        return run(x, w, constants), (x, w, feedback, constants)

    def backward(residuals: Any, delta: jax.Array) -> Any:
        x, w, feedback, constants = residuals
        x = from_memory(x)

        def bound(x: jax.Array, w: jax.Array) -> jax.Array:
            return op(x, w, *constants)

        with jax.named_scope(LOCAL):
            dw = _local_gradient(bound, x, w, delta)
        with jax.named_scope(TRANSPORT):
            dx, signal = feedback.learn(bound, x, w, delta, dw)
        return _cotangent(dx, x, feedback), _cotangent(dw, w, feedback), _cotangent(signal, feedback, feedback), None

    forward.defvjp(keep_residuals, backward)

    def apply(x: jax.Array, w: jax.Array, feedback: LayerFeedback | None = None, *constants: jax.Array) -> jax.Array:
        if feedback is None:
            return op(x, w, *constants)
        check_family(feedback, LayerFeedback, "with_feedback, linear and conv", "jaxfa.direct(h, wire, feedback)")
        # Whole numbers, such as pixels, have no gradient; the rule's backward is told of a float that nothing uses.
        x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(w.dtype)
        with backward_alone():
            return forward(*vary_alike((x, w, feedback, constants)))

    return apply


def _local_gradient(op: Operation, x: jax.Array, w: Any, delta: jax.Array) -> Any:
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(w)):
        return transpose(lambda w: op(x, w), w, delta)
    # No one of several factors is linear alone; what the forward pass computed, too, the compiler finds again.
    (dw,) = jax.vjp(lambda w: op(x, w), w)[1](delta)
    return dw


def deliver(tree: tuple[jax.Array, DirectFeedback], e: jax.Array) -> Any:
    """What an activation and its feedback learn from the output error ``e``, shaped as the pair."""
    h, feedback = tree
    with jax.named_scope(DIRECT):
        dh, signal = feedback.learn(h, e)
    return _cotangent(dh, h, feedback), _cotangent(signal, feedback, feedback)


def for_each(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """The shape of an activation that ``n`` examples have in common, as if each had its own."""
    leading = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return (n, *shape[leading:])


def deliver_for_all(tree: tuple[jax.Array, DirectFeedback], e: jax.Array) -> Any:
    """What an activation that all examples have in common and its feedback learn from the output error."""
    p, feedback = tree
    shape = for_each(p.shape, e.shape[0])
    delta, signal = deliver((jnp.broadcast_to(p.reshape(shape[1:]), shape), feedback), e)
    return delta.sum(0).reshape(p.shape), signal


def _cotangent(tree: Any, primal: Any, feedback: Any) -> Any:
    """Casts a cotangent to its primal's dtype; a rule that returns another shape is told so."""

    def cast(value: jax.Array, like: jax.Array) -> jax.Array:
        if value.shape != like.shape:
            raise ValueError(
                f"{type(feedback).__name__} must return errors and signals of their primal's shape: expected "
                f"{like.shape}, got {value.shape}."
            )
        return value.astype(like.dtype)

    return jax.tree.map(cast, tree, primal)


def check_family(feedback: Any, family: type, here: str, there: str) -> None:
    """Refuses what is no feedback of that family, and says where one of the other goes."""
    if not isinstance(feedback, family):
        raise TypeError(
            f"jaxfa's {here} take a feedback of the class {family.__name__}, got {type(feedback).__name__}. Make one "
            f"with rule.init(...), wrap a matrix of your own in jaxfa.FixedFeedback(b) or jaxfa.DirectMatrix(b); a "
            f"feedback of the other family goes to {there}."
        )


@contextlib.contextmanager
def backward_alone() -> Iterator[None]:
    """Says where forward mode is to be had, if it is asked of what has a backward pass alone."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "A feedback has a backward pass and no forward mode (jax.jvp, jax.jacfwd). Take the plain "
            "network, whose gradients are true: jaxfa.nn.plain(model); without Flax, feedback=None."
        ) from error
