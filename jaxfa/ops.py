"""Every custom VJP of the project: feedback layer by layer, and feedback straight from the output."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.base import DirectFeedback, LayerFeedback, Operation, transpose

# The names under which the two kinds of delivery appear in a jaxpr (and in a profile). The audit finds them by these.
TRANSPORT = "jaxfa.transport"
DIRECT = "jaxfa.direct"


def with_feedback(op: Operation) -> Callable[..., jax.Array]:
    """Gives an operation a backward pass of its own: true weight gradients, errors through the feedback.

    ``y = op(x, w)``; backward ``dw = (d op / d w)^T delta`` and ``dx = feedback.transport(op, x, w, delta)``. For a
    feedback matrix ``b`` of ``w``'s shape that is ``(d op(x, b) / d x)^T delta``, so ``b = w`` is backpropagation.

    Args:
      op: a function ``(x, w) -> y``, linear in ``x`` and linear in ``w``.

    Returns:
      A function ``(x, w, feedback=None) -> y``. The cotangent of ``feedback`` is the rule's own learning signal;
      ``feedback=None`` is ``op`` with ordinary autodiff, forward mode included.

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

    @jax.custom_vjp
    def forward(x: jax.Array, w: jax.Array, feedback: LayerFeedback) -> jax.Array:
        del feedback
        return op(x, w)

    def keep_residuals(x: jax.Array, w: jax.Array, feedback: LayerFeedback) -> tuple[jax.Array, Any]:
        return op(x, w), (x, w, feedback)

    def backward(residuals: Any, delta: jax.Array) -> Any:
        x, w, feedback = residuals
        dw = transpose(lambda w: op(x, w), w, delta)
        with jax.named_scope(TRANSPORT):
            dx = feedback.transport(op, x, w, delta)
            signal = feedback.signal(x, w, delta, dw)
        return _cotangent(dx, x, feedback), _cotangent(dw, w, feedback), _cotangent(signal, feedback, feedback)

    forward.defvjp(keep_residuals, backward)

    def apply(x: jax.Array, w: jax.Array, feedback: LayerFeedback | None = None) -> jax.Array:
        if feedback is None:
            return op(x, w)
        _check_family(feedback, LayerFeedback, "with_feedback, linear and conv", "jaxfa.direct(h, wire, feedback)")
        return forward(*_vary_alike((x, w, feedback)))

    return apply


def linear(x: jax.Array, w: jax.Array, feedback: LayerFeedback | None = None) -> jax.Array:
    """A dense layer's product: ``y = x w``, backward ``dw = x^T delta``, ``dx = delta b^T``.

    Args:
      x: input, ``(..., n)``.
      w: weights, ``(n, m)``.
      feedback: a layer-wise feedback made by ``rule.init(key, w)``; None is ordinary autodiff.

    Returns:
      ``(..., m)``.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, w = jaxfa.fa(), jnp.ones((3, 2))
      >>> feedback = rule.init(jax.random.key(0), w)
      >>> jaxfa.linear(jnp.ones((5, 3)), w, feedback).shape
      (5, 2)

    Source: as :func:`with_feedback`.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"linear expects x of shape (..., n) and w of shape (n, m), got {x.shape} and {w.shape}.")
    return _linear(x, w, feedback)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


_linear = with_feedback(_dot)


def conv(
    x: jax.Array,
    w: jax.Array,
    feedback: LayerFeedback | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """A convolution in one, two or three dimensions, channels last: ``y = x * w``, ``dx`` through the feedback.

    Args:
      x: input, ``(N, spatial..., n)``, such as NHWC.
      w: kernel, ``(window..., n / groups, m)``, such as HWIO.
      feedback: a layer-wise feedback made by ``rule.init(key, w)``; None is ordinary autodiff.
      strides: step of the window, in pixels, one number or one per dimension.
      padding: ``"SAME"``, ``"VALID"``, or (low, high) pairs in pixels.
      dilation: distance between the window's taps, in pixels.
      groups: into how many groups the channels are split; ``n`` is a depthwise convolution.

    Returns:
      ``(N, spatial..., m)``.

    Raises:
      ValueError: if the shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> w = jnp.ones((3, 3, 4, 8))
      >>> feedback = jaxfa.fa().init(jax.random.key(0), w)
      >>> jaxfa.conv(jnp.ones((2, 16, 16, 4)), w, feedback, strides=2).shape
      (2, 8, 8, 8)

    Source: as :func:`with_feedback`.
    """
    dims = x.ndim - 2
    if dims not in (1, 2, 3) or w.ndim != x.ndim or x.shape[-1] != w.shape[-2] * groups or w.shape[-1] % groups:
        raise ValueError(
            f"conv expects x of shape (N, spatial..., n), w of shape (window..., n / groups, m) with 1 to 3 spatial "
            f"dimensions and m divisible by groups, got {x.shape}, {w.shape} and groups={groups}."
        )
    spatial = "DHW"[3 - dims :]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def op(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            _each(strides, dims),
            padding if isinstance(padding, str) else tuple(padding),
            rhs_dilation=_each(dilation, dims),
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    return with_feedback(op)(x, w, feedback)


def error_wire(logits: Any) -> jax.Array:
    """The wire that carries the output error: zeros of the logits' shape and dtype.

    Pass it through every :func:`direct` and add it to the logits at the end. It changes no value; the gradient that
    reaches it is ``e = d loss / d logits``.

    Args:
      logits: an array or a ``jax.ShapeDtypeStruct``, ``(N, ..., C)``.

    Returns:
      Zeros, ``(N, ..., C)``.

    Example:
      >>> import jax, jaxfa
      >>> jaxfa.error_wire(jax.ShapeDtypeStruct((2, 3), "float32")).shape
      (2, 3)

    Source: Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016,
    https://arxiv.org/abs/1609.01596
    """
    return jnp.zeros(logits.shape, logits.dtype)


def direct(h: jax.Array, wire: jax.Array, feedback: DirectFeedback | None) -> tuple[jax.Array, jax.Array]:
    """Hands an activation its error straight from the output: ``dh = feedback.deliver(h, e)``, for DFA ``e B^T``.

    Nothing comes back from the layers above: ``h`` is a constant to them, so that their error is never computed.

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
      >>> logits = h @ jnp.ones((4, 3)) + wire

    Source: as :func:`error_wire`.
    """
    if feedback is None:
        return h, wire
    _check_family(feedback, DirectFeedback, "direct", "jaxfa.linear(x, w, feedback)")
    return lax.stop_gradient(h), _inject(*_vary_alike((h, wire, feedback)))


@jax.custom_vjp
def _inject(h: jax.Array, wire: jax.Array, feedback: DirectFeedback) -> jax.Array:
    del h, feedback
    return wire


def _inject_forward(h: jax.Array, wire: jax.Array, feedback: DirectFeedback) -> tuple[jax.Array, Any]:
    return wire, (h, feedback)


def _inject_backward(residuals: Any, e: jax.Array) -> Any:
    h, feedback = residuals
    with jax.named_scope(DIRECT):
        dh = feedback.deliver(h, e)
        signal = feedback.signal(h, e)
    return _cotangent(dh, h, feedback), e, _cotangent(signal, feedback, feedback)


_inject.defvjp(_inject_forward, _inject_backward)


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


def _vary_alike(arrays: Any) -> Any:
    """Under ``shard_map``, lets every array vary over the mesh axes that one of them varies over.

    A backward pass of our own must return cotangents that vary as their primals do. Weights and feedback are
    replicated, errors are not: autodiff sums over the devices where it transposes this cast.
    """

    def axes(array: jax.Array) -> frozenset[Any]:
        kind = jax.typeof(array)
        return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma

    union: frozenset[Any] = frozenset().union(*(axes(leaf) for leaf in jax.tree.leaves(arrays)))
    return jax.tree.map(lambda leaf: lax.pcast(leaf, tuple(sorted(union - axes(leaf), key=repr)), to="varying"), arrays)


def _check_family(feedback: Any, family: type, here: str, there: str) -> None:
    if not isinstance(feedback, family):
        raise TypeError(
            f"jaxfa's {here} take a feedback of the class {family.__name__}, got {type(feedback).__name__}. Make one "
            f"with rule.init(...), wrap a matrix of your own in jaxfa.FixedFeedback(b) or jaxfa.DirectMatrix(b); a "
            f"feedback of the other family goes to {there}."
        )


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)
