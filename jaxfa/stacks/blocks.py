"""What the blocks of a stack learn under direct feedback, one by one.

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
from jaxfa.ops import check_family, deliver
from jaxfa.order import after

Block = Callable[[Any, jax.Array], jax.Array]


def forward(block: Block, unroll: int, params: Any, h: jax.Array) -> jax.Array:
    """What a stack returns."""
    return lax.scan(lambda h, p: (block(p, h), None), h, params, unroll=unroll)[0]


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
