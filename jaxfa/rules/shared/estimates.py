"""Unbiased estimates of the Jacobian of the logits in tapped activations, from forward-mode derivatives."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfa.base import Initializer
from jaxfa.order import after
from jaxfa.rules.shared.noise import Noise, noise_of
from jaxfa.varying import refuse_shards

# By how much the square of an example's amplitude differs from its mean, 1.
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
    noise = noise_of(perturbation)
    moves = [
        _Perturbation(noise, node, logits.shape[: logits.ndim - node.outputs], p)
        for node, p in zip(nodes, given or [None] * len(nodes), strict=True)
    ]
    seeds = iter(noise.seeds(key, [shape for one in moves for shape in one.shapes]) if moves else [])
    held = [(next(seeds), one.amplitude(next(seeds))) for one in moves]
    tangents = [
        _along(node.scale, node.spread(one.made(*own), len(node.stack) + len(one.batch)))
        for node, one, own in zip(nodes, moves, held, strict=True)
    ]
    answers = _answers(forward, tangents, separate=separate)
    # Made again, from the same seeds and one after the other: else all layers' are kept until the outputs' movement is
    # known.
    found: list[Estimate] = []
    for node, one, own, y in zip(nodes, moves, held, answers, strict=True):
        seed, amplitude = _after(own, (y, [last.jacobian for last in found[-1:]]))
        found.append(_correlate(one.made(seed, amplitude), amplitude, y, node))
    return found


def _answers(forward: Callable[..., jax.Array], tangents: list[jax.Array], *, separate: bool) -> list[jax.Array]:
    """How the outputs move along the perturbations of each layer alone or, the same for each, of all at once."""
    zeros = [jnp.zeros_like(tangent) for tangent in tangents]
    if not separate:
        return [jax.jvp(forward, (zeros,), (tangents,))[1]] * len(tangents)
    alone = (
        [t if i == j else z for j, (t, z) in enumerate(zip(tangents, zeros, strict=True))] for i in range(len(tangents))
    )
    return [jax.jvp(forward, (zeros,), (some,))[1] for some in alone]


class _Perturbation(NamedTuple):
    """How one node's activation is perturbed, by variance 1.

    The amplitudes of a layer whose scale is learned differ from example to example, and their squares' mean is 1. What
    these have to do with the outputs' movement is the layer's part in it: the one number that a shared derivative
    hides. They add ``_DEPTH^2`` times its own part to a layer's variance, nothing to that of others.
    """

    noise: Noise
    node: Any
    batch: tuple[int, ...]
    told: jax.Array | None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of what is drawn: the noise, and the signs of the examples' amplitudes."""
        if self.told is not None:
            return (0,), (0,)
        each = (*self.node.stack, *self.batch)
        return (*each, *self.node.tile), (0,) if self.node.log_scale is None else each

    def amplitude(self, seed: jax.Array) -> jax.Array | None:
        """The examples' amplitudes; None are all 1."""
        if self.told is not None or self.node.log_scale is None:
            return None
        return jnp.sqrt(1 + _DEPTH * self.noise.signs(seed, self.shapes[1], self.node.b.dtype))

    def made(self, seed: jax.Array, amplitude: jax.Array | None) -> jax.Array:
        """The perturbation."""
        dtype = self.node.b.dtype
        p = self.noise.made(seed, self.shapes[0], dtype) if self.told is None else self.told.astype(dtype)
        return p if amplitude is None else _along(amplitude, p)


@jax.custom_batching.custom_vmap
def _after(held: Any, known: Any) -> Any:
    """The same, but not before something is known, for all that the compiler can tell."""
    return after(held, known)


@_after.def_vmap
def _after_each(size: int, batched: Any, held: Any, known: Any) -> tuple[Any, Any]:
    del size
    each = any(jax.tree.leaves(batched[0]))
    if each:
        found = jax.vmap(after, tuple(jax.tree.map(lambda one: 0 if one else None, batched)))(held, known)
    else:
        # One key for all stays one, and waits for the first of them: of many some generators would draw other numbers.
        found = _after(held, jax.tree.map(lambda leaf, one: leaf[0] if one else leaf, known, batched[1]))
    return found, jax.tree.map(lambda _: each, found)


def _correlate(p: jax.Array, amplitude: jax.Array | None, y: jax.Array, node: Any) -> Estimate:
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
        part=None if amplitude is None else jnp.tensordot(amplitude**2 - 1, moved, over) / (examples * _DEPTH**2),
        whole=jnp.full(node.stack, jnp.mean(moved)),
    )


def _along(factors: jax.Array, array: jax.Array) -> jax.Array:
    """An array with its leading axes multiplied by factors."""
    return factors.reshape(*factors.shape, *[1] * (array.ndim - factors.ndim)) * array


def _power(array: jax.Array, leading: int) -> jax.Array:
    return jnp.sum(jnp.square(array), tuple(range(leading, array.ndim)))
