"""The Jacobian of the output in every tapped activation, estimated by one forward-mode derivative, and how well."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfa.base import Initializer


class Estimate(NamedTuple):
    """One batch's estimate of one layer's Jacobian and how good it is, measured from the spread of its examples.

    Attributes:
      jacobian: the estimate, as the feedback's ``b``.
      variance: an unbiased estimate of ``E |J^ - J|^2``, one number for each layer of a stack; None for one example.
      part: likewise of the outputs' mean square movement that came from this layer alone, ``s_l^2 |J_l|^2``.
      whole: the outputs' mean square movement, from all layers; for each layer of a stack the same.
    """

    jacobian: jax.Array
    variance: jax.Array | None
    part: jax.Array | None
    whole: jax.Array


def measured(value: jax.Array | None) -> jax.Array:
    """What one example alone can't tell."""
    if value is None:
        raise ValueError(
            "The noise of an estimate is measured from the spread of its examples: give refine two examples or more."
        )
    return value


def jacobian_estimates(
    forward: Callable[..., jax.Array], nodes: list[Any], key: jax.Array, *, perturbation: Initializer, separate: bool
) -> list[Estimate]:
    """Unbiased estimates of the Jacobian of the logits in every tapped activation."""
    # One number for each layer of a stack: whatever the activations' shapes are, it can be added to them.
    logits = jax.eval_shape(forward, [jnp.zeros(node.stack) for node in nodes])
    batches = [logits.shape[: logits.ndim - node.outputs] for node in nodes]
    keys = jax.random.split(key, len(nodes))
    tiles = [
        perturbation(key, (*node.stack, *batch, *node.tile), node.b.dtype)
        for key, batch, node in zip(keys, batches, nodes, strict=True)
    ]
    tangents = [
        _along(node.scale, node.spread(p, len(node.stack) + len(batch)))
        for p, batch, node in zip(tiles, batches, nodes, strict=True)
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
    return list(map(_correlate, tiles, answers, nodes))


def _correlate(p: jax.Array, y: jax.Array, node: Any) -> Estimate:
    """What one derivative ``y`` along the perturbations ``scale p`` tells of one node's layers."""
    stack, batch = len(node.stack), y.ndim - node.outputs
    examples, y = math.prod(y.shape[:batch]), y.astype(p.dtype)
    over = (list(range(stack, stack + batch)), list(range(batch)))
    found = jnp.tensordot(p, y, over) / examples
    unit = 1 / (node.scale * node.repeats)
    jacobian = _along(unit, found)
    whole = jnp.full(node.stack, jnp.mean(_power(y, batch)))
    if examples < 2:
        return Estimate(jacobian, None, None, whole)
    squares = jnp.tensordot(_power(p, stack + batch), _power(y, batch), over) / examples
    size = _power(found, stack)
    variance = (squares - size) / (examples - 1)
    return Estimate(jacobian, jnp.square(unit) * variance, size - variance, whole)


def _along(factors: jax.Array, array: jax.Array) -> jax.Array:
    """An array with its leading axes multiplied by factors."""
    return factors.reshape(*factors.shape, *[1] * (array.ndim - factors.ndim)) * array


def _power(array: jax.Array, leading: int) -> jax.Array:
    return jnp.sum(jnp.square(array), tuple(range(leading, array.ndim)))
