"""A model of unequal blocks over several devices: each device forms the updates of its own share of the blocks.

A block's update needs its input and the output error, and no other block. So once the error is known all of them can be
formed at once, each by one device of the mesh's axis ``layer``, however unlike the blocks are. (For stacks of equal
blocks, whose parameters are on the devices too, see :func:`jaxfa.parallel.pipeline`.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxfa.base import Rule
from jaxfa.nn.stream import Inputs, Run, Walk, changed_state, check_streams, split_inputs, split_model, walked
from jaxfa.nn.tap import Tap, taps_of
from jaxfa.ops import deliver, error_wire, listen, vary_alike
from jaxfa.stages import LAYER


class Dispatch(Walk):
    """A forward pass that keeps what every block computes with.

    Attributes:
      runs: how to run each block, by its tap's path.
      scopes: the name scope of each block's delivery.
      blocks: what each computes with.
    """

    def __init__(self) -> None:
        super().__init__(())
        self.runs: dict[str, Run] = {}
        self.scopes: dict[str, str] = {}
        self.blocks: dict[str, Inputs] = {}

    def learn(self, run: Run, tap: Tap, block: Inputs) -> Any:
        name = f"{len(self.runs)}: {tap.path}"  # a block may run more than once
        self.runs[name], self.scopes[name], self.blocks[name] = run, f"tap[{tap.scope}]", block
        return run(block._replace(params=lax.stop_gradient(block.params), arrays=lax.stop_gradient(block.arrays)))


def check_dispatches(model: nnx.Module, rule: Rule, mesh: Mesh | None) -> Mesh:
    """Refuses what can't be dispatched over a mesh; else returns the mesh."""
    check_streams(model, rule, "dispatch")
    if mesh is None or LAYER not in mesh.shape:
        given = "none" if mesh is None else dict(mesh.shape)
        raise ValueError(f"schedule='dispatch' needs mesh= with an axis {LAYER!r}, got {given}: jaxfa.parallel.mesh().")
    blocks = len(taps_of(model))
    if blocks < mesh.shape[LAYER]:
        raise ValueError(f"{mesh.shape[LAYER]} devices need as many tapped blocks, got {blocks}: take a smaller axis.")
    return mesh


def call_dispatched(mesh: Mesh, model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
    """Runs a tapped model; its blocks' gradients are formed on different devices, and summed over them."""
    graphdef, params, feedback, rest = split_model(model)
    split_inputs("The dispatched model", args, kwargs)
    walk = Dispatch()
    copy = walked(walk, graphdef, params, feedback, rest)
    logits = copy(*args, **kwargs)
    nnx.update(model, changed_state(copy, params, rest))
    return logits + listen(partial(_learn, mesh, walk.runs, walk.scopes), error_wire(logits), walk.blocks)


def _learn(mesh: Mesh, runs: dict[str, Run], scopes: dict[str, str], blocks: dict[str, Inputs], e: jax.Array) -> Any:
    names, devices = list(runs), mesh.shape[LAYER]

    def on_device(blocks: Any, e: jax.Array) -> Any:
        index = lax.axis_index(LAYER)
        blocks, e, _ = vary_alike((blocks, e, index))
        shares = [partial(_share, runs, scopes, names[device::devices]) for device in range(devices)]
        return lax.psum(lax.switch(index, shares, blocks, e), LAYER)

    sums = jax.shard_map(on_device, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={LAYER})(blocks, e)
    return {name: _cotangent(blocks[name], sums[name]) for name in names}


def _share(
    runs: dict[str, Run], scopes: dict[str, str], own: list[str], blocks: dict[str, Inputs], e: jax.Array
) -> Any:
    """What all blocks learn, zeros but for one device's own."""
    learned = {name: partial(_one, runs[name], scopes[name], blocks[name]) for name in runs}
    return {name: one(e) if name in own else _zeros(one, e) for name, one in learned.items()}


def _zeros(one: Callable[[jax.Array], Any], e: jax.Array) -> Any:
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(one, e))
    return vary_alike((zeros, e))[0]


def _one(run: Run, scope: str, block: Inputs, e: jax.Array) -> tuple[Any, Any, Any]:
    """What one block's parameters and feedback learn, and the errors at those of its inputs that are no integers."""
    floats = {i: array for i, array in enumerate(block.arrays) if jnp.issubdtype(array.dtype, jnp.inexact)}

    def forward(params: Any, floats: dict[int, jax.Array]) -> jax.Array:
        arrays = [floats.get(i, array) for i, array in enumerate(block.arrays)]
        return run(block._replace(params=params, arrays=arrays))[0]

    out, vjp = jax.vjp(forward, block.params, floats)
    ((_, feedback),) = nnx.to_flat_state(block.feedback)
    with jax.named_scope(scope):
        delta, signal = deliver((out, feedback.get_value()), e)
    return *vjp(delta), signal


def _cotangent(block: Inputs, learned: tuple[Any, Any, Any]) -> Inputs:
    params, errors, signal = learned
    feedback = jax.tree.unflatten(jax.tree.structure(block.feedback), jax.tree.leaves(signal))
    arrays = [errors.get(i, jnp.zeros_like(array)) for i, array in enumerate(block.arrays)]
    return Inputs(params, feedback, jax.tree.map(jnp.zeros_like, block.rest), arrays)
