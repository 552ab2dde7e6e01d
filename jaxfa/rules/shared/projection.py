"""What direct rules share: matrices from the outputs to the units of one layer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.base import Initializer


def shared_axes(h: Any, logits: Any) -> int:
    """The number of leading axes that an activation shares with the logits: the batch, and a sequence's tokens.

    Raises:
      ValueError: if batched logits share no axis with ``h``.
    """
    equal = [a == b for a, b in zip(h.shape[:-1], logits.shape[:-1], strict=False)]
    count = [*equal, False].index(False)
    if logits.ndim > 1 and count == 0:
        raise ValueError(
            f"Direct feedback needs an activation with the logits' batch axis first: expected h of shape "
            f"({logits.shape[0]}, ..., n) for logits {logits.shape}, got {h.shape}. Tap a layer before the batch "
            f"axis is merged with others."
        )
    return count


def direct_matrix(key: jax.Array, distribution: Initializer, h: Any, logits: Any) -> jax.Array:
    """Draws a matrix from every output to every unit of ``h``; its fan-in is the number of those units.

    Returns:
      An array of shape ``h.shape[k:] + logits.shape[k:]`` with ``k`` the number of shared leading axes.
    """
    k = shared_axes(h, logits)
    rows, columns = h.shape[k:], logits.shape[k:]
    # Never below single precision: in bfloat16 the small steps of a learned feedback would round to nothing.
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    flat = distribution(key, (math.prod(rows), math.prod(columns)), dtype)
    return flat.reshape(*rows, *columns)


def project(b: jax.Array, h: Any, e: jax.Array) -> jax.Array:
    """``e B^T`` in the shape of ``h``: contracts the axes of ``e`` that ``h`` does not share."""
    k = (h.ndim + e.ndim - b.ndim) // 2
    if h.shape[k:] + e.shape[k:] != b.shape or h.shape[:k] != e.shape[:k]:
        raise ValueError(
            f"This feedback of shape {b.shape} is not from an error of shape {e.shape} to an activation of shape "
            f"{h.shape}. Make it with rule.init(key, h, logits) from one batch of that size; in a Flax model give "
            f"attach() an example of that size."
        )
    # As matrices, which every backend's product takes transposed; of more axes XLA:CPU would transpose a copy first.
    columns = math.prod(e.shape[k:])
    rows, flat = b.reshape(-1, columns), e.reshape(*e.shape[:k], columns)
    return lax.dot_general(flat, rows.astype(e.dtype), (((k,), (1,)), ((), ()))).reshape(h.shape)
