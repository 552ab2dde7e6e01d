"""Forward gradients: closed forms, no bias, the variance that their docstring states, and GrAPE as their regression."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfa
from jaxfa.rules.forward_gradient import bind
from tests.methods import batch, create, forward, loss, signals

KEY = jax.random.PRNGKey(3)


def softmax(a):
    a = np.exp(a - a.max(-1, keepdims=True))
    return a / a.sum(-1, keepdims=True)


@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate"])
def test_gradients_are_those_of_a_numpy_reference(separate, x64):
    params, feedback = create(jaxfa.forward_gradient(separate=separate), KEY)
    x, y = batch()
    w = [np.asarray(p["w"]) for p in params]
    h1 = np.tanh(x @ w[0])
    h2 = np.tanh(h1 @ w[1])
    logits = h2 @ w[2]
    p1, p2 = (np.asarray(node.draw(logits)) for node in feedback)
    assert p1.shape == h1.shape
    assert not np.array_equal(p1[0], p1[1])  # examples have draws of their own
    first = ((p1 @ w[1]) * (1 - h2**2)) @ w[2]
    second = p2 @ w[2]
    moved = (first, second) if separate else (first + second, first + second)
    e = (softmax(logits) - np.eye(3)[np.asarray(y)]) / len(x)
    deltas = [p * np.sum(d * e, -1, keepdims=True) * (1 - h**2) for p, d, h in ((p1, moved[0], h1), (p2, moved[1], h2))]
    wanted = [np.asarray(x).T @ deltas[0], h1.T @ deltas[1], h2.T @ e]
    got = signals(params, feedback, x, y)[0]
    for one, other, delta in zip(got, wanted, [*deltas, e], strict=True):
        np.testing.assert_allclose(one["w"], other, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(one["b"], delta.sum(0), rtol=1e-11, atol=1e-14)


def draws(rule, perturbed=lambda bound: bound, count=40_000):
    """The errors of one example at both hidden layers, of many draws, and the true ones."""
    params, _ = create(rule, KEY)
    x, y = batch(examples=1)

    def errors(key):
        nodes = [
            rule.init(k, jnp.zeros((1, n)), jnp.zeros((1, 3)))
            for k, n in zip(jax.random.split(key), (6, 5), strict=True)
        ]
        bound = perturbed(bind(lambda taps: forward(params, None, x, taps=taps), nodes))
        return [node.deliver(jnp.zeros((1, n)), e)[0] for node, n in zip(bound, (6, 5), strict=True)]

    def plain(taps):
        logits = forward(params, None, x, taps=taps)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    e = jax.grad(lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, y).mean())(
        forward(params, None, x)
    )
    true = jax.grad(plain)([jnp.zeros((1, 6)), jnp.zeros((1, 5))])
    found = jax.jit(jax.vmap(errors))(jax.random.split(jax.random.key(0), count))
    return found, [one[0] for one in true]


CASES = {
    "signs": (jaxfa.forward_gradient(), 1),
    "normal": (jaxfa.forward_gradient(perturbation=jax.random.normal), 3),
    "separate": (jaxfa.forward_gradient(separate=True), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_have_no_bias_and_the_variance_of_the_closed_form(name, x64):
    rule, kurtosis = CASES[name]
    found, true = draws(rule)
    powers = [float(jnp.sum(a**2)) for a in true]
    for samples, a, other in zip(found, true, reversed(powers), strict=True):
        own, n = float(jnp.sum(a**2)), len(a)
        variance = (n + kurtosis - 2) * own + (0 if name == "separate" else n * other)
        # The mean of many draws is as far off as their variance says, no less and no more.
        off = float(jnp.sum((samples.mean(0) - a) ** 2)) * len(samples) / variance
        assert off < 4
        assert off > 0.02
        np.testing.assert_allclose(float(jnp.sum(samples.var(0))), variance, rtol=0.06)


@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate"])
def test_gradients_of_weights_have_no_bias_and_the_same_variance(separate, x64):
    rule = jaxfa.forward_gradient(weights=True, separate=separate)
    params, _ = create(rule, KEY)
    x, y = batch(examples=4)
    w = [p["w"] for p in params]

    def plain(taps):
        moved = [
            p | {"w": p["w"] + tap.reshape(tap.shape and p["w"].shape)} for p, tap in zip(params, taps, strict=True)
        ]
        return forward(moved, None, x)

    def total(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    logits = plain([jnp.zeros(())] * 3)
    e = jax.grad(total)(logits)

    def gradients(key):
        keys = jax.random.split(key, 3)
        bound = bind(plain, [rule.init(k, one[None], logits) for k, one in zip(keys, w, strict=True)])
        return [node.deliver(one, e) for node, one in zip(bound, w, strict=True)]

    found = jax.jit(jax.vmap(gradients))(jax.random.split(jax.random.key(0), 40_000))
    true = jax.grad(lambda taps: total(plain(taps)))([jnp.zeros_like(one) for one in w])
    powers = [float(jnp.sum(a**2)) for a in true]
    for samples, a, own in zip(found, true, powers, strict=True):
        variance = (a.size - 1) * own + (0 if separate else a.size * (sum(powers) - own))
        off = float(jnp.sum((samples.mean(0) - a) ** 2)) * len(samples) / variance
        assert 0.02 < off < 4
        np.testing.assert_allclose(float(jnp.sum(samples.var(0))), variance, rtol=0.06)


def test_a_derivative_along_other_draws_than_the_error_s_has_mean_zero(x64):
    def later(bound):
        return [replace(node, step_bytes=node.step_bytes + 1) for node in bound]

    found, true = draws(jaxfa.forward_gradient(), later)
    for samples, a in zip(found, true, strict=True):
        assert jnp.linalg.norm(samples.mean(0)) < 0.2 * jnp.linalg.norm(a)


def test_grape_s_estimate_is_their_linear_regression_on_the_error(x64):
    params, _ = create(jaxfa.dfa(), KEY)
    x, _ = batch(examples=16)
    fixed = {n: jaxfa.rules.shared.noise.random_signs(jax.random.key(n), (16, n), float) for n in (6, 5)}

    def same(key, shape, dtype):
        return fixed[shape[-1]]

    def plain(taps):
        return forward(params, None, x, taps=taps)

    logits = jnp.zeros((16, 3))
    grape = jaxfa.fdfa(learning_rate=1.0, perturbation=same)  # B is the estimate itself
    estimates = grape.refine(plain, [grape.init(KEY, fixed[n], logits) for n in (6, 5)], KEY)
    ours = jaxfa.forward_gradient(perturbation=same)
    bound = bind(plain, [ours.init(KEY, fixed[n], logits) for n in (6, 5)])
    # Errors that know nothing of the perturbations: each example meets each of them.
    errors = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))
    for node, estimate, n in zip(bound, estimates, (6, 5), strict=True):
        answers = jnp.stack([node.deliver(fixed[n], jnp.broadcast_to(e, (16, 3))) for e in errors])
        given = np.repeat(errors, 16, 0)
        regression = np.linalg.lstsq(given, answers.reshape(-1, n), rcond=None)[0].T
        np.testing.assert_allclose(regression, estimate.b, rtol=1e-10, atol=1e-12)


def test_what_is_bound_to_no_batch_or_to_another_is_refused(x64):
    rule = jaxfa.forward_gradient()
    params, feedback = create(rule, KEY)
    x, y = batch()
    h, e = jnp.zeros((8, 6)), jnp.zeros((8, 3))
    with pytest.raises(ValueError, match=r"of shape \(8, 3\), got None. In each gradient take feedback = rule.bind"):
        feedback[0].deliver(h, e)
    smaller = bind(lambda taps: forward(params, None, x[:4], taps=taps), feedback)
    with pytest.raises(ValueError, match=r"got \(4, 3\). In each gradient"):
        jax.grad(loss)(params, smaller, x, y)
    with pytest.raises(ValueError, match="logits' batch axis first"):
        rule.init(KEY, jnp.zeros((5, 6)), e)


def test_a_network_without_forward_mode_is_refused():
    @jax.custom_vjp
    def backward_only(h):
        return h

    backward_only.defvjp(lambda h: (h, None), lambda _, e: (e,))
    rule, h = jaxfa.forward_gradient(), jnp.zeros((8, 6))
    with pytest.raises(ValueError, match=r"a jax\.custom_vjp function in it refuses: write that as a jax\.custom_jvp"):
        rule.bind(lambda taps: backward_only(h + taps[0]), [rule.init(KEY, h, h)])


def test_devices_that_would_share_their_draws_are_refused(x64):
    params, feedback = create(jaxfa.forward_gradient(), KEY)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P())
    with pytest.raises(ValueError, match="the devices would share their draws"):
        split(lambda *args: jax.lax.pmean(jax.grad(loss)(*args), "data"))(params, feedback, *batch())


def test_draws_are_new_after_an_update_and_only_then(x64):
    rule = jaxfa.forward_gradient()
    both = create(rule, KEY)
    tx = jaxfa.optimizer(optax.sgd(1e-9), rule)
    x, y = batch()
    one, again = signals(*both, x, y), signals(*both, x, y)
    chex.assert_trees_all_equal(one, again)
    updates, _ = tx.update(one, tx.init(both), both)
    after = optax.apply_updates(both, updates)
    chex.assert_trees_all_close(after[0], both[0], atol=1e-8)
    assert not np.allclose(signals(*after, x, y)[0][0]["w"], one[0][0]["w"], rtol=0.1)
