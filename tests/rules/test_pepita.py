"""PEPITA without Flax: the paper's update, the original code's numbers, and what it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfa
from tests.methods import batch, create, forward, loss, refine, signals

KEY = jax.random.PRNGKey(3)


def table(n, m, start):
    """Weights that any program can write down."""
    return np.sin(np.arange(n * m, dtype=float).reshape(n, m) * 2.8 + start)


# What functions.py of https://github.com/GiorgiaD/PEPITA gives for these weights, projection and examples, with the
# first pass's error at the last layer, as the paper has it; the code itself would take the second's.
ORIGINAL = (
    """0.609346692682 -1.524452827018 0.162460351297 -0.905272710171
       0.121336227380 -0.546526857313 -0.026961779374 -0.306741762950
       0.646569665466 -1.537987628037 0.191813080942 -0.919142391986""",
    """-0.029243835335 0.059966747169 0 0.036863970135
       0.238692770853 -0.457627799735 0.187873722813 -0.398445679364
       -0.015639102810 0.032069190425 0 0.019714220529
       0.173337917356 -0.332327826464 0.136433289211 -0.289349962270""",
    """-0.027450540288 0.027450540288
       0.221770945136 -0.221770945136
       0 0
       0.173387118114 -0.173387118114""",
)


def biasless(params, x, tap):
    for w in params[:-1]:
        x = jax.nn.relu(tap(x @ w))
    return x @ params[-1]


def original_task(rule):
    params = [jnp.asarray(table(n, m, i)) for i, (n, m) in enumerate(((3, 4), (4, 4), (4, 2)))]
    x, y = jnp.asarray(table(2, 3, 5)), jnp.array([0, 1])
    feedback = rule.init(KEY, x, jnp.zeros((2, 2)))
    feedback = jax.tree.map(lambda b: jnp.asarray(table(3, 2, 9)), feedback)

    def loss(params):
        logits = jaxfa.rules.modulated(biasless, params, x, feedback)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return jax.jit(jax.grad(loss))(params)


def test_updates_are_the_original_code_s(x64):
    for got, text in zip(original_task(jaxfa.pepita()), ORIGINAL, strict=True):
        wanted = np.array(text.split(), float).reshape(got.shape)
        np.testing.assert_allclose(got, wanted, atol=1e-11)


def test_neither_another_activation_nor_the_derivative_gives_the_original_s(x64):
    # Units that are at work in one pass alone tell the rule from one with the activation's derivative in it.
    for activation in (lambda a: a, jnp.tanh, lambda a: jax.nn.relu(a) * (a > 0.3)):
        got = original_task(jaxfa.pepita(activation=activation))
        wanted = np.array(ORIGINAL[1].split(), float).reshape(got[1].shape)
        assert np.abs(got[1] - wanted).max() > 0.01


def test_gradients_are_those_of_a_numpy_reference(x64):
    params, feedback = create(jaxfa.pepita(activation=jnp.tanh, scale=0.5), KEY)
    x, y = (np.asarray(one) for one in batch())
    w = [np.asarray(p["w"]) for p in params]

    def activities(x):
        h1 = np.tanh(x @ w[0])
        h2 = np.tanh(h1 @ w[1])
        return h1, h2, h2 @ w[2]

    *first, logits = activities(x)
    e = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(3)[y]
    modulated = x + e @ np.asarray(feedback.b).T
    *second, _ = activities(modulated)
    deltas = [(a - b) / 8 for a, b in zip(first, second, strict=True)] + [e / 8]
    got = signals(params, feedback, x, y)[0]
    for one, below, delta in zip(got, (modulated, *second), deltas, strict=True):
        np.testing.assert_allclose(one["w"], below.T @ delta, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(one["b"], delta.sum(0), rtol=1e-11, atol=1e-14)


def test_without_a_projection_hidden_layers_stand_still_and_the_last_learns_exactly(x64):
    params, feedback = create(jaxfa.pepita(activation=jnp.tanh, scale=0.0), KEY)
    x, y = batch()
    got, true = signals(params, feedback, x, y)[0], signals(params, None, x, y)[0]
    assert not any(leaf.any() for layer in got[:-1] for leaf in layer.values())
    np.testing.assert_allclose(got[-1]["w"], true[-1]["w"], rtol=1e-12)


def test_a_sum_learns_what_it_is_told_to_be(x64):
    x, y = batch()

    def gradient(rule, reduce):
        params, feedback = create(rule, KEY)

        def loss(params):
            logits = forward(params, feedback, x)
            return reduce(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        return jax.grad(loss)(params)[0]["w"]

    mean = gradient(jaxfa.pepita(activation=jnp.tanh), jnp.mean)
    told = gradient(jaxfa.pepita(activation=jnp.tanh, examples=1), jnp.sum)
    np.testing.assert_allclose(told, 8 * mean, rtol=1e-11)
    taken_for_a_mean = gradient(jaxfa.pepita(activation=jnp.tanh), jnp.sum)
    assert not np.allclose(taken_for_a_mean, 8 * mean, rtol=0.1)


def test_the_mirror_turns_the_projection_to_minus_the_jacobian_and_keeps_its_norm(x64):
    rule = jaxfa.pepita(activation=jnp.tanh, mirror=0.02)
    params, feedback = create(rule, KEY)
    x, _ = batch(examples=64)
    jacobian = np.mean([jax.jacrev(lambda x: forward(params, None, x))(one) for one in x], 0).T
    norm = float(jnp.linalg.norm(feedback.b))
    assert 60 < jaxfa.diagnostics.angle(feedback.b, -jacobian) < 120
    for key in jax.random.split(KEY, 400):
        feedback = refine(rule, params, feedback, x, key)
    assert jaxfa.diagnostics.angle(feedback.b, -jacobian) < 6
    np.testing.assert_allclose(jnp.linalg.norm(feedback.b), norm, rtol=1e-12)
    # What it is for: the updates come near to the gradient, to which random ones are at right angles.
    x, y = batch()
    mirrored, true = (signals(params, one, x, y)[0][0]["w"] for one in (feedback, None))
    drawn = signals(params, create(rule, KEY)[1], x, y)[0][0]["w"]
    assert jaxfa.diagnostics.angle(mirrored, true) < jaxfa.diagnostics.angle(drawn, true) - 20


def test_devices_add_up_to_the_whole_batch_where_the_loss_is_told(x64):
    rule = jaxfa.pepita(activation=jnp.tanh, examples=4)
    params, feedback = create(rule, KEY)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    args = (P(), P(), P("data"), P("data"))

    def run(rule, feedback):
        def local(*args):
            return jax.lax.pmean(jax.grad(loss)(jax.lax.pcast(args[0], "data", to="varying"), *args[1:]), "data")

        return jax.shard_map(local, mesh=mesh, in_specs=args, out_specs=P())(params, feedback, *batch())

    whole = jax.grad(loss)(*create(jaxfa.pepita(activation=jnp.tanh), KEY), *batch())
    for one, other in zip(jax.tree.leaves(run(rule, feedback)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match=r"Say pepita\(examples="):
        run(rule, create(jaxfa.pepita(activation=jnp.tanh), KEY)[1])


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="pepita needs examples > 0"):
        jaxfa.pepita(examples=0)
    with pytest.raises(ValueError, match=r"mirror in \(0, 1\]"):
        jaxfa.pepita(mirror=1.5)
    feedback = jaxfa.pepita().init(KEY, jnp.zeros((5, 4)), jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"must be of floats, got int32\. For tokens, modulate what embeds them"):
        jaxfa.rules.modulated(biasless, [jnp.ones((4, 2))], jnp.ones((5, 4), jnp.int32), feedback)
    params = [jnp.ones((4, 3)), jnp.ones((3, 2))]
    with pytest.raises(TypeError, match="a backward pass and no forward mode"):
        jax.jvp(
            lambda params: jaxfa.rules.modulated(biasless, params, jnp.ones((5, 4)), feedback), (params,), (params,)
        )
