"""The noise of GrAPE's estimates: measured without bias, lowered by the perturbations' scales, averaged by Kalman."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfa
from jaxfa.rules.shared.averaging import kalman
from jaxfa.rules.shared.estimates import Estimate
from jaxfa.rules.shared.noise import random_signs
from tests.jacobians import KEY, estimates, jacobians, network, samples

# One layer moves the outputs ten times as much as the others.
LOUD = (1.0, 10.0, 1.0)


def uneven(factors=LOUD, sizes=(6, 12, 5)):
    """A linear map of the taps: the same Jacobians in all nine examples, of very different size."""
    rng = np.random.default_rng(0)
    matrices = [jnp.asarray(rng.normal(size=(n, 4)) / np.sqrt(n) * f) for n, f in zip(sizes, factors, strict=True)]

    def forward(taps):
        return sum((jnp.zeros((9, len(j))) + tap) @ j for tap, j in zip(taps, matrices, strict=True))

    nodes = [replace(network("dense")[1][0], b=jnp.zeros_like(j), own=(len(j),)) for j in matrices]
    return forward, nodes, matrices


def scaled(nodes, scales):
    return [replace(node, log_scale=jnp.log(jnp.asarray(s))) for node, s in zip(nodes, scales, strict=True)]


def relative_variances(nodes, matrices, scales):
    """Theory's, of one estimate from nine examples: signs' with amplitudes whose fourth moment is 1.25."""
    n = np.array([node.own[0] for node in nodes])
    u = np.square(scales) * np.array([np.sum(np.square(j)) for j in matrices])
    return (1.25 * n - 1 + n * (u.sum() - u) / u) / 9


def measured(found, matrices):
    squares = [np.mean(np.sum(np.square(e - j), (1, 2))) for e, j in zip(found, map(np.asarray, matrices), strict=True)]
    return np.array(squares) / np.array([np.sum(np.square(j)) for j in matrices])


def best(nodes, matrices):
    return [node.own[0] ** 0.25 / float(jnp.linalg.norm(j)) for node, j in zip(nodes, matrices, strict=True)]


def test_scales_leave_the_estimates_unbiased(x64):
    forward, nodes = network("conv")
    found = samples(forward, scaled(nodes, (0.5, 3.0)), 8000, perturbation=random_signs)
    for one, true in zip(found, jacobians(forward, nodes), strict=True):
        # Were there a bias, the mean's error would be more than its samples' spread explains.
        explained = np.var(one, 0).sum() / len(one)
        assert np.sum(np.square(one.mean(0) - true)) < 1.7 * explained
        assert np.sum(np.square(true)) > 5 * explained


def test_the_variance_of_scaled_perturbations_is_that_of_theory_and_least_at_the_best_scales(x64):
    forward, nodes, matrices = uneven()
    optimum, sizes = best(nodes, matrices), [node.own[0] for node in nodes]
    random = np.exp(np.random.default_rng(1).normal(size=3)) * optimum
    totals = []
    for scales in (optimum, np.ones(3), random):
        found = samples(forward, scaled(nodes, scales), 6000, perturbation=random_signs)
        expected = relative_variances(nodes, matrices, scales)
        np.testing.assert_allclose(measured(found, matrices), expected, rtol=0.05)
        totals.append(sum(expected))
    assert totals[0] == min(totals)
    np.testing.assert_allclose(totals[0], (sum(np.sqrt(n) for n in sizes) ** 2 + sum(sizes) / 4 - 3) / 9, rtol=1e-9)
    # The loud layer's noise, which one derivative per layer would keep apart, is what they take away.
    apart = sum(1.25 * n - 1 for n in sizes) / 9
    assert totals[0] - apart < 0.05 * (totals[1] - apart)


def test_no_scales_nearby_are_better(x64):
    _, nodes, matrices = uneven()
    optimum = jnp.log(jnp.asarray(best(nodes, matrices)))

    def total(logarithms):
        squares = jnp.array([jnp.sum(jnp.square(j)) for j in matrices])
        u, n = jnp.exp(2 * logarithms) * squares, jnp.array([float(node.own[0]) for node in nodes])
        return jnp.sum(n * jnp.sum(u) / u)

    np.testing.assert_allclose(jax.grad(total)(optimum), 0, atol=1e-10)
    curvature = np.linalg.eigvalsh(jax.hessian(total)(optimum))
    np.testing.assert_allclose(curvature[0], 0, atol=1e-10)  # all scales together are free
    assert curvature[1] > 1


def test_scaling_finds_the_best_scales(x64):
    forward, nodes, matrices = uneven()
    rule = jaxfa.grape(scaling=0.05)
    shapes = [jax.ShapeDtypeStruct((9, *node.own), jnp.float64) for node in nodes]
    start = [rule.init(KEY, h, jax.ShapeDtypeStruct((9, 4), jnp.float64)) for h in shapes]

    def step(feedback, key):
        feedback = rule.refine(forward, feedback, key)
        return feedback, jnp.stack([node.log_scale for node in feedback])

    _, course = jax.jit(lambda keys: lax.scan(step, start, keys))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(course.sum(1), 0, atol=1e-10)
    logarithms = np.log(best(nodes, matrices))
    np.testing.assert_allclose(course[1000:].mean(0), logarithms - logarithms.mean(), atol=0.1)


@pytest.mark.parametrize("perturbation", [jax.random.normal, random_signs])
def test_the_noise_is_measured_without_bias(perturbation, x64):
    forward, nodes, matrices = uneven(factors=(1.0, 3.0, 2.0))
    scales = (0.5, 1.0, 2.0)
    found = samples(forward, scaled(nodes, scales), 16000, perturbation=perturbation, of=estimates)
    expected = [s**2 * np.sum(np.square(j)) for s, j in zip(scales, matrices, strict=True)]
    for one, j, part in zip(found, matrices, expected, strict=True):
        variance = np.mean(np.sum(np.square(one.jacobian - np.asarray(j)), (1, 2)))
        np.testing.assert_allclose(one.variance.mean(), variance, rtol=0.03)
        np.testing.assert_allclose(one.part.mean(), part, rtol=0.05, atol=0.03 * sum(expected))
        np.testing.assert_allclose(one.whole.mean(), sum(expected), rtol=0.05)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_a_layers_part_is_of_each_examples_own_jacobian(name, x64):
    forward, nodes = network(name)
    full = jax.jacrev(forward)([jnp.zeros((9, *node.own)) for node in nodes])
    found = samples(forward, scaled(nodes, (1.0, 2.0)), 16000, perturbation=random_signs, of=estimates)
    squares = [np.sum(np.square(np.einsum("bob...->bo...", np.asarray(j)))) / 9 for j in full]
    whole = squares[0] + 4 * squares[1]
    for one, part in zip(found, (squares[0], 4 * squares[1]), strict=True):
        np.testing.assert_allclose(one.part.mean(), part, rtol=0.05, atol=0.03 * whole)
        np.testing.assert_allclose(one.whole.mean(), whole, rtol=0.05)


class Walk(NamedTuple):
    """A random walk seen through noise whose variance changes, and what a textbook's filter makes of it."""

    seen: np.ndarray
    noise: np.ndarray
    means: np.ndarray
    variances: np.ndarray


def walk(drift, dimensions=4000, steps=60):
    rng = np.random.default_rng(0)
    x, p, mean = rng.normal(size=dimensions), None, None
    seen, noise, means, variances = [], [], [], []
    for _ in range(steps):
        r = 0.5 + rng.uniform() * 4
        z = x + rng.normal(size=dimensions) * np.sqrt(r)
        if p is None:
            mean, p = z, r
        else:
            p = p + drift**2 * max(np.mean(np.square(mean)) - p, 0)
            k = p / (p + r)
            mean, p = mean + k * (z - mean), (1 - k) * p
        for line, value in zip((seen, noise, means, variances), (z, r, mean, p), strict=True):
            line.append(value)
        x = x + drift * np.linalg.norm(x) / np.sqrt(dimensions) * rng.normal(size=dimensions)
    return Walk(*map(np.stack, (seen, noise, means, variances)))


@pytest.mark.parametrize("drift", [0.0, 0.1, 0.5])
def test_the_weights_are_a_textbooks_kalman_filters(drift, x64):
    course, count = walk(drift), 4000

    def step(carry, observed):
        mean, precision = carry
        weight, precision = kalman(drift)(mean, precision, Estimate(observed[0], observed[1] * count, None, None))
        mean = (1 - weight) * mean + weight * observed[0]
        return (mean, precision), (mean, precision, weight)

    _, (means, precisions, weights) = lax.scan(step, (jnp.zeros(count), jnp.zeros(())), (course.seen, course.noise))
    np.testing.assert_allclose(means, course.means, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(1 / precisions, course.variances * count, rtol=1e-9)
    assert weights[0] == 1
    if drift == 0:  # an ordinary mean, weighted by the inverse of the noise
        np.testing.assert_allclose(weights, (1 / course.noise) / np.cumsum(1 / course.noise), rtol=1e-9)


def test_the_filters_mean_is_nearer_the_walk_than_constant_weights(x64):
    # In layers of different noise no one weight is good for all; the filter has each layer's own.
    drift, rng, dimensions, steps = 0.1, np.random.default_rng(0), 2000, 300
    noise = np.array([0.1, 10.0, 1000.0])
    x = rng.normal(size=(3, dimensions))
    weights = {name: [np.zeros((3, dimensions)), np.zeros(3), []] for name in ("kalman", 0.5, 0.1, 0.02)}
    for step in range(steps):
        z = x + rng.normal(size=x.shape) * np.sqrt(noise)[:, None]
        for name, state in weights.items():
            if name == "kalman":
                found = [
                    kalman(drift)(m, p, Estimate(one, r * dimensions, None, None))
                    for m, p, one, r in zip(state[0], state[1], z, noise, strict=True)
                ]
                weight, state[1] = (np.array(line) for line in zip(*found, strict=True))
            else:
                weight = np.full(3, max(name, 1 / (step + 1)))
            state[0] = state[0] + weight[:, None] * (z - state[0])
            state[2].append(np.linalg.norm(state[0] - x, axis=1) / np.linalg.norm(x, axis=1))
        x = x + drift * rng.normal(size=x.shape) * np.sqrt(np.mean(np.square(x), 1, keepdims=True))
    errors = {name: np.mean(state[2], 0) for name, state in weights.items()}
    ours = errors.pop("kalman")
    assert all(np.all(ours < 1.05 * other) for other in errors.values())
    assert all(np.any(ours < 0.8 * other) for other in errors.values())


def test_what_is_watched_is_the_cosine_with_the_jacobian(x64):
    forward, nodes = network("conv")
    true = jacobians(forward, nodes)
    # Halfway between the Jacobian and a random direction; the feedback does not move.
    drawn = [np.random.default_rng(i).normal(size=j.shape) for i, j in enumerate(true)]
    b = [j / np.linalg.norm(j) + d / np.linalg.norm(d) for j, d in zip(true, drawn, strict=True)]
    start = [replace(node, b=jnp.asarray(one), watched=jnp.zeros(2)) for node, one in zip(nodes, b, strict=True)]
    rule = jaxfa.grape(learning_rate=0.0, column_norm=False, scaling=0.0, watch=True)

    def step(feedback, key):
        feedback = rule.refine(forward, feedback, key)
        return feedback, [node.watched for node in feedback]

    _, found = jax.jit(lambda keys: lax.scan(step, start, keys))(jax.random.split(KEY, 4000))
    for watched, one, j in zip(found, b, true, strict=True):
        overlap, square = np.asarray(watched)[200:].mean(0)
        cosine = np.vdot(one, j) / (np.linalg.norm(one) * np.linalg.norm(j))
        np.testing.assert_allclose(overlap / np.sqrt(square), cosine, rtol=0.1)


def test_a_network_that_nothing_moves_teaches_the_filter_nothing():
    start = (jnp.ones(3), jnp.asarray(2.0))
    weight, precision = kalman()(*start, Estimate(jnp.zeros(3), jnp.zeros(()), None, None))
    assert precision == 0
    weight, precision = kalman()(jnp.zeros(3), precision, Estimate(jnp.ones(3), jnp.asarray(4.0), None, None))
    assert (weight, precision) == (1, 0.25)
    rule = jaxfa.grape(averaging=kalman())
    feedback = [rule.init(KEY, jnp.ones((5, 3)), jnp.ones((5, 2)))]
    dead = partial(rule.refine, lambda taps: (jnp.ones((5, 3)) + taps[0]) @ jnp.zeros((3, 2)))
    (after,) = jax.jit(dead)(feedback, KEY)
    np.testing.assert_allclose(after.b, feedback[0].b, rtol=1e-6)
    assert after.log_scale == 0


def test_a_batch_of_one_example_tells_no_noise():
    rule = jaxfa.grape(averaging=kalman())
    feedback = [rule.init(KEY, jnp.ones((1, 3)), jnp.ones((1, 2)))]
    with pytest.raises(ValueError, match="two examples or more"):
        rule.refine(lambda taps: (jnp.ones((1, 3)) + taps[0]) @ jnp.ones((3, 2)), feedback, KEY)


def test_an_empty_batch_tells_nothing():
    rule = jaxfa.grape()
    feedback = [rule.init(KEY, jnp.ones((1, 3)), jnp.ones((1, 2)))]
    with pytest.raises(ValueError, match=r"one example or more, got logits \(0, 2\)"):
        rule.refine(lambda taps: (jnp.ones((0, 3)) + taps[0]) @ jnp.ones((3, 2)), feedback, KEY)


def test_what_can_not_be_is_refused():
    with pytest.raises(ValueError, match="scaling must be from 0 to 1"):
        jaxfa.grape(scaling=-0.1)
    with pytest.raises(ValueError, match="give scaling"):
        jaxfa.fdfa(scaling=0.1, separate=True)
    with pytest.raises(ValueError, match="drift must be from 0"):
        kalman(-1.0)
