"""The two contractions of the functional core with a rule's backward: dense and convolution."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxfa.base import LayerFeedback
from jaxfa.ops import INNER, with_feedback


@typing.runtime_checkable
class ThinWeights(typing.Protocol):
    """Weights that act as two thin ones of the layer's own kind, such as ``jaxfa.factored.Factors``."""

    shape: tuple[int, ...]
    ndim: int

    def kernels(self) -> tuple[jax.Array, jax.Array]:
        """The two, in the order in which an input meets them."""


def dot(x: jax.Array, w: jax.Array | ThinWeights) -> jax.Array:
    """``x w`` over the last axis of ``x``; with factors, ``(x u diag(s)) v^T``."""
    if isinstance(w, ThinWeights):
        first, second = w.kernels()
        h = dot(x, first)
        with jax.named_scope(INNER):
            return dot(h, second)
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution as a value, channels last: ``x * w``; with factors, a vertical one and then a horizontal one.

    Attributes:
      strides: one per dimension.
      padding: a string, or (low, high) pairs.
      dilation: one per dimension.
      groups: the number of groups of channels; with factors, 1.
    """

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """``(N, spatial..., n)`` to ``(N, spatial..., m)``, with one batch axis or another number of them."""
        spatial = x.shape[-len(self.strides) - 1 :]
        batch = x.shape[: x.ndim - len(spatial)]
        if len(batch) != 1:
            y = self(x.reshape(-1, *spatial), w)
            return y.reshape(*batch, *y.shape[1:])
        if isinstance(w, ThinWeights):
            first, second = w.kernels()
            h = self.along(slice(0, 1))(x, first)
            with jax.named_scope(INNER):
                return self.along(slice(1, None))(h, second)
        axes = "DHW"[-len(self.strides) :]
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            rhs_dilation=self.dilation,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=self.groups,
        )

    def along(self, axes: slice) -> "Convolution":
        """What it does along these axes alone, for a window of one pixel along the others."""
        dims = range(len(self.strides))
        chosen = dims[axes]
        padding = self.padding
        if not isinstance(padding, str):
            padding = tuple(padding[i] if i in chosen else (0, 0) for i in dims)
        strides, dilation = (
            tuple(each[i] if i in chosen else 1 for i in dims) for each in (self.strides, self.dilation)
        )
        return Convolution(strides, padding, dilation)


def linear(x: jax.Array, w: jax.Array | ThinWeights, feedback: LayerFeedback | None = None) -> jax.Array:
    """A dense layer's product: ``y = x w``, backward ``dw = x^T delta``, ``dx = delta b^T``.

    Args:
      x: input, ``(..., n)``.
      w: weights, ``(n, m)``, or their :class:`jaxfa.factored.Factors`.
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


_linear = with_feedback(dot)


def conv(
    x: jax.Array,
    w: jax.Array | ThinWeights,
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
      w: kernel, ``(window..., n / groups, m)``, such as HWIO, or, without groups, its ``Factors``.
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
    if groups > 1 and isinstance(w, ThinWeights):
        raise ValueError(f"A convolution in groups has no factors; got groups={groups}.")
    window = padding if isinstance(padding, str) else tuple(padding)
    op = Convolution(_each(strides, dims), window, _each(dilation, dims), groups)
    return with_feedback(op)(x, w, feedback)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)
