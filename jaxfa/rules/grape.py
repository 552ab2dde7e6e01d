"""GrAPE: direct feedback that learns to be the Jacobian of the output, from forward-mode derivatives alone.

Caillon, Fagnou, Delattre, Allauzen, "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees", 2026,
https://openreview.net/forum?id=kasbbmwk3s

``refine`` perturbs every tapped activation at once, each example's independently, by white noise ``p_l`` of variance 1,
and takes one forward-mode derivative ``y'`` of the plain network: ``J_l = <p_l y'^T>``, averaged over the batch, is
unbiased for every layer, since the perturbations of the others have no correlation with ``p_l``. Axes that the logits
share with an activation count as examples. Under batch normalisation in training mode what examples do to each other
adds variance, no bias.

The paper's rule to the letter is :func:`published_grape`; the defaults of :func:`grape` draw signs, and scale every
layer's perturbation for the least noise. The paper perturbs weights where they have fewer dimensions, which
:func:`published_grape` alone does. A dense layer's never have, and examples share the noise that
they make: more variance at the same cost. A kernel has if it is smaller than the map, and then tells nothing of that
part of the Jacobian that its patches don't see: a bias, which the experiment ``grape_bound`` measures.

A ``tile`` trades bias for noise. What is learned is the Jacobian's mean over the tiles: its relative variance is lower
by the number of repeats or more, and what differs from tile to tile is lost. Below a global average pool a linear
network loses nothing, since the Jacobian repeats with the stride from the layer to the pool (borders aside). Below a
dense layer most is lost. Short trainings gain by a tile, long ones lose: it is an option, no default. Tokens and other
axes before the last count as pixels do.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.base import DirectRule, Initializer
from jaxfa.rules.shared.jacobian import Gain, jacobian_rule
from jaxfa.rules.shared.noise import random_signs


def grape(
    *,
    learning_rate: float = 0.05,
    averaging: float | Gain = 0.0,
    tile: int | None = None,
    perturbation: Initializer = random_signs,
    scaling: float = 0.3,
    column_norm: bool = True,
    norm_axis: int = 0,
    separate: bool = False,
    watch: bool = False,
    epsilon: float = 1e-8,
) -> DirectRule:
    """GrAPE: ``dh_l = e B_l^T``, where ``B_l`` turns towards an unbiased estimate of ``(d logits / d h_l)^T``.

    One gradient step on ``sum_k (1 - cos(B_l[:, k], J_l[:, k]))`` over the outputs ``k``, with the batch's estimate
    ``J_l = <p_l y'^T>``; then every column gets norm 1. What the defaults change of the paper's rule, the module's
    docstring says.

    Args:
      learning_rate: ``eta_B`` of that sum; the paper's mean over ``C`` outputs has the rate ``C`` times this one. Ours.
      averaging: how much of the last running mean of ``J_l`` the new one keeps, in [0, 1); 0 is the paper's. Or
        :func:`jaxfa.rules.kalman`, by which each layer's noise says how much.
      tile: the side, in pixels, of a piece of ``B`` that repeats over the map, less noise for a bias; where it does not
        divide the map's, their greatest common divisor. None is the full ``B``; 1 is a matrix per channel.
      perturbation: ``(key, shape, dtype) -> p`` of its key, mean 0, variance 1; the paper's is ``jax.random.normal``.
      scaling: from 0 to 1, how fast the perturbations come to the scales of least variance,
        ``s_l ~ n_l^(1/4) / |J_l|``; 0, the paper's, is a scale of 1 for all. The estimates have no bias at any scale.
      column_norm: whether the columns get norm 1.
      norm_axis: what a column is: 0, what belongs to one output; 1, to one unit of the layer. The paper leaves it open.
      separate: with ``scaling=0.0``, a derivative for each layer: ``L`` times the cost, some ``1 / L`` of the variance.
      watch: whether the feedback measures its own cosine with the Jacobian, for ``calibrate(below=)``.
      epsilon: added to the norms.

    Returns:
      A :class:`jaxfa.DirectRule` whose ``refine`` must run to learn.

    Raises:
      ValueError: if an argument is out of range; by ``refine``, if a batch is empty.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> rule, h, w = jaxfa.grape(), jnp.ones((64, 3)), jnp.eye(3, 2)
      >>> feedback = [rule.init(jax.random.key(0), h, jnp.ones((64, 2)))]
      >>> (feedback,) = rule.refine(lambda taps: (h + taps[0]) @ w, feedback, jax.random.key(1))

    Source: Caillon et al., "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees", 2026,
    https://openreview.net/forum?id=kasbbmwk3s
    """
    if norm_axis not in (0, 1):
        raise ValueError(f"norm_axis must be 0 (columns of one output) or 1 (of one unit), got {norm_axis!r}.")
    return jacobian_rule(
        "grape",
        partial(_turn, learning_rate, normed=column_norm, axis=norm_axis, epsilon=epsilon),
        _unit_columns,
        averaging=averaging,
        tile=tile,
        perturbation=perturbation,
        separate=separate,
        scaling=scaling,
        watch=watch,
    )


def published_grape(*, learning_rate: float = 0.05, weights: bool = True) -> DirectRule:
    """GrAPE to the letter: a full ``B``, normal noise of one scale, in weights where they are fewer, no running mean.

    The noise is in the weights of every layer whose weights are fewer than its activations, else in these; the paper
    does not say more. ``p_l`` is how ``h_l`` moves by it. From weights the estimate ``<p_l y'^T>`` has a bias. With
    ``weights=False`` this is ``grape(scaling=0.0, perturbation=jax.random.normal)``.

    Args:
      learning_rate: as for :func:`jaxfa.grape`.
      weights: whether weights are perturbed where they are fewer: in attached models, whose taps are outside of loops,
        and with a :class:`jaxfa.rules.ForwardPass`. False perturbs activations in every layer.

    Returns:
      A :class:`jaxfa.DirectRule` whose ``refine`` must run to learn.

    Raises:
      ValueError: by ``refine`` with ``weights``, if the network does not tell its weights.

    Example:
      >>> import jaxfa
      >>> rule = jaxfa.rules.published_grape()

    Source: as :func:`jaxfa.grape`.
    """
    return jacobian_rule(
        "published_grape",
        partial(_turn, learning_rate),
        _unit_columns,
        perturbation=jax.random.normal,
        weights=weights,
    )


def _turn(
    rate: float, feedback: Any, estimate: jax.Array, *, normed: bool = True, axis: int = 0, epsilon: float = 1e-8
) -> jax.Array:
    """One gradient step on the columns' cosines with an estimate."""
    # In the layer's own space an output's column goes on over all the pixels that share a matrix; a unit's does not.
    size: Any = math.sqrt(feedback.repeats) if axis == 0 else 1.0
    b, j = (size * array.reshape(math.prod(feedback.tile), -1) for array in (feedback.b, estimate))
    bb, jj, bj = (jnp.sum(one * other, axis, keepdims=True) for one, other in ((b, b), (j, j), (b, j)))
    norm, length = jnp.sqrt(bb) + epsilon, jnp.sqrt(jj) + epsilon
    # With the cosine's gradient the new columns are sums of the old ones and the estimate's, and so are their norms.
    old, new = 1 - rate * bj / (norm**3 * length), rate / (norm * length)
    if normed:
        size *= jnp.sqrt(old**2 * bb + 2 * old * new * bj + new**2 * jj) + epsilon
    return ((old * b + new * j) / size).reshape(feedback.b.shape)


def _unit_columns(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    drawn = jax.random.normal(key, shape, dtype)
    return drawn / _norm(drawn, 0)


def _norm(columns: jax.Array, axis: int) -> jax.Array:
    return jnp.linalg.norm(columns, axis=axis, keepdims=True)
