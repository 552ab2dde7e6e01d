"""The lemma beside what happens: the bound is one, and perturbed weights see the Jacobian through patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfa
from experiments.grape import bound


@pytest.mark.long
def test_the_lemma_holds_at_every_step_and_is_empty():
    found = bound.follow(jaxfa.rules.published_grape(weights=False), bound.Config(steps=60, batch=32), 0)
    a, b, c = np.moveaxis(found["cosines"], -1, 0)
    assert (c >= a * b - np.sqrt(1 - a * a) * np.sqrt(1 - b * b) - 1e-5).all()
    assert ((a * a + b * b)[20:] < 1).all()
    assert (c[-10:] > 0.3).all()
    assert (found["bias"] < 0.9).all()


def test_what_came_of_it_is_each_layers_cosine_beside_its_guarantee():
    cosines = np.broadcast_to([[0.6, 0.8, 0.9], [1.0, 0.5, 0.5]], (2, 4, 2, 3))
    (first, said), (second, granted), (bias, _) = bound._findings(cosines, np.full((2, 4), 0.35))
    assert (first, second, bias) == ("0.90", "0.50", "0.35")
    assert said == "is the cosine of feedback and Jacobian in the first layer; the lemma grants 0.00."
    assert granted.endswith("in the second layer; the lemma grants 0.50.")


def test_what_perturbed_weights_estimate_in_expectation_is_the_mean_of_their_estimates():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((4, 8, 8, 1), (3, 3, 1, 8), (3, 3, 8, 8), (128, 10))
    x, *params = (jax.random.normal(*one) for one in zip(keys, shapes, strict=False))
    taps = [jnp.zeros((4, 8, 8, 8)), jnp.zeros((4, 4, 4, 8))]

    def estimate(key):
        p, _ = bound._moved(params[0], x, key, jax.random.normal)
        moved = jax.jvp(lambda taps: bound.above(params, x, taps), (taps,), ([p, taps[1]],))[1]
        return jnp.einsum("nhwc,no->ohwc", p, moved) / len(x)

    found = jax.lax.map(estimate, jax.random.split(keys[4], 4000)).mean(0)
    each = jax.vmap(lambda one: jax.jacrev(lambda tap: bound.above(params, one[None], [tap, 0.0])[0])(taps[0][:1]))(x)
    wanted = bound.expected(params[0], x, each[:, :, 0])
    assert jnp.linalg.norm(found - wanted) < 0.15 * jnp.linalg.norm(wanted)
    assert bound._cosine(wanted, each.mean(0)[:, 0]) < 0.8
