"""What one stage of a pipeline does inside ``shard_map`` over the axis ``layer``: see :func:`jaxfa.stacks.pipeline`."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfa.base import LAYER
from jaxfa.ops import deliver
from jaxfa.stacks.blocks import Block, gradients, input_error, sweep
from jaxfa.varying import vary_alike


class Sizes(NamedTuple):
    """How the work is cut.

    Attributes:
      microbatches: ``M``.
      data: the size of the axis ``data``.
      straight: whether loops are unrolled.
    """

    microbatches: int
    data: int
    straight: bool

    def unroll(self, count: int) -> int:
        """The number of turns of a loop of ``count`` that follow each other in straight code."""
        return count if self.straight else 1


def run_stage(run_block: Any, sizes: Sizes, params: Any, h: jax.Array, taps: jax.Array | None = None) -> Any:
    """One stage's forward pass: its part of the stack's output, its first block's input, what its blocks keep.

    With taps, blocks run on pairs of their parameters and their tap.
    """
    stages, stage = lax.axis_size(LAYER), lax.axis_index(LAYER)
    parts = _dealt(h[0], sizes.microbatches, sizes.data)
    layers, ticks = len(jax.tree.leaves(params)[0]), len(parts) + stages - 1

    def own(start: jax.Array, m: Any) -> Any:
        blocks = params if taps is None else (params, _taps_of(taps, m, sizes))
        return lax.scan(lambda h, p: run_block(p, h), start, blocks, unroll=sizes.unroll(layers))

    def tick(carry: Any, t: jax.Array) -> Any:
        arrived, kept = carry
        # In its bubbles a stage writes what the first microbatch then replaces, and the last once more.
        m = jnp.clip(t - stage, 0, len(parts) - 1)
        start = jnp.where(stage == 0, parts[m], arrived)
        end, saved = own(start, m)
        put = partial(lax.dynamic_update_index_in_dim, index=m, axis=0)
        kept = put(kept[0], end), put(kept[1], start), jax.tree.map(partial(put, axis=1), kept[2], saved)
        return (lax.ppermute(end, LAYER, [(s, s + 1) for s in range(stages - 1)]), kept), None

    saved = jax.tree.map(
        lambda one: _empty((layers, len(parts), *one.shape[1:]), one.dtype), jax.eval_shape(own, parts[0], 0)[1]
    )
    # In the bubbles, too, blocks run on real examples: on zeros their derivative may be none.
    first = parts[0], (jnp.zeros_like(parts), jnp.zeros_like(parts), saved)
    (_, (ends, starts, saved)), _ = lax.scan(tick, first, jnp.arange(ticks), unroll=sizes.unroll(ticks))
    return _scatter(gathered(ends, sizes.data), sizes.data), (gathered(starts, sizes.data)[None], saved)


def _taps_of(taps: jax.Array, m: jax.Array, sizes: Sizes) -> jax.Array:
    if taps.ndim == 1:
        return taps
    dealt = jax.vmap(partial(_dealt, parts=sizes.microbatches, data=sizes.data))(taps)
    return dealt[:, m]


def _empty(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return lax.pcast(jnp.zeros(shape, dtype), LAYER, to="varying")


def _scatter(end: jax.Array, data: int) -> jax.Array:
    """Sends every stage its part of what the last one has."""
    stages = lax.axis_size(LAYER)
    parts = _dealt(end, stages, data)
    own = parts[-1]
    for stage in range(stages - 1):
        # Link by link: a collective over all stages would carry as much from each as from the last.
        sent = lax.ppermute(parts[stage], LAYER, [(stages - 1, stage)])
        own = jnp.where(lax.axis_index(LAYER) == stage, sent, own)
    return own[None]


def run_only(block: Block, p: Any, h: jax.Array) -> tuple[jax.Array, None]:
    """A block's output; nothing is kept."""
    return block(p, h), None


def sweep_own(block: Block, sizes: Sizes, own: Any, e: jax.Array) -> Any:
    """What a stage's blocks learn, from a second sweep through them."""
    params, feedback, (start, _) = own
    layers = len(jax.tree.leaves(params)[0])
    dparams, dh, signals = sweep(block, sizes.unroll(layers), *vary_alike(((params, start[0], feedback), e)))
    return dparams, dh[None], signals


def run_and_keep(block: Block, p: Any, h: jax.Array) -> tuple[jax.Array, Any]:
    """A block's output, and what its derivative needs."""
    out, residuals, is_new, _ = _linearised(block, p, h)
    return out, (out, [one for one, new in zip(residuals, is_new, strict=True) if new])


def _linearised(block: Block, p: Any, h: jax.Array) -> Any:
    """A block's output, and the residuals of its derivative in ``p``; new are those but ``p``, ``h`` and the output."""
    out, vjp = jax.vjp(lambda p: block(p, h), p)
    residuals, structure = jax.tree.flatten(vjp)
    known = {id(leaf) for leaf in jax.tree.leaves((p, h, out))}
    return out, residuals, [id(one) not in known for one in residuals], structure


def _pull_back(block: Block, p: Any, kept: Any, delta: jax.Array) -> Any:
    h, out, kept = kept
    # Traced again for its structure alone: all that it computes is replaced by what was kept, and dropped.
    again, residuals, is_new, structure = _linearised(block, p, h)
    rest = iter(kept)
    values = [next(rest) if new else out if one is again else one for one, new in zip(residuals, is_new, strict=True)]
    return gradients(jax.tree.unflatten(structure, values), delta, p)


def learn_from_kept(block: Block, sizes: Sizes, own: Any, e: jax.Array) -> Any:
    """What a stage's blocks learn, from what the forward pass kept."""
    params, feedback, (start, saved) = own
    layers = len(jax.tree.leaves(params)[0])

    def layer(h: jax.Array, layer: Any) -> Any:
        p, f, (out, residuals) = layer
        delta, signal = deliver((gathered(out, sizes.data), f), e)

        def add(total: Any, part: Any) -> Any:
            return jax.tree.map(_add, total, _pull_back(block, p, *part)), None

        parts = (h, out, residuals), _dealt(delta, sizes.microbatches, sizes.data)
        total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, p), parts, unroll=sizes.unroll(sizes.microbatches))
        return out, (total, signal)

    first = _dealt(start[0], sizes.microbatches, sizes.data)
    _, (dparams, signals) = lax.scan(layer, first, (params, feedback, saved), unroll=sizes.unroll(layers))
    return dparams, input_error(block, params, start[0], feedback, e)[None], signals


def _add(total: jax.Array, one: jax.Array) -> jax.Array:
    return total + one if jnp.issubdtype(total.dtype, jnp.inexact) else total


def _dealt(h: jax.Array, parts: int, data: int) -> jax.Array:
    """Deals ``N`` examples out, ``(parts, N / parts, ...)``: some of every device's to each part, so that none move."""
    dealt = jnp.swapaxes(h.reshape(data, parts, -1, *h.shape[1:]), 0, 1)
    return dealt.reshape(parts, -1, *h.shape[1:])


def gathered(parts: jax.Array, data: int) -> jax.Array:
    """The examples in order again."""
    dealt = parts.reshape(len(parts), data, -1, *parts.shape[2:])
    return jnp.swapaxes(dealt, 0, 1).reshape(-1, *parts.shape[2:])
