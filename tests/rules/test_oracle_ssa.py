"""SSA's three losses and its steps on the manifold against NumPy, in both readings of how errors arrive, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from tests.oracles import backwards, factors
from tests.oracles.networks import Network, plain
from tests.twins import NETWORKS, close, create, signals

RATE, WEIGHTS = 0.1, {"alpha": 0.7, "beta": 0.2, "gamma": 0.3}
READINGS = {"parallel": backwards.by_lift, "sequential": backwards.by_factors}
STEPS = {
    "literal": {"project": False, "retract": False},
    "along": {"project": True, "retract": False},
    "back": {"project": False, "retract": True},
    "along and back": {"project": True, "retract": True},
}
grid = pytest.mark.parametrize("kind", NETWORKS)


@jax.jit
def drifted(params):
    """Factors that have left the manifold, so that the loss of orthogonality has something to say."""
    return jax.tree.map(lambda leaf: 1.1 * leaf + 0.03 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)


def learned(reading, kind, **options):
    """The rule, a network before a step, the signals in jaxfa, and the gradients of ``L_CE`` in NumPy."""
    rule = jaxfa.ssa(parallel=reading == "parallel", **WEIGHTS, **options)
    layers, params, data, _, feedback = create(kind, rule)
    params = drifted(params)
    net = Network(layers, [plain(p) for p in params], np.asarray(data[0]), data[1])
    known = [None, *(plain(f) for f in feedback[1:])]
    grads = signals(layers, params, feedback, data)
    return rule, (params, feedback), grads, net.learn(READINGS[reading], known)[0]


def updates(rule, both, grads):
    """One step of plain gradient descent."""
    tx = jaxfa.optimizer(optax.sgd(RATE), rule)
    return jax.jit(lambda grads, both: tx.update(grads, tx.init(both), both)[0])(grads, both)


def same(got, expected):
    for name in ("u", "s", "v"):
        close(getattr(got, name), expected[name])


@grid
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("step", STEPS)
def test_ssas_losses_and_steps_are_the_equations(step, reading, kind, x64):
    rule, both, grads, cross_entropy = learned(reading, kind, **STEPS[step])
    found, still = updates(rule, both, grads)
    assert not any(leaf.any() for leaf in jax.tree.leaves(still))
    for got, p, f, g in zip(found, *both, cross_entropy, strict=True):
        w, b = plain(p["w"]), None if f is None else plain(f.b)
        d = factors.gradient(g["w"], w, b, **WEIGHTS, project=STEPS[step]["project"])
        same(got["w"], factors.step({name: -RATE * one for name, one in d.items()}, w, **STEPS[step]))
        close(got["b"], -RATE * WEIGHTS["alpha"] * g["b"])


@grid
@pytest.mark.parametrize("reading", READINGS)
def test_alignment_that_pulls_the_feedback_is_the_equations(reading, kind, x64):
    options = STEPS["literal"] | {"pull_weights": False, "pull_feedback": True}
    rule, both, grads, cross_entropy = learned(reading, kind, **options)
    found, pulled = updates(rule, both, grads)
    for got, p, g in zip(found, both[0], cross_entropy, strict=True):
        d = factors.gradient(g["w"], plain(p["w"]), None, **WEIGHTS, project=False)
        same(got["w"], {name: -RATE * one for name, one in d.items()})
    for got, p, f in zip(pulled[1:], both[0][1:], both[1][1:], strict=True):
        w, b = plain(p["w"]), plain(f.b)
        same(got.b, {name: -RATE * 2 * WEIGHTS["beta"] * (getattr(b, name) - getattr(w, name)) for name in "usv"})
