"""Retractions: from a step back onto the Stiefel manifold of matrices with orthonormal columns, ``u^T u = 1``.

Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, https://press.princeton.edu/absil;
Cayley's is from Wen, Yin, "A feasible method for optimization with orthogonality constraints", 2013,
https://doi.org/10.1007/s10107-012-0584-1
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Retraction: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]

# The distance from which two of Newton and Schulz's steps, which square it, end at rounding.
_NEAR = 1e-4


def tangent(u: jax.Array, step: jax.Array) -> jax.Array:
    """The part of a step along the manifold: ``d - u sym(u^T d)``, ``sym(a) = (a + a^T) / 2``."""
    inner = u.mT @ step
    return step - u @ (inner + inner.mT) / 2


def qr(u: jax.Array, step: jax.Array) -> jax.Array:
    """The retraction by QR: the Q factor of ``u + d`` with ``R``'s diagonal positive.

    Args:
      u: orthonormal columns, ``(..., n, r)``.
      step: ``d``, of the same shape.

    Returns:
      Orthonormal columns. On a CPU do not ``vmap`` it: see :func:`jaxfa.factored.factorise`.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> bool(jnp.allclose(jaxfa.factored.retractions.qr(jnp.eye(3, 2), jnp.eye(3, 2)), jnp.eye(3, 2)))
      True

    Source: as :func:`jaxfa.factored.stiefel`.
    """
    q, r = jnp.linalg.qr(u + step)
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return q * jnp.expand_dims(sign, -2)


def polar(u: jax.Array, step: jax.Array) -> jax.Array:
    """The polar retraction: the nearest orthonormal columns, ``y (y^T y)^(-1/2)`` with ``y = u + d``.

    By Newton and Schulz's iteration, matrix products alone, so that it runs anywhere: ``y <- y (3 - y^T y) / 2`` once
    the largest singular value is at most one. A ``y`` that has lost rank has several nearest, of which it takes one.

    Args:
      u: orthonormal columns, ``(..., n, r)``.
      step: ``d``, of the same shape.

    Returns:
      Orthonormal columns.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> jaxfa.factored.retractions.polar(jnp.eye(3, 2), jnp.eye(3, 2)).round(6).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    Source: Higham, "Functions of Matrices", 2008, https://epubs.siam.org/doi/book/10.1137/1.9780898717778
    """
    return _nearest(u + step, rounds=1)


def orthonormal(u: jax.Array) -> jax.Array:
    """The nearest orthonormal columns to ``u``; ``u`` itself, bit for bit, if its own are orthonormal to 1e-4.

    Args:
      u: any columns, ``(..., n, r)`` with ``r <= n``; they may be dependent, or zero.

    Returns:
      Orthonormal columns.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> u = jaxfa.factored.retractions.orthonormal(jnp.zeros((3, 2)))
      >>> bool(jnp.allclose(u.T @ u, jnp.eye(2), atol=1e-6))
      True

    Source: as :func:`polar`.
    """
    return _nearest(u, rounds=0)


@partial(jax.jit, static_argnames="rounds")
def _nearest(y: jax.Array, *, rounds: int) -> jax.Array:
    """The nearest orthonormal columns after ``rounds`` of iterations, or as many more as it takes, up to 4."""

    def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        y, count = state
        return (count < rounds) | (~_is_near(y.mT @ y) & (count < 4))

    def fill(y: jax.Array, count: jax.Array) -> jax.Array:
        # Columns that the round before has found to be dependent get a part outside of all others: a hash of the place,
        # which does as well as random numbers and costs nothing.
        place = lax.iota(jnp.uint32, y.size).reshape(y.shape) + count.astype(jnp.uint32) * jnp.uint32(40503)
        drawn = (place * place * jnp.uint32(2654435761) >> 8).astype(y.dtype) / 2**23 - 1
        drawn = drawn - y @ (y.mT @ drawn)
        return y + drawn - drawn @ (y.mT @ y)

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y, count = state
        return _newton_schulz(lax.cond(count > 0, fill, lambda y, _: y, y, count)), count + 1

    with jax.default_matmul_precision("highest"):
        return lax.while_loop(goes_on, again, (y, jnp.zeros((), int)))[0]


def _newton_schulz(y: jax.Array) -> jax.Array:
    eye = jnp.broadcast_to(jnp.eye(y.shape[-1], dtype=y.dtype), (*y.shape[:-2], y.shape[-1], y.shape[-1]))

    def closer(y: jax.Array, gram: jax.Array) -> jax.Array:
        return y @ (3 * eye - gram) / 2

    def is_far(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, gram, count = state
        return (count < 100) & ~_is_near(gram)

    def iterate(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, gram, count = state
        y = closer(y, gram)
        return y, y.mT @ y, count + 1

    # Of any size, nothing is squared to zero or infinity.
    y = _divided(y, jnp.abs(y).max((-2, -1), keepdims=True))
    # The largest row sum bounds the largest eigenvalue of y^T y.
    y = _divided(y, jnp.sqrt(jnp.abs(y.mT @ y).sum(-1, keepdims=True).max(-2, keepdims=True)))
    y, gram, _ = lax.while_loop(is_far, iterate, (y, y.mT @ y, jnp.zeros((), int)))
    for _ in range(2):  # each squares what is left of the distance
        y = closer(y, gram)
        gram = y.mT @ y
    return y


def _is_near(gram: jax.Array) -> jax.Array:
    return jnp.abs(gram - jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)).max() <= _NEAR


def _divided(y: jax.Array, size: jax.Array) -> jax.Array:
    return y / jnp.where(size > 0, size, 1)


def cayley(u: jax.Array, step: jax.Array) -> jax.Array:
    """Cayley's retraction: ``(1 - a/2)^-1 (1 + a/2) u``, ``a = p d u^T - u d^T p``, ``p = 1 - u u^T / 2``.

    ``a`` is skew and of rank ``2 r``, so that the system to solve has ``2 r`` unknowns (Sherman, Morrison, Woodbury).

    Args:
      u: orthonormal columns, ``(..., n, r)``.
      step: ``d``, of the same shape, along the manifold: ``u^T d`` is skew.

    Returns:
      Orthonormal columns. On a CPU do not ``vmap`` it: see :func:`jaxfa.factored.factorise`.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> jaxfa.factored.retractions.cayley(jnp.eye(3, 2), jnp.zeros((3, 2))).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    Source: Wen, Yin, "A feasible method for optimization with orthogonality constraints", 2013,
    https://doi.org/10.1007/s10107-012-0584-1
    """
    moved = step - u @ (u.mT @ step) / 2
    x, y = jnp.concatenate([moved, u], -1), jnp.concatenate([u, -moved], -1)
    inner = y.mT @ x
    eye = jnp.broadcast_to(jnp.eye(inner.shape[-1], dtype=inner.dtype), inner.shape)
    return u + x @ jnp.linalg.solve(eye - inner / 2, y.mT @ u)
