"""Everything else: perceptrons, graphs, splines, agents, detectors, two towers."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.zoo.model import Model, inputs, tokens


class MLP(nnx.Module):
    """Batch norm and dropout."""

    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.fc1(x))))
        return self.head(nnx.relu(self.fc2(x)))


class KeywordMLP(nnx.Module):
    """Keyword-only arguments, layers called by keyword, and keys that the caller brings."""

    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.3)

    def __call__(self, *, x, train, rngs=None):
        x = nnx.relu(self.fc1(inputs=x))
        return self.fc2(inputs=self.dropout(x, deterministic=not train, rngs=rngs))


class WeightNormMLP(nnx.Module):
    """Each layer's weights are a direction and a length."""

    def __init__(self, rngs):
        self.fc1 = nnx.WeightNorm(nnx.Linear(6, 8, rngs=rngs), rngs=rngs)
        self.fc2 = nnx.WeightNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


class GCN(nnx.Module):
    """One graph: its nodes are the batch, and its adjacency matrix is an argument."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in ((6, 8), (8, 8))])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, nodes, adjacency):
        degrees = adjacency.sum(-1, keepdims=True)
        for layer in self.layers:
            nodes = nnx.relu(adjacency @ layer(nodes) / degrees)
        return self.head(nodes)


class MessagePassing(nnx.Module):
    """A batch of graphs as edges: messages are gathered, summed by segment and pooled."""

    def __init__(self, rngs):
        self.enter = nnx.Linear(4, 6, rngs=rngs)
        self.message, self.update = nnx.Linear(12, 6, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, nodes, senders, receivers, graph):
        x = nnx.relu(self.enter(nodes))
        messages = nnx.relu(self.message(jnp.concatenate([x[senders], x[receivers]], axis=-1)))
        inbox = jax.ops.segment_sum(messages, receivers, num_segments=len(x))
        x = x + nnx.relu(self.update(jnp.concatenate([x, inbox], axis=-1)))
        return self.head(jax.ops.segment_sum(x, graph, num_segments=3))


class Spline(nnx.Module):
    """Every edge is a learned function: a sum of bumps, and a plain weight on its activation."""

    def __init__(self, n, m, rngs, bumps=4):
        self.base = nnx.Linear(n, m, use_bias=False, rngs=rngs)
        self.grid = jnp.linspace(-2.0, 2.0, bumps)
        self.weights = nnx.Param(0.3 * jax.random.normal(rngs.params(), (n, bumps, m)))

    def __call__(self, x):
        bumps = jnp.exp(-((x[..., None] - self.grid) ** 2))
        return self.base(nnx.silu(x)) + jnp.einsum("ni,nib,ibm->nm", jnp.ones_like(x), bumps, self.weights[...])


class KAN(nnx.Module):
    """Two layers of such edges."""

    def __init__(self, rngs):
        self.layers = nnx.List([Spline(6, 5, rngs), Spline(5, 5, rngs), Spline(5, 3, rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class ActorCritic(nnx.Module):
    """A trunk, the policy's logits and the value (N,)."""

    def __init__(self, rngs):
        self.trunk = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 8, rngs=rngs), nnx.tanh)
        self.actor, self.critic = nnx.Linear(8, 3, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        h = self.trunk(x)
        return self.actor(h), self.critic(h).squeeze(-1)


class DETR(nnx.Module):
    """Learned queries read an image; a dictionary of classes and boxes comes out."""

    def __init__(self, rngs, width=8):
        self.backbone = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
        self.encoder = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (3, width)))
        self.decoder = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(width, width, rngs=rngs)
        self.classes, self.boxes = nnx.Linear(width, 4, rngs=rngs), nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, images):
        memory = nnx.relu(self.backbone(images)).reshape(len(images), 4, -1)
        memory = memory + self.encoder(memory)
        queries = jnp.broadcast_to(self.queries[...], (len(images), *self.queries.shape))
        x = queries + self.decoder(queries, memory)
        x = x + nnx.relu(self.mlp(x))
        return {"classes": self.classes(x), "boxes": nnx.sigmoid(self.boxes(x)), "count": x.shape[1]}


class Towers(nnx.Module):
    """Images and texts to unit vectors, and a temperature."""

    def __init__(self, rngs):
        self.image = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 4, rngs=rngs))
        self.words = nnx.Embed(11, 8, rngs=rngs)
        self.text = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 4, rngs=rngs))
        self.temperature = nnx.Param(jnp.zeros(()))

    def __call__(self, images, texts):
        a, b = self.image(images), self.text(self.words(texts).mean(1))

        def unit(x):
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        return unit(a) @ unit(b).T * jnp.exp(self.temperature[...])


class Autoencoder(nnx.Module):
    """Has no ``__call__``: it encodes, decodes and reconstructs."""

    def __init__(self, rngs):
        self.fc1, self.code = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.fc2, self.out = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def encode(self, x):
        """The code."""
        return self.code(nnx.relu(self.fc1(x)))

    def reconstruct(self, x):
        """The input again."""
        return self.out(nnx.relu(self.fc2(self.encode(x))))


class Recommender(nnx.Module):
    """Embedded categories, their products with each other, a perceptron, one number (N,)."""

    def __init__(self, rngs):
        self.tables = nnx.List([nnx.Embed(5, 4, rngs=rngs) for _ in range(2)])
        self.bottom = nnx.Linear(6, 4, rngs=rngs)
        self.top = nnx.Sequential(nnx.Linear(7, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 1, rngs=rngs))

    def __call__(self, numbers, categories):
        parts = [nnx.relu(self.bottom(numbers)), *(table(categories[:, i]) for i, table in enumerate(self.tables))]
        parts = jnp.stack(parts, axis=1)
        products = (parts @ parts.swapaxes(1, 2))[:, *jnp.triu_indices(3, 1)]
        return self.top(jnp.concatenate([parts[:, 0], products], axis=-1))[:, 0]


def vectors():
    """A batch of four."""
    return (inputs(4, 6),)


def graph():
    """Four nodes in a ring."""
    ring = jnp.eye(4) + jnp.roll(jnp.eye(4), 1, 0) + jnp.roll(jnp.eye(4), -1, 0)
    return inputs(4, 6), ring


def graphs():
    """Three graphs of two, three and two nodes; both ends of each edge."""
    edges = jnp.array([[0, 1, 2, 3, 4, 5, 6], [1, 0, 3, 4, 2, 6, 5]])
    return inputs(7, 4), edges[0], edges[1], jnp.array([0, 0, 1, 1, 1, 2, 2])


MODELS = (
    Model("MLP, batch norm, dropout", MLP, vectors, ("norm", "fc2")),
    Model("MLP called by keywords", KeywordMLP, tuple, ("fc1",), kwargs=lambda: {"x": inputs(4, 6), "train": False}),
    Model("MLP with weight norm", WeightNormMLP, vectors, ("fc1", "fc2")),
    Model("GCN, adjacency matrix", GCN, graph, ("layers/*",)),
    Model("message passing, a batch of graphs", MessagePassing, graphs, ("enter", "message", "update")),
    Model("KAN", KAN, vectors, ("layers/0", "layers/1")),
    Model("actor-critic", ActorCritic, vectors, ("trunk/layers/0", "trunk/layers/2")),
    Model("DETR", DETR, lambda: (inputs(4, 8, 8, 3),), ("backbone", "encoder", "queries", "decoder", "mlp")),
    Model("two towers", Towers, lambda: (inputs(4, 6), tokens(4, 3)), ("image/layers/0", "words", "text/layers/0")),
    Model("autoencoder without __call__", Autoencoder, vectors, ("fc1", "code", "fc2"), method="reconstruct"),
    Model(
        "recommender",
        Recommender,
        lambda: (inputs(4, 6), tokens(4, 2, below=5)),
        ("bottom", "tables/*", "top/layers/0"),
    ),
)
