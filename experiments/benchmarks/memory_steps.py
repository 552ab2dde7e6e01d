"""The steps that ``memory`` compares: one network each, learned in several ways."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import jaxfa
import jaxfa.nn
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Options
from experiments.common.task import cross_entropy
from experiments.models.networks import ResNet
from jaxfa.optim.optimizer import optimizer

REFERENCE, REMATERIALISED = "backpropagation", "backpropagation, rematerialised"
STORED, PARALLEL, STREAMED, FUSED = "DFA, stored", "DFA, parallel", "DFA, streamed", "DFA, streamed, updated at once"
METHODS = REFERENCE, REMATERIALISED, STORED, PARALLEL, STREAMED, FUSED
CLASSES = 10
Steps = dict[str, tuple[Any, tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """The networks, and where the results go."""

    depths: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    """Numbers of blocks at which the stack is measured."""
    timed: int = 64
    """The depth at which the stack's steps are timed, one of --depths."""
    width: int = 128
    """How many units a block of the stack has."""
    batch: int = 8192
    """How many examples a step of the stack has."""
    repeats: tuple[int, ...] = (1, 3, 5)
    """Numbers of blocks in each of a ResNet's three stages; 3 is ResNet-20."""
    timed_repeats: int = 3
    """The ResNet whose steps are timed, one of --repeats."""
    images: int = 128
    """How many images a step of the ResNet has."""
    pixels: int = 32
    """The width and height of the ResNet's images."""
    rounds: int = 9
    """How many rounds of timing there are."""
    seed: Annotated[int, FROM_ZERO] = 0
    """The seed of all that is random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, all_ in ("timed", self.depths), ("timed_repeats", self.repeats):
            if getattr(self, name) not in all_:
                raise ValueError(f"{name} must be one of {all_}, got {getattr(self, name)}.")


def stack(config: Config, depth: int) -> Steps:
    """For each method a jitted step and its arguments: residual blocks under one linear head.

    Args:
      config: a :class:`Config`.
      depth: how many blocks.
    """
    keys = jax.random.split(jax.random.key(config.seed), 4)
    n, x = config.width, jax.random.normal(keys[0], (config.batch, config.width))
    y = jax.random.randint(keys[1], (config.batch,), 0, CLASSES)
    blocks = {"w": jax.random.normal(keys[2], (depth, n, n)) / n, "b": jnp.zeros((depth, 1, n))}
    params = blocks, jax.random.normal(keys[3], (n, CLASSES)) / n
    rule = jaxfa.dfa()
    wire = jaxfa.error_wire(jax.ShapeDtypeStruct((config.batch, CLASSES), x.dtype))
    feedback = jax.vmap(rule.init, (0, None, None))(jax.random.split(keys[3], depth), x, wire)

    def gradient(run: Callable[..., Any]) -> Any:
        def loss(params: Any, feedback: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            h, wire = run(params[0], feedback, x)
            return cross_entropy(h @ params[1] + wire, y)

        return jax.jit(jax.grad(loss)), (params, feedback, x, y)

    def direct(schedule: jaxfa.stacks.Schedule) -> Any:
        return gradient(lambda blocks, b, x: jaxfa.direct_stack(_block, blocks, x, wire, b, schedule=schedule))

    def backpropagation(block: Callable[..., Any]) -> Any:
        return gradient(lambda blocks, b, x: (lax.scan(lambda h, p: (block(p, h), None), x, blocks)[0], wire))

    return {
        REFERENCE: backpropagation(_block),
        REMATERIALISED: backpropagation(jax.checkpoint(_block)),
        STORED: direct(jaxfa.stacks.stored),
        PARALLEL: direct(jaxfa.stacks.parallel),
        STREAMED: direct(jaxfa.stacks.stream),
        FUSED: _fused(rule, (blocks, feedback), params[1], x, y),
    }


def _block(p: Any, h: jax.Array) -> jax.Array:
    return h + jax.nn.relu(h @ p["w"] + p["b"])


def _fused(rule: jaxfa.Rule, both: Any, head: jax.Array, x: jax.Array, y: jax.Array) -> Any:
    tx = optimizer(optax.adam(1e-3), rule)

    def step(both: Any, state: Any, head: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        wire = jnp.zeros((len(x), CLASSES), x.dtype)
        h, wire = jaxfa.direct_stack(_block, both[0], x, wire, None, schedule=jaxfa.stacks.stream)
        dhead, e = jax.grad(lambda head, wire: cross_entropy(h @ head + wire, y), argnums=(0, 1))(head, wire)
        both, state, _ = jaxfa.update_stack(_block, both, x, e, optimizer=tx, state=state)
        return both, state, head - 1e-3 * dhead

    # A user donates what is updated; here each round needs it again.
    return jax.jit(step), (both, jax.vmap(tx.init)(both), head, x, y)


def resnet(config: Config, repeats: int) -> Steps:
    """For each method a jitted gradient and its arguments: a ResNet with blocks of three shapes, tapped block by block.

    Args:
      config: a :class:`Config`.
      repeats: the blocks of each stage.
    """
    shape = (config.pixels, config.pixels, 3)
    x, y = jnp.zeros((config.images, *shape)), jnp.zeros(config.images, int)

    def gradient(model: nnx.Module) -> Any:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params: Any, rest: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return cross_entropy(nnx.merge(graphdef, params, rest, copy=True)(x), y)

        return jax.jit(jax.grad(loss)), (params, rest, x, y)

    def direct(schedule: jaxfa.stacks.Schedule) -> Any:
        model = ResNet(shape, CLASSES, repeats=repeats, rngs=nnx.Rngs(config.seed))
        at = ("stem", "blocks/*")
        rngs = nnx.Rngs(config.seed + 1)
        return gradient(jaxfa.nn.attach(model, jaxfa.dfa(), rngs=rngs, example=x, at=at, schedule=schedule))

    return {
        REFERENCE: gradient(ResNet(shape, CLASSES, repeats=repeats, rngs=nnx.Rngs(config.seed))),
        STORED: direct(jaxfa.stacks.stored),
        STREAMED: direct(jaxfa.stacks.stream),
    }
