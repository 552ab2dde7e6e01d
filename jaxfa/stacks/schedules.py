"""When the blocks of a stack or of a model learn, and what is kept until they do: a schedule is a value.

:func:`jaxfa.direct_stack` runs by ``stored``, ``parallel`` or ``stream``, :func:`jaxfa.stacks.pipeline` by ``parallel``
or ``stream``, :func:`jaxfa.nn.attach` by ``stored``, ``stream`` or ``dispatch(mesh)``. The gradients are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jaxfa.base import LAYER
from jaxfa.ops import deliver
from jaxfa.stacks.blocks import Block, forward, gradients, input_error, sweep
from jaxfa.stacks.stages import learn_from_kept, run_and_keep, run_only, sweep_own
from jaxfa.wire import direct, listen


class Schedule:
    """What every schedule is.

    Those that a stack can run by have ``stack``, those that a stage of a pipeline can run by ``run_block`` and
    ``learn``.
    """

    name: ClassVar[str] = ""

    def __repr__(self) -> str:
        return f"jaxfa.stacks.{self.name}"


class Stored(Schedule):
    """As autodiff does it: every activation is kept, and blocks learn from the last to the first."""

    name = "stored"

    def stack(self, block: Block, unroll: int, tree: Any, wire: jax.Array) -> Any:
        """The stack's output and the wire."""
        params, h, feedback = tree

        def step(carry: Any, layer: Any) -> tuple[Any, None]:
            (h, wire), (p, f) = carry, layer
            return direct(block(p, h), wire, f), None

        return lax.scan(step, (h, wire), (params, feedback), unroll=unroll)[0]


class Parallel(Schedule):
    """Every activation is kept, and all blocks learn at once.

    In a stack that is one ``vmap`` over its blocks. A pipeline's stage keeps what the derivatives of its blocks need;
    with ``jax.checkpoint(block)`` their inputs alone.
    """

    name = "parallel"
    run_block = staticmethod(run_and_keep)
    learn = staticmethod(learn_from_kept)

    def stack(self, block: Block, unroll: int, tree: Any, wire: jax.Array) -> Any:
        """The stack's output and the wire."""
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


class Stream(Schedule):
    """No activation is kept: a second forward pass forms each block's update and drops its activations at once.

    Memory does not grow with the number of blocks. Two forward passes and the gradients inside blocks: as no error
    passes between blocks, for blocks of one matrix not more operations than backpropagation. A pipeline's stage keeps
    the input of its first block; a Flax model's memory is set by its largest block and by what lies between blocks.
    """

    name = "stream"
    run_block = staticmethod(run_only)
    learn = staticmethod(sweep_own)

    def stack(self, block: Block, unroll: int, tree: Any, wire: jax.Array) -> Any:
        """The stack's output and the wire."""
        params, h, _ = tree
        end = forward(block, unroll, *lax.stop_gradient((params, h)))
        return lax.stop_gradient(end), listen(partial(sweep, block, unroll), wire, tree)


@dataclass(frozen=True, repr=False)
class Dispatch(Schedule):
    """The inputs of a Flax model's blocks are kept; each device forms the updates of its own share of the blocks.

    Attributes:
      mesh: the devices, along its axis ``layer``.
    """

    name = "dispatch(mesh)"
    mesh: Mesh

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh) or LAYER not in self.mesh.shape:
            given = dict(self.mesh.shape) if isinstance(self.mesh, Mesh) else self.mesh
            raise ValueError(f"dispatch(mesh) needs a mesh with an axis {LAYER!r}, got {given}: jaxfa.stacks.mesh().")


stored, parallel, stream = Stored(), Parallel(), Stream()


def dispatch(mesh: Mesh) -> Dispatch:
    """A schedule for :func:`jaxfa.nn.attach`: each device forms the updates of its own share of a model's blocks.

    Every device runs the forward pass and keeps the blocks' inputs. (XLA is slow at dispatched convolutions on a CPU.)

    Args:
      mesh: the devices, along its axis ``layer``, such as ``jaxfa.stacks.mesh(layer=2)``.

    Raises:
      ValueError: if the mesh has no axis ``layer``.

    Example:
      >>> import jaxfa
      >>> jaxfa.stacks.dispatch(jaxfa.stacks.mesh(layer=1))
      jaxfa.stacks.dispatch(mesh)
    """
    return Dispatch(mesh)


def check_schedule(schedule: Any, who: str, method: str) -> Any:
    """The schedule, if it has that method.

    Raises:
      ValueError: if it has not.
    """
    if not isinstance(schedule, Schedule) or not hasattr(schedule, method):
        known = [repr(one) for one in (stored, parallel, stream) if hasattr(one, method)]
        raise ValueError(f"{who} takes schedule={' or '.join(known)}, a value and no string; got {schedule!r}.")
    return schedule
