"""What direct rules share that learn the Jacobian of the output: their feedback, which follows its estimates."""

import math
from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.base import DirectFeedback, DirectRule, ForwardPass, Initializer, feedback_dataclass, is_feedback
from jaxfa.rules.shared.estimates import Estimate, jacobian_estimates
from jaxfa.rules.shared.projection import direct_matrix, project, shared_axes

# The weight of a new batch in what is watched.
_WATCHED = 0.05


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
    name: str,
    turn: Callable[[JacobianFeedback, jax.Array], jax.Array],
    distribution: Initializer,
    *,
    perturbation: Initializer,
    averaging: float | Gain = 0.0,
    tile: int | None = None,
    separate: bool = False,
    scaling: float = 0.0,
    watch: bool = False,
    weights: bool = False,
) -> DirectRule:
    """The rule of a name whose feedback ``turn``s to each new estimate, or running mean, of the Jacobian."""
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

    def refine(forward: Any, feedback: Any, key: jax.Array) -> Any:
        nodes, structure = jax.tree.flatten(feedback, is_leaf=is_feedback)
        key, weight_key = jax.random.split(key) if weights else (key, key)
        given = _moved(forward, weight_key, perturbation) if weights else None
        found = estimate(lambda taps: forward(jax.tree.unflatten(structure, taps)), nodes, key, given=given)
        nodes = [_learn(turn, averaging, node, one) for node, one in zip(nodes, found, strict=True)]
        return jax.tree.unflatten(structure, rescale(nodes, found, scaling) if scaling and nodes else nodes)

    refine.__qualname__ = name  # as messages say
    return DirectRule(init, refine)


def _moved(forward: Any, key: jax.Array, noise: Initializer) -> list[jax.Array | None]:
    """How weights' noise moves every node's activation; None where they are not fewer."""
    if not isinstance(forward, ForwardPass):
        raise ValueError(
            "The rule perturbs weights, which forward(taps) does not tell: attach it to a model (jaxfa.nn.attach), "
            "give refine a jaxfa.rules.ForwardPass, or perturb activations alone, by weights=False."
        )
    return jax.tree.leaves(forward.moved(key, noise), is_leaf=lambda one: one is None)


def _learn(turn: Any, averaging: float | Gain, feedback: JacobianFeedback, estimate: Estimate) -> JacobianFeedback:
    if feedback.stack:
        return jax.vmap(partial(_learn, turn, averaging))(feedback, estimate)
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
    if any(node.log_scale is None for node in nodes):
        raise ValueError(
            "The rule learns the scales of its perturbations, and a feedback has none: make it with this rule's init."
        )
    # All layers move the outputs at once, so that with u_l = s_l^2 <|J_l|^2>, how much of it is l's, the variances in
    # units of <|J_l|^2> add up to sum_l n_l (1 + sum_m u_m / u_l) / N, m not l. A pair's n_l u_m / u_l + n_m u_l / u_m
    # is least where u_l : u_m = sqrt(n_l) : sqrt(n_m), which one u, sqrt(n), gives all pairs at once. Robbins and
    # Monro's steps rest there; the clipping is for small batches; the scales' product stays 1.
    both: list[Any] = [(one.part, one.whole) for one in found]
    shares = [jnp.where(whole > 0, jnp.clip(part / whole, -1, 1), 0) for part, whole in both]
    sides = [math.sqrt(math.prod(node.tile)) for node in nodes]
    total = sum(math.prod(node.stack) * side for node, side in zip(nodes, sides, strict=True))
    # A product, since the compiler would make a sum of many anew in the step of each layer.
    every = jnp.concatenate([jnp.ravel(share) for share in shares])
    mean = jnp.vdot(every, jnp.full_like(every, 1 / total), precision=lax.Precision.HIGHEST)
    return [
        replace(node, log_scale=node.log_scale - rate * (share - side * mean).astype(node.log_scale.dtype))
        for node, share, side in zip(nodes, shares, sides, strict=True)
    ]
