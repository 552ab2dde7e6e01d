"""Plain NNX models for the tests of ``jaxfa.nn``, none of which knows jaxfa, and what those tests do with them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn


class MLP(nnx.Module):
    """Three dense layers with functional activations."""

    def __init__(self, rngs, sizes=(6, 8, 8, 3)):
        self.fc1 = nnx.Linear(sizes[0], sizes[1], rngs=rngs)
        self.fc2 = nnx.Linear(sizes[1], sizes[2], rngs=rngs)
        self.fc3 = nnx.Linear(sizes[2], sizes[3], rngs=rngs)

    def __call__(self, x):
        return self.fc3(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


class ConvNet(nnx.Module):
    """Convolutions with BatchNorm and dropout."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        x = self.dropout(nnx.relu(self.conv2(x)))
        return self.head(x.reshape(x.shape[0], -1))


class Block(nnx.Module):
    """A residual block, shortcut inside."""

    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.down = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(x + self.down(nnx.relu(self.norm(self.up(x)))))


class Residual(nnx.Module):
    """A stem, a list of residual blocks, a head."""

    def __init__(self, rngs, depth=2):
        self.stem = nnx.Linear(6, 4, rngs=rngs)
        self.blocks = nnx.List([Block(4, rngs) for _ in range(depth)])
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scanned(nnx.Module):
    """The same with its blocks stacked: created by ``nnx.vmap``, run by ``nnx.scan``, rematerialised if asked."""

    def __init__(self, rngs, depth=3, remat=False):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(4, rngs)

        self.stem = nnx.Linear(6, 4, rngs=rngs)
        self.blocks = make(rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def sweep(block, x):
            return nnx.remat(lambda block, x: block(x))(block, x) if self.remat else block(x)

        return self.head(sweep(self.blocks, self.stem(x)))


class AttentionBlock(nnx.Module):
    """Norm, attention, shortcut."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, qkv_features=8, decode=False, rngs=rngs)

    def __call__(self, h):
        return h + self.attention(self.norm(h))


class Transformer(nnx.Module):
    """One attention block on embedded tokens."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.block = AttentionBlock(rngs)
        self.head = nnx.Linear(6, 11, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.block(self.embed(tokens)))


class Recurrent(nnx.Module):
    """A recurrent cell over a sequence, read out at its end."""

    def __init__(self, rngs, cell=nnx.LSTMCell):
        self.rnn = nnx.RNN(cell(6, 5, rngs=rngs))
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


class RawWeights(nnx.Module):
    """Has weights that belong to no Flax layer, between two that do."""

    def __init__(self, rngs):
        self.fc1 = nnx.Linear(6, 4, rngs=rngs)
        self.w = nnx.Param(jnp.ones((4, 4)))
        self.fc2 = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(nnx.relu(self.fc1(x)) @ self.w[...]))


BLOCKS = ("stem", "blocks/*")
TRAINED = (nnx.Param, jaxfa.nn.Feedback)
# For tests that look at gradients of the parameters and train by none.
LOOKS = pytest.mark.filterwarnings("ignore:The feedback of")


def inputs(*shape):
    return jax.random.normal(jax.random.key(5), shape)


# name: (model, inputs, where direct rules tap)
MODELS = {
    "mlp": (MLP, inputs(9, 6), None),
    "conv, batch norm, dropout": (ConvNet, inputs(9, 8, 8, 3), None),
    "residual": (Residual, inputs(9, 6), BLOCKS),
    "scanned": (Scanned, inputs(9, 6), ("stem", "blocks")),
    "scanned, rematerialised": (lambda rngs: Scanned(rngs, remat=True), inputs(9, 6), ("stem", "blocks")),
    "transformer": (Transformer, jax.random.randint(jax.random.key(6), (9, 4), 0, 11), ("embed", "block")),
    "recurrent": (Recurrent, inputs(9, 4, 6), "rnn"),
}


def attach(model, rule, x, at=None, **kwargs):
    at = at if jaxfa.base.is_direct(rule) else None
    return jaxfa.nn.attach(model, rule, rngs=nnx.Rngs(1), example=x, at=at, **kwargs)


def loss(model, x):
    logits = model(x)
    labels = jnp.arange(logits[..., 0].size).reshape(logits.shape[:-1]) % logits.shape[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def alignment(aligned, x):
    return nnx.jit(lambda aligned: jaxfa.nn.alignment(aligned, lambda model: loss(model, x)))(aligned)


@nnx.jit
def gradient(model, x):
    """The loss and its gradient in all that learns."""
    return nnx.value_and_grad(lambda model: loss(model, x), argnums=nnx.DiffState(0, TRAINED))(model)
