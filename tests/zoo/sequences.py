"""Models over time: recurrent, state space, spiking, convolutional; each loop by Flax, by JAX and by Python."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Model, inputs


class Recurrent(nnx.Module):
    """Flax's own loop: an LSTM in both directions, then a GRU."""

    def __init__(self, rngs):
        dtype = {"param_dtype": jnp.zeros(()).dtype}  # Flax's cells make their first state of this
        forward, backward = (nnx.RNN(nnx.OptimizedLSTMCell(6, 4, **dtype, rngs=rngs)) for _ in range(2))
        self.both = nnx.Bidirectional(forward, backward)
        self.gru = nnx.RNN(nnx.GRUCell(8, 5, **dtype, rngs=rngs))
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.gru(self.both(x))[:, -1])


class Elman(nnx.Module):
    """A recurrent network by hand, in Python."""

    def __init__(self, rngs):
        self.enter = nnx.Linear(6, 5, rngs=rngs)
        self.recur = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def step(self, h, x):
        """The next state."""
        return jnp.tanh(self.enter(x) + self.recur(h))

    def __call__(self, x):
        h = jnp.zeros((len(x), 5), x.dtype)
        for t in range(x.shape[1]):
            h = self.step(h, x[:, t])
        return self.head(h)


class ScannedElman(Elman):
    """The same with ``jax.lax.scan`` over a step that closes over the module."""

    def __call__(self, x):
        def step(h, x):
            return (self.step(h, x), None)

        return self.head(jax.lax.scan(step, jnp.zeros((len(x), 5), x.dtype), x.swapaxes(0, 1))[0])


class FlaxScannedElman(Elman):
    """The same with ``nnx.scan``, to which the module is broadcast."""

    def __call__(self, x):
        @nnx.scan(in_axes=(None, nnx.Carry, 1), out_axes=nnx.Carry)
        def sweep(cell, h, x):
            return cell.step(h, x)

        return self.head(sweep(self, jnp.zeros((len(x), 5), x.dtype), x))


class Mamba(nnx.Module):
    """A gated block: causal depthwise convolution, then a scan whose steps depend on the data."""

    def __init__(self, width, rngs, inner=6, states=3):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.enter = nnx.Linear(width, 2 * inner, use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(inner, inner, (3,), padding="CAUSAL", feature_group_count=inner, rngs=rngs)
        self.select = nnx.Linear(inner, 1 + 2 * states, use_bias=False, rngs=rngs)
        self.step = nnx.Linear(1, inner, rngs=rngs)
        self.log_a = nnx.Param(jnp.log(jnp.tile(jnp.arange(1.0, states + 1), (inner, 1))))
        self.skip = nnx.Param(jnp.ones(inner))
        self.leave = nnx.Linear(inner, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        h, gate = jnp.split(self.enter(self.norm(x)), 2, axis=-1)
        h = nnx.silu(self.conv(h))
        states = self.log_a.shape[1]
        step, b, c = jnp.split(self.select(h), [1, 1 + states], axis=-1)
        step = nnx.softplus(self.step(step))[..., None]
        decay, entry = jnp.exp(-step * jnp.exp(self.log_a[...])), step * b[..., None, :] * h[..., None]

        def join(one, two):
            return (one[0] * two[0], two[0] * one[1] + two[1])

        _, state = jax.lax.associative_scan(join, (decay, entry), axis=1)
        y = (state * c[..., None, :]).sum(-1) + self.skip * h
        return x + self.leave(y * nnx.silu(gate))


class StateSpace(nnx.Module):
    """Two such blocks on a residual stream."""

    def __init__(self, rngs, width=5):
        self.enter = nnx.Linear(6, width, rngs=rngs)
        self.blocks = nnx.List([Mamba(width, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@jax.custom_jvp
def spike(v):
    """One above the threshold; a smooth stand-in is differentiated."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    return spike(*primals), tangents[0] / (1 + 4 * jnp.abs(primals[0])) ** 2


class Spiking(nnx.Module):
    """Two layers of leaky neurons over time, time axis first; the readout integrates. The loop is Python's."""

    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.readout = nnx.Linear(8, 3, rngs=rngs)

    def step(self, state, x):
        """One tick: the next potentials and the readout."""
        v1, v2, out = state
        v1 = 0.9 * v1 + self.fc1(x)
        s1 = spike(v1 - 0.5)
        v2 = 0.9 * v2 + self.fc2(s1)
        s2 = spike(v2 - 0.5)
        return v1 - s1, v2 - s2, out + self.readout(s2)

    def rest(self, x):
        """Potentials at rest."""
        return tuple(jnp.zeros((x.shape[1], n), x.dtype) for n in (8, 8, 3))

    def __call__(self, x):
        return functools.reduce(self.step, x, self.rest(x))[-1]


class ScannedSpiking(Spiking):
    """The same with ``jax.lax.scan`` closing over the module."""

    def __call__(self, x):
        return jax.lax.scan(lambda state, x: (self.step(state, x), None), self.rest(x), x)[0][-1]


class Flow(nnx.Module):
    """A differential equation by Euler's steps, in Python."""

    def __init__(self, rngs):
        self.enter, self.head = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def velocity(self, t, x):
        """How fast the state moves."""
        time = jnp.broadcast_to(jnp.asarray(t, x.dtype), (*x.shape[:-1], 1))
        return self.fc2(nnx.tanh(self.fc1(jnp.concatenate([x, time], axis=-1))))

    def solve(self, x):
        """The state at the end."""
        for i in range(3):
            x = x + self.velocity(i / 3, x) / 3
        return x

    def __call__(self, x):
        return self.head(self.solve(self.enter(x)))


class LoopedFlow(Flow):
    """The same with ``jax.lax.fori_loop``."""

    def solve(self, x):
        """The state at the end."""
        return jax.lax.fori_loop(0, 3, lambda i, x: x + self.velocity(i / 3, x) / 3, x)


class Causal(nnx.Module):
    """Dilated causal convolutions with normalised weights and shortcuts."""

    def __init__(self, rngs, width=5):
        def conv(n, d):
            return nnx.Conv(n, width, (2,), kernel_dilation=d, padding="CAUSAL", rngs=rngs)

        self.enter = nnx.Linear(6, width, rngs=rngs)
        self.convs = nnx.List([nnx.WeightNorm(conv(width, 2**i), rngs=rngs) for i in range(2)])
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        x = self.enter(x)
        for conv in self.convs:
            x = x + nnx.relu(conv(x))
        return self.head(x)


def series():
    """A batch of four series of five vectors."""
    return (inputs(4, 5, 6),)


def ticks():
    """The same with the time axis first."""
    return (inputs(5, 4, 6),)


def vectors():
    """A batch of four."""
    return (inputs(4, 6),)


CELL, LAYERS = ("enter", "recur"), ("fc1", "fc2")
MODELS = (
    Model("LSTM and GRU, nnx.RNN", Recurrent, series, ("both", "gru")),
    Model("RNN, lax.scan over a closure", ScannedElman, series, CELL, reference=(Elman, CELL)),
    Model("RNN, nnx.scan over a broadcast module", FlaxScannedElman, series, CELL, reference=(Elman, CELL)),
    Model("Mamba", StateSpace, series, ("enter", "blocks/*", "norm")),
    Model("spiking, lax.scan", ScannedSpiking, ticks, LAYERS, reference=(Spiking, LAYERS)),
    Model("neural ODE, fori_loop", LoopedFlow, vectors, ("enter", *LAYERS), reference=(Flow, ("enter", *LAYERS))),
    Model("TCN with weight norm", Causal, series, ("enter", "convs/*")),
)
