"""GrAPE: direct feedback that learns to be the Jacobian of the output, from forward-mode derivatives alone.

Caillon, Fagnou, Delattre, Allauzen, "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees", 2026,
https://openreview.net/forum?id=kasbbmwk3s; its ancestor is from Bacho, Chu, "Low-variance Forward Gradients using
Direct Feedback Alignment and momentum", 2024, https://arxiv.org/abs/2212.07282
"""

import math
from collections.abc import Callable
from dataclasses import field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.base import DirectFeedback, Initializer, Rule, is_feedback, register
from jaxfa.projection import direct_matrix, project, random_signs, shared_axes


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


def grape(
    *,
    learning_rate: float = 0.05,
    averaging: float = 0.0,
    tile: int | None = None,
    perturbation: Initializer = random_signs,
    column_norm: bool = True,
    norm_axis: int = 0,
    separate: bool = False,
    epsilon: float = 1e-8,
) -> Rule:
    """GrAPE: ``dh_l = e B_l^T``, and every step turns ``B_l`` towards an unbiased estimate of ``(d logits / d h_l)^T``.

    ``refine`` perturbs every tapped activation at once, each example's independently, by white noise ``p_l`` of
    variance 1, and takes one forward-mode derivative ``y'`` of the plain network: ``J_l = <p_l y'^T>``, averaged over
    the batch, is unbiased for every layer, since the perturbations of the others have no correlation with ``p_l``. Then
    one gradient step on ``sum_k (1 - cos(B_l[:, k], J_l[:, k]))`` over the outputs ``k``, and every column gets norm 1.

    Axes that the logits share with an activation count as examples: with logits per token it is the Jacobian of a
    token's logits in its own activation. Under batch normalisation in training mode what examples do to each other adds
    variance, no bias. ``refine`` runs the model in its present mode and changes nothing of it but the feedback.

    Args:
      learning_rate: ``eta_B`` of that sum; the paper's mean over ``C`` outputs has the rate ``C`` times this one. Ours.
      averaging: from 0 to below 1, how much of the last running mean of ``J_l`` the new one keeps; 0, the paper's, is
        this batch's estimate alone.
      tile: the side, in pixels, of a piece of ``B`` that repeats over the map; None is the full ``B``, 1 a matrix per
        channel. Below a global average pool the Jacobian repeats likewise, with the stride from the layer to the pool
        as its period (borders aside): that tile loses nothing. The perturbation is tiled, too, so that its dimension
        falls, and with it the estimate's variance. Smaller maps are one tile; tokens and other axes before the last
        count as pixels do.
      perturbation: ``(key, shape, dtype) -> p``, of mean 0 and variance 1. Random signs are the quickest, and of all
        white noise that of least variance; the paper's is ``jax.random.normal``.
      column_norm: whether the columns get norm 1. It discards how unlike in size the outputs' Jacobians are.
      norm_axis: what a column is: 0, what belongs to one output; 1, to one unit of the layer. The paper leaves it open.
      separate: one derivative for each layer instead of one for all: ``L`` times the cost, about ``1 / L`` of the
        variance.
      epsilon: added to the norms.

    Returns:
      A direct :class:`jaxfa.Rule` whose ``refine`` must run to learn.

    Raises:
      ValueError: if ``averaging`` is not in [0, 1), ``tile`` below 1, or ``norm_axis`` neither 0 nor 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, w = jaxfa.grape(), jnp.eye(3, 2)
      >>> feedback = [rule.init(jax.random.key(0), jnp.ones((64, 3)), jnp.ones((64, 2)))]
      >>> for key in jax.random.split(jax.random.key(1), 100):
      ...     feedback = rule.refine(lambda taps: (jnp.ones((64, 3)) + taps[0]) @ w, feedback, key)
      >>> bool(jaxfa.diagnostics.angle(feedback[0].b, w) < 20)
      True

    Source: Caillon, Fagnou, Delattre, Allauzen, "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees",
    2026, https://openreview.net/forum?id=kasbbmwk3s
    """
    if norm_axis not in (0, 1):
        raise ValueError(f"norm_axis must be 0 (columns of one output) or 1 (of one unit), got {norm_axis!r}.")

    def unit(columns: jax.Array) -> jax.Array:
        return columns / (_norm(columns, norm_axis) + epsilon)

    def turn(feedback: JacobianFeedback, estimate: jax.Array) -> jax.Array:
        # In the layer's own space a matrix counts once for each of the pixels that share it.
        size = math.sqrt(feedback.repeats)
        b, j = (size * array.reshape(math.prod(feedback.tile), -1) for array in (feedback.b, estimate))
        norm = _norm(b, norm_axis) + epsilon
        cosine = jnp.sum(b * unit(j), norm_axis, keepdims=True) / norm
        b = b + learning_rate * (unit(j) - cosine * b / norm) / norm
        return (unit(b) if column_norm else b).reshape(feedback.b.shape) / size

    return _rule(
        turn, _unit_columns, averaging, tile, partial(_estimates, perturbation=perturbation, separate=separate)
    )


def fdfa(
    *,
    learning_rate: float = 0.03,
    tile: int | None = None,
    perturbation: Initializer = random_signs,
    separate: bool = False,
) -> Rule:
    """Forward direct feedback: ``dh_l = e B_l^T`` with ``B_l`` the running mean of the Jacobian's estimates.

    GrAPE's ancestor: ``B_l <- B_l - eta (B_l - <p_l y'^T>)`` with the same perturbations. It keeps the Jacobian's size
    beside its direction. ``B`` starts at zero, so that the hidden layers stand still at first.

    Args:
      learning_rate: ``eta``, how far one batch moves ``B``; ours.
      tile: as for :func:`grape`.
      perturbation: as for :func:`grape`.
      separate: as for :func:`grape`.

    Returns:
      A direct :class:`jaxfa.Rule` whose ``refine`` must run to learn.

    Raises:
      ValueError: if ``tile`` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, h = jaxfa.fdfa(learning_rate=1.0), jnp.ones((9999, 1))
      >>> feedback = [rule.init(jax.random.key(0), h, h)]
      >>> (feedback,) = rule.refine(lambda taps: 3 * (h + taps[0]), feedback, jax.random.key(1))
      >>> 2.8 < float(feedback.b[0, 0]) < 3.2
      True

    Source: Bacho, Chu, "Low-variance Forward Gradients using Direct Feedback Alignment and momentum", 2024,
    https://arxiv.org/abs/2212.07282
    """

    def follow(feedback: JacobianFeedback, estimate: jax.Array) -> jax.Array:
        return feedback.b + learning_rate * (estimate - feedback.b)

    return _rule(
        follow, jax.nn.initializers.zeros, 0.0, tile, partial(_estimates, perturbation=perturbation, separate=separate)
    )


def _rule(
    turn: Callable[..., jax.Array],
    distribution: Initializer,
    averaging: float,
    tile: int | None,
    estimate: Callable[..., list[jax.Array]],
) -> Rule:
    """A rule whose feedback ``turn``s to each new estimate, or running mean, of the Jacobian."""
    if not 0.0 <= averaging < 1.0:
        raise ValueError(f"averaging must be in [0, 1), got {averaging}.")
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be a number of pixels from 1, or None for the whole map, got {tile}.")

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


def _estimates(
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


def _unit_columns(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    drawn = jax.random.normal(key, shape, dtype)
    return drawn / _norm(drawn, 0)


def _norm(columns: jax.Array, axis: int) -> jax.Array:
    return jnp.linalg.norm(columns, axis=axis, keepdims=True)
