"""The update of a stack of blocks, each made as its block's gradient is known, so that no gradients are kept."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxfa.stacks.blocks import Block, check_feedback, check_stack, input_error, is_unrolled, learn, order


def update_stack(
    block: Block,
    both: tuple[Any, Any],
    h: jax.Array,
    e: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    state: Any,
    unroll: bool | None = None,
) -> tuple[tuple[Any, Any], Any, jax.Array]:
    """Streams through a stack once more and updates each block at once: no gradient outlives its block, either.

    The same as the streamed gradient of :func:`jaxfa.direct_stack` followed by ``jax.vmap(optimizer.update)``; for
    transformations that treat every entry alike (SGD, Adam, decay, schedules) also as ``optimizer.update`` on the whole
    stack. Others, such as a global norm's clip, see one block at a time.

    Args:
      block: as for :func:`jaxfa.direct_stack`, as are ``h`` and ``unroll``.
      both: ``(params, feedback)``, all arrays with a leading axis ``L``. Donate them and ``state`` to ``jax.jit``, and
        the update is done in place.
      h: the input of the first block.
      e: the output error, ``(N, ..., C)``: the loss's gradient in the wire.
      optimizer: for one block's pair, such as ``jaxfa.optimizer(optax.adam(1e-3), rule)``. Keys and integers stay as
        they are; keep them from it by ``optax.masked``.
      state: its states, ``jax.vmap(optimizer.init)(both)``.
      unroll: as for :func:`jaxfa.direct_stack`. In straight code XLA keeps ``both`` and ``state`` once more.

    Returns:
      ``(both, state, dh)``, ``dh`` being the error at ``h``, before the update.

    Raises:
      TypeError, ValueError: as :func:`jaxfa.direct_stack`; if there is no feedback, or one shared by all blocks; and if
        ``state`` has arrays without the leading axis.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa, optax
      >>> x, both = jnp.ones((5, 4)), (0.1 * jnp.ones((6, 4, 4)), jaxfa.DirectMatrix(jnp.ones((6, 4, 4))))
      >>> optimizer = jaxfa.optimizer(optax.adam(1e-3), jaxfa.dfa())
      >>> both, state, dx = jaxfa.update_stack(
      ...     lambda w, h: jnp.tanh(h @ w), both, x, x, optimizer=optimizer, state=jax.vmap(optimizer.init)(both))

    Source: as :func:`jaxfa.direct_stack`.
    """
    layers = check_stack(block, both[0], h)
    _check(both[1], state, layers)
    straight = layers if is_unrolled(block, both[0], h, unroll) else 1
    ordered = order(straight)
    dh = input_error(block, both[0], h, both[1], e)

    def at(layer: Any, trees: Any) -> Any:
        return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), trees)

    def put(layer: Any, trees: Any, values: Any) -> Any:
        return jax.tree.map(lambda leaf, one: lax.dynamic_update_index_in_dim(leaf, one, layer, 0), trees, values)

    def step(layer: Any, carry: Any) -> Any:
        # What was learned is written one block later. XLA would fuse a write with the sums that make its value, and
        # as these read the same stack, copy the whole of it for each block.
        h, e, trees, last = carry
        trees = put((layer - 1) % layers, trees, last)
        # Straight code reads the stack as it was: XLA would copy all of a stack that is read between two writes.
        pair, own = at(layer, (both, state) if straight > 1 else trees)
        h, *signals = learn(block, pair, h, e)
        updates, own = optimizer.update(tuple(signals), own, pair)
        last = jax.tree.map(_moved, pair, updates), own
        return *ordered((h, e), last), trees, last

    trees = both, state
    first = *ordered((h, e), e), trees, at(layers - 1, trees)
    _, _, trees, last = lax.fori_loop(0, layers, step, first, unroll=straight)
    return *put(layers - 1, trees, last), dh


def _check(feedback: Any, state: Any, layers: int) -> None:
    if check_feedback(feedback, layers) is not feedback:
        raise ValueError(
            "update_stack needs a feedback for each block, got one shared by all: give each a copy, on a leading axis."
        )
    if any(jnp.shape(leaf)[:1] != (layers,) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            f"Every array in the optimizer's state has a leading axis for these {layers} blocks: make it by "
            f"jax.vmap(optimizer.init)(both)."
        )


def _moved(value: jax.Array, update: jax.Array) -> Any:
    return optax.apply_updates(value, update) if jnp.issubdtype(value.dtype, jnp.inexact) else value
