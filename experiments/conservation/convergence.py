"""What the law leads to in a two-layer linear network: exponential convergence, and to which solution."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxfa
from jaxfa.measure.conservation import minimum_norm


class Convergence(NamedTuple):
    """How a two-layer linear network came to its solution; arrays of NumPy, seeds first.

    Attributes:
      distance: ``|w_1 w_2 - w| / |w|`` of the least solution ``w``, ``(seeds, steps)``.
      residual: ``|x w_1 w_2 - y|``, likewise.
      fitted: the rate at which the residual falls, per step, from its logarithm's slope.
      predicted: the rate that the state at the end gives, ``-log(1 - eta lambda_min(overlap K + x w_1 w_1^T x^T))``,
        with ``K = x x^T``.
      bound: the theorem's, ``eta lambda_min(K)`` times the least overlap that the law allows.
    """

    distance: np.ndarray
    residual: np.ndarray
    fitted: np.ndarray
    predicted: np.ndarray
    bound: np.ndarray


def convergence(*, seeds: int, seed: int, steps: int, rate: float = 3e-3) -> dict[str, Convergence]:
    """How a two-layer linear network that learns by feedback alignment comes to a solution, by its first layer's start.

    20 examples of 50 dimensions, 10 hidden units, one output, squared error; the second layer starts as its feedback.
    With ``r = x w_1 w_2 - y`` the flow is ``r' = -(<b, w_2> K + x w_1 w_1^T x^T) r``, and the law keeps the overlap
    ``<b, w_2>`` above ``<b, w_2(0)> - |w_1(0)|^2 / 2``: exponential where that is positive.
    """

    def one(start: str, key: jax.Array) -> Any:
        x_key, y_key, b_key, w_key = jax.random.split(key, 4)
        x, y = jax.random.normal(x_key, (20, 50)), jax.random.normal(y_key, (20, 1))
        b = jax.random.normal(b_key, (10, 1)) / np.sqrt(10)
        least = minimum_norm(x, y)

        def loss(params: Any) -> jax.Array:
            first, second = params
            return 0.5 * jnp.sum((jaxfa.linear(x @ first, second, jaxfa.FixedFeedback(b)) - y) ** 2)

        def step(params: Any, _: None) -> Any:
            params = jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params))
            w = params[0] @ params[1]
            return params, (jnp.linalg.norm(w - least) / jnp.linalg.norm(least), jnp.linalg.norm(x @ w - y))

        first = FIRST_LAYERS[start](x, w_key)
        (w, v), found = lax.scan(step, (first, b), length=steps)
        slowest = jnp.linalg.eigvalsh(jnp.sum(b * v) * (x @ x.T) + (x @ w) @ (x @ w).T)[0]
        least_overlap = jnp.sum(b * b) - 0.5 * jnp.sum(first**2)
        bound = rate * jnp.linalg.eigvalsh(x @ x.T)[0] * least_overlap
        return *found, -jnp.log1p(-rate * slowest), bound

    keys = [jax.random.key(i) for i in range(seed, seed + seeds)]
    made = {}
    for start in FIRST_LAYERS:
        run = jax.jit(partial(one, start))
        # One by one: least squares under vmap would be a batched decomposition, which can hang on CPUs.
        distance, residual, predicted, bound = map(np.stack, zip(*map(run, keys), strict=True))
        made[start] = Convergence(distance, residual, np.array(list(map(_slope, residual))), predicted, bound)
    return made


def _slope(residual: np.ndarray) -> float:
    """The rate of an exponential fall, fitted where only the slowest mode is left and rounding is far."""
    where = (residual < 1e-6 * residual[0]) & (residual > 1e-12 * residual[0])
    return -np.polyfit(np.flatnonzero(where), np.log(residual[where]), 1)[0] if where.sum() > 1 else np.nan


def _first_layer(x: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (x.shape[1], 10)) / np.sqrt(x.shape[1])


FIRST_LAYERS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "zero": lambda x, key: jnp.zeros((x.shape[1], 10)),
    "in the span of the data": lambda x, key: minimum_norm(x, x @ _first_layer(x, key)),
    "random": _first_layer,
}
