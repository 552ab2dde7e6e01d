"""What theory says about training with a rule: what aligns, what is estimated, and what must break it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import jaxfa
from jaxfa.jaxprs.versions import equations, opened
from tests.methods import batch, create, forward, loss, signals, train

RNG = np.random.default_rng(2)
KEY = jax.random.PRNGKey(5)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


@pytest.mark.parametrize(
    ("tx", "rate"),
    [(optax.sgd(0.1, momentum=0.5), 0.02), (optax.adam(1e-2), 0.02), (optax.adamw(1e-2, weight_decay=0.3), 0.023)],
    ids=["sgd", "adam", "adamw"],
)
def test_kolen_pollack_draws_weights_and_feedback_together_at_the_rate_of_the_decay(tx, rate, x64):
    rule, steps = jaxfa.kolen_pollack(weight_decay=0.02), 50
    init, step = train(rule, tx)
    step = jax.jit(step)
    both = first = create(rule, KEY)
    x, y = batch()
    state = init(both)
    for _ in range(steps):
        both, state = step(both, state, x, y, KEY)
    for i in (1, 2):
        gaps = [np.asarray(params[i]["w"] - feedback[i].b) for params, feedback in (first, both)]
        assert np.linalg.norm(both[0][i]["w"] - first[0][i]["w"]) > 0.1
        np.testing.assert_allclose(gaps[1], (1 - rate) ** steps * gaps[0], atol=1e-10)


def test_kolen_pollack_decays_no_bias_and_needs_its_decay(x64):
    rule = jaxfa.kolen_pollack(weight_decay=0.02)
    params, feedback = jax.tree.map(lambda leaf: leaf + 1.0, create(rule, KEY))
    tx = jaxfa.optimizer(optax.sgd(0.1), rule)
    silence = jax.tree.map(jnp.zeros_like, (params, feedback))
    updates, _ = tx.update(silence, tx.init((params, feedback)), (params, feedback))
    for p, u in zip(params, updates[0], strict=True):
        np.testing.assert_array_equal(u["b"], 0)
        np.testing.assert_allclose(u["w"], -0.02 * p["w"], rtol=1e-14)
    np.testing.assert_allclose(updates[1][1].b, -0.02 * feedback[1].b, rtol=1e-14)
    for decay in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="w - b never shrinks"):
            jaxfa.kolen_pollack(weight_decay=decay)


def mirrored(op, x_shape, w_shape, steps, **settings):
    """Weights and the average over many noise batches of the mirror's estimate of them."""
    w = normal(*w_shape)
    layer = jaxfa.Layer(op, jax.ShapeDtypeStruct(x_shape, w.dtype), w)
    rule = jaxfa.weight_mirror(learning_rate=1.0, **settings)

    def one(key):
        return rule.refine([layer], [rule.init(KEY, w)], key)[0].b

    samples = jax.lax.map(jax.jit(one), jax.random.split(KEY, steps), batch_size=50)
    return np.asarray(w), np.asarray(samples.mean(0)), np.asarray(samples.std(0) / np.sqrt(steps))


@pytest.mark.parametrize(
    ("op", "x_shape", "w_shape"),
    [
        (jaxfa.linear, (8, 4), (4, 3)),
        (jaxfa.conv, (2, 4, 3, 2), (3, 3, 2, 3)),
        (lambda x, w: jaxfa.conv(x, w, groups=2, strides=2, padding="VALID"), (2, 5, 5, 4), (3, 3, 2, 4)),
    ],
    ids=["dense", "conv_same", "conv_grouped"],
)
def test_the_mirror_estimates_the_weights_without_bias(op, x_shape, w_shape):
    w, mean, error = mirrored(op, x_shape, w_shape, 300)
    assert np.max(np.abs(mean - w) / error) < 4.5
    assert np.linalg.norm(mean - w) < 0.25 * np.linalg.norm(w)


def test_the_mirrors_error_is_of_the_other_weights_alone():
    # An input's square tells its own weight, and signs have no other square than 1: noise of any other law errs more.
    w, _, error = mirrored(jaxfa.linear, (8, 4), (4, 3), 3000)
    expected = np.sqrt((np.sum(w**2, 0) - w**2) / 8)
    np.testing.assert_allclose(error * np.sqrt(3000), expected, rtol=0.06)


def test_the_noise_of_all_mirrors_comes_of_one_draw():
    # On a CPU a draw takes longer to compile than a layer.
    rule, w = jaxfa.weight_mirror(), normal(4, 4)
    layers = [jaxfa.Layer(jaxfa.linear, jax.ShapeDtypeStruct((n, 4), w.dtype), w) for n in (8, 9, 64)]
    feedback = [rule.init(KEY, w) for _ in layers]
    traced = jax.make_jaxpr(lambda key: rule.refine(layers, feedback, key))(KEY)
    assert sum(eqn.primitive.name in ("random_bits", "random_split") for eqn in equations(opened(traced))) == 1
    one, two, _ = rule.refine(layers, feedback, KEY)
    assert not np.allclose(one.b - 0.9 * feedback[0].b, two.b - 0.9 * feedback[1].b)


def test_the_mirror_is_finite_where_a_map_is_smaller_than_the_kernel():
    w, mean, _ = mirrored(jaxfa.conv, (4, 1, 1, 2), (3, 3, 2, 3), 50)
    never = np.ones((3, 3), bool)
    never[1, 1] = False
    assert np.all(mean[never] == 0)
    assert np.all(mean[1, 1] != 0)
    assert np.all(np.isfinite(w))


@pytest.mark.parametrize(("decay", "reaches"), [(None, 1.0), (0.1, 0.5)])
def test_the_mirrored_feedback_tends_to_the_weights_if_decay_matches(decay, reaches):
    w, other = normal(4, 3), normal(3, 2)
    rule = jaxfa.weight_mirror(learning_rate=0.05, weight_decay=decay)
    layers = [None, jaxfa.Layer(jaxfa.linear, jax.ShapeDtypeStruct((256, 4), w.dtype), w)]
    layers.append(jaxfa.Layer(jaxfa.linear, jax.ShapeDtypeStruct((256, 3), w.dtype), other))
    feedback = [None, rule.init(KEY, w), rule.init(KEY, other)]
    assert jaxfa.diagnostics.weight_angle(w, feedback[1]) > 40
    refine = jax.jit(lambda feedback, key: rule.refine(layers, feedback, key))
    for key in np.asarray(jax.random.split(KEY, 200)):
        feedback = refine(feedback, key)
    for weights, f in ((w, feedback[1]), (other, feedback[2])):
        assert jaxfa.diagnostics.weight_angle(weights, f) < 6
        np.testing.assert_allclose(np.linalg.norm(f.b) / np.linalg.norm(weights), reaches, rtol=0.05)


def test_without_decay_the_mirror_grows_past_the_weights():
    w = normal(4, 3)
    rule = jaxfa.weight_mirror(learning_rate=0.05, weight_decay=0.0)
    layer = jaxfa.Layer(jaxfa.linear, jax.ShapeDtypeStruct((64, 4), w.dtype), w)
    feedback = rule.init(KEY, w)
    refine = jax.jit(lambda f, key: rule.refine(layer, f, key))
    for key in np.asarray(jax.random.split(KEY, 200)):
        feedback = refine(feedback, key)
    np.testing.assert_allclose(np.linalg.norm(feedback.b) / np.linalg.norm(w), 10, rtol=0.1)


@pytest.mark.parametrize("rule", [jaxfa.fa(), jaxfa.dfa()], ids=["fa", "dfa"])
def test_the_angle_to_backpropagation_falls_from_ninety_degrees(rule):
    data = load_digits()
    x, y = (data.data[:256] / 8 - 1).astype(np.float32), data.target[:256].astype(np.int32)
    init, step = train(rule, optax.sgd(0.3))
    step = jax.jit(step)
    both = create(rule, KEY, (64, 48, 48, 10))
    state = init(both)

    def angles(params, feedback):
        compared = jaxfa.diagnostics.compare(signals(params, feedback, x, y)[0], signals(params, None, x, y)[0])
        return np.array([float(layer["w"].angle) for layer in compared])

    start = angles(*both)
    for _ in range(400):
        both, state = step(both, state, x, y, KEY)
    end = angles(*both)
    assert np.all(np.abs(start[:-1] - 90) < 20), start
    assert np.all(end[:-1] < 78), end
    assert np.all(end[:-1] < start[:-1] - 5)
    assert max(start[-1], end[-1]) < 0.1
    assert loss(both[0], None, x, y) < 0.5


def test_direct_updates_do_not_see_the_weights_above(x64):
    x, _ = batch()
    for rule, sees in ((jaxfa.dfa(), False), (jaxfa.fa(), False), (jaxfa.backprop(), True)):
        params, feedback = create(rule, KEY)
        a, b = (top_gradient(params, feedback, x, shift) for shift in (0.0, 0.5))
        assert np.any(a[0]["w"] != b[0]["w"]) == sees
        assert np.linalg.norm(a[0]["w"]) > 1e-3


def top_gradient(params, feedback, x, shift):
    """Gradients with the output error held fixed while the weights of the last layer move."""
    e = jnp.asarray(np.random.default_rng(3).normal(size=(len(x), 3)))
    params = [*params[:-1], {"w": params[-1]["w"] + shift, "b": params[-1]["b"]}]
    return jax.jit(jax.grad(lambda params: jnp.vdot(forward(params, feedback, x), e)))(params)
