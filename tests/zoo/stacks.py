"""Blocks in every functional form that people run them in; each equals a Python loop."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Model, inputs

DEPTH = 3


class Block(nnx.Module):
    """A residual block."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.up, self.down = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(self.norm(x))))


class Loop(nnx.Module):
    """The reference: a list of blocks."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(6, 5, rngs=rngs)
        self.blocks = self.make(rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def make(self, rngs):
        """The blocks."""
        return nnx.List([Block(rngs) for _ in range(DEPTH)])

    def run(self, x):
        """Through all of them."""
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x):
        return self.head(self.run(self.stem(x)))


class Rematerialised(Loop):
    """``nnx.remat`` around each block."""

    def run(self, x):
        """Through all of them."""
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


class Checkpointed(Loop):
    """``jax.checkpoint`` of a function of the block's split state."""

    def run(self, x):
        """Through all of them."""
        for block in self.blocks:
            graphdef, state = nnx.split(block)
            x = jax.checkpoint(lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x))(state, x)
        return x


class Closed(Loop):
    """``jax.checkpoint`` of a function that closes over the block."""

    def run(self, x):
        """Through all of them."""
        for block in self.blocks:
            x = jax.checkpoint(lambda x, block=block: block(x))(x)
        return x


class Jitted(Loop):
    """``jax.jit`` of a function of the block's split state."""

    def run(self, x):
        """Through all of them."""
        step = jax.jit(lambda graphdef, state, x: nnx.merge(graphdef, state)(x), static_argnums=0)
        for block in self.blocks:
            x = step(*nnx.split(block), x)
        return x


class Cloned(Loop):
    """``nnx.clone`` of each block."""

    def run(self, x):
        """Through all of them."""
        for block in self.blocks:
            x = nnx.clone(block)(x)
        return x


class Stacked(Loop):
    """Made by ``nnx.vmap``, run by ``nnx.scan``."""

    def make(self, rngs):
        """The blocks, on a leading axis."""
        return nnx.vmap(Block, in_axes=0)(rngs.split(DEPTH))

    def run(self, x):
        """Through all of them."""
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


class StackedRematerialised(Stacked):
    """The same with ``nnx.remat`` around each block."""

    def run(self, x):
        """Through all of them."""
        one = nnx.remat(lambda block, x: block(x))
        return nnx.scan(one, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


class StackedSplit(Stacked):
    """The stack's state by ``jax.lax.scan`` and ``nnx.merge``."""

    def run(self, x):
        """Through all of them."""
        graphdef, state = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), x, state)[0]


class Shared(Loop):
    """One block, used again and again, in Python."""

    def make(self, rngs):
        """The block."""
        return Block(rngs)

    def run(self, x):
        """Through it, again and again."""
        for _ in range(DEPTH):
            x = self.blocks(x)
        return x


class ScannedShared(Shared):
    """The same with ``nnx.scan``, to which the block is broadcast."""

    def run(self, x):
        """Through it, again and again."""
        sweep = nnx.scan(lambda block, x: block(x), in_axes=(None, nnx.Carry), out_axes=nnx.Carry, length=DEPTH)
        return sweep(self.blocks, x)


class Ensemble(nnx.Module):
    """Members side by side, made and run by ``nnx.vmap``; their mean is read."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(6, 5, rngs=rngs)
        self.blocks = nnx.vmap(Block, in_axes=0)(rngs.split(DEPTH))
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        members = nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.blocks, self.stem(x))
        return self.head(members.mean(0))


class ListedEnsemble(Ensemble):
    """The reference: a list of members."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])

    def __call__(self, x):
        x = self.stem(x)
        return self.head(sum(block(x) for block in self.blocks) / DEPTH)


class Frames(nnx.Module):
    """The same perceptron on every frame, in Python; the classifier sees their mean."""

    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def frame(self, x):
        """Features of one frame (N, n)."""
        return nnx.relu(self.fc2(nnx.relu(self.fc1(x))))

    def frames(self, x):
        """Features of all of them, along axis 1."""
        return jnp.stack([self.frame(x[:, t]) for t in range(x.shape[1])], axis=1)

    def __call__(self, x):
        return self.head(self.frames(x).mean(1))


class VmappedFrames(Frames):
    """The same with ``jax.vmap`` over time."""

    def frames(self, x):
        """Features of all frames."""
        return jax.vmap(self.frame, in_axes=1, out_axes=1)(x)


class FlaxVmappedFrames(Frames):
    """The same with ``nnx.vmap`` over time, to which the module is broadcast."""

    def frames(self, x):
        """Features of all frames."""
        return nnx.vmap(lambda model, x: model.frame(x), in_axes=(None, 1), out_axes=1)(self, x)


class MappedFrames(Frames):
    """The same with ``jax.lax.map``."""

    def frames(self, x):
        """Features of all frames."""
        return jax.lax.map(self.frame, x.swapaxes(0, 1)).swapaxes(0, 1)


def vectors():
    """A batch of four."""
    return (inputs(4, 6),)


def series():
    """A batch of four series of five vectors."""
    return (inputs(4, 5, 6),)


BLOCKS, STACK, FRAME = ("stem", "blocks/*"), ("stem", "blocks"), ("fc1", "fc2")
MODELS = (
    Model("nnx.remat", Rematerialised, vectors, BLOCKS, reference=(Loop, BLOCKS)),
    Model("jax.checkpoint of split state", Checkpointed, vectors, BLOCKS, reference=(Loop, BLOCKS)),
    Model("jax.checkpoint of a closure", Closed, vectors, BLOCKS, reference=(Loop, BLOCKS)),
    Model("jax.jit of split state", Jitted, vectors, BLOCKS, reference=(Loop, BLOCKS)),
    Model("nnx.clone", Cloned, vectors, BLOCKS, reference=(Loop, BLOCKS)),
    Model("stack by nnx.scan", Stacked, vectors, STACK, reference=(Loop, BLOCKS)),
    Model("stack by nnx.scan of nnx.remat", StackedRematerialised, vectors, STACK, reference=(Loop, BLOCKS)),
    Model("stack by lax.scan of split state", StackedSplit, vectors, STACK, reference=(Loop, BLOCKS)),
    Model("shared block by nnx.scan", ScannedShared, vectors, STACK, reference=(Shared, STACK)),
    Model("ensemble by nnx.vmap", Ensemble, vectors, STACK, reference=(ListedEnsemble, BLOCKS)),
    Model("frames, jax.vmap", VmappedFrames, series, FRAME, reference=(Frames, FRAME)),
    Model("frames, nnx.vmap", FlaxVmappedFrames, series, FRAME, reference=(Frames, FRAME)),
    Model("frames, lax.map", MappedFrames, series, FRAME, reference=(Frames, FRAME)),
)
