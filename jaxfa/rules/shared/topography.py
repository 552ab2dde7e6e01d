"""Feedback with a structure: units in a row, each of which reaches its neighbours alone, or all by the same weights."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.base import Initializer


def topographic(reach: float, *, shared: bool = False) -> Initializer:
    """Draws matrices between units that lie along two circles: each column is zero but around its own place.

    ``b_ij = 0`` where the places ``i / n`` and ``j / m`` are more than ``reach`` apart, else Gaussian, every column
    scaled to length 1. For the projection of :func:`jaxfa.ldfa`, for its ``distribution``, or both; ``structured=True``
    keeps the zeros while the factors learn. The last two axes of a shape count units, so that in a convolution's kernel
    channels have places; its window is local by itself.

    Args:
      reach: a part of the circle, more than 0, up to one half, which is all of it.
      shared: whether all columns are one, shifted to their places: the matrix of a convolution, until it learns.

    Returns:
      An initializer ``(key, shape, dtype) -> b``.

    Raises:
      ValueError: if the reach is not in (0, 0.5].

    Example:
      >>> import jax, jaxfa
      >>> rule = jaxfa.ldfa(4, projection=jaxfa.rules.topographic(0.2), structured=True)
      >>> int((rule.init(jax.random.key(0), jax.numpy.ones((8, 16))).p != 0).sum(0)[0])
      7
    """
    if not 0 < reach <= 0.5:
        raise ValueError(f"topographic needs a reach in (0, 0.5], got {reach}.")

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        n, m = shape[-2:]
        apart = (jnp.arange(n)[:, None] / n - jnp.arange(m)[None] / m + 0.5) % 1 - 0.5
        drawn = jax.random.normal(key, (*shape[:-1], 1) if shared else shape, dtype)
        if shared:
            places = (jnp.arange(n)[:, None] - jnp.round(jnp.arange(m)[None] * n / m).astype(int)) % n
            drawn = jnp.take(drawn[..., 0], places, axis=-1)
        near = jnp.where(abs(apart) <= reach, drawn, 0)
        return near / jnp.maximum(jnp.linalg.norm(near, axis=-2, keepdims=True), jnp.finfo(dtype).tiny)

    return draw


def keep_zeros(factor: jax.Array, signal: jax.Array) -> jax.Array:
    """A factor's signal without the places where the factor is zero."""
    return jnp.where(factor == 0, 0, signal)
