"""A layer with the weights that read it, and the inner products, unit by unit, that make up what is conserved."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfa.base import LayerFeedback


class Pair(NamedTuple):
    """A layer's parameters with the weights that read its ``m`` units; or, in the same places, a step of them.

    Attributes:
      w: ``(n, m)`` or ``(window..., n, m)``.
      above: ``(m, p)`` or ``(window..., m, p)``; ``(s m, p)`` for a map of ``s`` pixels flattened with channels last.
      bias: ``(m,)``, or None.
    """

    w: jax.Array
    above: jax.Array
    bias: jax.Array | None = None


def incoming(pair: Pair, other: Pair) -> jax.Array:
    """``<w_j, w'_j> + bias_j bias'_j`` of every unit."""
    product = _wide(pair.w) * _wide(other.w)
    square = product.sum(range(product.ndim - 1))
    if pair.bias is None or other.bias is None:
        return square
    return square + _wide(pair.bias) * _wide(other.bias)


def outgoing(pair: Pair, above: jax.Array, feedback: Any) -> jax.Array:
    """``<above_j, b_j>`` of every unit; pixels of a flattened map and taps of a window are summed over."""
    m, (rows, p) = pair.w.shape[-1], above.shape[-2:]
    if rows % m:
        raise ValueError(
            f"Weights {above.shape} do not read the {m} units of weights {pair.w.shape}: expected (..., {m}, p), or a "
            f"multiple of {m} rows after flattening. A convolution in groups is several pairs."
        )
    if feedback is None:
        b = pair.above
    elif isinstance(feedback, jax.Array):
        b = feedback
    else:
        b = matrix_of(feedback, pair.above)
    if b.size != above.size:
        raise ValueError(f"This feedback {b.shape} is not for weights {above.shape}: it must have as many entries.")
    return (_wide(above) * _wide(b.reshape(above.shape))).reshape(-1, m, p).sum((0, 2))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def matrix_of(feedback: Any, w: jax.Array) -> jax.Array:
    """The matrix that a layer-wise feedback puts in the place of weights.

    Raises:
      ValueError: if it has none, such as a direct or a low-rank one.
    """
    if isinstance(feedback, LayerFeedback) and type(feedback).matrix is not LayerFeedback.matrix:
        return feedback.matrix(w)
    raise ValueError(f"{type(feedback).__name__} has no matrix in the place of the weights {w.shape}.")
