"""Steps on the Stiefel manifold of matrices with orthonormal columns, ``u^T u = 1``, as an optax transformation.

Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, https://press.princeton.edu/absil;
Cayley's retraction is from Wen, Yin, "A feasible method for optimization with orthogonality constraints", 2013,
https://doi.org/10.1007/s10107-012-0584-1
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

Retraction: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


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
      Orthonormal columns. On a CPU do not ``vmap`` it: see :func:`jaxfa.factorise`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxfa.stiefel import qr
      >>> bool(jnp.allclose(qr(jnp.eye(3, 2), jnp.eye(3, 2)), jnp.eye(3, 2)))
      True

    Source: as :func:`stiefel`.
    """
    q, r = jnp.linalg.qr(u + step)
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return q * jnp.expand_dims(sign, -2)


def polar(u: jax.Array, step: jax.Array) -> jax.Array:
    """The polar retraction: the nearest orthonormal columns, ``y (y^T y)^(-1/2)`` with ``y = u + d``.

    By Newton and Schulz's iteration, matrix products alone, so that it runs anywhere: ``y <- y (3 - y^T y) / 2`` once
    the largest singular value is at most one. It stops after 100 of them, which a ``y`` of full rank never needs.

    Args:
      u: orthonormal columns, ``(..., n, r)``.
      step: ``d``, of the same shape.

    Returns:
      Orthonormal columns.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxfa.stiefel import polar
      >>> polar(jnp.eye(3, 2), jnp.eye(3, 2)).round(6).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    Source: Higham, "Functions of Matrices", 2008, https://epubs.siam.org/doi/book/10.1137/1.9780898717778
    """
    y = u + step
    eye = jnp.broadcast_to(jnp.eye(y.shape[-1], dtype=y.dtype), (*y.shape[:-2], y.shape[-1], y.shape[-1]))

    def closer(y: jax.Array, gram: jax.Array) -> jax.Array:
        return y @ (3 * eye - gram) / 2

    def is_far(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, gram, count = state
        return (count < 100) & (jnp.abs(gram - eye).max() > 1e-4)

    def iterate(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, gram, count = state
        y = closer(y, gram)
        return y, y.mT @ y, count + 1

    # The largest row sum bounds the largest eigenvalue of y^T y.
    y = y * lax.rsqrt(jnp.abs(y.mT @ y).sum(-1, keepdims=True).max(-2, keepdims=True))
    y, gram, _ = lax.while_loop(is_far, iterate, (y, y.mT @ y, jnp.zeros((), int)))
    for _ in range(2):  # each squares what is left of the distance
        y = closer(y, gram)
        gram = y.mT @ y
    return y


def cayley(u: jax.Array, step: jax.Array) -> jax.Array:
    """Cayley's retraction: ``(1 - a/2)^-1 (1 + a/2) u``, ``a = p d u^T - u d^T p``, ``p = 1 - u u^T / 2``.

    ``a`` is skew and of rank ``2 r``, so that the system to solve has ``2 r`` unknowns (Sherman, Morrison, Woodbury).

    Args:
      u: orthonormal columns, ``(..., n, r)``.
      step: ``d``, of the same shape, along the manifold: ``u^T d`` is skew.

    Returns:
      Orthonormal columns. On a CPU do not ``vmap`` it: see :func:`jaxfa.factorise`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxfa.stiefel import cayley
      >>> cayley(jnp.eye(3, 2), jnp.zeros((3, 2))).tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    Source: Wen, Yin, "A feasible method for optimization with orthogonality constraints", 2013,
    https://doi.org/10.1007/s10107-012-0584-1
    """
    moved = step - u @ (u.mT @ step) / 2
    x, y = jnp.concatenate([moved, u], -1), jnp.concatenate([u, -moved], -1)
    inner = y.mT @ x
    eye = jnp.broadcast_to(jnp.eye(inner.shape[-1], dtype=inner.dtype), inner.shape)
    return u + x @ jnp.linalg.solve(eye - inner / 2, y.mT @ u)


def stiefel(retraction: Retraction | None = polar, *, project: bool = True) -> optax.GradientTransformation:
    """Keeps matrices orthonormal: ``d <- d - u sym(u^T d)``, then ``u <- R(u, d)``; the last link of a chain.

    All retractions agree with ``u + d`` to first order and differ at the second. An optimizer that changes a gradient's
    direction, such as Adam, should be given the projected one, or it will rest elsewhere than at the optimum:
    ``optax.chain(stiefel(None), optax.adam(...), stiefel())``. For some of the parameters, wrap it in
    ``optax.masked``. Orthonormal columns stay so; others become so at the first step with a retraction.

    Args:
      retraction: ``(u, d) -> u`` back onto the manifold: :func:`polar`, or from ``jaxfa.stiefel`` :func:`qr` or
        :func:`cayley` (which needs ``project``); None takes the step as it is, so that ``u^T u`` drifts by ``d^T d``.
      project: whether to project the step on the tangent space.

    Returns:
      A transformation of matrices ``(..., n, r)`` with ``r <= n``.

    Raises:
      ValueError: by ``update``, if a parameter is no such matrix, or there are no parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa, optax
      >>> tx, u = optax.chain(jaxfa.stiefel(None), optax.adam(0.1), jaxfa.stiefel()), jnp.eye(4, 2)
      >>> updates, _ = tx.update(jnp.arange(8.0).reshape(4, 2), tx.init(u), u)
      >>> u = optax.apply_updates(u, updates)
      >>> bool(jnp.allclose(u.T @ u, jnp.eye(2), atol=1e-6))
      True

    Source: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008,
    https://press.princeton.edu/absil
    """

    def move(d: jax.Array, u: jax.Array) -> jax.Array:
        if u.ndim < 2 or u.shape[-1] > u.shape[-2]:
            raise ValueError(
                f"stiefel needs matrices (..., n, r) with r <= n, got {u.shape}. Leave such out with optax.masked."
            )
        wide = jnp.promote_types(u.dtype, jnp.float32)
        d, base = d.astype(wide), u.astype(wide)
        d = tangent(base, d) if project else d
        return (d if retraction is None else retraction(base, d) - base).astype(u.dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("stiefel needs the parameters: call update(updates, state, params).")
        return jax.tree.map(move, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
