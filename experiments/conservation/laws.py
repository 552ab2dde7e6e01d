"""What feedback alignment conserves, followed in double precision: the law and its controls."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.common import data
from experiments.common.task import cross_entropy
from experiments.models.networks import max_pool
from jaxfa.measure.conservation import Pair, half_square, imbalance, overlap, quantity

BATCH = 50


class Case(NamedTuple):
    """One training.

    Attributes:
      holds: whether the law should.
      activation: of every hidden layer.
      rule: how the error returns.
      convolutional: whether the hidden layers are convolutions with max-pooling.
      normalised: whether batch normalisation stands before every activation.
      momentum: of the gradient descent.
      below: whether to look below the last hidden layer, where direct feedback has no matrix: for the one that fits
        best in hindsight.
    """

    holds: bool
    activation: Callable[[jax.Array], jax.Array] = nnx.relu
    rule: Callable[[], jaxfa.Rule] = jaxfa.fa
    convolutional: bool = False
    normalised: bool = False
    momentum: float | None = None
    below: bool = False


CASES = {
    "linear": Case(True, activation=jnp.positive),
    "ReLU": Case(True),
    "leaky ReLU": Case(True, activation=nnx.leaky_relu),
    "convolutions": Case(True, convolutional=True),
    "DFA, last hidden layer": Case(True, rule=jaxfa.dfa),
    "tanh": Case(False, activation=jnp.tanh),
    "momentum": Case(False, momentum=0.9),
    "batch normalisation": Case(False, normalised=True),
    "DFA, layer below": Case(False, rule=jaxfa.dfa, below=True),
}


class Network(nnx.Module):
    """Two hidden layers for images of 8 x 8 pixels."""

    def __init__(self, case: Case, *, rngs: nnx.Rngs) -> None:
        self.case = nnx.static(case)
        if case.convolutional:
            self.layers = nnx.List([nnx.Conv(n, 8, (3, 3), rngs=rngs) for n in (1, 8)])
        else:
            self.layers = nnx.List([nnx.Linear(n, 32, rngs=rngs) for n in (64, 32)])
        width = self.layers[0].bias.shape[0]
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for _ in self.layers] if case.normalised else [])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(N, 8, 8, 1)`` to logits ``(N, 10)``."""
        x = x if self.case.convolutional else x.reshape(len(x), -1)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = self.case.activation(self.norms[i](x) if self.norms else x)
            x = max_pool(x) if self.case.convolutional else x
        return self.head(x.reshape(len(x), -1))


class Followed(NamedTuple):
    """A training's history; arrays of NumPy, steps first, then the units of all pairs of layers.

    Attributes:
      drift: how far every unit's conserved quantity is from its first value.
      squares: half of all squared steps so far.
      overlap: how far its outgoing weights lie along its feedback.
      bound: what the law says the overlap does not fall below.
    """

    drift: np.ndarray
    squares: np.ndarray
    overlap: np.ndarray
    bound: np.ndarray

    @property
    def residual(self) -> np.ndarray:
        """By how much the discrete law fails, the worst unit at every step."""
        return np.abs(self.drift - self.squares).max(1)


def follow(case: Case, *, rate: float, steps: int, seed: int, aligned: bool = False, full: bool = False) -> Followed:
    """Trains on scikit-learn's digits in double precision and follows what is conserved.

    Args:
      case: what is trained.
      rate: the learning rate.
      steps: how many.
      seed: of weights, feedback and order.
      aligned: whether to start aligned, see :func:`jaxfa.nn.align`.
      full: whether every step sees the same examples, as a flow would.

    Returns:
      A :class:`Followed`.
    """
    x, y = _digits()
    order = _batches(len(x), steps, seed, full=full)
    model = _model(case, seed, x[:BATCH])
    if aligned:
        jaxfa.nn.align(model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(rate, momentum=case.momentum)

    @jax.jit
    def step(params: Any, state: Any, rest: Any, batch: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)
            value = cross_entropy(model(x[batch]), y[batch])
            return value, nnx.split(model, nnx.Param, ...)[2]

        gradient, rest = jax.grad(loss, has_aux=True)(params)
        update, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, update)
        return params, state, rest, _pairs(nnx.merge(graph, params, rest, copy=True))

    state, history = optimizer.init(params), [_pairs(model)]
    for batch in order:
        params, state, rest, pairs = step(params, state, rest, batch)
        history.append(pairs)
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *history)
    if case.below:
        return _account([(stacked[0], in_hindsight(stacked[0]))])
    links = jaxfa.nn.consecutive_layers(model)
    found = [(stacked[i], links[f"layers/{i}"].feedback) for i in range(2) if f"layers/{i}" in links]
    return _account(found)


def in_hindsight(history: Pair) -> jax.Array:
    """The feedback matrix that explains a history of steps best: where the law holds, the one that was used."""
    steps = jax.tree.map(lambda a: jnp.diff(a, axis=0), history)
    before = jax.tree.map(lambda a: a[:-1], history)
    # Without the term of the feedback, what is left of the law's imbalance is the other side of the equation.
    incoming = np.asarray(jax.vmap(imbalance)(before, steps._replace(above=jnp.zeros_like(steps.above))))
    above = np.asarray(steps.above)
    return jnp.stack([np.linalg.lstsq(above[:, j], incoming[:, j])[0] for j in range(above.shape[1])])


def _model(case: Case, seed: int, example: jax.Array) -> jaxfa.nn.Attached:
    graph, state = nnx.split(Network(case, rngs=nnx.Rngs(seed)))
    model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(example.dtype), state))
    return jaxfa.nn.attach(model, case.rule(), rngs=nnx.Rngs(seed + 1), example=example)


def _pairs(model: jaxfa.nn.Attached) -> list[Pair]:
    layers = [*model.model.layers, model.model.head]
    return [Pair(one.kernel[...], above.kernel[...], one.bias[...]) for one, above in pairwise(layers)]


def _account(found: list[tuple[Pair, Any]]) -> Followed:
    each = []
    for history, feedback in found:
        conserved, along = (jax.vmap(f, (0, None))(history, feedback) for f in (quantity, overlap))
        steps = jax.tree.map(lambda a: jnp.diff(a, axis=0), history)
        squares = jnp.cumsum(jax.vmap(half_square)(steps), 0)
        squares = jnp.concatenate([jnp.zeros_like(squares[:1]), squares])
        each.append((conserved - conserved[:1], squares, along, -conserved[:1] - squares))
    return Followed(*(np.concatenate(arrays, 1) for arrays in zip(*each, strict=True)))


def _digits() -> tuple[jax.Array, jax.Array]:
    found = data.load("digits")
    return jnp.asarray(found.train_images, float) / 8 - 1, jnp.asarray(found.train_labels)


def _batches(examples: int, steps: int, seed: int, *, full: bool) -> jax.Array:
    """Indices ``(steps, batch)`` of every step's examples."""
    if full:
        return jnp.broadcast_to(jnp.arange(BATCH), (steps, BATCH))
    epochs = -(-steps * BATCH // (examples // BATCH * BATCH))
    keys = jax.random.split(jax.random.key(seed), epochs)
    orders = [jax.random.permutation(key, examples)[: examples // BATCH * BATCH] for key in keys]
    return jnp.concatenate(orders).reshape(-1, BATCH)[:steps]
