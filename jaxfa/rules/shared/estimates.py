"""Unbiased estimates of the Jacobian of the logits in tapped activations, from forward-mode derivatives."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfa.base import Initializer
from jaxfa.order import after
from jaxfa.varying import refuse_shards

# How much the square of an example's amplitude differs from its mean, 1.
_DEPTH = 0.5


class Estimate(NamedTuple):
    """One batch's estimate of one layer's Jacobian and how good it is, measured from the spread of its examples.

    Attributes:
      jacobian: the estimate, as the feedback's ``b``.
      variance: an unbiased estimate of ``E |J^ - J|^2``, one number for each layer of a stack; None for one example.
      part: what of the outputs' mean square movement came from this layer, ``s_l^2 <|J_l|^2>``, without bias; None
        for a layer whose scale is fixed.
      whole: the outputs' mean square movement, from all layers; for each layer of a stack the same.
    """

    jacobian: jax.Array
    variance: jax.Array | None
    part: jax.Array | None
    whole: jax.Array


def jacobian_estimates(
    forward: Callable[..., jax.Array],
    nodes: list[Any],
    key: jax.Array,
    *,
    perturbation: Initializer,
    separate: bool,
    given: Sequence[jax.Array | None] | None = None,
) -> list[Estimate]:
    """Estimates of the Jacobian of the logits in every tapped activation, unbiased but for ``given`` perturbations."""
    refuse_shards(
        "the Jacobian's estimate is a mean over the whole batch, so that each device would come to a feedback of its "
        "own. Call refine outside, on arrays that are sharded under jit."
    )
    # One number for each layer of a stack: whatever the activations' shapes are, it can be added to them.
    logits = jax.eval_shape(forward, [jnp.zeros(node.stack) for node in nodes])
    if 0 in logits.shape:
        raise ValueError(f"An estimate needs one example or more, got logits {logits.shape}: leave empty batches out.")
    batches = [logits.shape[: logits.ndim - node.outputs] for node in nodes]
    first, *keys = jax.random.split(key, len(nodes) + 1)
    told = given or [None] * len(nodes)
    powers = [None if p is not None else own for p, own in zip(told, _powers(first, batches, nodes), strict=True)]

    def draw(i: int, key: jax.Array) -> jax.Array:
        p = told[i]
        return _draw(key, batches[i], nodes[i], perturbation, powers[i]) if p is None else p.astype(nodes[i].b.dtype)

    tiles = [draw(i, key) for i, key in enumerate(keys)]
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
    # Drawn again, from the same keys and one after the other: else all layers' are kept until the outputs' movement is
    # known.
    found: list[Estimate] = []
    for i, y in enumerate(answers):
        p = draw(i, _after(keys[i], (y, [one.jacobian for one in found[-1:]])))
        found.append(_correlate(p, powers[i], y, nodes[i]))
    return found


@jax.custom_batching.custom_vmap
def _after(key: jax.Array, known: Any) -> jax.Array:
    """The same key, but not before something is known, for all that the compiler can tell."""
    return after(key, known)


@_after.def_vmap
def _after_each(size: int, batched: Any, key: jax.Array, known: Any) -> tuple[jax.Array, bool]:
    del size
    if batched[0]:
        return jax.vmap(after, tuple(jax.tree.map(lambda one: 0 if one else None, batched)))(key, known), True
    # One key for all stays one, and waits for the first of them: of many some generators would draw other numbers.
    return _after(key, jax.tree.map(lambda leaf, one: leaf[0] if one else leaf, known, batched[1])), False


def _powers(key: jax.Array, batches: Sequence[tuple[int, ...]], nodes: list[Any]) -> list[jax.Array | None]:
    """By what the powers of a layer's examples differ from 1, for layers whose scales are learned.

    One draw for all: each would take longer to compile than a layer.
    """
    shapes = [(*node.stack, *batch) for node, batch in zip(nodes, batches, strict=True)]
    counts = [0 if node.log_scale is None else math.prod(shape) for node, shape in zip(nodes, shapes, strict=True)]
    signs = jnp.split(random_signs(key, (sum(counts),)), np.cumsum(counts)[:-1])
    return [
        None if node.log_scale is None else _DEPTH * own.reshape(shape).astype(node.b.dtype)
        for node, shape, own in zip(nodes, shapes, signs, strict=True)
    ]


def _draw(
    key: jax.Array, batch: tuple[int, ...], node: Any, perturbation: Initializer, powers: jax.Array | None
) -> jax.Array:
    """A perturbation of variance 1; the examples' powers of a layer whose scale is learned differ from it.

    What the outputs' movement has to do with those powers is the layer's part in it: the one number that a shared
    derivative hides. They add ``_DEPTH^2`` times its own part to a layer's variance, nothing to that of others.
    """
    p = perturbation(key, (*node.stack, *batch, *node.tile), node.b.dtype)
    return p if powers is None else _along(jnp.sqrt(1 + powers), p)


def _correlate(p: jax.Array, powers: jax.Array | None, y: jax.Array, node: Any) -> Estimate:
    """What one derivative ``y`` along the perturbations ``scale p`` tells of one node's layers."""
    stack, batch = len(node.stack), y.ndim - node.outputs
    examples, y = math.prod(y.shape[:batch]), y.astype(p.dtype)
    over = (list(range(stack, stack + batch)), list(range(batch)))
    found = jnp.tensordot(p, y, over) / examples
    unit = 1 / (node.scale * node.repeats)
    moved = _power(y, batch)
    squares = jnp.tensordot(_power(p, stack + batch), moved, over) / examples
    return Estimate(
        jacobian=_along(unit, found),
        variance=jnp.square(unit) * (squares - _power(found, stack)) / (examples - 1) if examples > 1 else None,
        part=None if powers is None else jnp.tensordot(powers, moved, over) / (examples * _DEPTH**2),
        whole=jnp.full(node.stack, jnp.mean(moved)),
    )


def _along(factors: jax.Array, array: jax.Array) -> jax.Array:
    """An array with its leading axes multiplied by factors."""
    return factors.reshape(*factors.shape, *[1] * (array.ndim - factors.ndim)) * array


def _power(array: jax.Array, leading: int) -> jax.Array:
    return jnp.sum(jnp.square(array), tuple(range(leading, array.ndim)))


def random_signs(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Independent draws of -1 and 1: white noise from one bit each, a twelfth of the time of normal draws on a CPU."""
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // 32), 1), jnp.uint32)
    bits = words >> jnp.arange(32, dtype=jnp.uint32)[None] & 1
    return (1 - 2 * bits.astype(dtype)).ravel()[:count].reshape(shape)
