"""The two contractions of the functional core with a rule's backward: dense and convolution."""

from collections.abc import Sequence

import jax
from jax import lax

from jaxfa.base import LayerFeedback
from jaxfa.ops import with_feedback


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

    Source: as :func:`jaxfa.with_feedback`.
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

    Source: as :func:`jaxfa.with_feedback`.
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


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)
