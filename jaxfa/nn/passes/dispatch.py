"""A model of unequal blocks over several devices: each device forms the updates of its own share of the blocks.

A block's update needs its input and the output error, and no other block. So once the error is known all of them can be
formed at once, each by one device of the mesh's axis ``layer``, however unlike the blocks are. (For stacks of equal
blocks, whose parameters are on the devices too, see :func:`jaxfa.stacks.pipeline`.)
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

from jaxfa.base import LAYER, Rule
from jaxfa.delivery import filled, is_zero
from jaxfa.nn.model.cotangents import relearned, split_floats
from jaxfa.nn.model.program import Program, method_of
from jaxfa.nn.passes.output import OutputError
from jaxfa.nn.passes.refined import bound
from jaxfa.nn.passes.stream import Walk, check_streams, learn, walked
from jaxfa.nn.taps.tap import Tap, taps_of
from jaxfa.stacks import schedules
from jaxfa.varying import refuse_shards, vary_alike


class Dispatched(Walk):
    """A forward pass that keeps what every block computes with.

    Attributes:
      blocks: how to run each block, and its tap.
      states: what each computes with.
    """

    def __init__(self) -> None:
        super().__init__(())
        self.blocks: dict[str, tuple[Program, Tap]] = {}
        self.states: dict[str, Any] = {}

    def learn(self, program: Program, tap: Tap) -> Any:
        name = f"{len(self.blocks)}: {tap.path}"  # a block may run more than once
        state = jax.tree.map(lambda a: a, program.states[0])  # a copy, since the block is about to change its own
        self.blocks[name], self.states[name] = (program, tap), state
        return program.run(lax.stop_gradient(state))


def check_dispatches(model: nnx.Module, rule: Rule, schedule: schedules.Dispatch) -> None:
    """Refuses what can't be dispatched over a mesh."""
    check_streams(model, rule, schedule)
    blocks, devices = len(taps_of(model)), schedule.mesh.shape[LAYER]
    if blocks < devices:
        raise ValueError(f"{devices} devices need as many tapped blocks, got {blocks}: take a smaller axis.")


def call_dispatched(mesh: Mesh, attached: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a tapped model; its blocks' gradients are formed on different devices, and summed over them."""
    refuse_shards("jaxfa.stacks.dispatch is a shard_map of its own; shard the batch by jax.jit, or take stream.")
    program = bound(attached, Program(attached.model, method_of(attached.method), args, kwargs))
    output, blocks = OutputError(attached, program), dict[str, tuple[Program, Tap]]()

    def run(state: Any) -> Any:
        walk = Dispatched()
        found = program.run(state, prepare=walked(walk))
        blocks.update(walk.blocks)
        # What a block computes with comes from the state, or from what is before the block: as an output it takes its
        # gradient there.
        learns = {name: (split_floats(one)[0], walk.blocks[name][1].feedbacks()) for name, one in walk.states.items()}
        return (found, learns), walk.states

    def keep(state: Any) -> Any:
        def without_statistics(state: Any) -> Any:
            ((outputs, changed), learns), states = run(state)
            statistics, others = nnx.split_state(changed, nnx.BatchStat, ...)
            return ((outputs, others), learns), (statistics, states)

        ((outputs, others), _), pullback, (statistics, states) = jax.vjp(without_statistics, state, has_aux=True)
        kept = pullback, state, states, output.keep(outputs)
        return (outputs, nnx.merge_state(statistics, others)), kept

    def backward(kept: Any, cotangents: Any) -> Any:
        pullback, state, states, logits = kept
        outputs, changed = cotangents
        learned = _learn(mesh, blocks, states, output.of(logits, filled(outputs)))
        statistics, others = nnx.split_state(changed, nnx.BatchStat, ...)
        if all(map(is_zero, jax.tree.leaves(statistics))):
            return pullback((filled((outputs, others)), learned))[0]
        # Their gradient would run all blocks on all devices: a loss that reads statistics is the only one to pay that.
        return jax.vjp(run, state, has_aux=True)[1]((filled(cotangents), learned))[0]

    return program.finish(*relearned(keep, backward, program.states[0]))


def _learn(mesh: Mesh, blocks: dict[str, Any], states: dict[str, Any], e: jax.Array) -> Any:
    names, devices = list(blocks), mesh.shape[LAYER]

    def on_device(states: Any, e: jax.Array) -> Any:
        index = lax.axis_index(LAYER)
        states, e, _ = vary_alike((states, e, index))
        shares = [partial(_share, blocks, names[device::devices]) for device in range(devices)]
        return lax.psum(lax.switch(index, shares, states, e), LAYER)

    return jax.shard_map(on_device, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={LAYER})(states, e)


def _share(blocks: dict[str, Any], own: list[str], states: dict[str, Any], e: jax.Array) -> Any:
    """What all blocks learn, zeros but for one device's own."""
    learned = {name: partial(_one, blocks[name], states[name]) for name in blocks}
    return {name: one(e) if name in own else _zeros(one, e) for name, one in learned.items()}


def _zeros(one: Callable[[jax.Array], Any], e: jax.Array) -> Any:
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(one, e))
    return vary_alike((zeros, e))[0]


def _one(block: tuple[Program, Tap], state: Any, e: jax.Array) -> tuple[Any, Any]:
    """What one block's floats and its feedback learn."""
    program, tap = block
    return learn(program, state, tap, lambda: e)[1:]
