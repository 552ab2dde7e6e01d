"""GrAPE and FDFA: one pass estimates every layer's Jacobian without bias and with theory's variance; ``B`` follows."""

import itertools
import math
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfa
from jaxfa.jaxprs.versions import equations, opened
from jaxfa.rules.shared.estimates import jacobian_estimates
from jaxfa.rules.shared.jacobian import JacobianFeedback
from jaxfa.rules.shared.noise import noise_of, random_signs
from tests.jacobians import KEY, estimate, jacobians, literal, network, samples


def refined(rule, forward, feedback):
    return jax.jit(lambda feedback: rule.refine(forward, feedback, KEY))(feedback)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_one_pass_is_unbiased_for_every_layer_and_its_error_falls_as_the_root_of_the_samples(name, x64):
    forward, nodes = network(name)
    found = samples(forward, nodes, 16000)
    for estimates, true in zip(found, jacobians(forward, nodes), strict=True):
        errors = [
            np.sqrt(np.mean(np.sum(np.square(estimates.reshape(-1, count, true.size).mean(1) - true.ravel()), -1)))
            for count in (10, 160)
        ]
        np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.1)
        assert np.linalg.norm(estimates.mean(0) - true) < 0.12 * np.linalg.norm(true)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("keys", ["one", "own"])
@pytest.mark.parametrize("perturbation", [random_signs, jax.random.normal], ids=("signs", "normal"))
def test_networks_side_by_side_estimate_what_each_does_alone(perturbation, keys, impl):
    # Some generators draw other numbers for many keys at once: what is drawn again must be what was drawn.
    rule, scales = jaxfa.grape(averaging=0.9, perturbation=perturbation), jnp.array([1.0, 2.0, 3.0])
    feedback = [rule.init(KEY, jnp.ones((64, 4)), jnp.ones((64, 3)))]
    j = jnp.arange(12.0).reshape(4, 3) / 12

    def mean(key, scale):
        return rule.refine(lambda taps: scale * (jnp.zeros((64, 4)) + taps[0]) @ j, feedback, key)[0].mean

    key = jax.random.key(0, impl=impl)
    if keys == "one":
        found = jax.vmap(mean, (None, 0))(key, scales)
        want = jnp.stack([mean(key, scale) for scale in scales])
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    else:
        found = jax.vmap(mean)(jax.random.split(key, 3), scales)
    truth = jnp.stack([scale * j for scale in scales])
    cosines = jnp.einsum("sij,sij->s", found, truth) / jnp.sqrt((found**2).sum((1, 2)) * (truth**2).sum((1, 2)))
    assert float(cosines.min()) > 0.8


def test_the_noise_of_one_layer_alone_is_in_memory():
    # Kept until the outputs have moved, every layer would add a MiB, 30 in all.
    rule, batch, width = jaxfa.grape(), 4096, 64
    w = jnp.eye(width)

    def allocated(layers):
        def forward(taps):
            h = jnp.ones((batch, width))
            for tap in taps:
                h = jnp.tanh(h @ w) + tap
            return h[:, :2]

        like = jax.ShapeDtypeStruct((batch, width), jnp.float32), jax.ShapeDtypeStruct((batch, 2), jnp.float32)
        feedback = [rule.init(KEY, *like)] * layers
        program = jax.jit(lambda feedback: rule.refine(forward, feedback, KEY)).lower(feedback)
        return program.compile().memory_analysis().temp_size_in_bytes / 2**20

    few, many = allocated(2), allocated(32)
    assert many < few + 6


@pytest.mark.parametrize(("perturbation", "own"), [(jax.random.normal, 1), (random_signs, -1)], ids=("normal", "signs"))
@pytest.mark.parametrize("separate", [False, True])
def test_the_variance_is_that_of_theory(separate, perturbation, own, x64):
    # E |J^ - J|^2 = mean_b [(n_l + 1) |J_l|^2 + n_l sum_others |J_m|^2] / N, each example having Jacobians of its own;
    # n_l - 1 for signs, whose fourth moment is 1 and not 3.
    forward, nodes = network("dense")
    zeros = [jnp.zeros((9, *node.own)) for node in nodes]
    squares = [np.square(np.einsum("bobi->boi", np.asarray(j))).sum((1, 2)).mean() for j in jax.jacrev(forward)(zeros)]
    found = samples(forward, nodes, 16000, separate=separate, perturbation=perturbation)
    for layer, (estimates, true) in enumerate(zip(found, jacobians(forward, nodes), strict=True)):
        n, others = true.shape[0], 0 if separate else sum(squares) - squares[layer]
        expected = ((n + own) * squares[layer] + n * others) / 9
        np.testing.assert_allclose(np.mean(np.sum(np.square(estimates - true), (1, 2))), expected, rtol=0.03)


def test_one_perturbation_for_the_whole_batch_would_not_average(x64):
    # The control: the same estimator with p shared by the examples has the variance of one example, not of nine.
    forward, nodes = network("dense")
    true = jacobians(forward, nodes)

    def shared(key):
        drawn = [jax.random.normal(k, node.own) for k, node in zip(jax.random.split(key), nodes, strict=True)]
        tangents = [jnp.stack([p] * 9) for p in drawn]
        _, y = jax.jvp(forward, ([jnp.zeros_like(t) for t in tangents],), (tangents,))
        return [jnp.einsum("bi,bo->io", t, y) / 9 for t in tangents]

    worse = lax.map(jax.jit(shared), jax.random.split(KEY, 4000), batch_size=500)
    good = samples(forward, nodes, 4000)
    for a, b, j in zip(map(np.asarray, worse), good, true, strict=True):
        assert np.mean(np.square(a - j)) > 4 * np.mean(np.square(b - j))


def test_a_tile_estimates_the_mean_over_its_repeats_with_less_variance(x64):
    forward, nodes = network("conv")
    true = jacobians(forward, nodes)
    variances = []
    for side in (4, 2, 1):
        kind = [JacobianFeedback(jnp.zeros((min(side, n.own[0]),) * 2 + n.b.shape[2:]), None, n.own) for n in nodes]
        found = samples(forward, kind, 8000)
        for node, estimates, j in zip(kind, found, true, strict=True):
            (y, x), (height, width) = node.b.shape[:2], j.shape[:2]
            expected = j.reshape(height // y, y, width // x, x, *j.shape[2:]).mean((0, 2))
            assert np.linalg.norm(estimates.mean(0) - expected) < 0.15 * np.linalg.norm(expected)
        variances.append(np.mean(np.var(found[0], 0)))
    assert variances[0] > 2 * variances[1] > 4 * variances[2]


def test_below_a_pool_the_jacobian_repeats_with_the_stride(x64):
    # Circular padding, a linear network: nothing but the stride of 2 tells pixels apart.
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=shape)) for shape in ((3, 3, 2, 3), (3, 3, 3, 4)))

    def circular(h, w, stride):
        return jaxfa.conv(jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)), "wrap"), w, strides=stride, padding="VALID")

    j = np.asarray(
        jax.jacrev(lambda h: circular(circular(h, first, 1), second, 2).mean((1, 2))[0])(jnp.ones((1, 8, 8, 2)))
    )
    np.testing.assert_allclose(j[:, :, 2:], j[:, :, :-2], atol=1e-12)
    np.testing.assert_allclose(j[:, :, :, 2:], j[:, :, :, :-2], atol=1e-12)
    assert np.abs(j[:, :, 1:] - j[:, :, :-1]).max() > 0.01


def test_tokens_get_their_own_blocks_of_the_jacobian(x64):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    mix = jnp.asarray([[1.0, 0.5], [0.0, 2.0]])  # token 1 also hears of token 0
    node = JacobianFeedback(jnp.zeros((5, 3)), None, (5,))
    found = samples(lambda taps: jnp.einsum("bti,io,ts->bso", taps[0] + jnp.zeros((4, 2, 5)), w, mix), [node], 8000)
    np.testing.assert_allclose(found[0].mean(0), w * 1.5, atol=0.1)  # the mean of the diagonal blocks, 1 and 2


@pytest.mark.parametrize("norm_axis", [0, 1])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_a_step_is_the_gradient_of_the_cosines_with_that_estimate(name, norm_axis, x64):
    forward, nodes = network(name)
    nodes = [replace(node, b=jax.random.normal(KEY, node.b.shape)) for node in nodes]
    after, normed = (
        refined(literal(learning_rate=0.3, norm_axis=norm_axis, column_norm=norm, epsilon=0.0), forward, nodes)
        for norm in (False, True)
    )
    for node, found, *moved in zip(nodes, estimate(forward, nodes, KEY), after, normed, strict=True):
        arrays = (node.b, found, *(one.b for one in moved))
        b, j, free, unit = (np.asarray(array).reshape(-1, array.shape[-1]) for array in arrays)

        def distance(b, j=j):
            sizes = jnp.linalg.norm(b, axis=norm_axis) * jnp.linalg.norm(j, axis=norm_axis)
            return jnp.sum(1 - jnp.sum(b * j, norm_axis) / sizes)

        np.testing.assert_allclose(free, b - 0.3 * jax.jit(jax.grad(distance))(b), rtol=1e-9)
        np.testing.assert_allclose(unit, free / np.linalg.norm(free, axis=norm_axis, keepdims=True), rtol=1e-9)


def test_the_cosine_of_one_sample_is_within_the_papers_bounds(x64):
    n = 12
    j = jnp.asarray(np.random.default_rng(0).normal(size=(n, 5)) * np.array([3.0, 1, 1, 0.3, 0.1]))
    node = JacobianFeedback(jnp.zeros((n, 5)), None, (n,))
    found = samples(lambda taps: (jnp.zeros((1, n)) + taps[0]) @ j, [node], 20000)[0]
    cosine = np.sum(found * np.asarray(j), (1, 2)) / (np.linalg.norm(found, axis=(1, 2)) * np.linalg.norm(j))
    lower = math.sqrt(2 / (math.pi * n)) * np.linalg.norm(j, 2) / np.linalg.norm(j)
    assert lower <= cosine.mean() <= 1 / math.sqrt(n)


def test_a_running_mean_is_one(x64):
    forward, nodes = network("dense")
    rule = literal(averaging=0.75)
    ones = [jnp.ones_like(node.b) for node in nodes]
    start = [replace(node, b=one, mean=one, precision=jnp.zeros(())) for node, one in zip(nodes, ones, strict=True)]
    after = refined(rule, forward, start)
    for node, j in zip(after, estimate(forward, nodes, KEY), strict=True):
        np.testing.assert_allclose(node.mean, 0.75 + 0.25 * j, rtol=1e-12)
    plain = [replace(node, mean=None) for node in start]
    assert not np.allclose(after[0].b, refined(literal(), forward, plain)[0].b)


def test_fdfa_is_the_running_mean_itself(x64):
    forward, nodes = network("conv")
    after = refined(jaxfa.fdfa(learning_rate=0.25), forward, [replace(n, b=jnp.ones_like(n.b)) for n in nodes])
    for node, j in zip(after, estimate(forward, nodes, KEY), strict=True):
        np.testing.assert_allclose(node.b, 0.75 + 0.25 * j, rtol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        jaxfa.grape(averaging=jaxfa.rules.kalman()),
        literal(averaging=0.97, learning_rate=0.1),
        jaxfa.fdfa(learning_rate=0.01),
    ],
)
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_on_a_fixed_network_it_finds_the_jacobian(rule, name, x64):
    forward, nodes = network(name)
    shapes = [jax.ShapeDtypeStruct((9, *node.own), jnp.float64) for node in nodes]
    logits = jax.ShapeDtypeStruct((9, nodes[0].b.shape[-1]), jnp.float64)
    start = [rule.init(KEY, h, logits) for h in shapes]

    def step(feedback, key):
        return rule.refine(forward, feedback, key), None

    found, _ = jax.jit(lambda keys: lax.scan(step, start, keys))(jax.random.split(KEY, 600))
    for node, before, j in zip(found, start, jacobians(forward, nodes), strict=True):
        assert cosine(node.b, j) > 0.8
        assert not np.any(before.b) or cosine(before.b, j) < 0.6


def cosine(*pair):
    """The mean over outputs of the cosine between two matrices' columns."""
    b, j = (np.asarray(array).reshape(-1, array.shape[-1]) for array in pair)
    return np.mean(np.sum(b * j, 0) / (np.linalg.norm(b, axis=0) * np.linalg.norm(j, axis=0)))


@pytest.mark.parametrize(("tile", "side"), [(1, 1), (2, 2), (3, 1), (6, 2), (8, 4), (None, 4)])
def test_a_tile_repeats_over_the_map_and_the_layers_columns_have_norm_one(tile, side, x64):
    h, e = jnp.ones((5, 4, 4, 3)), jax.random.normal(KEY, (5, 6))
    feedback = jaxfa.grape(tile=tile).init(KEY, h, e)
    assert feedback.b.shape == (side, side, 3, 6)
    dh = np.asarray(feedback.deliver(h, e))
    b = np.asarray(feedback.b)
    for y, x in itertools.product(range(4), range(4)):
        np.testing.assert_allclose(dh[:, y, x], e @ b[y % side, x % side].T, rtol=1e-12)
    ones = np.stack([np.ravel(feedback.deliver(h[:1], row[None])) for row in jnp.eye(6)])
    np.testing.assert_allclose(np.linalg.norm(ones, axis=1), 1, rtol=1e-12)


def test_random_signs_are_white():
    found = np.asarray(random_signs(KEY, (40, 7, 50)))
    assert set(np.unique(found)) == {-1, 1}
    assert found.dtype == np.float32
    flat = found.ravel()
    assert abs(flat.mean()) < 0.04
    # No bit of a word, nor one word and the next, repeats another.
    for lag in (1, 2, 16, 31, 32, 33, 64):
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 0.04
    assert random_signs(KEY, (3,), jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("perturbation", [random_signs, jax.random.normal], ids=("signs", "normal"))
def test_the_noise_of_many_layers_is_white_and_always_the_same_of_its_seeds(perturbation):
    noise, shapes = noise_of(perturbation), [(70, 11), (0,), (3, 33), (1000,)]
    seeds = noise.seeds(KEY, shapes)

    def made(seeds):
        return [noise.made(seed, shape, jnp.float32) for seed, shape in zip(seeds, shapes, strict=True)]

    found = made(seeds)
    assert [one.shape for one in found] == shapes
    chex.assert_trees_all_close(jax.jit(lambda: made(noise.seeds(KEY, shapes)))(), found, atol=1e-6)
    signs = np.asarray(noise.signs(seeds[1], (1000,), jnp.float32)) if perturbation is jax.random.normal else []
    flat = np.concatenate([np.ravel(one) for one in [*found, signs]])
    assert abs(np.mean(flat**2) - 1) < 0.1
    # Neither within a layer nor from one to the next does a number repeat another.
    for lag in (1, 32, 70, 770, 869, 1000):
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 5 / np.sqrt(flat.size - lag)
    assert set(np.unique(noise.signs(seeds[0], (40,), jnp.float32))) == {-1, 1}


def test_signs_of_all_layers_come_of_one_draw():
    # On a CPU a draw takes longer to compile than a layer.
    forward, nodes = network("dense")
    nodes = [replace(node, log_scale=jnp.zeros(node.stack)) for node in nodes]

    def draws(perturbation):
        traced = jax.make_jaxpr(partial(jacobian_estimates, forward, nodes, perturbation=perturbation, separate=False))
        return sum(eqn.primitive.name in ("random_bits", "random_split") for eqn in equations(opened(traced(KEY))))

    assert draws(random_signs) == 1
    assert draws(jax.random.normal) > 2 * len(nodes)


def test_feedback_without_the_scales_that_a_rule_learns_is_refused():
    feedback = [jaxfa.fdfa().init(KEY, jnp.ones((4, 3)), jnp.ones((4, 2)))]
    with pytest.raises(ValueError, match="The rule learns the scales of its perturbations, and a feedback has none"):
        jaxfa.grape().refine(lambda taps: (jnp.zeros((4, 3)) + taps[0])[:, :2], feedback, KEY)


def test_the_jacobian_as_feedback_is_backpropagation(x64):
    rng = np.random.default_rng(0)
    x, w, last = (jnp.asarray(rng.normal(size=shape)) for shape in ((9, 6), (6, 7), (7, 4)))

    def loss(w, feedback):
        h, wire = jaxfa.direct(jnp.tanh(x @ w), jnp.zeros((9, 4)), feedback)
        return jnp.sum(jnp.sin(h @ last + wire))

    feedback = JacobianFeedback(last, None, (7,))
    np.testing.assert_allclose(jax.grad(loss)(w, feedback), jax.grad(loss)(w, None), rtol=1e-10)


def test_the_published_rule_without_weights_is_the_literal_one(x64):
    forward, nodes = network("dense")
    found, expected = (
        refined(rule, forward, nodes)
        for rule in (jaxfa.rules.published_grape(weights=False), literal(perturbation=jax.random.normal))
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.b, other.b)
        assert one.mean is one.log_scale is one.watched is None


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="norm_axis"):
        jaxfa.grape(norm_axis=2)
    with pytest.raises(ValueError, match=r"averaging must be in \[0, 1\)"):
        jaxfa.grape(averaging=1.0)
    with pytest.raises(ValueError, match="tile"):
        jaxfa.fdfa(tile=0)
