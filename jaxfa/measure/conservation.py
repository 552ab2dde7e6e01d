"""What feedback alignment conserves, the alignment that follows, and where to start so that it follows at once.

The units of a layer, ``h_j = phi(a_j)``, ``a_j = sum_i x_i w_ij + bias_j``, are read by the weights ``above``, from
which the error returns through the matrix ``b``. Gradient descent conserves, for each ``j``,

    ``Q_j = 1/2 |w_j|^2 + 1/2 bias_j^2 - <above_j, b_j>``,

for ``<w_j, dw_j> + bias_j dbias_j = sum delta_j a_j`` and ``<dabove_j, b_j> = sum h_j (b delta_above)_j``, which are
the same where ``delta_j = phi'(a_j) (b delta_above)_j`` and ``phi'(a) a = phi(a)``. So it holds

- for a positively homogeneous ``phi`` (ReLU, leaky ReLU, none), with max or mean pooling, dropout and flattening;
- for dense layers and for convolutions, where ``j`` is a channel and sums run over the window;
- for any loss, outputs, batches, and whatever other layers there are, by whatever rule they learn;
- under gradient flow; and at every step of plain gradient descent, with any learning rates in turn, up to the squared
  steps: ``Q_j(T) - Q_j(0) = 1/2 sum_t |dw_j(t)|^2 + dbias_j(t)^2``, to rounding.

It does not hold for tanh, sigmoid or GELU; with a norm, a shortcut or a second reader between the two layers; with
momentum, Adam, Muon, weight decay, clipping, or other learning rates for one of the two; where ``b`` learns (at each
step it still does); under direct feedback below the last hidden layer. Arrays do not show any of this: where
:func:`imbalance` is zero, the law holds.

Robertson, Koyejo, "Layer-Wise Feedback Alignment is Conserved in Deep Neural Networks", 2023,
https://arxiv.org/abs/2306.01870, for whole layers, ReLU and one output. That it holds for every unit, with biases, for
convolutions and exactly for finite steps is derived above and tested in ``tests/measure/test_conservation.py``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxfa.measure.pair import Pair, incoming, matrix_of, outgoing


def half_square(pair: Pair) -> jax.Array:
    """``1/2 |w_j|^2 + 1/2 bias_j^2`` of every unit, ``(m,)``: over all steps, the drift of :func:`quantity`."""
    return 0.5 * incoming(pair, pair)


def overlap(pair: Pair, feedback: Any = None) -> jax.Array:
    """How far every unit's outgoing weights lie along its feedback: ``<above_j, b_j>``.

    Args:
      pair: a :class:`Pair`.
      feedback: what the error returns through from ``above``: a layer-wise feedback that has a matrix, an array with as
        many entries as ``above``, or None for backpropagation, where ``b = above``.

    Returns:
      ``(m,)``; its sum is the layer's.

    Raises:
      ValueError: if the feedback has no matrix, or the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> pair = jaxfa.conservation.Pair(jnp.ones((4, 2)), jnp.ones((2, 3)))
      >>> jaxfa.conservation.overlap(pair, jaxfa.FixedFeedback(2 * pair.above)).tolist()
      [6.0, 6.0]

    Source: as :func:`quantity`.
    """
    return outgoing(pair, pair.above, feedback)


def quantity(pair: Pair, feedback: Any = None) -> jax.Array:
    """What gradient flow conserves, unit by unit: ``Q_j = 1/2 |w_j|^2 + 1/2 bias_j^2 - <above_j, b_j>``.

    For backpropagation the last term is ``1/2 |above_j|^2``: the balancedness of Du, Hu and Lee. When this holds, and
    when not, is said at the top of the module.

    Args:
      pair: a :class:`Pair`.
      feedback: as for :func:`overlap`.

    Returns:
      ``(m,)``; its sum is the layer's.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> pair = jaxfa.conservation.Pair(jnp.ones((4, 2)), jnp.ones((2, 3)))
      >>> jaxfa.conservation.quantity(pair, jaxfa.FixedFeedback(2 * pair.above)).tolist()
      [-4.0, -4.0]

    Source: Robertson, Koyejo, "Layer-Wise Feedback Alignment is Conserved in Deep Neural Networks", 2023,
    https://arxiv.org/abs/2306.01870; Du, Hu, Lee, "Algorithmic Regularization in Learning Deep Homogeneous Models:
    Layers are Automatically Balanced", 2018, https://arxiv.org/abs/1806.00900
    """
    return half_square(pair) - overlap(pair, feedback) * (0.5 if feedback is None else 1.0)


def imbalance(pair: Pair, step: Pair, feedback: Any = None) -> jax.Array:
    """A step's breach of the law: ``<w_j, dw_j> + bias_j dbias_j - <dabove_j, b_j>``, zero where it holds.

    While ``b`` is fixed any step changes ``Q_j`` by this and by ``half_square(step)``; the law is that this is zero. A
    gradient in the place of the step tells what the network breaks from what the optimizer does.

    Args:
      pair: a :class:`Pair` before the step.
      step: what the step adds to it; or a gradient.
      feedback: as for :func:`overlap`, at that step.

    Returns:
      ``(m,)``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> pair = jaxfa.conservation.Pair(jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [1.0]]))
      >>> b = jaxfa.FixedFeedback(jnp.array([[-1.0], [2.0]]))
      >>> loss = lambda p: (jaxfa.linear(jax.nn.relu(jnp.ones((1, 1)) @ p.w), p.above, b) ** 2).sum()
      >>> abs(jaxfa.conservation.imbalance(pair, jax.grad(loss)(pair), b)).tolist()
      [0.0, 0.0]

    Source: as :func:`quantity`.
    """
    return incoming(pair, step) - outgoing(pair, step.above, feedback)


def alignment_bound(pair: Pair, feedback: Any = None) -> jax.Array:
    """What no unit's alignment falls below while the law holds: ``<above_j(t), b_j> >= -Q_j(0)``.

    As ``<above_j(t), b_j> = <above_j(0), b_j> + 1/2 |w_j(t)|^2 - 1/2 |w_j(0)|^2``, alignment that starts out positive
    stays so if ``|w_j(0)|^2 < 2 <above_j(0), b_j>`` (the bias among the weights). Finite steps lower the bound by their
    half squares. It is one on the inner product, not on the angle: ``above`` may grow across ``b`` as well.

    Args:
      pair: a :class:`Pair` before training.
      feedback: as for :func:`overlap`, fixed; for None the bound is on ``1/2 |above_j(t)|^2``.

    Returns:
      ``(m,)``; its sum bounds the layer's.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> pair = jaxfa.conservation.Pair(jnp.ones((4, 2)), jnp.ones((2, 3)))
      >>> jaxfa.conservation.alignment_bound(pair, jaxfa.FixedFeedback(pair.above)).tolist()
      [1.0, 1.0]

    Source: as :func:`quantity`.
    """
    return -quantity(pair, feedback)


def shrink(pair: Pair, feedback: Any, ratio: float = 0.5) -> Pair:
    """Scales units down, where they need it, until alignment is sure to last: ``|w_j|^2 <= 2 ratio <above_j, b_j>``.

    Then ``<above_j(t), b_j> >= (1 - ratio) <above_j(0), b_j>`` while the law holds. The paper's condition,
    ``above = b`` and ``|w| <= |above|``, is one case of ``ratio=0.5``.

    Args:
      pair: a :class:`Pair`, best with weights made by ``feedback.matrix(above)``.
      feedback: as for :func:`overlap`.
      ratio: how much of the alignment training may take away, between 0 and 1.

    Returns:
      The pair with ``w`` and ``bias`` scaled; a unit whose alignment is not positive stays as it is, for nothing helps.

    Raises:
      ValueError: if the ratio is not between 0 and 1.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> pair = jaxfa.conservation.Pair(jnp.ones((4, 2)), jnp.ones((2, 1)))
      >>> jaxfa.conservation.shrink(pair, jaxfa.FixedFeedback(pair.above)).w.tolist()
      [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]

    Source: as :func:`quantity`.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"shrink needs a ratio between 0 and 1, got {ratio}.")
    room, square = 2 * ratio * overlap(pair, feedback), incoming(pair, pair)
    needs = (room > 0) & (square > room)
    scale = jnp.where(needs, jnp.sqrt(jnp.where(needs, room, 1) / jnp.where(needs, square, 1)), 1)
    w = (pair.w * jnp.expand_dims(scale, range(pair.w.ndim - 1))).astype(pair.w.dtype)
    return pair._replace(w=w, bias=None if pair.bias is None else (pair.bias * scale).astype(pair.bias.dtype))


def aligned_init(weights: Sequence[jax.Array], feedback: Sequence[Any], ratio: float = 0.5) -> list[jax.Array]:
    """Weights that are aligned from the first step, and stay so: each one the feedback's own matrix, scaled.

    ``w_l = b_l`` for every layer that has a feedback; then, from the last layer to the first, :func:`shrink`. For Flax
    models see :func:`jaxfa.nn.align`.

    Args:
      weights: a chain of layers', from first to last; biases must be zero, as they mostly start.
      feedback: one layer-wise feedback for each, None where there is none, as for the first.
      ratio: as for :func:`shrink`.

    Returns:
      The weights, of the same shapes.

    Raises:
      ValueError: if the lists differ in length.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> weights = [jnp.ones((6, 4)), jnp.ones((4, 3))]
      >>> feedback = [None, jaxfa.fa().init(jax.random.key(0), weights[1])]
      >>> first, last = jaxfa.conservation.aligned_init(weights, feedback)
      >>> bound = jaxfa.conservation.alignment_bound(jaxfa.conservation.Pair(first, last), feedback[1])
      >>> bool((last == feedback[1].b).all()), bool((bound > 0).all())
      (True, True)

    Source: as :func:`quantity`.
    """
    pairs = zip(weights, feedback, strict=True)
    made = [w if f is None else matrix_of(f, w).astype(w.dtype) for w, f in pairs]
    for i in reversed(range(len(made) - 1)):
        if feedback[i + 1] is not None:
            made[i] = shrink(Pair(made[i], made[i + 1]), feedback[i + 1], ratio).w
    return made


def minimum_norm(x: jax.Array, y: jax.Array) -> jax.Array:
    """The least of all solutions: ``argmin |w|`` among the minimisers of ``|x w - y|``, ``x^T (x x^T)^-1 y``.

    A linear network ``x w_1 w_2`` of two layers that learns ``y`` by squared error and feedback alignment ends here
    if the rows of ``x`` are independent and ``w_1`` starts at zero, or in their span, aligned; a random ``w_1`` keeps
    what it has across the span, and ends elsewhere. ``minimum_norm(x, x @ w)`` is the part of ``w`` in the span.

    Args:
      x: ``(N, n)``, ``N <= n``.
      y: ``(N,)`` or ``(N, C)``.

    Returns:
      ``(n,)`` or ``(n, C)``.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> w = jaxfa.conservation.minimum_norm(jnp.array([[3.0, 4.0]]), jnp.array([5.0]))
      >>> [round(float(one), 3) for one in w]
      [0.6, 0.8]

    Source: as :func:`quantity`, its second theorem.
    """
    return jnp.linalg.lstsq(x, y)[0]
