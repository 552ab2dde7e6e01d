"""The forms that a map of the error can have, each fitted to some images' Jacobians and judged on others."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

RIDGE = 0.01  # of the gates' mean power
SEEN, GATES = 64, 16
STEPS, BATCH, RATE = 500, 256, 1e-2


class Seen(NamedTuple):
    """What is known of some images at one tap.

    Attributes:
      h: the activation along its principal directions, of deviation 1, the strongest first, ``(N, SEEN)``.
      own: the activation of the units that are judged, ``(N, n)``.
      probabilities: of the classes, ``(N, C)``.
      error: the output's, ``(N, C)``.
      jacobian: of the logits by the units that are judged, ``(N, C, n)``.
    """

    h: jax.Array
    own: jax.Array
    probabilities: jax.Array
    error: jax.Array
    jacobian: jax.Array


def gated(gates: Callable[[Seen], jax.Array], fit: Seen, held: Seen) -> jax.Array:
    """The held images' Jacobians by the maps that are least squares for some gates, ``(N, K)``."""
    g = gates(fit)
    power = g.T @ g / len(g)
    ridge = RIDGE * jnp.trace(power) / len(power) * jnp.eye(len(power))
    b = jnp.linalg.solve(power + ridge, jnp.einsum("Nk,NCn->kCn", g, fit.jacobian).reshape(len(power), -1) / len(g))
    return (gates(held) @ b).reshape(held.jacobian.shape)


def alone(seen: Seen) -> jax.Array:
    """One gate that is always 1."""
    return jnp.ones((len(seen.h), 1))


def by_output(seen: Seen) -> jax.Array:
    """The same, and the probabilities of all classes but one."""
    return jnp.concatenate([alone(seen), seen.probabilities[:, 1:]], -1)


def by_activation(count: int, seen: Seen) -> jax.Array:
    """The same, and the activation along the directions in which it varies most."""
    return jnp.concatenate([alone(seen), seen.h[:, :count]], -1)


def by_own(fit: Seen, held: Seen) -> jax.Array:
    """Two maps, the second gated unit by unit: whether the unit's own ReLU is open."""
    is_open = (fit.own > 0).astype(fit.own.dtype)
    share, mean = is_open.mean(0, keepdims=True), fit.jacobian.mean(0)
    slope = (jnp.einsum("Nn,NCn->Cn", is_open, fit.jacobian) / len(is_open) - share * mean) / (
        share * (1 - share) + RIDGE
    )
    return mean[None] + slope[None] * ((held.own > 0) - share)[:, None]


def by_low_rank(key: jax.Array, seen: Seen) -> Any:
    """One map for all, and gates that learn, each of an outer product."""
    keys, (_, classes, units), width = jax.random.split(key, 3), seen.jacobian.shape, seen.h.shape[1]
    w, p, q = map(jax.random.normal, keys, ((width, GATES), (GATES, classes), (GATES, units)))
    return {"w": w / width**0.5, "p": p, "q": 0.1 * q, "b": seen.jacobian.mean(0)}


def tell_low_rank(params: Any, h: jax.Array) -> jax.Array:
    """Every example's Jacobian by the maps of :func:`by_low_rank`."""
    return params["b"][None] + jnp.einsum("Nk,kC,kn->NCn", h @ params["w"], params["p"], params["q"])


def by_network(key: jax.Array, seen: Seen) -> Any:
    """One map for all, and maps with gates that a network with a hidden layer computes."""
    (first, second), width, b = jax.random.split(key), seen.h.shape[1], seen.jacobian.mean(0)
    hidden = jax.random.normal(first, (width, SEEN)) * (2 / width) ** 0.5
    out = jax.random.normal(second, (SEEN, GATES)) / SEEN**0.5
    return {"hidden": hidden, "bias": jnp.zeros(SEEN), "out": out, "b": b, "maps": jnp.zeros((GATES, *b.shape))}


def tell_network(params: Any, h: jax.Array) -> jax.Array:
    """Every example's Jacobian by the maps of :func:`by_network`."""
    g = jax.nn.relu(h @ params["hidden"] + params["bias"][None]) @ params["out"]
    return params["b"][None] + jnp.einsum("Nk,kCn->NCn", g, params["maps"])


def learned(start: Callable[..., Any], tell: Callable[..., jax.Array], fit: Seen, held: Seen) -> jax.Array:
    """The held images' Jacobians by a function of the activation that Adam has fitted to the others."""
    size = jnp.sqrt(jnp.mean(fit.jacobian**2))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    first, *keys = jax.random.split(jax.random.key(0), STEPS + 1)

    def step(carry: Any, key: jax.Array) -> Any:
        (params, state), some = carry, jax.random.randint(key, (BATCH,), 0, len(fit.h))
        h, true = fit.h[some], fit.jacobian[some] / size
        gradient = jax.grad(lambda params: jnp.mean((tell(params, h) - true) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = start(first, fit._replace(jacobian=fit.jacobian / size))
    (params, _), _ = lax.scan(step, (params, optimizer.init(params)), jnp.stack(keys))
    return tell(params, held.h) * size


# Each form's title, and the held images' Jacobians by it.
FORMS: dict[str, tuple[str, Callable[[Seen, Seen], jax.Array]]] = {
    "alone": ("One map for all examples", partial(gated, alone)),
    "own": ("Gated by the unit's own ReLU", by_own),
    "output": ("Gated by the output's probabilities", partial(gated, by_output)),
    "activation": ("Gated by the activation along 16 directions", partial(gated, partial(by_activation, GATES))),
    "all": ("Gated by the activation along 64 directions", partial(gated, partial(by_activation, SEEN))),
    "low-rank": ("16 gates that learn, of low rank", partial(learned, by_low_rank, tell_low_rank)),
    "network": ("16 gates by a small network", partial(learned, by_network, tell_network)),
}


def judge(predict: Callable[[Seen, Seen], jax.Array], seen: Seen) -> float:
    """The mean cosine of the errors that a form delivers with the true ones, on images that it was not fitted to."""
    first = 3 * len(seen.h) // 4
    fit, held = (jax.tree.map(lambda leaf, part=part: leaf[part], seen) for part in (slice(first), slice(first, None)))
    told, true = (jnp.einsum("NC,NCn->Nn", held.error, j) for j in (jax.jit(predict)(fit, held), held.jacobian))
    size = jnp.linalg.norm(told, axis=-1) * jnp.linalg.norm(true, axis=-1)
    return float(jnp.mean((told * true).sum(-1) / (size + 1e-12)))
