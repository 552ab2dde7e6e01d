"""Direct feedback from measured Jacobians: what a map of the error could teach if its estimate had no noise.

GrAPE learns the Jacobian's mean from perturbations. Here every example's Jacobian is measured, so that what is lost is
lost by the form of the map. Gates ``g_f`` make the map depend on the example: ``dh = sum_f g_f e B_f^T``, where the
``B_f`` are the least squares of the Jacobians of the last batches. One gate, always 1, is GrAPE's linear map. It is a
bound, no rule: it takes a backward pass for every output.
"""

from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxfa
from jaxfa.base import is_feedback

Gates = Callable[[jax.Array, jax.Array], jax.Array]
RIDGE = 0.01  # of the gates' mean power
DIRECTIONS = 16


@jaxfa.feedback_dataclass
class Measured(jaxfa.DirectFeedback):
    """One layer's maps, and the running means of which they are the least squares.

    Attributes:
      b: the maps of ``K`` gates to ``n`` units, ``(K, n, C)``.
      power: the mean of ``g g^T``, ``(K, K)``.
      moment: the mean of ``g`` times the Jacobian, as ``b``.
      own: the layer's own axes, such as ``(H, W, channels)``.
      gates: ``(h, logits) -> g``, of shape ``(N, K)``.
      logits: of the batch; None in a feedback that is bound to none.
      jacobian: every example's, ``(C, N, n)``; likewise.
    """

    b: jax.Array
    power: jax.Array
    moment: jax.Array
    own: tuple[int, ...] = field(metadata={"static": True})
    gates: Gates = field(metadata={"static": True})
    logits: Any = None
    jacobian: Any = None

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return jnp.einsum("Nf,NC,fnC->Nn", self.gates(h, self.logits), e, self.b).reshape(h.shape)

    def signal(self, h: jax.Array, e: jax.Array) -> "Measured":
        g = self.gates(h, self.logits)
        moment = jnp.einsum("Nf,CNn->fnC", g, self.jacobian)
        return replace(jax.tree.map(jnp.zeros_like, self), power=g.T @ g / len(h), moment=moment / len(h))


def measured(gates: Gates, memory: float = 0.95) -> jaxfa.DirectRule:
    """Least squares of the Jacobians, for some gates, of which each batch leaves a share ``memory``."""

    def init(key: jax.Array, h: Any, logits: Any) -> Measured:
        count, own = jax.eval_shape(gates, h, logits).shape[-1], h.shape[1:]
        b = jnp.zeros((count, jax.eval_shape(jnp.ravel, h).size // len(h), logits.shape[-1]), h.dtype)
        return Measured(b, jnp.zeros((count, count), h.dtype), jnp.zeros_like(b), own, gates)

    follow = optax.GradientTransformation(lambda feedback: optax.EmptyState(), partial(_follow, memory))
    return jaxfa.DirectRule(init, transform=follow, bind=_bind)


def _bind(forward: Callable[[Any], jax.Array], feedback: Any) -> Any:
    """The feedback with the logits and Jacobians of one batch."""
    nodes, structure = jax.tree.flatten(feedback, is_leaf=is_feedback)
    examples = len(jax.eval_shape(forward, jax.tree.unflatten(structure, [jnp.zeros(())] * len(nodes))))
    taps = jax.tree.unflatten(structure, [jnp.zeros((examples, *node.own), node.b.dtype) for node in nodes])
    logits, pull = jax.vjp(forward, taps)
    outputs = jnp.broadcast_to(
        jnp.eye(logits.shape[-1], dtype=logits.dtype)[:, None], (logits.shape[-1], *logits.shape)
    )
    found = jax.tree.leaves(lax.stop_gradient(jax.vmap(pull)(outputs)))
    bound = [
        replace(node, logits=lax.stop_gradient(logits), jacobian=one.reshape(*one.shape[:2], -1))
        for node, one in zip(nodes, found, strict=True)
    ]
    return jax.tree.unflatten(structure, bound)


def _follow(memory: float, signals: Any, state: Any, feedback: Any = None) -> tuple[Any, Any]:
    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
        return memory * old + (1 - memory) * new

    def change(signal: Measured, old: Measured) -> Measured:
        power, moment = mean(old.power, signal.power), mean(old.moment, signal.moment)
        held = power + RIDGE * jnp.trace(power) / len(power) * jnp.eye(len(power))
        b = jnp.linalg.solve(held, moment.reshape(len(power), -1)).reshape(moment.shape)
        return replace(old, b=b - old.b, power=power - old.power, moment=moment - old.moment)

    return jax.tree.map(change, signals, feedback, is_leaf=is_feedback), state


def alone(h: jax.Array, logits: jax.Array) -> jax.Array:
    """One gate that is always 1."""
    return jnp.ones((len(h), 1), h.dtype)


def by_output(h: jax.Array, logits: jax.Array) -> jax.Array:
    """One that is always 1, and the probabilities of all classes but one, scaled to a size like its."""
    spread = jax.nn.softmax(logits) - 1 / logits.shape[-1]
    return jnp.concatenate([alone(h, logits), 3 * spread[:, 1:]], -1)


def by_activation(h: jax.Array, logits: jax.Array) -> jax.Array:
    """One that is always 1, and the activation along random directions, each of deviation 1 over the batch."""
    flat = h.reshape(len(h), -1)
    along = flat @ jax.random.normal(jax.random.key(0), (flat.shape[-1], DIRECTIONS), h.dtype)
    along = (along - along.mean(0, keepdims=True)) / (along.std(0, keepdims=True) + 1e-6)
    return jnp.concatenate([alone(h, logits), along], -1)


# The share that a batch leaves makes a map one of this batch alone, of some twenty batches, or of a hundred.
MEASURED: dict[str, tuple[str, jaxfa.Rule]] = {
    "map": ("The measured map", measured(alone)),
    "map-recent": ("The measured map, of one batch", measured(alone, 0.0)),
    "map-slow": ("The measured map, of many batches", measured(alone, 0.99)),
    "map-by-output": ("Measured maps, by the output", measured(by_output)),
    "map-by-activation": ("Measured maps, by the activation", measured(by_activation)),
}
