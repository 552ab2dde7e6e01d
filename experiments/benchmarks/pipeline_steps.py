"""The training steps that ``pipeline`` compares: one stack of residual layers, one head.

Backpropagation's pipeline is GPipe's: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline
Parallelism", 2019, https://arxiv.org/abs/1811.06965. It is the derivative of a scan of ticks, its loss taken on the
last stage, so that no byte is sent but those between neighbours and the head's gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfa
from experiments.common.task import cross_entropy
from jaxfa import stacks


class Network(NamedTuple):
    """A stack's sizes.

    Attributes:
      layers: ``L``.
      width: ``n``.
      outputs: ``C``.
      examples: ``N``, of a batch.
    """

    layers: int
    width: int
    outputs: int
    examples: int


Loss = Callable[..., jax.Array]


def block(w: jax.Array, h: jax.Array) -> jax.Array:
    """A residual layer."""
    return h + jax.nn.relu(h @ w)


def on_one_device(schedule: jaxfa.stacks.Schedule) -> Loss:
    """Direct feedback on a stack, by one of :func:`jaxfa.direct_stack`'s schedules."""
    return partial(_loss, partial(jaxfa.direct_stack, block, schedule=schedule))


def backprop_on_one_device(params: Any, feedback: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Backpropagation through a scan."""
    return _loss(partial(jaxfa.direct_stack, block, schedule=jaxfa.stacks.stored), params, None, x, y)


def piped(mesh: Mesh, microbatches: int, schedule: jaxfa.stacks.Schedule) -> Loss:
    """Direct feedback through :func:`jaxfa.stacks.pipeline`."""
    run = partial(stacks.pipeline, block, mesh=mesh, microbatches=microbatches, schedule=schedule)
    return partial(_loss, run)


def _loss(run: Any, params: Any, feedback: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    wire = jnp.zeros((len(x), params["head"].shape[-1]), x.dtype)
    h, wire = run(params["stack"], x, wire, feedback)
    return cross_entropy(h @ params["head"] + wire, y)


def gpipe(mesh: Mesh, microbatches: int, *, rematerialise: bool) -> Loss:
    """Backpropagation through a pipeline; rematerialised, as in the paper, a stage keeps its inputs alone."""

    def stage(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        own, stages = lax.axis_index("layer"), lax.axis_size("layer")
        parts = x.reshape(microbatches, -1, x.shape[-1])

        def run(h: jax.Array) -> jax.Array:
            return lax.scan(lambda h, w: (block(w, h), None), h, params["stack"])[0]

        run = jax.checkpoint(run) if rematerialise else run

        def tick(arrived: jax.Array, t: jax.Array) -> Any:
            end = run(jnp.where(own == 0, parts[jnp.minimum(t, microbatches - 1)], arrived))
            return lax.ppermute(end, "layer", [(s, s + 1) for s in range(stages - 1)]), end

        first = lax.pcast(parts[0], "layer", to="varying")
        _, ends = lax.scan(tick, first, jnp.arange(microbatches + stages - 1))
        logits = ends[stages - 1 :].reshape(x.shape) @ params["head"]
        return lax.psum(jnp.where(own == stages - 1, cross_entropy(logits, y), 0), "layer")

    specs = {"stack": P("layer"), "head": P()}, P(), P()
    run = jax.shard_map(stage, mesh=mesh, in_specs=specs, out_specs=P())
    return lambda params, feedback, x, y: run(params, x, y)


def arms(mesh: Mesh, microbatches: int) -> dict[str, Loss]:
    """Every pipeline, by name."""
    return {
        "backpropagation": gpipe(mesh, microbatches, rematerialise=False),
        "backpropagation, rematerialised": gpipe(mesh, microbatches, rematerialise=True),
        "direct, parallel": piped(mesh, microbatches, jaxfa.stacks.parallel),
        "direct, stream": piped(mesh, microbatches, jaxfa.stacks.stream),
    }


BASES: dict[str, Loss] = {
    "backpropagation": backprop_on_one_device,
    "direct, parallel": on_one_device(jaxfa.stacks.parallel),
    "direct, stream": on_one_device(jaxfa.stacks.stream),
}


def step_of(loss: Loss) -> Any:
    """A jitted step of SGD ``(params, feedback, x, y) -> params``."""

    def step(params: Any, feedback: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.grad(loss)(params, feedback, x, y)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    return jax.jit(step, donate_argnums=0)


def arguments(network: Network) -> Any:
    """Parameters, feedback and data, drawn."""
    shape = network.layers, network.width, network.width
    keys = iter(jax.random.split(jax.random.key(0), 5))
    # Small enough that the residual stream stays of order one at every depth.
    stack = jax.random.normal(next(keys), shape) / network.layers / network.width**0.5
    head = jax.random.normal(next(keys), (network.width, network.outputs)) / network.width
    x = jax.random.normal(next(keys), (network.examples, network.width))
    y = jax.random.randint(next(keys), (network.examples,), 0, network.outputs)
    logits = jax.ShapeDtypeStruct((network.examples, network.outputs), x.dtype)
    own = jax.random.split(next(keys), network.layers)
    feedback = jax.vmap(lambda key: jaxfa.dfa().init(key, x, logits))(own)
    return {"stack": stack, "head": head}, feedback, x, y


def shardings(mesh: Mesh) -> Any:
    """Where the arguments of a pipeline's step lie."""
    layers, all_devices = NamedSharding(mesh, P("layer")), NamedSharding(mesh, P())
    feedback = jax.tree.map(lambda _: layers, jaxfa.DirectMatrix(jnp.zeros(())))
    return {"stack": layers, "head": all_devices}, feedback, all_devices, all_devices
