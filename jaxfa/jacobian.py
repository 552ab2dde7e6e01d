"""What direct rules share that learn the Jacobian of the output: its estimate from one forward-mode derivative."""

import math
from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.base import DirectFeedback, Initializer, Rule, is_feedback, register
from jaxfa.projection import direct_matrix, project, shared_axes


@register
class JacobianFeedback(DirectFeedback):
    """A matrix from the outputs to one layer that learns to be the transposed Jacobian ``d logits / d h``.

    Attributes:
      b: feedback weights, the layer's own axes, then the outputs: ``(n, C)``, ``(H, W, n, C)``, or ``(t, t, n, C)``
        for a tile that repeats over the map.
      mean: the running mean of the Jacobian's estimates, as ``b``; None if none is kept.
      own: the layer's own axes, such as ``(H, W, n)``.
      outputs: how many axes the outputs have.
    """

    b: jax.Array
    mean: jax.Array | None
    own: tuple[int, ...] = field(metadata={"static": True})
    outputs: int = field(default=1, metadata={"static": True})

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        batch = h.shape[: h.ndim - len(self.own)]
        tile = jax.ShapeDtypeStruct((*batch, *self.tile), h.dtype)
        return self.spread(project(self.b, tile, e), len(batch))

    @property
    def repeats(self) -> int:
        """How many positions share one matrix."""
        return math.prod(self.own) // math.prod(self.tile)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes that count the layers of a stack."""
        return self.b.shape[: self.b.ndim - len(self.own) - self.outputs]

    @property
    def tile(self) -> tuple[int, ...]:
        """The shape of the layer's own part of ``b``."""
        return self.b.shape[len(self.stack) : len(self.stack) + len(self.own)]

    def spread(self, values: jax.Array, batch: int) -> jax.Array:
        """Repeats a tile's values over the map; the first ``batch`` axes are left alone."""
        counts = [size // part for size, part in zip(self.own, self.tile, strict=True)]
        return values if self.tile == self.own else jnp.tile(values, (*[1] * batch, *counts))


def jacobian_rule(
    turn: Callable[[JacobianFeedback, jax.Array], jax.Array],
    distribution: Initializer,
    *,
    averaging: float,
    tile: int | None,
    perturbation: Initializer,
    separate: bool,
) -> Rule:
    """A rule whose feedback ``turn``s to each new estimate, or running mean, of the Jacobian."""
    if not 0.0 <= averaging < 1.0:
        raise ValueError(f"averaging must be in [0, 1), got {averaging}.")
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be a number of pixels from 1, or None for the whole map, got {tile}.")
    estimate = partial(jacobian_estimates, perturbation=perturbation, separate=separate)

    def init(key: jax.Array, h: Any, logits: Any) -> JacobianFeedback:
        k = shared_axes(h, logits)
        *positions, n = h.shape[k:]
        sides = [size if tile is None else min(tile, size) for size in positions]
        if any(size % side for size, side in zip(positions, sides, strict=True)):
            raise ValueError(
                f"Tiles of {tile} do not divide an activation of {h.shape[k:]}; choose 1, None or a divisor."
            )
        b = direct_matrix(key, distribution, jax.ShapeDtypeStruct((*h.shape[:k], *sides, n), h.dtype), logits)
        feedback = JacobianFeedback(b, None, tuple(h.shape[k:]), len(logits.shape) - k)
        b = b / math.sqrt(feedback.repeats)
        return replace(feedback, b=b, mean=jnp.zeros_like(b) if averaging else None)

    def learn(feedback: JacobianFeedback, estimate: jax.Array) -> JacobianFeedback:
        if feedback.stack:
            return jax.vmap(learn)(feedback, estimate)
        if feedback.mean is None:
            return replace(feedback, b=turn(feedback, estimate))
        mean = averaging * feedback.mean + (1 - averaging) * estimate
        return replace(feedback, b=turn(feedback, mean), mean=mean)

    def refine(forward: Any, feedback: Any, key: jax.Array) -> Any:
        nodes, structure = jax.tree.flatten(feedback, is_leaf=is_feedback)
        found = estimate(lambda taps: forward(jax.tree.unflatten(structure, taps)), nodes, key)
        return jax.tree.unflatten(structure, [learn(node, one) for node, one in zip(nodes, found, strict=True)])

    return Rule(init, refine)


def jacobian_estimates(
    forward: Callable[..., jax.Array], nodes: list[Any], key: jax.Array, *, perturbation: Initializer, separate: bool
) -> list[jax.Array]:
    """Unbiased estimates of the Jacobian of the logits in every tapped activation, each shaped as its ``b``."""
    # One number for each layer of a stack: whatever the activations' shapes are, it can be added to them.
    logits = jax.eval_shape(forward, [jnp.zeros(node.stack) for node in nodes])
    batches = [logits.shape[: logits.ndim - node.outputs] for node in nodes]
    keys = jax.random.split(key, len(nodes))
    tiles = [
        perturbation(key, (*node.stack, *batch, *node.tile), node.b.dtype)
        for key, batch, node in zip(keys, batches, nodes, strict=True)
    ]
    tangents = [
        node.spread(p, len(node.stack) + len(batch)) for p, batch, node in zip(tiles, batches, nodes, strict=True)
    ]
    zeros = [jnp.zeros_like(tangent) for tangent in tangents]
    if separate:
        alone = (
            [t if i == j else z for j, (t, z) in enumerate(zip(tangents, zeros, strict=True))]
            for i in range(len(nodes))
        )
        answers = [jax.jvp(forward, (zeros,), (some,))[1] for some in alone]
    else:
        answers = [jax.jvp(forward, (zeros,), (tangents,))[1]] * len(nodes)

    def correlate(p: jax.Array, y: jax.Array, batch: tuple[int, ...], node: JacobianFeedback) -> jax.Array:
        axes = range(len(batch))
        found = jnp.tensordot(p, y.astype(p.dtype), ([len(node.stack) + axis for axis in axes], list(axes)))
        return found / (math.prod(batch) * node.repeats)

    return list(map(correlate, tiles, answers, batches, nodes))
