"""How low-dimensional feedback follows the weights: Q by Hebb's rule at the decay's rate, both factors by fitting."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxfa
from jaxfa.optim.optimizer import of_pair
from tests.methods import batch, create, train

KEY = jax.random.key(11)


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def missed(rule, tx, steps=40, decay=0.02):
    """How far ``q - w p`` is after training from what it was before times ``(1 - decay)^steps``, relatively."""
    init, step = train(rule, tx)
    first, data = create(rule, KEY), batch()
    start = jax.tree.map(lambda leaf: leaf + 0.1, first)

    def one(carry, _):
        return step(*carry, *data, KEY), None

    ((params, feedback), _), _ = jax.jit(lambda carry: lax.scan(one, carry, None, length=steps))((start, init(start)))

    def gap(params, feedback):
        direct = isinstance(feedback[-1], jaxfa.DirectFeedback)
        above = [(params[-1], feedback[-1])] if direct else zip(params[1:], feedback[1:], strict=True)
        return [np.asarray(f.q - p["w"] @ f.p) for p, f in above]

    found = []
    for before, after in zip(gap(*start), gap(params, feedback), strict=True):
        law = (1 - decay) ** steps * before
        found.append(np.linalg.norm(after - law) / np.linalg.norm(law))
    assert np.linalg.norm(params[-1]["w"] - (1 - decay) ** steps * start[0][-1]["w"]) > 0.1
    return found


@pytest.mark.parametrize(
    ("family", "tx"),
    [
        (jaxfa.ldfa, optax.sgd(0.1)),
        (jaxfa.ldfa, optax.sgd(optax.cosine_decay_schedule(0.2, 40), momentum=0.5, nesterov=True)),
        (jaxfa.dldfa, optax.sgd(0.1, momentum=0.5)),
    ],
    ids=["sgd", "nesterov_schedule", "direct_momentum"],
)
def test_behind_a_fixed_p_q_follows_the_weights_at_the_rate_of_the_decay(family, tx, x64):
    assert max(missed(family(2, learn_p=False, weight_decay=0.02), tx)) < 1e-12


def beside(rule, for_feedback):
    """The rule, but that its feedback learns by another transformation of the pair."""

    def transform(tx):
        ours, others = of_pair(tx, rule), for_feedback(tx)

        def update(updates, states, both):
            (steps, _), mine = ours.update(updates, states[0], both)
            (_, learned), theirs = others.update(updates, states[1], both)
            return (steps, learned), (mine, theirs)

        return optax.GradientTransformation(lambda both: (ours.init(both), others.init(both)), update)

    return replace(rule, transform=transform)


def other_decay(rule):
    return beside(rule, lambda tx: of_pair(tx, jaxfa.ldfa(2, learn_p=False, weight_decay=0.03)))


def wrong_sign(rule):
    return beside(rule, lambda tx: of_pair(optax.chain(tx, optax.scale(-1)), rule))


@pytest.mark.parametrize(
    ("family", "change", "tx", "learn_p"),
    [
        (jaxfa.ldfa, other_decay, optax.sgd(0.1), False),
        (jaxfa.ldfa, wrong_sign, optax.sgd(0.1), False),
        (jaxfa.ldfa, lambda rule: rule, optax.sgd(0.1), True),
        (jaxfa.ldfa, lambda rule: rule, optax.adamw(1e-2), False),
        (jaxfa.dldfa, wrong_sign, optax.sgd(0.1), False),
    ],
    ids=["other_decay", "wrong_sign", "moving_p", "adamw", "direct_wrong_sign"],
)
def test_that_law_needs_one_decay_one_sign_a_fixed_p_and_linear_steps(family, change, tx, learn_p, x64):
    assert min(missed(change(family(2, learn_p=learn_p, weight_decay=0.02, learning_rate=0.5)), tx)) > 0.01


def test_under_adam_the_law_holds_where_p_only_picks_units(x64):
    # Adam works entry by entry, and the entries of dw p are then entries of dw.
    rule = jaxfa.ldfa(2, learn_p=False, weight_decay=0.02)

    def picking(key, w):
        made = rule.init(key, w)
        return replace(made, p=jnp.eye(w.shape[-1])[:, ::-2][:, :2] - 0.1)

    tx = optax.adamw(1e-2, weight_decay=0.3)
    assert max(missed(replace(rule, init=picking), tx, decay=0.023)) < 1e-12


@pytest.mark.parametrize(
    ("op", "x_shape", "w_shape"),
    [(jaxfa.linear, (5, 6), (6, 4)), (functools.partial(jaxfa.conv, strides=2), (2, 5, 6, 3), (3, 3, 3, 4))],
    ids=["dense", "conv"],
)
def test_where_q_has_followed_it_is_backpropagation_of_the_error_projected_on_p(op, x_shape, w_shape, rng, x64):
    x, w = jnp.asarray(rng.normal(size=x_shape)), jnp.asarray(rng.normal(size=w_shape))
    delta = jnp.asarray(rng.normal(size=jax.eval_shape(op, x, w).shape))
    feedback = jaxfa.ldfa(2).init(KEY, w)
    feedback = replace(feedback, q=jnp.tensordot(w, feedback.p, 1))

    @jax.jit
    def through(feedback, delta):
        return jax.vjp(lambda x: op(x, w, feedback), x)[1](delta)[0]

    u = np.linalg.svd(feedback.p)[0][:, :2]
    dx, inside = through(feedback, delta), delta @ (u @ u.T)
    np.testing.assert_allclose(dx, through(None, inside), atol=1e-12)
    np.testing.assert_allclose(through(feedback, inside), dx, atol=1e-12)
    assert np.linalg.norm(dx - through(None, delta)) > 0.1


def distance(feedback, w):
    return np.linalg.norm(feedback.matrix(w) - w)


def optimum(w, r):
    """Eckart's and Young's: what no product of rank ``r`` falls below."""
    return np.sqrt(np.sum(np.linalg.svd(np.asarray(w).reshape(-1, w.shape[-1]))[1][r:] ** 2))


@functools.partial(jax.jit, static_argnums=(0, 3))
def fitted(rule, w, feedback, times):
    layers = [None, jaxfa.Layer(jaxfa.linear, None, w)]
    return lax.fori_loop(0, times, lambda _, f: rule.refine(layers, f, KEY), [None, feedback])[1]


@pytest.mark.parametrize("shape", [(9, 6), (4, 6), (3, 3, 2, 5)], ids=["tall", "wide", "conv"])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_the_normative_factors_start_at_the_optimum_keep_it_and_find_it_from_anywhere(shape, rate, rng, x64):
    rule, w, r = jaxfa.normative_ldfa(3, learning_rate=rate), jnp.asarray(rng.normal(size=shape)), 3
    start = rule.init(KEY, w)
    assert optimum(w, r) > 0.1
    np.testing.assert_allclose(distance(start, w), optimum(w, r), rtol=1e-12)
    np.testing.assert_allclose(fitted(rule, w, start, 5).matrix(w), start.matrix(w), atol=1e-9)
    anywhere = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), start)
    assert distance(anywhere, w) > 2 * optimum(w, r)
    found = fitted(rule, w, anywhere, 400)
    np.testing.assert_allclose(distance(found, w), optimum(w, r), rtol=1e-9)
    np.testing.assert_allclose(found.matrix(w), start.matrix(w), atol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.7, 1.0])
def test_a_normative_step_is_the_papers_and_never_increases_the_distance(rate, rng, x64):
    rule, w = jaxfa.normative_ldfa(2, learning_rate=rate), jnp.asarray(rng.normal(size=(7, 5)))
    for size in (1e-3, 1.0, 1e3):  # far too small, right, far too large
        start = rule.init(KEY, w)
        feedback = replace(start, p=jnp.asarray(rng.normal(size=(5, 2))), q=size * jnp.asarray(rng.normal(size=(7, 2))))
        P, Q, W = np.asarray(feedback.p).T, np.asarray(feedback.q), np.asarray(w).T
        Q = Q - rate * (Q @ P - W.T) @ P.T @ np.linalg.inv(P @ P.T)
        P = P - rate * np.linalg.inv(Q.T @ Q) @ Q.T @ (Q @ P - W.T)
        before = distance(feedback, w)
        feedback = fitted(rule, w, feedback, 1)
        np.testing.assert_allclose(feedback.q, Q, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(feedback.p, P.T, rtol=1e-9, atol=1e-9)
        assert distance(feedback, w) < before
        for _ in range(20):
            before, feedback = distance(feedback, w), fitted(rule, w, feedback, 1)
            assert distance(feedback, w) <= before * (1 + 1e-12)


def test_stacked_layers_are_fitted_side_by_side_and_follow_weights_that_move(rng, x64):
    rule = jaxfa.normative_ldfa(2)
    for shape in ((3, 6, 5), (2, 3, 3, 2, 4)):
        w, later = (jnp.asarray(rng.normal(size=shape)) for _ in range(2))
        stacked = jax.vmap(rule.init)(jax.random.split(KEY, shape[0]), w)
        moved = fitted(rule, later, stacked, 100)
        for i in range(shape[0]):
            before, after = (jax.tree.map(lambda leaf, i=i: leaf[i], f) for f in (stacked, moved))
            np.testing.assert_allclose(distance(before, w[i]), optimum(w[i], 2), rtol=1e-12)
            assert distance(before, later[i]) > 1.2 * optimum(later[i], 2)
            np.testing.assert_allclose(distance(after, later[i]), optimum(later[i], 2), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("kind", ["zero", "rank_one", "tiny", "huge"])
def test_degenerate_weights_give_no_nan(kind, dtype, rng, x64):
    full, one = rng.normal(size=(6, 5)), np.outer(rng.normal(size=6), rng.normal(size=5))
    w = jnp.asarray({"zero": 0 * full, "rank_one": one, "tiny": 1e-12 * full, "huge": 1e8 * full}[kind], dtype)
    rule = jaxfa.normative_ldfa(3)
    for times in (0, 1, 10):
        feedback = fitted(rule, w, rule.init(KEY, w), times)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(feedback))
        limit = optimum(w, 3) + 1e-5 * np.linalg.norm(w)
        assert distance(feedback, w) <= limit


@pytest.mark.parametrize("start", ["zero", "rank_one", "passing_zero"])
def test_weights_that_leave_zero_are_followed(start, rng, x64):
    rule, w = jaxfa.normative_ldfa(3), jnp.asarray(rng.normal(size=(6, 5)))
    first = jnp.outer(w[:, 0], w[0]) if start == "rank_one" else 0 * w
    feedback = rule.init(KEY, w if start == "passing_zero" else first)
    feedback = fitted(rule, w, fitted(rule, first, feedback, 2), 100)
    np.testing.assert_allclose(distance(feedback, w), optimum(w, 3), rtol=1e-6)
