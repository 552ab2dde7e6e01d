"""Steps on the Stiefel manifold of matrices with orthonormal columns, ``u^T u = 1``, as an optax transformation.

Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, https://press.princeton.edu/absil
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfa.factored.retractions import Retraction, cayley, orthonormal, polar, tangent


def stiefel(retraction: Retraction | None = polar, *, project: bool = True) -> optax.GradientTransformation:
    """Keeps matrices orthonormal: ``d <- d - u sym(u^T d)``, then ``u <- R(u, d)``; the last link of a chain.

    All retractions agree with ``u + d`` to first order and differ at the second. An optimizer that changes a gradient's
    direction, such as Adam, should be given the projected one, or it will rest elsewhere than at the optimum:
    ``optax.chain(stiefel(None), optax.adam(...), stiefel())``. For some of the parameters, wrap it in
    ``optax.masked``.

    With a retraction, orthonormal columns stay so. Any others, dependent or zero, become so at the first step, which
    sets out from the nearest orthonormal ones; columns too large for the sum ``u + d`` to be exact, at the second.

    Args:
      retraction: ``(u, d) -> u`` back onto the manifold: ``polar``, ``qr`` or ``cayley`` (which needs ``project``)
        of :mod:`jaxfa.factored.retractions`; None takes the step as it is, so that ``u^T u`` drifts by ``d^T d``.
      project: whether to project the step on the tangent space.

    Returns:
      A transformation of matrices ``(..., n, r)`` with ``r <= n``.

    Raises:
      ValueError: if ``cayley`` is to do without ``project``; by ``init`` and ``update``, if a parameter is no such
        matrix; by ``update``, if there are no parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa, optax
      >>> tx, u = optax.chain(jaxfa.factored.stiefel(None), optax.adam(0.1), jaxfa.factored.stiefel()), jnp.eye(4, 2)
      >>> updates, _ = tx.update(jnp.arange(8.0).reshape(4, 2), tx.init(u), u)
      >>> u = optax.apply_updates(u, updates)
      >>> bool(jnp.allclose(u.T @ u, jnp.eye(2), atol=1e-6))
      True

    Source: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008,
    https://press.princeton.edu/absil
    """

    if retraction is cayley and not project:
        raise ValueError("Cayley's retraction takes steps along the manifold alone: leave project=True.")

    def move(d: jax.Array, u: jax.Array) -> jax.Array:
        _check(u)
        wide = jnp.promote_types(u.dtype, jnp.float32)
        d, own = d.astype(wide), u.astype(wide)
        with jax.default_matmul_precision("highest"):
            base = own if retraction is None else orthonormal(own)
            d = tangent(base, d) if project else d
            return (d if retraction is None else retraction(base, d) - own).astype(u.dtype)

    def init(params: Any) -> optax.EmptyState:
        jax.tree.map(_check, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("stiefel needs the parameters: call update(updates, state, params).")
        return jax.tree.map(move, updates, params), state

    return optax.GradientTransformation(init, update)


def _check(u: Any) -> None:
    if u.ndim < 2 or u.shape[-1] > u.shape[-2]:
        raise ValueError(
            f"stiefel needs matrices (..., n, r) with r <= n, got {u.shape}. Leave such out with optax.masked."
        )
