"""Stacks of equal blocks under direct feedback: in parallel, or in memory that does not grow with their number.

A block's update waits for no other's: it needs the block's input, its feedback and the output error. So the backward
pass of a stack may be one ``vmap`` over its blocks, or a second forward sweep that forms each block's update and drops
its activations at once. (What the literature on direct feedback calls update unlocking: Nokland, "Direct Feedback
Alignment Provides Learning in Deep Neural Networks", 2016, https://arxiv.org/abs/1609.01596)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.base import DirectFeedback
from jaxfa.ops import check_family, deliver, direct, listen, vary_alike

Block = Callable[[Any, jax.Array], jax.Array]


def direct_stack(
    block: Block,
    params: Any,
    h: jax.Array,
    wire: jax.Array,
    feedback: Any,
    *,
    schedule: str,
    unroll: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs ``L`` blocks, each of which has its error straight from the output: ``h_{l+1} = block(params_l, h_l)``.

    The same as ``for l in range(L): h, wire = jaxfa.direct(block(params[l], h), wire, feedback[l])``, and the same
    gradients whatever the schedule:

    - ``"stored"``: as autodiff does it: every activation is kept, blocks learn from the last to the first.
    - ``"parallel"``: every activation is kept, all blocks learn at once, by a ``vmap`` over them.
    - ``"stream"``: none is kept. A second forward sweep runs each block once more, from the input of the first, and
      forms its update at once: memory does not grow with ``L``. Two forward passes and the gradients inside blocks: as
      no error passes between blocks, for blocks of one matrix not more operations than backpropagation. (In straight
      code under ``vmap``, such as seeds side by side, XLA keeps activations all the same.)

    The first block's own input learns, too, so that a stem may come before.

    Args:
      block: ``(params_l, h) -> h``, of ``h``'s shape and dtype. What it closes over is constant, and must not be
        computed inside the function that is differentiated; give what learns, masks and keys in ``params``.
      params: any tree whose arrays have a leading axis ``L``.
      h: the input of the first block, ``(N, ..., n)``.
      wire: the error wire, ``(N, ..., C)``.
      feedback: a direct feedback with a leading axis ``L``, such as ``jax.vmap(rule.init, (0, None, None))`` makes of
        ``L`` keys, or one shared by all blocks; None is the plain network with ordinary autodiff.
      schedule: see above; with ``feedback=None`` it has no effect.
      unroll: whether blocks follow each other in straight code instead of a loop. None does so for convolutions on a
        CPU, where XLA runs them some 20 times slower inside loops.

    Returns:
      ``(h, wire)`` after the last block.

    Raises:
      TypeError: if the feedback is not a :class:`jaxfa.DirectFeedback`, or ``h`` no array.
      ValueError: if the schedule is none of these, leading axes differ, or the block changes ``h``'s shape or dtype.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa
      >>> x, w = jnp.ones((5, 4)), 0.1 * jnp.ones((6, 4, 4))
      >>> keys = jax.random.split(jax.random.key(0), 6)
      >>> feedback = jax.vmap(jaxfa.dfa().init, (0, None, None))(keys, x, jnp.ones((5, 4)))
      >>> def loss(w):
      ...     h, wire = jaxfa.direct_stack(
      ...         lambda w, h: jnp.tanh(h @ w), w, x, jaxfa.error_wire(x), feedback, schedule="stream")
      ...     return ((h + wire) ** 2).sum()
      >>> jax.grad(loss)(w).shape
      (6, 4, 4)

    Source: Nokland, "Direct Feedback Alignment Provides Learning in Deep Neural Networks", 2016,
    https://arxiv.org/abs/1609.01596
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule must be one of {sorted(_SCHEDULES)}, got {schedule!r}.")
    layers = check_stack(block, params, h)
    straight = layers if is_unrolled(block, params, h, unroll) else 1
    if feedback is None:
        return _forward(block, straight, *vary_alike((params, h))), wire
    # Under shard_map a loop's carry varies as its first value does.
    tree, wire = vary_alike(((params, h, check_feedback(feedback, layers)), wire))
    return _SCHEDULES[schedule](block, straight, tree, wire)


def _forward(block: Block, unroll: int, params: Any, h: jax.Array) -> jax.Array:
    return lax.scan(lambda h, p: (block(p, h), None), h, params, unroll=unroll)[0]


def _stored(block: Block, unroll: int, tree: Any, wire: jax.Array) -> Any:
    params, h, feedback = tree

    def step(carry: Any, layer: Any) -> tuple[Any, None]:
        (h, wire), (p, f) = carry, layer
        return direct(block(p, h), wire, f), None

    return lax.scan(step, (h, wire), (params, feedback), unroll=unroll)[0]


def _parallel(block: Block, unroll: int, tree: Any, wire: jax.Array) -> Any:
    params, h, feedback = tree

    def step(h: jax.Array, p: Any) -> Any:
        out, vjp = jax.vjp(lambda p: block(p, h), p)
        return out, (out, vjp)

    end, saved = lax.scan(step, *lax.stop_gradient((h, params)), unroll=unroll)

    def backward(tree: Any, e: jax.Array) -> Any:
        params, h, feedback, saved = tree

        def learn_from(f: Any, saved: Any) -> Any:
            out, vjp = saved
            delta, signal = deliver((out, f), e)
            return gradients(vjp, delta, first), signal

        first = jax.tree.map(lambda leaf: leaf[0], params)
        each = jax.vmap(learn_from) if unroll == 1 else _one_by_one(learn_from, unroll)
        dparams, signals = each(feedback, saved)
        return dparams, input_error(block, params, h, feedback, e), signals, jax.tree.map(jnp.zeros_like, saved)

    return lax.stop_gradient(end), listen(backward, wire, (params, h, feedback, saved))


def _one_by_one(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    return lambda *xs: lax.scan(lambda _, x: (None, function(*x)), None, xs, unroll=count)[1]


def _stream(block: Block, unroll: int, tree: Any, wire: jax.Array) -> Any:
    params, h, _ = tree
    end = _forward(block, unroll, *lax.stop_gradient((params, h)))
    return lax.stop_gradient(end), listen(partial(sweep, block, unroll), wire, tree)


def sweep(block: Block, unroll: int, tree: Any, e: jax.Array) -> Any:
    """What a stack's parameters, input and feedback learn from ``e``, in a second forward sweep."""
    params, h, feedback = tree

    ordered = order(unroll)

    def step(carry: Any, layer: Any) -> Any:
        h, e = carry
        out, *learned = learn(block, layer, h, e)
        return ordered((out, e), learned), learned

    _, (dparams, signals) = lax.scan(step, ordered((h, e), e), (params, feedback), unroll=unroll)
    return dparams, input_error(block, params, h, feedback, e), signals


def order(unroll: int) -> Callable[[Any, Any], Any]:
    """:func:`after` in straight code, where the compiler would find activations of the forward pass again; in a loop,
    which has its order, the values as they are.
    """
    return after if unroll > 1 else lambda values, known: values


def after(values: Any, known: Any) -> Any:
    """The values, bit for bit, but not before those in ``known`` are, for all that the compiler can tell.

    An ``optimization_barrier`` would say so, too, but XLA drops it on a CPU before it looks for common subexpressions;
    and elementwise operations it would fuse, with all that leads to them from block to block.
    """
    floats = [leaf for leaf in jax.tree.leaves(known) if leaf.size and jnp.issubdtype(leaf.dtype, jnp.inexact)]
    first = sum(jnp.ravel(leaf)[0] for leaf in floats)
    # Never true, which the compiler does not see.
    return lax.cond(jnp.isnan(first) & (first == 0), partial(jax.tree.map, jnp.zeros_like), lambda tree: tree, values)


def learn(block: Block, pair: tuple[Any, DirectFeedback], h: jax.Array, e: jax.Array) -> tuple[jax.Array, Any, Any]:
    """One block's output, and what its parameters and its feedback learn."""
    p, f = pair
    out, vjp = jax.vjp(lambda p: block(p, h), p)
    delta, signal = deliver((out, f), e)
    return out, gradients(vjp, delta, p), signal


def gradients(vjp: Any, delta: jax.Array, p: Any) -> Any:
    """One block's gradient; zeros where a parameter has none."""
    # Keys and counters have gradients of a type of their own, which no loop can carry.
    (dp,) = vjp(delta)
    return jax.tree.map(lambda d, leaf: jnp.zeros_like(leaf) if d.dtype == jax.dtypes.float0 else d, dp, p)


def input_error(block: Block, params: Any, h: jax.Array, feedback: Any, e: jax.Array) -> jax.Array:
    """The error at the first block's input; the compiler drops it where nothing learns from it."""
    p, f = jax.tree.map(lambda leaf: leaf[0], (params, feedback))
    out, vjp = jax.vjp(lambda h: block(p, h), h)
    return vjp(deliver((out, f), e)[0])[0]


def check_stack(block: Block, params: Any, h: jax.Array) -> int:
    """The number of blocks; refuses trees whose arrays differ in it, and blocks that can't follow each other."""
    if not hasattr(h, "dtype"):
        raise TypeError(f"A stack's h is one array, got {type(h).__name__}; concatenate several on their last axis.")
    layers = _layers(params, "params")
    out = jax.eval_shape(partial(_first, block), params, h)
    if not isinstance(out, jax.ShapeDtypeStruct) or (out.shape, out.dtype) != (h.shape, h.dtype):
        raise ValueError(
            f"A stack's block must return an array like the one it gets: expected {h.dtype}{list(h.shape)}, got {out}. "
            f"Put what changes the shape or dtype before or after the stack."
        )
    return layers


def check_feedback(feedback: Any, layers: int) -> Any:
    """The stack's feedback with a leading axis for its blocks."""
    there = "jaxfa.linear(x, w, feedback) inside the block"
    check_family(feedback, DirectFeedback, "direct_stack, update_stack and pipeline", there)
    if feedback.shared:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), feedback)
    found = _layers(feedback, "the feedback")
    if found != layers:
        raise ValueError(
            f"{layers} blocks need as many feedbacks, got {found}: make them with jax.vmap(rule.init, (0, None, None))"
            f"(jax.random.split(key, {layers}), h, logits)."
        )
    return feedback


def _layers(tree: Any, name: str) -> int:
    """The size of the one leading axis that all arrays of a stack's tree share."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(f"Every array in {name} of a stack has one leading axis for its blocks, got {sorted(sizes)}.")
    return sizes.pop()[0]


def is_unrolled(block: Block, params: Any, h: jax.Array, unroll: bool | None) -> bool:
    """Whether a stack runs as straight code: as asked, else convolutions on a CPU."""
    if unroll is not None:
        return unroll
    if jax.default_backend() != "cpu":
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(partial(_first, block))(params, h))


def _first(block: Block, params: Any, h: jax.Array) -> jax.Array:
    return block(jax.tree.map(lambda leaf: leaf[0], params), h)


_SCHEDULES = {"stored": _stored, "parallel": _parallel, "stream": _stream}
