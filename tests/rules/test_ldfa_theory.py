"""What theory says of low-dimensional feedback: to what Oja's rule and linear networks converge, and what must not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxfa
from jaxfa.rules.shared.lowrank import oja

KEY = jax.random.key(11)
RATE, DECAY = 0.05, 1e-3


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def projector(columns):
    u, _, _ = np.linalg.svd(np.asarray(columns), full_matrices=False)
    return u @ u.T


def errors(rng, spectrum, rows=40, mean=0.0):
    """Rows of exactly the covariance ``V diag(spectrum) V^T``, and ``V``."""
    m = len(spectrum)
    u = rng.normal(size=(rows, m))
    u = np.linalg.qr(u - u.mean(0))[0]
    v = np.linalg.qr(rng.normal(size=(m, m)))[0]
    return np.sqrt(rows) * (u * np.sqrt(spectrum)) @ v.T + mean, v


def learned(rule, deltas, steps, start=None):
    """``p`` after training one layer on the same errors again and again."""
    m = deltas.shape[-1]
    params, x = {"w": jnp.zeros((m, m))}, jnp.zeros(deltas.shape)
    feedback = rule.init(KEY, params["w"], path="head")
    feedback = feedback if start is None else replace(feedback, p=jnp.asarray(start))
    tx = jaxfa.optimizer(optax.sgd(0.1), rule)

    def step(carry, _):
        (params, feedback), state = carry
        _, dw, signal = jax.vjp(jaxfa.linear, x, params["w"], feedback)[1](jnp.asarray(deltas))
        updates, state = tx.update(({"w": dw}, signal), state, (params, feedback))
        return (optax.apply_updates((params, feedback), updates), state), None

    both = params, feedback
    (both, _), _ = jax.jit(lambda carry: lax.scan(step, carry, None, length=steps))((both, tx.init(both)))
    return np.asarray(both[1].p)


def paper(p, c, steps, rate, form="PC(I-P'P)"):
    """Equation 15 in the paper's orientation, ``P: r x m``, and forms that it must not be mistaken for."""
    r, m = p.shape
    c = c / np.trace(c)
    for _ in range(steps):
        if form == "(I-PP')PC":
            p = p + rate * (np.eye(r) - p @ p.T) @ p @ c
        else:
            p = p + (-1 if form == "wrong sign" else 1) * rate * p @ c @ (np.eye(m) - p.T @ p)
        if np.linalg.norm(p) > 1e3:
            break
    return p


def test_oja_turns_p_to_the_principal_subspace_and_only_the_papers_form_does(rng, x64):
    spectrum, r = [5.0, 3.0, 2.0, 0.4, 0.2, 0.1], 3
    deltas, v = errors(rng, spectrum, mean=4.0 * rng.normal(size=6))
    rule, goal = jaxfa.ldfa(r, learning_rate=0.9), v[:, :r] @ v[:, :r].T
    start = np.asarray(rule.init(KEY, jnp.zeros((6, 6))).p)
    assert np.linalg.norm(projector(start) - goal) > 0.5
    p = learned(rule, deltas, 400)
    np.testing.assert_allclose(p.T @ p, np.eye(r), atol=1e-6)
    np.testing.assert_allclose(p @ p.T, goal, atol=1e-6)
    rotation = np.abs(p.T @ v[:, :r])  # the subspace, not the components one by one
    assert np.max(np.sort(rotation, axis=0)[-2]) > 0.1
    c, raw = np.cov(deltas.T, bias=True), deltas.T @ deltas / len(deltas)
    np.testing.assert_allclose(paper(start.T, c, 400, 0.9), p.T, atol=1e-6)
    for form in ("(I-PP')PC", "wrong sign"):
        wrong = paper(start.T + 1e-3, c, 400, 0.9, form)
        assert np.linalg.norm(wrong.T @ wrong - goal) > 0.3, form
    assert np.linalg.norm(paper(start.T, c, 400, 0.9, "wrong sign")) > 100
    uncentred = paper(start.T, raw, 400, 0.9).T
    mean = deltas.mean(0) / np.linalg.norm(deltas.mean(0))
    assert np.linalg.norm(projector(uncentred) @ mean) > 0.99
    assert np.linalg.norm(goal @ mean) < 0.9
    assert np.linalg.norm(projector(uncentred) - goal) > 0.3


# A high rank for few errors goes another way to the same.
@pytest.mark.parametrize("rank", [2, 4])
def test_ojas_step_knows_no_mean_no_scale_and_no_number_of_examples(rank, rng, x64):
    e, p = rng.normal(size=(12, 5)) @ rng.normal(size=(5, 5)), jnp.asarray(rng.normal(size=(5, rank)))
    c = np.cov(e.T, bias=True)
    np.testing.assert_allclose(oja(p, jnp.asarray(e)), (c @ p - p @ p.T @ c @ p) / np.trace(c), atol=1e-12)
    step = oja(p, jnp.asarray(e))
    assert np.linalg.norm(step) > 0.1
    for same in (e + 7.0, 1000 * e, -e, np.concatenate([e, e, e]), e.reshape(3, 4, 5), 1e-100 * e, e[::-1]):
        np.testing.assert_allclose(oja(p, jnp.asarray(same)), step, atol=1e-12)
    assert np.linalg.norm(oja(p, jnp.asarray(e * [1, 2, 3, 4, 5])) - step) > 0.1
    for silent in (0 * e, 0 * e + 3.0):
        np.testing.assert_array_equal(oja(p, jnp.asarray(silent)), 0)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_ojas_step_survives_single_precision(scale, rng):
    e, p = rng.normal(size=(64, 6)), rng.normal(size=(6, 2))
    c = np.cov(e.T, bias=True)
    expected = (c @ p - p @ p.T @ c @ p) / np.trace(c)
    got = oja(jnp.asarray(p, jnp.float32), jnp.asarray(scale * e, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(oja(jnp.asarray(p, jnp.float32), jnp.zeros((64, 6))), 0)


@pytest.mark.parametrize(("offset", "atol"), [(10, 1e-5), (100, 1e-4), (1000, 1e-3)])
@pytest.mark.parametrize(("rows", "rank"), [(4096, 8), (64, 60)])
def test_in_single_precision_errors_far_from_zero_are_centred_too(rows, rank, offset, atol, rng):
    e, p = (
        (rng.normal(size=(rows, 128)) * np.geomspace(1, 9, 128) + offset).astype(np.float32),
        rng.normal(size=(128, rank)),
    )
    p = np.linalg.qr(p)[0]
    c = np.cov(e.T.astype(float), bias=True)
    expected = (c @ p - p @ p.T @ c @ p) / np.trace(c)
    assert np.abs(expected).max() > 2e-3
    np.testing.assert_allclose(oja(jnp.asarray(p, jnp.float32), jnp.asarray(e)), expected, atol=atol)


@pytest.mark.parametrize("size", [1e-25, 1e-20, 9e-20, 1e18, 1e19])
def test_where_squares_leave_the_numbers_there_is_no_step_or_the_right_one(size):
    signs = np.where(np.arange(512)[:, None] % 7 == 0, 0.5, 1) * np.where(np.arange(512)[:, None] % 2, 1, -1)
    e = jnp.asarray(size * signs * np.ones((1, 4096)), jnp.float32)
    p = jnp.full((4096, 1), 1 / 64, jnp.float32)
    step = oja(p, e)
    right = oja(p, jnp.asarray(signs * np.ones((1, 4096)), jnp.float32))
    assert bool(jnp.all(step == 0)) or float(jnp.abs(step - right).max()) < 1e-4


def test_a_projection_in_half_precision_has_its_step_from_single(rng):
    e, p = 30 * rng.normal(size=(512, 64)) * np.geomspace(1, 9, 64), np.linalg.qr(rng.normal(size=(64, 4)))[0]
    half = jnp.asarray(p, jnp.float16)
    step, whole = oja(half, jnp.asarray(e, jnp.float32)), oja(half.astype(jnp.float32), jnp.asarray(e, jnp.float32))
    assert step.dtype == jnp.float16
    np.testing.assert_allclose(step.astype(jnp.float32), whole, atol=1e-4)


@pytest.mark.parametrize(("rate", "converges"), [(0.3, True), (0.95, True), (1.05, False), (1.5, False)])
def test_p_is_stable_up_to_a_learning_rate_of_one(rate, converges, rng, x64):
    # One direction carries all variance: |p| has the slope 1 - 2 rate at its fixed point.
    deltas, v = errors(rng, [1.0, 0.0, 0.0])
    start = np.asarray([[0.6], [0.7], [0.3]]) * 1.1
    rule = jaxfa.ldfa(1, learning_rate=rate)
    # Some of many steps come close by chance.
    off = [abs(np.linalg.norm(learned(rule, deltas, steps, start).T @ v[:, :1]) - 1) for steps in (400, 401, 408)]
    assert max(off) < 1e-9 if converges else max(off) > 0.05, off


def test_p_stays_bounded_in_noise_at_a_rate_below_one(x64):
    def step(p, key):
        direction, *_ = jax.random.normal(key, (1, 6))
        e = jnp.outer(jnp.array([1.0, -1.0]), direction)  # every batch has one direction of its own
        p = p + 0.95 * oja(p, e)
        return p, jnp.linalg.norm(p.T @ p - jnp.eye(3))

    start = jaxfa.ldfa(3).init(KEY, jnp.ones((6, 6))).p
    _, off = jax.jit(lambda p: lax.scan(step, p, jax.random.split(KEY, 3000)))(start)
    assert np.max(off) < 3
    assert np.max(off) > 1e-3


def test_labels_turn_p_to_the_span_of_the_classes(rng, x64):
    y = np.array([0, 2, 5, 5, 2, 0, 0, 5, 0, 2])
    onehot = np.eye(6)[y]
    deltas = (np.asarray(jax.nn.softmax(rng.normal(size=(10, 6)))) - onehot) * np.exp(rng.normal(size=(10, 1)))
    span = onehot - onehot.mean(0)
    assert np.linalg.matrix_rank(span) == 2  # one less than the classes that are there
    goal = projector(np.linalg.svd(span)[2][:2].T)
    p = learned(jaxfa.ldfa(2, learning_rate=0.9, labels="head"), deltas, 300)
    np.testing.assert_allclose(p @ p.T, goal, atol=1e-6)
    assert np.linalg.norm(projector(learned(jaxfa.ldfa(2, learning_rate=0.9), deltas, 300)) - goal) > 0.1
    wider = learned(jaxfa.ldfa(3, learning_rate=0.9, labels="head"), deltas, 300)
    np.testing.assert_allclose(projector(wider) @ goal, goal, atol=1e-6)


def linear_network(rule, seeds=3, steps=6000, size=0.3):
    """Two linear layers learn a teacher ``16 -> 8`` of rank two; the last losses, gradients and singular values."""
    n, k, m = 16, 8, 8
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, n))
    x = jnp.asarray(8 * np.linalg.qr(x - x.mean(0))[0])
    a, b = (np.linalg.qr(rng.normal(size=(rows, 2)))[0] for rows in (n, m))
    y = x @ (a * [2.0, 1.0] @ b.T)

    def loss(params, feedback):
        return jnp.sum((jaxfa.linear(x @ params[0]["w"], params[1]["w"], feedback[1]) - y) ** 2) / (2 * len(x))

    def one(key):
        keys = jax.random.split(key, 3)
        shapes = (n, k), (k, m)
        params = [{"w": size * jax.random.normal(q, s) / np.sqrt(s[0])} for q, s in zip(keys[:2], shapes, strict=True)]
        both = params, [None, rule.init(keys[2], params[1]["w"])]
        tx = jaxfa.optimizer(optax.sgd(RATE), rule)

        def step(carry, _):
            both, state = carry
            updates, state = tx.update(jax.grad(loss, argnums=(0, 1))(*both), state, both)
            return (optax.apply_updates(both, updates), state), None

        (both, _), _ = lax.scan(step, (both, tx.init(both)), None, length=steps)
        return loss(*both), optax.tree.norm(jax.grad(loss)(*both)), both[0][0]["w"] @ both[0][1]["w"]

    losses, gradients, products = jax.jit(jax.vmap(one))(jax.random.split(KEY, seeds))
    return np.asarray(losses), np.asarray(gradients), np.linalg.svd(products)[1]


def test_a_linear_network_with_a_learned_p_of_the_teachers_rank_learns_what_backpropagation_does(x64):
    # Under decay that is the teacher with both of its singular values less by decay / rate.
    goal = np.array([2.0 - DECAY / RATE, 1.0 - DECAY / RATE, 0, 0, 0, 0, 0, 0])
    losses, _, values = linear_network(jaxfa.ldfa(2, weight_decay=DECAY, learning_rate=0.1))
    np.testing.assert_allclose(values, np.broadcast_to(goal, values.shape), atol=1e-3)
    np.testing.assert_allclose(losses, (DECAY / RATE) ** 2, rtol=0.05)
    losses, _, _ = linear_network(jaxfa.ldfa(2, weight_decay=DECAY, learn_p=False))
    assert np.all(losses > 1.5 * (DECAY / RATE) ** 2)  # a P that stands still finds another point


def test_below_the_teachers_rank_it_stays_at_the_leading_mode(x64):
    losses, _, values = linear_network(jaxfa.ldfa(1, weight_decay=DECAY, learning_rate=0.01))
    assert np.all(losses > 0.4)
    assert np.all(values[:, 1] < 0.05 * values[:, 0])


def test_a_fixed_feedback_gets_stuck_below_the_teachers_rank_and_only_there(x64):
    fixed = {"learn_p": False, "learn_q": False}
    losses, gradients, values = linear_network(jaxfa.ldfa(1, **fixed), size=1e-3)
    assert np.all(gradients < 0.01)
    assert np.all(losses > 0.4)
    assert np.all(values[:, 1] < 0.01)
    # From rank two on a point with no gradient has P (A - W) = 0 and (A - W) W_1^T = 0, hence no error at all.
    losses, _, _ = linear_network(jaxfa.ldfa(2, **fixed), size=1e-3)
    assert np.all(losses < 1e-6)
