"""Steps on the Stiefel manifold of matrices with orthonormal columns, ``u^T u = 1``, as an optax transformation.

Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, https://press.princeton.edu/absil
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

# The distance from which two of Newton and Schulz's steps, which square it, end at rounding.
_NEAR = 1e-4


def stiefel(*, retract: bool = True, project: bool = True) -> optax.GradientTransformation:
    """Keeps matrices orthonormal: ``d <- d - u sym(u^T d)``, then ``u <- polar(u + d)``; the last link of a chain.

    Orthonormal columns stay so. Any others, dependent or zero, become so at the first step, which sets out from the
    nearest orthonormal ones; columns too large for the sum ``u + d`` to be exact, at the second. An optimizer that
    changes a gradient's direction, such as Adam, should be given the projected one, or it rests elsewhere than at the
    optimum: ``optax.chain(stiefel(retract=False), optax.adam(...), stiefel())``.

    Args:
      retract: whether the step ends on the manifold; else it is taken as it is, so that ``u^T u`` drifts by ``d^T d``.
      project: whether to project the step on the tangent space.

    Returns:
      A transformation of matrices ``(..., n, r)`` with ``r <= n``; ``optax.masked`` leaves other parameters out.

    Raises:
      ValueError: by ``init`` and ``update``, if a parameter is no such matrix; by ``update``, if there are none.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa, optax
      >>> project, u = jaxfa.factored.stiefel(retract=False), jnp.eye(4, 2)
      >>> tx = optax.chain(project, optax.adam(0.1), jaxfa.factored.stiefel())
      >>> updates, _ = tx.update(jnp.arange(8.0).reshape(4, 2), tx.init(u), u)
      >>> u = optax.apply_updates(u, updates)
      >>> bool(jnp.allclose(u.T @ u, jnp.eye(2), atol=1e-6))
      True

    Source: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008,
    https://press.princeton.edu/absil
    """

    def init(params: Any) -> optax.EmptyState:
        jax.tree.map(_check, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("stiefel needs the parameters: call update(updates, state, params).")
        return jax.tree.map(partial(kept, retract=retract, project=project), updates, params), state

    return optax.GradientTransformation(init, update)


def kept(d: jax.Array, u: jax.Array, *, retract: bool, project: bool = True) -> jax.Array:
    """A step ``d`` of ``u`` as :func:`stiefel` takes it."""
    _check(u)
    wide = jnp.promote_types(u.dtype, jnp.float32)
    d, own = d.astype(wide), u.astype(wide)
    with jax.default_matmul_precision("highest"):
        base = orthonormal(own) if retract else own
        d = tangent(base, d) if project else d
        return (polar(base, d) - own if retract else d).astype(u.dtype)


def _check(u: Any) -> None:
    if u.ndim < 2 or u.shape[-1] > u.shape[-2]:
        raise ValueError(
            f"stiefel needs matrices (..., n, r) with r <= n, got {u.shape}. Leave such out with optax.masked."
        )


def tangent(u: jax.Array, step: jax.Array) -> jax.Array:
    """The part of a step along the manifold: ``d - u sym(u^T d)``, ``sym(a) = (a + a^T) / 2``."""
    inner = u.mT @ step
    return step - u @ (inner + inner.mT) / 2


def polar(u: jax.Array, step: jax.Array) -> jax.Array:
    """The polar retraction: the nearest orthonormal columns to ``u + d``, of orthonormal ``u`` and any ``d``."""
    return _nearest(u + step)


@jax.jit
def orthonormal(u: jax.Array) -> jax.Array:
    """The nearest orthonormal columns to ``u``; ``u`` itself, bit for bit, if its own are orthonormal to 1e-4.

    Args:
      u: any columns, ``(..., n, r)`` with ``r <= n``; they may be dependent, or zero.
    """

    def is_off(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        u, is_first = state
        return is_first & ~_is_near(u.mT @ u)

    # A loop of one round at most: under vmap a cond would run it for all, though none needs it.
    return lax.while_loop(is_off, lambda state: (_nearest(state[0]), jnp.array(False)), (u, jnp.array(True)))[0]


@jax.jit
def _nearest(y: jax.Array) -> jax.Array:
    """The nearest orthonormal columns, ``y (y^T y)^(-1/2)``, by Newton and Schulz's iteration.

    ``y <- y (3 - y^T y) / 2``, matrix products alone, once the largest singular value is at most one. A ``y`` that has
    lost rank has several nearest, of which it takes one.
    (Higham, "Functions of Matrices", 2008, https://epubs.siam.org/doi/book/10.1137/1.9780898717778)
    """

    def is_far(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, gram, count = state
        return (count < 200) & ~_is_near(gram)

    def closer(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, gram, count = state
        y = y @ (3 * _identity(gram) - gram) / 2
        return y, y.mT @ y, count + 1

    # A hash of the place, which does as well as random numbers: of the size of rounding, it parts dependent columns.
    place = lax.iota(jnp.uint32, y.size).reshape(y.shape)
    noise = (place * place * jnp.uint32(2654435761) >> 8).astype(y.dtype) / 2**23 - 1
    with jax.default_matmul_precision("highest"):
        # Divided by its size, nothing is squared to zero or infinity.
        y = _divided(y, jnp.abs(y).max((-2, -1), keepdims=True)) + 2 * jnp.finfo(y.dtype).eps * noise
        # The largest row sum bounds the largest eigenvalue of y^T y.
        y = _divided(y, jnp.sqrt(jnp.abs(y.mT @ y).sum(-1, keepdims=True).max(-2, keepdims=True)))
        state = lax.while_loop(is_far, closer, (y, y.mT @ y, jnp.zeros((), int)))
        return closer(closer(state))[0]  # each squares what is left of the distance


def random_orthonormal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random orthonormal columns, ``(..., n, r)``: those that span what normal draws do.

    Never below single precision: in bfloat16 the small steps of a learned projection would round to nothing.
    """
    drawn = jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))
    return jnp.vectorize(_columns, signature="(n,r)->(n,r)")(drawn)


@jax.custom_batching.sequential_vmap  # jaxlib's batched one waits for threads of the pool that it runs on, and can hang
def _columns(drawn: jax.Array) -> jax.Array:
    return jnp.linalg.qr(drawn)[0]


def _is_near(gram: jax.Array) -> jax.Array:
    return jnp.abs(gram - _identity(gram)).max() <= _NEAR


def _identity(gram: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)


def _divided(y: jax.Array, size: jax.Array) -> jax.Array:
    return y / jnp.where(size > 0, size, 1)
