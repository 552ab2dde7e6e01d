"""Stacks whose layers live on different devices: microbatches stream through them, and all layers learn at once.

The forward pass is a pipeline as in Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline
Parallelism", 2019, https://arxiv.org/abs/1811.06965. The backward pass is none: the output error goes to every device
once, each device updates its own layers from it, and no gradient travels between stages (Nokland, "Direct Feedback
Alignment Provides Learning in Deep Neural Networks", 2016, https://arxiv.org/abs/1609.01596). The mesh's other axes,
such as ``data``, are the compiler's: what a rule takes from a batch, it takes from the whole one. Only what a block
itself makes of its batch, such as batch normalisation's statistics and dropout's masks, it makes of each microbatch.

Under ``jit``, put ``params``, ``feedback`` and their optimizer's state on the mesh by their leading axis,
``jax.sharding.NamedSharding(mesh, P("layer"))``, and the batch by ``P("data")``. The output is spread over both axes,
so that what follows, such as the head and the loss, is computed in ``data x layer`` parts.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxfa.base import LAYER
from jaxfa.stacks.blocks import Block, check_feedback, check_stack, is_unrolled
from jaxfa.stacks.schedules import Schedule, check_schedule
from jaxfa.stacks.stages import Sizes, gathered, run_stage
from jaxfa.wire import listen

DATA = "data"
_LAYERS = PartitionSpec(LAYER)


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
      >>> import jaxfa
      >>> dict(jaxfa.stacks.mesh().shape)
      {'data': 1, 'layer': 1}
    """
    sizes = {DATA: data, LAYER: layer} | others
    needed = math.prod(sizes.values())
    if min(sizes.values()) < 1 or needed > jax.device_count():
        raise ValueError(
            f"A mesh of {sizes} needs {needed} devices, and JAX sees {jax.device_count()}: choose sizes from 1 whose "
            f"product is at most that."
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
    schedule: Schedule,
    taps: jax.Array | None = None,
    unroll: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs :func:`jaxfa.direct_stack` on ``S`` devices, or groups of them, each of which owns ``L / S`` of the blocks.

    Forward, ``M`` microbatches stream from stage to stage in ``M + S - 1`` ticks. Backward, all stages learn at once,
    each on the whole batch, so that the update is the single device's. With ``feedback=None`` the pipeline is
    differentiated as it is, in both modes.

    Args:
      block: as for :func:`jaxfa.direct_stack`, as are ``wire`` and ``feedback``.
      params: any tree whose arrays have a leading axis ``L``, a multiple of ``S``.
      h: the input of the first block, ``(N, ..., n)``.
      wire: the error wire, ``(N, ..., C)``.
      feedback: a direct feedback with a leading axis ``L``, one shared by all blocks, or None.
      mesh: a mesh with an axis ``"layer"`` of size ``S``, from :func:`mesh`, or ``jax.make_mesh`` with ``Auto``.
      microbatches: ``M``; ``N`` is a multiple of ``M`` and of ``S``, each times the size of the axis ``"data"``.
      schedule: ``jaxfa.stacks.parallel`` or ``stream``; without effect where ``feedback`` is None.
      taps: what is added to the blocks' results, ``(L, N, ..., n)`` or ``(L,)``, if ``feedback`` is None: for
        ``refine``.
      unroll: as for :func:`jaxfa.direct_stack`; the ticks, too, then follow each other in straight code.

    Returns:
      ``(h, wire)`` after the last block.

    Raises:
      TypeError, ValueError: as :func:`jaxfa.direct_stack`; if layers or examples cannot be divided so, saying what can;
        if there are taps and a feedback.

    Example:
      >>> import jax.numpy as jnp, jaxfa
      >>> x, w, mesh = jnp.ones((8, 4)), 0.1 * jnp.ones((6, 4, 4)), jaxfa.stacks.mesh(layer=1)
      >>> h, wire = jaxfa.stacks.pipeline(
      ...     lambda w, h: jnp.tanh(h @ w), w, x, jaxfa.error_wire(x), jaxfa.DirectMatrix(jnp.ones((6, 4, 4))),
      ...     mesh=mesh, microbatches=2, schedule=jaxfa.stacks.stream)

    Source: see the module's docstring.
    """
    _check_mesh(mesh)
    how = check_schedule(schedule, "pipeline", "learn")
    layers = check_stack(block, params, h)
    _check_sizes(mesh, layers, h.shape[0], microbatches)
    sizes = Sizes(microbatches, mesh.shape.get(DATA, 1), is_unrolled(block, params, h, unroll))
    on = partial(jax.shard_map, mesh=mesh, axis_names={LAYER})
    # One copy for each stage: XLA (jax 0.10) cannot sum what is replicated over an axis of one device.
    copies = jnp.broadcast_to(h, (mesh.shape[LAYER], *h.shape))
    # What follows would else be computed by every stage, on all of the last one's output.
    spread = NamedSharding(mesh, PartitionSpec(tuple(axis for axis in (DATA, LAYER) if axis in mesh.shape)))

    def forward(run: Any, *own: Any) -> Any:
        end, kept = on(partial(run_stage, run, sizes), in_specs=_LAYERS, out_specs=_LAYERS)(*own)
        return lax.with_sharding_constraint(gathered(end, sizes.data), spread), kept

    def backward(tree: Any, e: jax.Array) -> Any:
        params, _, feedback, kept = tree
        learn_own = on(partial(how.learn, block, sizes), in_specs=(_LAYERS, PartitionSpec()), out_specs=_LAYERS)
        dparams, dh, signals = learn_own((params, feedback, kept), e)
        return dparams, dh[0], signals, None

    if taps is not None:
        _check_taps(taps, feedback, layers, h)
    if feedback is None and taps is None:
        return forward(lambda p, h: (block(p, h), None), params, copies)[0], wire
    if feedback is None:
        return forward(partial(_shifted, block), params, copies, taps)[0], wire
    end, kept = forward(partial(how.run_block, block), *lax.stop_gradient((params, copies)))
    return lax.stop_gradient(end), listen(backward, wire, (params, h, check_feedback(feedback, layers), kept))


def _shifted(block: Block, p: tuple[Any, jax.Array], h: jax.Array) -> tuple[jax.Array, None]:
    out = block(p[0], h)
    return out + p[1].astype(out.dtype), None


def _check_taps(taps: jax.Array, feedback: Any, layers: int, h: jax.Array) -> None:
    if taps.shape not in ((layers,), (layers, *h.shape)):
        raise ValueError(f"taps must have the shape {(layers,)} or {(layers, *h.shape)}, got {taps.shape}.")
    if feedback is not None:
        raise ValueError("pipeline adds taps to the plain network alone: give feedback=None with taps.")


def _check_mesh(mesh: Mesh) -> None:
    if LAYER not in mesh.shape:
        raise ValueError(f"pipeline needs a mesh with an axis {LAYER!r}, got {dict(mesh.shape)}: make one with mesh().")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"pipeline needs a mesh of Auto axes, got {mesh.axis_types}: make one with mesh().")


def _check_sizes(mesh: Mesh, layers: int, examples: int, microbatches: int) -> None:
    stages, data = mesh.shape[LAYER], mesh.shape.get(DATA, 1)
    if layers % stages:
        raise ValueError(
            f"{layers} layers cannot be divided over {stages} stages: choose {_divisors(layers)} stages, or a multiple "
            f"of {stages} layers."
        )
    if not examples or examples % (data * stages):
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
