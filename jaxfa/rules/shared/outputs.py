"""Whether an operation's weights count its outputs on their last axis, so that others may have fewer of them."""

import jax

from jaxfa.base import Operation


def counts_outputs_last(op: Operation, x: jax.Array, w: jax.Array, shape: tuple[int, ...]) -> bool:
    """Whether the last axes of ``w`` and of the result, of this shape, count the outputs and nothing else does.

    Only then is ``op`` the same operation with more or fewer of them. One output more tells it apart even for a square.
    """
    wider = jax.ShapeDtypeStruct((*w.shape[:-1], w.shape[-1] + 1), w.dtype)
    try:
        found = jax.eval_shape(op, jax.ShapeDtypeStruct(x.shape, x.dtype), wider)
    except (TypeError, ValueError):
        return False
    return bool(found.shape == (*shape[:-1], shape[-1] + 1))
