"""The paper's own perturbation on Flax models: weights, wherever they are fewer than what they move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from jaxfa.nn.taps.tap import taps_of
from tests.networks import Scanned, attach, inputs

BATCH, SIDE, CLASSES = 6, 6, 3
RULE = jaxfa.rules.published_grape(learning_rate=0.02)


class Net(nnx.Module):
    """Two convolutions and a linear layer: the first kernel and bias, 57 numbers, are fewer than a map of 108."""

    def __init__(self, rngs):
        self.first = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.second = nnx.Conv(3, 5, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(45, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.above(nnx.relu(self.first(x)))

    def above(self, h):
        return self.head(nnx.relu(self.second(h)).reshape(len(h), -1))


class Twice(nnx.Module):
    """A block that is called twice."""

    def __init__(self, rngs):
        self.block, self.head = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.block(nnx.relu(self.block(x)))))


def images(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, SIDE, SIDE, 2)), jnp.float32)


def moved(model, x, noise):
    """What a rule is told of a model's weights."""
    told = {}

    def refine(forward, feedback, key):
        told.update(forward.moved(key, noise))
        return feedback

    spy = jaxfa.DirectRule(jaxfa.dfa().init, refine)
    attach(model, spy, x).refine(jax.random.key(0), x)
    return told


def test_weights_are_perturbed_where_they_are_fewer_and_by_themselves_alone():
    model, x = Net(nnx.Rngs(0)), images()
    bias = jnp.asarray([0.3, -0.2, 0.1])

    def noise(key, shape, dtype):  # one for all weights that are perturbed, bias first
        return jnp.concatenate([bias.astype(dtype), jnp.ones(shape[0] - 3, dtype)])

    found = moved(model, x, noise)
    assert found.pop("head") is None  # the second kernel and its bias, 140, are more than a map of 45
    (first,) = found.values()
    before = model.first(x)
    expected = (before > 0) * (jaxfa.conv(x, jnp.ones((3, 3, 2, 3))) + bias[None, None, None])
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-5)


class Tokens(nnx.Module):
    """Dense layers on every token, with logits for each token or for all."""

    def __init__(self, rngs, each):
        self.first, self.second = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 5, rngs=rngs)
        self.head, self.each = nnx.Linear(5, CLASSES, rngs=rngs), each

    def __call__(self, x):
        h = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.head(h if self.each else h.mean(1))


def test_tokens_with_logits_of_their_own_are_examples_whose_entries_do_not_add_up():
    # 16 and 25 weights are fewer than eight tokens' 32 and 40 entries, and more than the 4 and 5 of one.
    x = inputs(6, 8, 3)
    assert all(one is None for one in moved(Tokens(nnx.Rngs(0), each=True), x, jax.random.normal).values())
    found = moved(Tokens(nnx.Rngs(0), each=False), x, jax.random.normal)
    assert found["second"].shape == (6, 8, 4)
    assert found["head"] is None  # after the mean, five entries


def test_its_mean_is_the_jacobian_smoothed_by_the_patches_and_not_the_jacobian():
    # E y' (x) p = J P P^T, where P, the derivative of h in the first layer's weights, makes the movement p of noise.
    model, x = Net(nnx.Rngs(0)), images()
    aligned = attach(model, RULE, x)
    refine = nnx.jit(lambda aligned, key: aligned.refine(key, x))
    for key in jax.random.split(jax.random.key(0), 1500):
        refine(aligned, key)
    (b,) = (tap.b for path, tap in feedback_of(aligned).items() if path == "second")
    graph, weights = nnx.split(model.first)
    j = np.asarray(jax.vmap(jax.jacrev(lambda h: model.above(h[None])[0]))(nnx.relu(model.first(x))))
    p = jax.jacrev(lambda weights: nnx.relu(nnx.merge(graph, weights)(x)))(weights)
    p = np.concatenate([np.asarray(leaf).reshape(BATCH, SIDE * SIDE * 3, -1) for leaf in jax.tree.leaves(p)], -1)
    j = j.reshape(BATCH, CLASSES, -1)
    smoothed = np.einsum("bcn,bnk,bmk->mc", j, p, p) / BATCH
    true = j.mean(0).T
    found = np.asarray(b).reshape(-1, CLASSES)
    assert jaxfa.diagnostics.angle(found, smoothed) < 20
    assert jaxfa.diagnostics.angle(found, true) > 35


def feedback_of(aligned):
    return {path: tap.feedback.get_value() for path, tap in taps_of(aligned.model).items()}


def test_every_feedback_turns_and_parameters_statistics_and_keys_stay():
    class Noisy(Net):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.above(self.dropout(nnx.relu(self.norm(self.first(x)))))

    x = images()
    aligned = attach(Noisy(nnx.Rngs(0)), RULE, x)
    rest = nnx.Any(nnx.Param, nnx.BatchStat, nnx.RngCount)
    kept = jax.tree.map(jnp.copy, nnx.state(aligned, rest))
    before = feedback_of(aligned)
    aligned.refine(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(aligned, rest), kept)
    for path, after in feedback_of(aligned).items():
        assert np.abs(after.b - before[path].b).max() > 0


def test_what_tells_no_weights_is_refused():
    x = inputs(4, 6)
    stacked = attach(Scanned(nnx.Rngs(0)), RULE, x, ("stem", "blocks"))
    with pytest.raises(ValueError, match=r"calls 'blocks' several times, or inside a transformation.*weights=False"):
        stacked.refine(jax.random.key(0), x)
    twice = attach(Twice(nnx.Rngs(0)), RULE, x, ("block",))
    with pytest.raises(ValueError, match=r"calls 'block' several times"):
        twice.refine(jax.random.key(0), x)
    h, w = jnp.ones((4, 3)), jnp.eye(3, 2)
    feedback = [RULE.init(jax.random.key(0), h, jnp.ones((4, 2)))]
    with pytest.raises(ValueError, match=r"The rule perturbs weights, which forward\(taps\) does not tell"):
        RULE.refine(lambda taps: (h + taps[0]) @ w, feedback, jax.random.key(0))
