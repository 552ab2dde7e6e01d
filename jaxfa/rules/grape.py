"""GrAPE: direct feedback that learns to be the Jacobian of the output, from forward-mode derivatives alone.

Caillon, Fagnou, Delattre, Allauzen, "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees", 2026,
https://openreview.net/forum?id=kasbbmwk3s
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.base import DirectRule, Initializer
from jaxfa.rules.shared.jacobian import Gain, JacobianFeedback, jacobian_rule, random_signs


def grape(
    *,
    learning_rate: float = 0.05,
    averaging: float | Gain = 0.0,
    tile: int | None = 4,
    perturbation: Initializer = random_signs,
    scaling: float = 0.3,
    column_norm: bool = True,
    norm_axis: int = 0,
    separate: bool = False,
    epsilon: float = 1e-8,
) -> DirectRule:
    """GrAPE: ``dh_l = e B_l^T``, and every step turns ``B_l`` towards an unbiased estimate of ``(d logits / d h_l)^T``.

    ``refine`` perturbs every tapped activation at once, each example's independently, by white noise ``p_l`` of
    variance 1, and takes one forward-mode derivative ``y'`` of the plain network: ``J_l = <p_l y'^T>``, averaged over
    the batch, is unbiased for every layer, since the perturbations of the others have no correlation with ``p_l``. Then
    one gradient step on ``sum_k (1 - cos(B_l[:, k], J_l[:, k]))`` over the outputs ``k``, and every column gets norm 1.

    Axes that the logits share with an activation count as examples: with logits per token it is the Jacobian of a
    token's logits in its own activation. Under batch normalisation in training mode what examples do to each other adds
    variance, no bias. ``refine`` runs the model in its present mode and changes nothing of it but the feedback.

    The paper's rule to the letter is ``grape(tile=None, scaling=0.0, perturbation=jax.random.normal)``. The defaults
    lower the estimate's noise, where its own analysis points; in convolutional networks
    ``averaging=jaxfa.rules.kalman()`` lowers it further (evidence: ``grape_ablation``, ``grape_shallow``).

    Weights are never perturbed, though the paper does so where they have fewer dimensions. A dense layer's never have,
    and examples share the noise that they make: more variance at the same cost. A kernel has if it is smaller than the
    map, and then tells nothing of that part of the Jacobian that its patches don't see: a bias. A ``tile`` lowers the
    dimensions without either.

    Args:
      learning_rate: ``eta_B`` of that sum; the paper's mean over ``C`` outputs has the rate ``C`` times this one. Ours.
      averaging: how much of the last running mean of ``J_l`` the new one keeps, from 0 to below 1; 0, the paper's, is
        this batch's estimate alone. Or :func:`jaxfa.rules.kalman`, by which each layer's noise says how much. The mean
        takes as much memory as ``B``.
      tile: the side, in pixels, of a piece of ``B`` that repeats over the map, where it does not divide the map's their
        greatest common divisor; None, the paper's, is the full ``B``, 1 a matrix per channel. Below a global average
        pool the Jacobian repeats likewise, with the stride from the layer to the pool as its period (borders aside):
        that tile loses nothing. The perturbation is tiled, too, so that its dimension falls, and with it the estimate's
        variance; elsewhere what is learned is the Jacobian's mean over the tiles. Tokens and other axes before the last
        count as pixels do: give None where one of them alone is read out.
      perturbation: ``(key, shape, dtype) -> p``, of mean 0 and variance 1. Random signs are the quickest, and of all
        white noise that of least variance; the paper's is ``jax.random.normal``.
      scaling: from 0 to 1, how fast the layers' perturbations ``s_l p_l`` come to the scales of least variance, ``s_l ~
        n_l^(1/4) / |J_l|``, by which layers move the outputs in the proportion of ``sqrt(n_l)``; 0, the paper's, is a
        scale of 1 for all. The estimates have no bias at any scale.
      column_norm: whether the columns get norm 1. It discards how unlike in size the outputs' Jacobians are.
      norm_axis: what a column is: 0, what belongs to one output; 1, to one unit of the layer. The paper leaves it open.
      separate: one derivative for each layer instead of one for all: ``L`` times the cost, about ``1 / L`` of the
        variance.
      epsilon: added to the norms.

    Returns:
      A :class:`jaxfa.DirectRule` whose ``refine`` must run to learn.

    Raises:
      ValueError: if ``averaging`` is not in [0, 1), ``tile`` below 1, ``norm_axis`` neither 0 nor 1, ``scaling`` not
        in [0, 1], or not 0 with ``separate``; from ``refine``, if a batch is empty, or of one example under
        :func:`jaxfa.rules.kalman`.

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

    return jacobian_rule(
        turn,
        _unit_columns,
        averaging=averaging,
        tile=tile,
        perturbation=perturbation,
        separate=separate,
        scaling=scaling,
    )


def _unit_columns(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    drawn = jax.random.normal(key, shape, dtype)
    return drawn / _norm(drawn, 0)


def _norm(columns: jax.Array, axis: int) -> jax.Array:
    return jnp.linalg.norm(columns, axis=axis, keepdims=True)
