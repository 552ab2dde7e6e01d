"""A streamed model of unequal layers, dense or convolutional, against the equations in NumPy, float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.nn import initializers

import jaxfa
import jaxfa.nn
from tests.networks import TRAINED
from tests.oracles import backwards
from tests.oracles.networks import Dense, Network
from tests.twins import CLASSES, IMAGES, NETWORKS, close

RULES = {
    "dfa": (jaxfa.dfa(), backwards.dfa),
    "dkp": (jaxfa.dkp(distribution=initializers.normal()), backwards.dkp),
}


class Block(nnx.Module):
    """A dense layer or a convolution, then tanh."""

    def __init__(self, layer, shape, rngs):
        *window, n, m = shape
        options = {"bias_init": nnx.initializers.normal(), "param_dtype": float, "rngs": rngs}
        dense = isinstance(layer, Dense)
        self.layer = (
            nnx.Linear(n, m, **options) if dense else nnx.Conv(n, m, tuple(window), strides=layer.stride, **options)
        )
        self.flat = dense

    def __call__(self, x):
        return jnp.tanh(self.layer(x.reshape(len(x), -1) if self.flat else x))


class Model(nnx.Module):
    """Blocks, and a head."""

    def __init__(self, layers, shapes, rngs):
        self.blocks = nnx.List([Block(*one, rngs) for one in zip(layers[:-1], shapes[:-1], strict=True)])
        self.head = nnx.Linear(*shapes[-1], param_dtype=float, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def parts(model):
    """Parameters, or their gradients, of one layer after the other."""
    every = [*(model.blocks[i].layer for i in range(len(model.blocks))), model.head]
    return [{"w": np.asarray(one.kernel[...]), "b": np.asarray(one.bias[...])} for one in every]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", RULES)
def test_a_streamed_model_learns_by_the_equations(name, kind, x64):
    (rule, reference), (layers, (inputs, *shapes)) = RULES[name], NETWORKS[kind]
    rng = np.random.default_rng(3)
    x, labels = rng.normal(size=(IMAGES, *inputs)), rng.integers(CLASSES, size=IMAGES)
    model = Model(layers, shapes, nnx.Rngs(0))
    options = {"at": "blocks/*", "schedule": jaxfa.stacks.stream}
    streamed = jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=x, **options)

    @nnx.jit
    def gradient(model, x):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        return nnx.grad(loss, argnums=nnx.DiffState(0, TRAINED))(model)

    matrices = [np.asarray(b) for b in jax.tree.leaves(nnx.state(streamed, jaxfa.nn.Feedback))]
    net = Network(layers, parts(model), x, labels)
    grads, slots = net.learn(reference, [None, *(SimpleNamespace(b=b) for b in matrices)])
    got = gradient(streamed, x)
    for expected, found in zip(grads, parts(got["model"]), strict=True):
        jax.tree.map(close, found, expected)
    signals = jax.tree.leaves(nnx.filter_state(got, jaxfa.nn.Feedback))
    for expected, found in zip(slots, signals, strict=True):
        close(found, expected["b"].reshape(found.shape) if expected else 0)
