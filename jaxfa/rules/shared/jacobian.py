"""What direct rules share that learn the Jacobian of the output: their feedback, which follows its estimates."""

import math
from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfa.base import DirectFeedback, DirectRule, Initializer, feedback_dataclass, is_feedback
from jaxfa.rules.shared.projection import direct_matrix, project, shared_axes
from jaxfa.varying import refuse_shards

# How much the square of an example's amplitude differs from its mean, 1.
_DEPTH = 0.5
# The weight of a new batch in what is watched.
_WATCHED = 0.05


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


# (running mean, its precision, an estimate) -> the estimate's weight in the new mean, the new mean's precision.
Gain = Callable[[jax.Array, jax.Array, Estimate], tuple[jax.Array | float, jax.Array]]


@feedback_dataclass
class JacobianFeedback(DirectFeedback):
    """A matrix from the outputs to one layer that learns to be the transposed Jacobian ``d logits / d h``.

    Attributes:
      b: feedback weights, the layer's own axes, then the outputs: ``(n, C)``, ``(H, W, n, C)``, or ``(t, t, n, C)``
        for a tile that repeats over the map.
      mean: the running mean of the Jacobian's estimates, as ``b``; None if none is kept.
      own: the layer's own axes, such as ``(H, W, n)``.
      outputs: how many axes the outputs have.
      precision: one over the running mean's variance; zero if nothing is known yet or nobody asks.
      log_scale: the logarithm of the perturbation's scale; None is a scale of 1.
      watched: running means of ``<b, J^> / |b|`` and of ``|J|^2``, of which no bias is known; None if nobody asks.
    """

    b: jax.Array
    mean: jax.Array | None
    own: tuple[int, ...] = field(metadata={"static": True})
    outputs: int = field(default=1, metadata={"static": True})
    precision: jax.Array | None = None
    log_scale: jax.Array | None = None
    watched: jax.Array | None = None

    def deliver(self, h: jax.Array, e: jax.Array) -> jax.Array:
        batch = h.shape[: h.ndim - len(self.own)]
        tile = jax.ShapeDtypeStruct((*batch, *self.tile), h.dtype)
        return self.spread(project(self.b, tile, e), len(batch))

    @property
    def repeats(self) -> int:
        """The number of positions that share one matrix."""
        return math.prod(self.own) // math.prod(self.tile)

    @property
    def scale(self) -> jax.Array:
        """The perturbation's scale, for each layer of a stack."""
        return jnp.ones(self.stack, self.b.dtype) if self.log_scale is None else jnp.exp(self.log_scale)

    @property
    def alignment(self) -> jax.Array | None:
        """The cosine of ``b`` with the Jacobian, as the estimates tell it; 0 until they do, None if nobody asked."""
        if self.watched is None:
            return None
        overlap, square = self.watched[..., 0], self.watched[..., 1]
        return jnp.where(square > 0, overlap / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

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
    averaging: float | Gain,
    tile: int | None,
    perturbation: Initializer,
    separate: bool,
    scaling: float,
    watch: bool = False,
) -> DirectRule:
    """A rule whose feedback ``turn``s to each new estimate, or running mean, of the Jacobian."""
    _check(averaging, tile, separate, scaling)
    estimate = partial(jacobian_estimates, perturbation=perturbation, separate=separate)

    def init(key: jax.Array, h: Any, logits: Any) -> JacobianFeedback:
        k = shared_axes(h, logits)
        *positions, n = h.shape[k:]
        sides = [size if tile is None else math.gcd(size, tile) for size in positions]
        b = direct_matrix(key, distribution, jax.ShapeDtypeStruct((*h.shape[:k], *sides, n), h.dtype), logits)
        feedback = JacobianFeedback(b, None, tuple(h.shape[k:]), len(logits.shape) - k)
        b = b / math.sqrt(feedback.repeats)
        # Each array is one of its own: a buffer that two leaves share cannot be donated.
        mean, precision = (jnp.zeros_like(b), jnp.zeros((), b.dtype)) if averaging else (None, None)
        log_scale = jnp.zeros((), b.dtype) if scaling else None
        watched = jnp.zeros(2, b.dtype) if watch else None
        return replace(feedback, b=b, mean=mean, precision=precision, log_scale=log_scale, watched=watched)

    def learn(feedback: JacobianFeedback, estimate: Estimate) -> JacobianFeedback:
        if feedback.stack:
            return jax.vmap(learn)(feedback, estimate)
        if feedback.watched is not None:
            feedback = replace(feedback, watched=_watch(feedback, estimate, feedback.watched))
        if feedback.mean is None or feedback.precision is None:
            return replace(feedback, b=turn(feedback, estimate.jacobian))
        if callable(averaging):
            weight, precision = averaging(feedback.mean, feedback.precision, estimate)
        else:
            weight, precision = 1 - averaging, feedback.precision
        mean = (1 - weight) * feedback.mean + weight * estimate.jacobian
        return replace(feedback, b=turn(feedback, mean), mean=mean, precision=precision)

    def refine(forward: Any, feedback: Any, key: jax.Array) -> Any:
        nodes, structure = jax.tree.flatten(feedback, is_leaf=is_feedback)
        found = estimate(lambda taps: forward(jax.tree.unflatten(structure, taps)), nodes, key)
        nodes = [learn(node, one) for node, one in zip(nodes, found, strict=True)]
        return jax.tree.unflatten(structure, rescale(nodes, found, scaling) if scaling else nodes)

    refine.__qualname__ = turn.__qualname__  # a message about it names the rule
    return DirectRule(init, refine)


def _watch(feedback: JacobianFeedback, estimate: Estimate, watched: jax.Array) -> jax.Array:
    """What is watched after one more batch, of which ``b`` knows nothing yet: so neither of the two has a bias."""
    if estimate.variance is None:
        raise ValueError("watch measures noise by the spread of a batch: give refine two examples or more.")
    overlap = jnp.vdot(feedback.b, estimate.jacobian) / jnp.linalg.norm(feedback.b)
    found = jnp.stack([overlap, jnp.sum(jnp.square(estimate.jacobian)) - estimate.variance])
    return watched + _WATCHED * (found - watched)


def _check(averaging: float | Gain, tile: int | None, separate: bool, scaling: float) -> None:
    if not callable(averaging) and not 0.0 <= averaging < 1.0:
        raise ValueError(f"averaging must be in [0, 1) or a value such as kalman(), got {averaging}.")
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be a number of pixels from 1, or None for the whole map, got {tile}.")
    if not 0.0 <= scaling <= 1.0:
        raise ValueError(f"scaling must be from 0 to 1, got {scaling}.")
    if separate and scaling:
        raise ValueError(
            "Separate derivatives make each other no noise that scaling could lower: give scaling=0.0 with separate."
        )


def rescale(nodes: list[Any], found: list[Estimate], rate: float) -> list[Any]:
    """Moves every layer's scale towards the one of least variance, ``s_l ~ n_l^(1/4) / |J_l|``."""
    # All layers move the outputs at once, so that with u_l = s_l^2 <|J_l|^2>, how much of it is l's, the variances in
    # units of <|J_l|^2> add up to sum_l n_l (1 + sum_m u_m / u_l) / N, m not l. A pair's n_l u_m / u_l + n_m u_l / u_m
    # is least where u_l : u_m = sqrt(n_l) : sqrt(n_m), which one u, sqrt(n), gives all pairs at once. Robbins and
    # Monro's steps rest there; the clipping is for small batches; the scales' product stays 1.
    shares = [
        jnp.where(one.whole > 0, jnp.clip(one.part / one.whole, -1, 1), 0) for one in found if one.part is not None
    ]
    sides = [math.sqrt(math.prod(node.tile)) for node in nodes]
    whole = sum(side * math.prod(node.stack) for side, node in zip(sides, nodes, strict=True))
    total = sum(jnp.sum(share) for share in shares)
    return [
        replace(node, log_scale=node.log_scale - rate * (share - side / whole * total))
        for node, share, side in zip(nodes, shares, sides, strict=True)
    ]


def jacobian_estimates(
    forward: Callable[..., jax.Array], nodes: list[Any], key: jax.Array, *, perturbation: Initializer, separate: bool
) -> list[Estimate]:
    """Unbiased estimates of the Jacobian of the logits in every tapped activation."""
    refuse_shards(
        "the Jacobian's estimate is a mean over the whole batch, so that each device would come to a feedback of its "
        "own. Call refine outside, on arrays that are sharded under jit."
    )
    # One number for each layer of a stack: whatever the activations' shapes are, it can be added to them.
    logits = jax.eval_shape(forward, [jnp.zeros(node.stack) for node in nodes])
    if 0 in logits.shape:
        raise ValueError(f"An estimate needs one example or more, got logits {logits.shape}: leave empty batches out.")
    batches = [logits.shape[: logits.ndim - node.outputs] for node in nodes]
    keys = jax.random.split(key, len(nodes))
    drawn = [_draw(*one, perturbation) for one in zip(keys, batches, nodes, strict=True)]
    tiles = [p for p, _ in drawn]
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
    return [_correlate(*one, y, node) for one, y, node in zip(drawn, answers, nodes, strict=True)]


def _draw(
    key: jax.Array, batch: tuple[int, ...], node: Any, perturbation: Initializer
) -> tuple[jax.Array, jax.Array | None]:
    """A perturbation of variance 1 and, of a layer whose scale is learned, by what its examples' powers differ from it.

    What the outputs' movement has to do with those powers is the layer's part in it: the one number that a shared
    derivative hides. They add ``_DEPTH^2`` times its own part to a layer's variance, nothing to that of others.
    """
    p = perturbation(key, (*node.stack, *batch, *node.tile), node.b.dtype)
    if node.log_scale is None:
        return p, None
    powers = _DEPTH * random_signs(jax.random.fold_in(key, 1), (*node.stack, *batch), p.dtype)
    return _along(jnp.sqrt(1 + powers), p), powers


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
