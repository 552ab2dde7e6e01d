"""Steps on the Stiefel manifold of matrices with orthonormal columns, ``u^T u = 1``, as an optax transformation.

Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, https://press.princeton.edu/absil
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

# The distance from which two of Newton and Schulz's steps, which square it, end at rounding.
_NEAR = 1e-4


def stiefel(*, retract: bool = True, project: bool = True) -> optax.GradientTransformation:
    """Keeps matrices orthonormal: ``d <- d - u sym(u^T d)``, then ``u <- polar(u + d)``; the last link of a chain.

    Orthonormal columns stay so. Any others, dependent or zero, become so at the first step by the same equations;
    columns too large for the sum ``u + d`` to be exact, at the second. An optimizer that changes a gradient's
    direction, such as Adam, should be given the projected one, or it rests elsewhere than at the optimum:
    ``optax.chain(stiefel(retract=False), optax.adam(...), stiefel())``.

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
        jax.tree.map(_check, params)
        return kept(updates, params, retract=retract, project=project), state

    return optax.GradientTransformation(init, update)


def kept(steps: Any, params: Any, *, retract: bool, project: bool = True) -> Any:
    """Steps of matrices as :func:`stiefel` takes them, in one loop for all: a loop takes long to compile."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)

    d, own = wide(steps), wide(params)
    with jax.default_matmul_precision("highest"):
        if project:
            d = jax.tree.map(_finite_tangent if retract else tangent, own, d)
        d = jax.tree.map(jnp.subtract, polar(own, d), own) if retract else d
    return jax.tree.map(lambda d, u: d.astype(u.dtype), d, params)


def _check(u: Any) -> None:
    if u.ndim < 2 or u.shape[-1] > u.shape[-2]:
        raise ValueError(
            f"stiefel needs matrices (..., n, r) with r <= n, got {u.shape}. Leave such out with optax.masked."
        )


def tangent(u: jax.Array, step: jax.Array) -> jax.Array:
    """The part of a step along the manifold: ``d - u sym(u^T d)``, ``sym(a) = (a + a^T) / 2``."""
    inner = u.mT @ step
    return step - u @ (inner + inner.mT) / 2


def _finite_tangent(u: jax.Array, step: jax.Array) -> jax.Array:
    """The same; the step itself where columns are so large that their squares leave the numbers."""
    along = tangent(u, step)
    return jnp.where(jnp.isfinite(along).all((-2, -1), keepdims=True), along, step)


def polar(u: Any, step: Any) -> Any:
    """The polar retraction: the nearest orthonormal columns to ``u + d``, for arrays or trees of them."""
    return _nearest(jax.tree.map(jnp.add, u, step))


@jax.jit
def _nearest(tree: Any) -> Any:
    """The nearest orthonormal columns, ``y (y^T y)^(-1/2)``, by Newton and Schulz's iteration.

    ``y <- y (3 - y^T y) / 2``, matrix products alone, once the largest singular value is at most one. A ``y`` that has
    lost rank has several nearest, of which it takes one.
    (Higham, "Functions of Matrices", 2008, https://epubs.siam.org/doi/book/10.1137/1.9780898717778)
    """

    def is_far(state: tuple[Any, Any, jax.Array]) -> jax.Array:
        _, grams, count = state
        far = [jnp.abs(gram - _identity(gram)).max() > _NEAR for gram in grams]
        return (count < 200) & jnp.array(far).any()

    def closer(state: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
        ys, grams, count = state
        ys = [y @ (3 * _identity(gram) - gram) / 2 for y, gram in zip(ys, grams, strict=True)]
        return ys, [y.mT @ y for y in ys], count + 1

    ys, structure = jax.tree.flatten(tree)
    with jax.default_matmul_precision("highest"):
        ys = list(map(_bounded, ys))
        state = lax.while_loop(is_far, closer, (ys, [y.mT @ y for y in ys], jnp.zeros((), int)))
        return jax.tree.unflatten(structure, closer(closer(state))[0])  # each squares what is left of the distance


def _bounded(y: jax.Array) -> jax.Array:
    """Columns of the same direction whose largest singular value is at most one."""
    # A hash of the place, which does as well as random numbers: of the size of rounding, it parts dependent columns.
    place = lax.iota(jnp.uint32, y.size).reshape(y.shape)
    noise = (place * place * jnp.uint32(2654435761) >> 8).astype(y.dtype) / 2**23 - 1
    # Divided by its size, nothing is squared to zero or infinity.
    y = _divided(y, jnp.abs(y).max((-2, -1), keepdims=True)) + 2 * jnp.finfo(y.dtype).eps * noise
    # The largest row sum bounds the largest eigenvalue of y^T y.
    return _divided(y, jnp.sqrt(jnp.abs(y.mT @ y).sum(-1, keepdims=True).max(-2, keepdims=True)))


def random_orthonormal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random orthonormal columns, ``(..., n, r)``: those that span what normal draws do.

    Never below single precision: in bfloat16 the small steps of a learned projection would round to nothing.
    """
    drawn = jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32))
    return jnp.vectorize(_columns, signature="(n,r)->(n,r)")(drawn)


@jax.custom_batching.sequential_vmap  # jaxlib's batched one waits for threads of the pool that it runs on, and can hang
def _columns(drawn: jax.Array) -> jax.Array:
    return jnp.linalg.qr(drawn)[0]


def _identity(gram: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)


def _divided(y: jax.Array, size: jax.Array) -> jax.Array:
    return y / jnp.where(size > 0, size, 1)
