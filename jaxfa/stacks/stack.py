"""Stacks of equal blocks under direct feedback: in parallel, or in memory that does not grow with their number."""

from typing import Any

import jax

from jaxfa.stacks.blocks import Block, check_feedback, check_stack, forward, is_unrolled
from jaxfa.stacks.schedules import Schedule, check_schedule
from jaxfa.varying import vary_alike


def direct_stack(
    block: Block,
    params: Any,
    h: jax.Array,
    wire: jax.Array,
    feedback: Any,
    *,
    schedule: Schedule,
    unroll: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``L`` blocks, each of which has its error straight from the output: ``h_{l+1} = block(params_l, h_l)``.

    As ``for l in range(L): h, wire = jaxfa.direct(block(params[l], h), wire, feedback[l])``, with the same gradients
    whatever the schedule. The first block's own input learns, too, so that a stem may come before.

    Args:
      block: ``(params_l, h) -> h``, of ``h``'s shape and dtype. What it closes over is constant, and must not be
        computed inside the function that is differentiated; give what learns, masks and keys in ``params``.
      params: any tree whose arrays have a leading axis ``L``.
      h: the input of the first block, ``(N, ..., n)``.
      wire: the error wire, ``(N, ..., C)``.
      feedback: a direct feedback with a leading axis ``L``, such as ``jax.vmap(rule.init, (0, None, None))`` makes of
        ``L`` keys, or one shared by all blocks; None is the plain network with ordinary autodiff.
      schedule: ``jaxfa.stacks.stored``, ``parallel`` or ``stream``; without effect where ``feedback`` is None.
      unroll: whether blocks follow each other in straight code instead of a loop. None does so for convolutions on a
        CPU, where XLA runs them far slower inside loops.

    Returns:
      ``(h, wire)`` after the last block.

    Raises:
      TypeError: if the feedback is not a :class:`jaxfa.DirectFeedback`, or ``h`` no array.
      ValueError: if the schedule is none of these, leading axes differ, or the block changes ``h``'s shape or dtype.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> x, w = jnp.ones((5, 4)), 0.1 * jnp.ones((6, 4, 4))
      >>> feedback = jax.vmap(jaxfa.dfa().init, (0, None, None))(jax.random.split(jax.random.key(0), 6), x, x)
      >>> h, wire = jaxfa.direct_stack(
      ...     lambda w, h: jnp.tanh(h @ w), w, x, jaxfa.error_wire(x), feedback, schedule=jaxfa.stacks.stream)

    Source: Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016,
    https://arxiv.org/abs/1609.01596
    """
    run = check_schedule(schedule, "direct_stack", "stack").stack
    layers = check_stack(block, params, h)
    straight = layers if is_unrolled(block, params, h, unroll) else 1
    if feedback is None:
        return forward(block, straight, *vary_alike((params, h))), wire
    # Under shard_map a loop's carry varies as its first value does.
    tree, wire = vary_alike(((params, h, check_feedback(feedback, layers)), wire))
    return run(block, straight, tree, wire)
