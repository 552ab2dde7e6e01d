"""Stacks whose layers live on different devices: microbatches stream through them, and all layers learn at once.

The forward pass is a pipeline as in Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline
Parallelism", 2019, https://arxiv.org/abs/1811.06965. The backward pass is none: the output error goes to every device
once, each device updates its own layers from it, and no gradient travels between stages (Nokland, "Direct Feedback
Alignment Provides Learning in Deep Neural Networks", 2016, https://arxiv.org/abs/1609.01596). The mesh's other axes,
such as ``data``, are the compiler's: what a rule takes from a batch, it takes from the whole one.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxfa.ops import deliver, listen
from jaxfa.stack import Block, check_feedback, check_stack, gradients, input_error, is_unrolled, sweep

DATA, LAYER = "data", "layer"
_LAYERS, _KEPT = PartitionSpec(LAYER), PartitionSpec(None, LAYER)


def mesh(*, data: int = 1, layer: int = 1, **others: int) -> Mesh:
    """A mesh of ``data x layer x ...`` devices whose sharding the compiler completes.

    Args:
      data: the number of parts of a batch.
      layer: the number of pipeline stages ``S``, parts of a stack.
      **others: further axes, such as ``model=2``, for the blocks' own use.

    Returns:
      A ``jax.sharding.Mesh`` with these axes in this order.

    Raises:
      ValueError: if there are not as many devices.

    Example:
      >>> import jaxfa.parallel
      >>> dict(jaxfa.parallel.mesh().shape)
      {'data': 1, 'layer': 1}
    """
    sizes = {DATA: data, LAYER: layer} | others
    needed = 1
    for size in sizes.values():
        needed *= size
    if min(sizes.values()) < 1 or needed > jax.device_count():
        raise ValueError(
            f"A mesh of {sizes} needs {needed} devices, each axis 1 at least, and JAX sees {jax.device_count()}. Choose "
            f"sizes whose product is at most that."
        )
    devices = jax.devices()[:needed]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)


def pipeline(
    block: Block,
    params: Any,
    h: jax.Array,
    wire: jax.Array,
    feedback: Any,
    *,
    mesh: Mesh,
    microbatches: int,
    schedule: str,
    unroll: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs :func:`jaxfa.direct_stack` on ``S`` devices, or groups of them, each of which owns ``L / S`` of the blocks.

    Forward, ``M`` microbatches stream from stage to stage in ``M + S - 1`` ticks. Backward, there are no ticks: every
    stage has kept the input of its first block and updates its blocks in a second forward sweep, as
    ``schedule="stream"`` does, on the whole batch at once. So the update is the single device's, except where the block
    itself looks at its batch, as batch normalisation does: it sees a microbatch, which takes every ``M``-th example.

    Under ``jit``, put ``params``, ``feedback`` and their optimizer's state on the mesh by their leading axis,
    ``jax.NamedSharding(mesh, P("layer"))``, and the batch by ``P("data")``. The output is spread over both axes, so that
    what follows, such as the head and the loss, is computed in ``data x layer`` parts.

    With ``feedback=None`` the pipeline is differentiated as it is, in both modes; its gradient goes back stage by stage.

    Args:
      block: as for :func:`jaxfa.direct_stack`.
      params: any tree whose arrays have a leading axis ``L``, a multiple of ``S``.
      h: the input of the first block, ``(N, ..., n)``.
      wire: the error wire, ``(N, ..., C)``.
      feedback: as for :func:`jaxfa.direct_stack`.
      mesh: a mesh with an axis ``"layer"`` of size ``S``, from :func:`mesh` or ``jax.make_mesh``.
      microbatches: ``M``; ``N`` is a multiple of ``M`` and of ``S``, each times the size of the axis ``"data"``.
      unroll: as for :func:`jaxfa.direct_stack`; the ticks, too, then follow each other in straight code.

    Returns:
      ``(h, wire)`` after the last block.

    Raises:
      TypeError: if the feedback is not a :class:`jaxfa.DirectFeedback`.
      ValueError: if layers or examples cannot be divided so; the message has the sizes that can.

    Example:
      >>> import jax, jax.numpy as jnp, jaxfa.parallel
      >>> x, w, mesh = jnp.ones((8, 4)), 0.1 * jnp.ones((6, 4, 4)), jaxfa.parallel.mesh(layer=1)
      >>> keys = jax.random.split(jax.random.key(0), 6)
      >>> feedback = jax.vmap(jaxfa.dfa().init, (0, None, None))(keys, x, jnp.ones((8, 4)))
      >>> @jax.jit
      ... def loss(w):
      ...     h, wire = jaxfa.parallel.pipeline(
      ...         lambda w, h: jnp.tanh(h @ w), w, x, jaxfa.error_wire(x), feedback, mesh=mesh, microbatches=2, schedule="stream")
      ...     return ((h + wire) ** 2).sum()
      >>> jax.grad(loss)(w).shape
      (6, 4, 4)

    Source: see the module's.
    """
    layers = check_stack(block, params, h)
    _check_sizes(mesh, layers, h.shape[0], microbatches)
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule must be one of {sorted(_SCHEDULES)}, got {schedule!r}.")
    sizes = _Sizes(microbatches, mesh.shape.get(DATA, 1), is_unrolled(block, params, h, unroll))
    run_block, learn = _SCHEDULES[schedule]
    on = partial(jax.shard_map, mesh=mesh, axis_names={LAYER})
    # One copy for each stage: XLA (jax 0.10) cannot sum what is replicated over an axis of one device.
    copies = jnp.broadcast_to(h, (mesh.shape[LAYER], *h.shape))
    # What follows would else be computed by every stage, on all of the last one's output.
    spread = NamedSharding(mesh, PartitionSpec(tuple(axis for axis in (DATA, LAYER) if axis in mesh.shape)))
    if feedback is None:
        plain = partial(_stages, lambda p, h: (block(p, h), None), sizes)
        end, _, _ = on(plain, in_specs=_LAYERS, out_specs=(_LAYERS, _LAYERS, _KEPT))(params, copies)
        return lax.with_sharding_constraint(_gathered(end, sizes.data), spread), wire
    feedback = check_feedback(feedback, layers)
    run = on(partial(_stages, partial(run_block, block), sizes), in_specs=_LAYERS, out_specs=(_LAYERS, _LAYERS, _KEPT))
    end, *kept = run(*lax.stop_gradient((params, copies)))

    def backward(tree: Any, e: jax.Array) -> Any:
        params, _, feedback, kept = tree
        specs = (_LAYERS, _LAYERS, (_LAYERS, _KEPT), PartitionSpec())
        own = on(partial(learn, block, sizes), in_specs=specs, out_specs=_LAYERS)
        dparams, dh, signals = own(params, feedback, tuple(kept), e)
        return dparams, dh[0], signals, None

    end = lax.with_sharding_constraint(_gathered(end, sizes.data), spread)
    return end, listen(backward, wire, (params, h, feedback, tuple(kept)))


class _Sizes(NamedTuple):
    microbatches: int
    data: int
    straight: bool

    def unroll(self, count: int) -> int:
        return count if self.straight else 1


def _stages(run_block: Any, sizes: _Sizes, params: Any, h: jax.Array) -> Any:
    """One stage's forward pass: its part of the stack's output, its first block's input, what its blocks keep."""
    stages, stage = lax.axis_size(LAYER), lax.axis_index(LAYER)
    parts = _dealt(h[0], sizes.microbatches, sizes.data)
    layers, ticks = len(jax.tree.leaves(params)[0]), len(parts) + stages - 1

    def own(start: jax.Array) -> Any:
        return lax.scan(lambda h, p: run_block(p, h), start, params, unroll=sizes.unroll(layers))

    def tick(carry: Any, t: jax.Array) -> Any:
        arrived, kept = carry
        start = jnp.where(stage == 0, parts[jnp.minimum(t, len(parts) - 1)], arrived)
        end, saved = own(start)
        kept = jax.tree.map(lambda whole, one: _put(whole, one, t - stage), kept, (end, start, saved))
        return (lax.ppermute(end, LAYER, [(s, s + 1) for s in range(stages - 1)]), kept), None

    # In the bubbles, too, blocks run on real examples: on zeros their derivative may be none.
    end, saved = jax.eval_shape(own, parts[0])
    empty = jax.tree.map(lambda one: _empty((len(parts), *one.shape), one.dtype), (end, end, saved))
    (_, (ends, starts, saved)), _ = lax.scan(
        tick, (parts[0], empty), jnp.arange(ticks), unroll=sizes.unroll(ticks)
    )
    return _scatter(_gathered(ends, sizes.data), sizes.data), _gathered(starts, sizes.data)[None], saved


def _empty(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return lax.pcast(jnp.zeros(shape, dtype), LAYER, to="varying")


def _put(whole: jax.Array, one: jax.Array, i: jax.Array) -> jax.Array:
    """Sets entry ``i``, if there is one."""
    at = jnp.clip(i, 0, len(whole) - 1)
    return lax.dynamic_update_index_in_dim(whole, jnp.where(at == i, one, whole[at]), at, 0)


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


def _run_only(block: Block, p: Any, h: jax.Array) -> tuple[jax.Array, None]:
    return block(p, h), None


def _sweep_own(block: Block, sizes: _Sizes, params: Any, feedback: Any, kept: Any, e: jax.Array) -> Any:
    """What a stage's blocks learn, from a second sweep through them."""
    start, layers = kept[0][0], len(jax.tree.leaves(params)[0])
    dparams, dh, signals = sweep(block, sizes.unroll(layers), (params, start, feedback), e)
    return dparams, dh[None], signals


def _run_and_keep(block: Block, p: Any, h: jax.Array) -> tuple[jax.Array, Any]:
    out, residuals, is_new, _ = _linearised(block, p, h)
    return out, (out, [one for one, new in zip(residuals, is_new, strict=True) if new])


def _linearised(block: Block, p: Any, h: jax.Array) -> Any:
    """A block's output, and the residuals of its derivative in ``p``; new are those but ``p``, ``h`` and the output."""
    out, vjp = jax.vjp(lambda p: block(p, h), p)
    residuals, structure = jax.tree.flatten(vjp)
    known = {id(leaf) for leaf in jax.tree.leaves((p, h, out))}
    return out, residuals, [id(one) not in known for one in residuals], structure


def _pull_back(block: Block, p: Any, h: jax.Array, out: jax.Array, kept: Any, delta: jax.Array) -> Any:
    # Traced again for its structure alone: all that it computes is replaced by what was kept, and dropped.
    again, residuals, is_new, structure = _linearised(block, p, h)
    rest = iter(kept)
    values = [next(rest) if new else out if one is again else one for one, new in zip(residuals, is_new, strict=True)]
    return gradients(jax.tree.unflatten(structure, values), delta, p)


def _learn_from_kept(block: Block, sizes: _Sizes, params: Any, feedback: Any, kept: Any, e: jax.Array) -> Any:
    """What a stage's blocks learn, from what the forward pass kept."""
    start, saved = kept
    layers = len(jax.tree.leaves(params)[0])

    def layer(h: jax.Array, layer: Any) -> Any:
        p, f, (out, residuals) = layer
        delta, signal = deliver((_gathered(out, sizes.data), f), e)

        def add(total: Any, part: Any) -> Any:
            return jax.tree.map(_add, total, _pull_back(block, p, *part)), None

        parts = h, out, residuals, _dealt(delta, sizes.microbatches, sizes.data)
        total, _ = lax.scan(add, jax.tree.map(jnp.zeros_like, p), parts, unroll=sizes.unroll(sizes.microbatches))
        return out, (total, signal)

    by_layer = params, feedback, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), saved)
    first = _dealt(start[0], sizes.microbatches, sizes.data)
    _, (dparams, signals) = lax.scan(layer, first, by_layer, unroll=sizes.unroll(layers))
    return dparams, input_error(block, params, start[0], feedback, e)[None], signals


def _add(total: jax.Array, one: jax.Array) -> jax.Array:
    return total + one if jnp.issubdtype(total.dtype, jnp.inexact) else total


def _dealt(h: jax.Array, parts: int, data: int) -> jax.Array:
    """Deals ``N`` examples out, ``(parts, N / parts, ...)``: some of every device's to each part, so that none move."""
    dealt = jnp.swapaxes(h.reshape(data, parts, -1, *h.shape[1:]), 0, 1)
    return dealt.reshape(parts, -1, *h.shape[1:])


def _gathered(parts: jax.Array, data: int) -> jax.Array:
    """The examples in order again."""
    dealt = parts.reshape(len(parts), data, -1, *parts.shape[2:])
    return jnp.swapaxes(dealt, 0, 1).reshape(-1, *parts.shape[2:])


def _check_sizes(mesh: Mesh, layers: int, examples: int, microbatches: int) -> None:
    if LAYER not in mesh.shape:
        raise ValueError(f"pipeline needs a mesh with an axis {LAYER!r}, got {dict(mesh.shape)}: make one with mesh().")
    stages, data = mesh.shape[LAYER], mesh.shape.get(DATA, 1)
    if layers % stages:
        raise ValueError(
            f"{layers} layers cannot be divided over {stages} stages: choose {_divisors(layers)} stages, or a multiple "
            f"of {stages} layers."
        )
    if examples % (data * stages):
        raise ValueError(
            f"A batch of {examples} examples cannot be divided over {data} x {stages} devices (data x layer): choose a "
            f"multiple of {data * stages}."
        )
    if microbatches < 1 or examples % (data * microbatches):
        raise ValueError(
            f"{examples} examples on {data} devices of the axis 'data' cannot be divided into {microbatches} "
            f"microbatches: choose {_divisors(examples // data)}."
        )


def _divisors(number: int) -> str:
    *some, last = [str(one) for one in range(1, number + 1) if number % one == 0]
    return f"{', '.join(some)} or {last}" if some else last


_SCHEDULES: dict[str, Any] = {"parallel": (_run_and_keep, _learn_from_kept), "stream": (_run_only, _sweep_own)}
