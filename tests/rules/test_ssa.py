"""SSA: its two readings against backpropagation and closed forms, its local losses, and what alignment moves."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from jaxfa.factored import pruning, svd
from jaxfa.factored.svd import Factors
from tests.methods import batch, create, forward, loss, signals, train

KEY = jax.random.PRNGKey(0)
drift = jax.jit(pruning.drift)


def with_feedback_of(params, feedback):
    """The same feedback with the weights themselves in the place of its factors."""
    return [None if b is None else type(b)(p["w"]) for p, b in zip(params, feedback, strict=True)]


def test_the_sequential_reading_with_the_weights_own_factors_is_backpropagation(x64):
    params, feedback = create(jaxfa.ssa(parallel=False), KEY)
    own = with_feedback_of(params, feedback)
    true = signals(params, None, *batch())[0]
    chex.assert_trees_all_close(signals(params, own, *batch())[0], true, atol=1e-13)
    pseudo = signals(params, feedback, *batch())[0]
    assert np.linalg.norm(pseudo[0]["w"].u - true[0]["w"].u) > 0.3 * np.linalg.norm(true[0]["w"].u)


def test_the_parallel_reading_with_the_weights_own_factors_is_backpropagation_in_the_last_hidden_layer_alone(x64):
    params, feedback = create(jaxfa.ssa(), KEY)
    own = [type(b)(p["w"], b.lift, b.op) for p, b in zip(params[1:], feedback, strict=True)]
    pseudo, true = signals(params, own, *batch())[0], signals(params, None, *batch())[0]
    chex.assert_trees_all_close(pseudo[1:], true[1:], atol=1e-13)
    assert np.linalg.norm(pseudo[0]["w"].u - true[0]["w"].u) > 0.3 * np.linalg.norm(true[0]["w"].u)


def test_the_parallel_reading_is_its_closed_form(x64):
    rng = np.random.default_rng(0)
    e, h = jnp.asarray(rng.normal(size=(4, 3))), jnp.zeros((4, 6))
    layer = jaxfa.Layer(jaxfa.linear, h, jaxfa.factored.factorise(jnp.asarray(rng.normal(size=(6, 5)))))
    b = jaxfa.ssa().init(KEY, h, e, layer=layer)
    expected = (((e @ b.lift.T) @ b.b.v) * b.b.s[None]) @ b.b.u.T
    chex.assert_trees_all_close(b.deliver(h, e), expected, atol=1e-13)
    # In a convolution the lift has an entry for each pixel, and the error returns through the transposed pair.
    op = functools.partial(jaxfa.conv, strides=2)
    h, w = jnp.zeros((4, 8, 8, 2)), jaxfa.factored.factorise(jnp.asarray(rng.normal(size=(3, 3, 2, 5))), 4)
    b = jaxfa.ssa().init(KEY, h, e, layer=jaxfa.Layer(op, h, w))
    assert b.lift.shape == (4, 4, 5, 3)
    delta = jnp.einsum("nc,hwmc->nhwm", e, b.lift)
    expected = jax.vjp(lambda h: op(h, b.b.dense()), h)[1](delta)[0]
    chex.assert_trees_all_close(b.deliver(h, e), expected, atol=1e-12)


def test_the_feedback_is_the_weights_turned_at_random(x64):
    w = jaxfa.factored.factorise(jnp.asarray(np.random.default_rng(0).normal(size=(9, 6))), 4, name="fc")
    b = jaxfa.ssa(parallel=False, scale=0.5).init(KEY, w).b
    assert drift(b) < 1e-13
    chex.assert_trees_all_equal((-jnp.sort(-jnp.abs(b.s)), b.shape, b.name), (0.5 * w.s, w.shape, "fc"))
    assert jaxfa.diagnostics.angle(b.dense(), w.dense()) > 45


def distance(a, b):
    return sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def otherwise(w, order, x, y):
    """The same weights, their columns in another order and of other signs."""
    x, y, order = (jnp.asarray(one) for one in (x, y, order))
    return Factors(w.u[:, order] * x[None], w.s[order] * x * y, w.v[:, order] * y[None], w.shape, w.name)


def column(w, i):
    return [w.u[:, i], w.s[i], w.v[:, i]]


@pytest.mark.parametrize("seed", range(4))
def test_each_column_is_matched_with_the_nearest_that_is_left(seed, x64):
    rng = np.random.default_rng(seed)
    w, b = (jaxfa.factored.factorise(jnp.asarray(rng.normal(size=(7, 6))), 5) for _ in range(2))
    w = otherwise(w, rng.permutation(5), rng.choice((1, -1), 5), rng.choice((1, -1), 5))
    found = jax.jit(svd.matched)(b, w)
    chex.assert_trees_all_close(found.dense(), b.dense(), atol=1e-13)
    signs, left, farther = list(itertools.product((1, -1), repeat=2)), set(range(5)), 0
    for i in sorted(range(5), key=lambda i: -abs(w.s[i])):
        ways = {
            (j, x, y): distance(column(otherwise(b, [j], [x], [y]), 0), column(w, i))
            for x, y in signs
            for j in range(5)
        }
        j, x, y = min((one for one in ways if one[0] in left), key=ways.get)
        chex.assert_trees_all_close(column(found, i), column(otherwise(b, [j], [x], [y]), 0), atol=1e-13)
        farther += ways[j, x, y] > min(ways.values())
        left.remove(j)
    assert farther  # what is nearest is not always left


def test_columns_are_matched_with_themselves(x64):
    w = jaxfa.factored.factorise(jnp.asarray(np.random.default_rng(0).normal(size=(9, 6))))
    for s in (w.s, jnp.ones(6), -w.s):
        own = dataclasses.replace(w, s=s)
        b = otherwise(own, [3, 5, 0, 1, 4, 2], [1, -1, 1, 1, -1, 1], [-1, 1, 1, 1, -1, -1])
        chex.assert_trees_all_equal(svd.matched(b, own), own)


@pytest.mark.parametrize("shape", [(6, 5), (3, 3, 2, 4)], ids=["dense", "convolution"])
def test_the_arbitrary_signs_and_order_of_a_decomposition_change_nothing(shape, x64):
    rule = jaxfa.ssa(parallel=False, beta=0.3, pull_feedback=True, retract=False)
    rng = np.random.default_rng(0)
    normal = (
        rng.normal(size=shape),
        rng.normal(size=(shape[-1], 3)),
        rng.normal(size=(4, *[5] * (len(shape) - 2), shape[-2])),
    )
    first, head, x = map(jnp.asarray, normal)
    op = jaxfa.linear if len(shape) == 2 else jaxfa.conv

    def loss(both):
        (first, head), (b_first, b_head) = both
        h = jnp.tanh(op(x, first, b_first)).reshape(4, -1, shape[-1]).mean(1)
        return (jaxfa.linear(h, head, b_head) ** 3).sum()

    tx = jaxfa.optimizer(optax.adam(0.03), rule)

    @jax.jit
    def step(both, state):
        updates, state = tx.update(jax.grad(loss)(both), state, both)
        return optax.apply_updates(both, updates), state

    def products(change):
        """All weights and feedback, as they are after steps and after a new decomposition that drops columns."""
        weights = [change(jaxfa.factored.factorise(w, name=name)) for name, w in (("first", first), ("head", head))]
        keys = jax.random.split(KEY)
        both = weights, [rule.init(*pair) for pair in zip(keys, weights, strict=True)]
        state, found = tx.init(both), []
        for energy in (1.0, 1.0, 0.8, 1.0):
            both, state = step(both, state)
            *both, state = jaxfa.factored.prune(*both, state, energy=energy, multiple=1)
            both = tuple(both)
            found.append([one.dense() for one in (*both[0], *(b.b for b in both[1]))])
        assert sum(w.s.size for w in both[0]) < sum(w.s.size for w in weights)
        return found

    def turn(w):
        signs = np.random.default_rng(1).choice([-1, 1], (2, w.s.size))
        return otherwise(w, np.random.default_rng(2).permutation(w.s.size), *signs)

    chex.assert_trees_all_close(products(turn), products(lambda w: w), atol=1e-10)
    # So, too, where errors are lifted to a layer.
    w = jaxfa.factored.factorise(first, name="first")
    lifted = [jaxfa.ssa().init(KEY, x, jnp.ones((4, 3)), layer=jaxfa.Layer(op, x, w)) for w in (w, turn(w))]
    chex.assert_trees_all_close(lifted[0].b.dense(), lifted[1].b.dense(), atol=1e-13)
    np.testing.assert_allclose(distance(lifted[0].b, w), distance(lifted[1].b, turn(w)))


def plain_step(rule, rate=0.1):
    """The updates of one SGD step, and what they were of."""
    params, feedback = create(rule, KEY)
    tx = jaxfa.optimizer(optax.sgd(rate), rule)
    both = params, feedback
    grads = signals(*both, *batch())
    return jax.jit(tx.update)(grads, tx.init(both), both)[0], both, grads[0]


def test_local_losses_add_their_exact_gradients(x64):
    alpha, beta, gamma = 0.7, 0.2, 0.3
    options = {"alpha": alpha, "beta": beta, "gamma": gamma, "project": False, "retract": False}
    rule = jaxfa.ssa(parallel=False, **options)
    params, feedback = create(rule, KEY)
    params = jax.tree.map(lambda leaf: 1.1 * leaf, params)

    def local(params):
        total = 0.0
        for p, b in zip(params, feedback, strict=True):
            u, s, v = p["w"].u, p["w"].s, p["w"].v
            total += gamma * (((u.T @ u - jnp.eye(s.size)) ** 2).sum() + ((v.T @ v - jnp.eye(s.size)) ** 2).sum())
            if b is not None:
                total += beta * sum(((x - y) ** 2).sum() for x, y in ((u, b.b.u), (s, b.b.s), (v, b.b.v)))
        return total

    tx = jaxfa.optimizer(optax.sgd(0.1), rule)
    grads = signals(params, feedback, *batch())
    updates = jax.jit(tx.update)(grads, tx.init((params, feedback)), (params, feedback))[0][0]
    expected = jax.tree.map(lambda g, own: -0.1 * (alpha * g + own), grads[0], jax.jit(jax.grad(local))(params))
    chex.assert_trees_all_close(updates, expected, atol=1e-13)


def test_steps_stay_on_the_manifold_or_along_it(x64):
    for options, largest in (({}, 1e-13), ({"retract": False}, 1e-2), ({"retract": False, "project": False}, 1.0)):
        updates, (params, _), _ = plain_step(jaxfa.ssa(parallel=False, beta=0.1, **options))
        after = optax.apply_updates(params, updates[0])
        drifts = max(float(drift(p["w"])) for p in after)
        assert largest / 100 < drifts + (largest < 1e-12) < largest + (largest < 1e-12), (options, drifts)


def run(rule, steps, tx=None, key=KEY):
    init, step = train(rule, tx or optax.sgd(0.1))
    both = create(rule, key)
    state, step = init(both), jax.jit(step)
    for _ in range(steps):
        both, state = step(both, state, *batch(), KEY)
    return both


def test_the_orthogonality_loss_holds_what_only_steps_along_the_manifold_let_go(x64):
    drifts = []
    for gamma in (0.0, 0.1):
        rule = jaxfa.ssa(parallel=False, beta=0.0, gamma=gamma, retract=False)
        params, _ = run(rule, 60, optax.sgd(0.5))
        drifts.append(max(float(drift(p["w"])) for p in params))
    assert drifts[1] < 0.3 * drifts[0]


def test_literal_alignment_pulls_the_weights_to_the_feedback_and_freezes_them_there(x64):
    rule = jaxfa.ssa(parallel=False, alpha=0.0, beta=1.0)
    reached = []
    for key in jax.random.split(KEY, 3):
        (params, feedback), (_, before) = run(rule, 300, key=key), create(rule, key)
        chex.assert_trees_all_equal(feedback, before)
        for w, b in ((p["w"], b.b) for p, b in zip(params[1:], feedback[1:], strict=True)):
            for one, other in ((w.u, b.u), (w.v, b.v)):
                # On the manifold no square matrix comes to one of the other determinant: a column stays turned around.
                reached.append(one.shape[0] > one.shape[1] or float(jnp.linalg.det(one.T @ other)) > 0)
                np.testing.assert_allclose(jnp.linalg.norm(one - other), 0 if reached[-1] else 2, atol=1e-5)
            np.testing.assert_allclose(w.s, b.s, atol=1e-6)
    assert {*reached} == {True, False}


def test_alignment_may_pull_the_feedback_instead_which_is_weight_transport_by_name(x64):
    rule = jaxfa.ssa(parallel=False, alpha=0.0, beta=1.0, pull_weights=False, pull_feedback=True)
    (params, feedback), (before, _) = run(rule, 100), create(rule, KEY)
    chex.assert_trees_all_close(params, before, atol=1e-12)
    assert "Transported" in type(feedback[1]).__name__
    for p, b in zip(params[1:], feedback[1:], strict=True):
        chex.assert_trees_all_close(p["w"], b.b, atol=1e-6)
    both = run(jaxfa.ssa(parallel=False, alpha=0.0, beta=0.1, pull_feedback=True), 1)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), both, create(rule, KEY))
    assert min(jax.tree.leaves((moved[0][1]["w"].u, moved[1][1].b.u))) > 1e-6


def test_weight_decay_never_touches_the_lift(x64):
    rule = jaxfa.ssa(pull_feedback=True, beta=0.1)
    _, before = create(rule, KEY)
    _, after = run(rule, 3, optax.adamw(0.1, weight_decay=0.5))
    chex.assert_trees_all_equal(after[0].lift, before[0].lift)
    assert np.abs(after[0].b.u - before[0].b.u).max() > 1e-2


def test_alignment_brings_the_sequential_pseudo_gradient_nearer_to_the_true_one(x64):
    def angle(beta):
        params, feedback = run(jaxfa.ssa(parallel=False, beta=beta), 300)
        pseudo, true = signals(params, feedback, *batch())[0], signals(params, None, *batch())[0]
        return float(jaxfa.diagnostics.angle(pseudo[-2]["b"], true[-2]["b"]))

    assert angle(0.05) < angle(0.0) - 5


@pytest.mark.long
def test_training_goes_on_after_pruning_and_the_step_costs_less(x64):
    rule = jaxfa.ssa(parallel=False)
    init, step = train(rule, optax.adam(1e-3))
    both = create(rule, KEY, (64, 64, 64, 3))
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64))), batch()[1]
    state = init(both)
    cost = jaxfa.diagnostics.flops(step, both, state, x, y, KEY)
    params, feedback, state = jaxfa.factored.prune(*both, state, energy=0.5)
    assert jaxfa.diagnostics.flops(step, (params, feedback), state, x, y, KEY) < 0.6 * cost
    before = loss(params, None, x, y)
    step = jax.jit(step)
    for _ in range(60):
        (params, feedback), state = step((params, feedback), state, x, y, KEY)
    assert loss(params, None, x, y) < before
    assert forward(params, None, x).shape == (8, 3)


def test_wrong_use_is_told():
    w = jaxfa.factored.factorise(jnp.eye(4, 3))
    with pytest.raises(ValueError, match="alpha, beta and gamma >= 0"):
        jaxfa.ssa(beta=-1.0)
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="needs scale > 0"):
            jaxfa.ssa(scale=scale)
    with pytest.raises(ValueError, match="whole number from 1"):
        jaxfa.ssa(rank=-3)
    with pytest.raises(ValueError, match="needs factored weights"):
        jaxfa.ssa(parallel=False).init(KEY, w.dense())
    with pytest.raises(ValueError, match="inputs of factored layers alone"):
        jaxfa.ssa().init(KEY, jnp.ones((5, 4)), jnp.ones((5, 2)))
    rule = jaxfa.ssa(parallel=False)
    both = [w, w], [rule.init(KEY, w), rule.init(KEY, w)]
    tx = jaxfa.optimizer(optax.sgd(0.1), rule)
    with pytest.raises(ValueError, match="a name of its own"):
        tx.update(both, tx.init(both), both)
    assert isinstance(rule.weights(jnp.eye(3), "fc"), Factors)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_layer_that_starts_at_zero_is_refused_where_its_values_are_known(parallel):
    rule, zero = jaxfa.ssa(parallel=parallel), jaxfa.factored.factorise(jnp.zeros((4, 3)), name="head")

    def init(key, w):
        if not parallel:
            return rule.init(key, w)
        return rule.init(key, jnp.ones((5, 4)), jnp.ones((5, 2)), layer=jaxfa.Layer(jaxfa.linear, jnp.ones((5, 4)), w))

    for make in (init, lambda key, w: jax.jit(lambda key: init(key, zero))(key)):
        with pytest.raises(ValueError, match=r"weights of 'head' are all zero.*Initialise the layer otherwise"):
            make(KEY, zero)
    assert jax.eval_shape(init, KEY, zero).b.s.shape == (3,)


@pytest.mark.parametrize("pull", ["pull_weights", "pull_feedback"])
def test_alignment_refuses_feedback_without_weights_and_takes_weights_without_feedback(pull):
    rule = jaxfa.ssa(parallel=False, **{"pull_weights": False, "pull_feedback": False, pull: True}, alpha=0.0)
    a, b = (jaxfa.factored.factorise(jnp.eye(4, 3), name=name) for name in "ab")
    tx = jaxfa.optimizer(optax.sgd(0.1), rule)

    def update(weights, feedback):
        both = weights, [rule.init(KEY, w) for w in feedback]
        return tx.update(jax.tree.map(jnp.zeros_like, both), tx.init(both), both)[0]

    with pytest.raises(ValueError, match=r"feedback for \['b'\] but factored weights for \['a'\]"):
        update([a], [a, b])
    weights, (feedback,) = update([a, b], [a])
    assert np.any(weights[0].u) == (pull == "pull_weights")
    assert np.any(feedback.b.u) == (pull == "pull_feedback")
    assert not np.any(weights[1].u)


def test_no_orthogonality_costs_nothing():
    w = jaxfa.factored.factorise(jnp.eye(64))
    costs = []
    for gamma in (0.0, 0.1):
        rule = jaxfa.ssa(parallel=False, beta=0.0, gamma=gamma, project=False, retract=False)
        tx = jaxfa.optimizer(optax.sgd(0.1), rule)
        both = w, rule.init(KEY, w)
        costs.append(jaxfa.diagnostics.flops(tx.update, both, tx.init(both), both))
    assert costs[0] < 0.1 * costs[1]
