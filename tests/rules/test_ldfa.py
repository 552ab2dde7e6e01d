"""Low-dimensional feedback against its closed forms, written as the paper's columns, and what it refuses."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxfa
from jaxfa.jaxprs.versions import equations, opened
from tests.methods import batch, create, signals

KEY = jax.random.key(7)
VARIANTS = [(True, True), (True, False), (False, True), (False, False)]
FIXED = {"learn_p": False, "learn_q": False}
OPERATIONS = {
    "dense": (jaxfa.linear, (5, 4), (4, 3)),
    "few": (jaxfa.linear, (4, 9), (9, 8)),
    "tokens": (jaxfa.linear, (2, 5, 4), (4, 3)),
    "heads": (jaxfa.with_feedback(lambda x, w: jnp.einsum("nhi,hij->nhj", x, w)), (4, 2, 3), (2, 3, 5)),
    "conv1d_valid": (functools.partial(jaxfa.conv, padding="VALID"), (2, 9, 3), (4, 3, 4)),
    "conv2d_strided": (functools.partial(jaxfa.conv, strides=2), (2, 7, 6, 3), (3, 3, 3, 4)),
    "conv2d_dilated": (functools.partial(jaxfa.conv, dilation=(2, 1), padding="VALID"), (2, 7, 6, 3), (3, 2, 3, 4)),
}
every_operation = pytest.mark.parametrize(("op", "x_shape", "w_shape"), OPERATIONS.values(), ids=OPERATIONS)


@pytest.fixture
def normal():
    rng = np.random.default_rng(4)
    return lambda *shape: jnp.asarray(rng.normal(size=shape))


@functools.partial(jax.jit, static_argnums=0)
def backward(op, x, w, feedback, delta):
    """``dx``, ``dw`` and the signal that the feedback receives."""
    return jax.vjp(op, x, w, feedback)[1](delta)


def paper_oja(p, d):
    """Equation 15 for ``P: r x m`` and errors as the columns of ``D: m x N``; the covariance has a trace of one."""
    c = np.cov(d, bias=True)
    return p @ (c / np.trace(c)) @ (np.eye(len(c)) - p.T @ p)


def test_the_paper_writes_columns_and_the_covariance_is_centred():
    D = np.array([[1.0, 3.0], [0.0, 0.0]])  # mean 2, deviation 1: C = diag(1, 0)
    np.testing.assert_allclose(paper_oja(np.array([[0.6, 0.8]]), D), [[0.6 - 0.6 * 0.36, -0.6 * 0.48]])


@every_operation
def test_an_orthonormal_square_p_with_its_q_is_backpropagation(op, x_shape, w_shape, normal, x64):
    x, w = normal(*x_shape), normal(*w_shape)
    delta = normal(*jax.eval_shape(op, x, w).shape)
    true_dx, true_dw = backward(op, x, w, None, delta)[:2]
    rotation = jnp.asarray(np.linalg.qr(normal(w_shape[-1], w_shape[-1]))[0])
    q = jnp.tensordot(w, rotation, 1)
    feedback = replace(jaxfa.ldfa(1.0, **FIXED).init(KEY, w), p=rotation, q=q)
    dx, dw, signal = backward(op, x, w, feedback, delta)
    np.testing.assert_allclose(dx, true_dx, atol=1e-12)
    np.testing.assert_allclose(dw, true_dw, atol=1e-12)
    assert not any(map(np.any, jax.tree.leaves(signal)))
    assert np.linalg.norm(backward(op, x, w, replace(feedback, p=rotation.T), delta)[0] - true_dx) > 0.1
    cut = rotation.at[:, 0].set(0)
    assert np.linalg.norm(backward(op, x, w, replace(feedback, p=cut), delta)[0] - true_dx) > 0.1
    dx, dw, signal = backward(op, x, w, jaxfa.normative_ldfa(1.0).init(KEY, w), delta)
    np.testing.assert_allclose(dx, true_dx, atol=1e-12)
    np.testing.assert_allclose(dw, true_dw, atol=1e-12)
    assert not any(map(np.any, jax.tree.leaves(signal)))


@pytest.mark.parametrize(
    ("case", "options", "product"),
    [
        ((4, 9), FIXED, False),  # 3 x 3 windows of 4 channels: 36 inputs and 8 outputs
        ((7, 9), FIXED, True),
        ((7, 1), FIXED, False),  # too few errors for a product to be formed
        ((7, 9), {}, False),  # p learns from the thin errors, which are there
        ((8, 9), {}, True),
    ],
)
def test_errors_take_the_product_where_the_factors_cost_more(case, options, product, normal, x64):
    (r, examples), op, w = case, jaxfa.conv, normal(3, 3, 4, 8)
    x, delta = normal(examples, 4, 4, 4), normal(examples, 4, 4, 8)
    feedback = jaxfa.ldfa(r, **options).init(KEY, w)
    formed = jnp.tensordot(feedback.q, feedback.p, (-1, -1))
    wanted = backward(op, x, w, jaxfa.FixedFeedback(formed), delta)[0]
    np.testing.assert_allclose(backward(op, x, w, feedback, delta)[0], wanted, atol=1e-12)
    program = opened(jax.make_jaxpr(lambda delta: feedback.transport(op, x, w, delta))(delta))
    (made,) = (eqn.outvars[0].aval.shape for eqn in equations(program) if eqn.primitive.name == "dot_general")
    assert made == (w.shape if product else (*delta.shape[:-1], r))


@pytest.mark.parametrize("examples", [5, 8])
def test_q_learns_from_the_smaller_product(examples, normal, x64):
    x, w, delta = normal(examples, 6), normal(6, 8), normal(examples, 8)
    feedback = jaxfa.ldfa(2, learn_p=False).init(KEY, w)
    program = opened(jax.make_jaxpr(jax.vjp(jaxfa.linear, x, w, feedback)[1])(delta))
    products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    made = [eqn for eqn in products if sorted(eqn.outvars[0].aval.shape) == [2, 6]]
    summed = {eqn.invars[0].aval.shape[eqn.params["dimension_numbers"][0][0][0]] for eqn in made}
    assert summed == {min(examples, 8)}


def test_a_square_p_that_was_drawn_orthonormal_takes_no_steps(normal, x64):
    w, errors = normal(6, 4), normal(9, 4)
    drawn, given = (jaxfa.ldfa(4, projection=one).init(KEY, w) for one in (None, jax.nn.initializers.normal(1.0)))
    # Oja's step, which is none.
    assert jnp.abs(replace(drawn, learn_p=True).signal(None, w, errors, w).p).max() < 1e-14
    assert not jnp.any(drawn.signal(None, w, errors, w).p)
    assert jnp.abs(given.signal(None, w, errors, w).p).max() > 1e-2
    assert jnp.abs(jaxfa.ldfa(3).init(KEY, w).signal(None, w, errors, w).p).max() > 1e-2


@every_operation
def test_it_starts_as_feedback_alignment_through_p(op, x_shape, w_shape, normal, x64):
    x, w, b = normal(*x_shape), normal(*w_shape), normal(*w_shape)
    delta = normal(*jax.eval_shape(op, x, w).shape)
    for r in (w_shape[-1], w_shape[-1] - 1):
        rule = jaxfa.ldfa(r, distribution=lambda *_: b, scale=2.0)
        feedback, other = (rule.init(key, w) for key in jax.random.split(KEY))
        assert np.linalg.norm(feedback.p - other.p) > 0.1
        np.testing.assert_allclose(feedback.p.T @ feedback.p, np.eye(r), atol=1e-14)
        through = 2 * b @ (feedback.p @ feedback.p.T)
        np.testing.assert_allclose(feedback.matrix(w), through, atol=1e-13)
        dx = backward(op, x, w, feedback, delta)[0]
        np.testing.assert_allclose(dx, backward(op, x, w, jaxfa.FixedFeedback(through), delta)[0], atol=1e-12)
        assert (np.linalg.norm(through - 2 * b) < 1e-12) == (r == w_shape[-1])
        assert np.linalg.norm(dx - backward(op, x, w, None, delta)[0]) > 0.1


def test_the_default_scale_is_feedback_alignments():
    b = np.asarray(jaxfa.ldfa(1.0).init(KEY, jnp.ones((400, 200))).matrix(jnp.ones((400, 200))))
    bound = np.sqrt(6 / 600)
    np.testing.assert_allclose([b.min(), b.max(), b.std()], [-bound, bound, bound / np.sqrt(3)], rtol=0.01)
    q = np.asarray(jaxfa.dldfa(2, scale=3.0).init(KEY, jnp.ones((2, 900)), jnp.ones((2, 50))).q)
    np.testing.assert_allclose([q.min(), q.max(), q.std()], [-0.1, 0.1, 0.1 / np.sqrt(3)], rtol=0.03)


@every_operation
def test_layer_wise_it_is_the_papers_equations(op, x_shape, w_shape, normal, x64):
    r, m = 2, w_shape[-1]
    x, w = normal(*x_shape), normal(*w_shape)
    delta = 3.0 + normal(*jax.eval_shape(op, x, w).shape)
    p, q = normal(m, r), normal(*w_shape[:-1], r)
    P, Q, D = np.asarray(p).T, np.asarray(q).reshape(-1, r), np.asarray(delta).reshape(-1, m).T
    QP = jnp.asarray(Q @ P).reshape(w_shape)
    thin = jnp.asarray((P @ D).T).reshape(*delta.shape[:-1], r)

    def surrogate(x, w, q):
        stop = lax.stop_gradient
        return jnp.vdot(op(x, QP), delta) + jnp.vdot(op(stop(x), w), delta) + jnp.vdot(op(stop(x), q), thin)

    expected_dx, expected_w, expected_q = jax.jit(jax.grad(surrogate, argnums=(0, 1, 2)))(x, w, q)
    if op is jaxfa.linear:
        H = np.asarray(x).reshape(-1, x_shape[-1]).T
        np.testing.assert_allclose(expected_dx, (Q @ P @ D).T.reshape(x_shape), atol=1e-12)
        np.testing.assert_allclose(expected_q, H @ (P @ D).T, atol=1e-12)
    for learn_p, learn_q in VARIANTS if op is jaxfa.linear else VARIANTS[:1]:
        made = jaxfa.ldfa(r, learn_p=learn_p, learn_q=learn_q).init(KEY, w)
        dx, dw, signal = backward(op, x, w, replace(made, p=p, q=q), delta)
        np.testing.assert_allclose(dx, expected_dx, atol=1e-12)
        np.testing.assert_allclose(dw, expected_w, atol=1e-12)
        np.testing.assert_allclose(signal.p, -paper_oja(P, D).T if learn_p else 0, atol=1e-13)
        np.testing.assert_allclose(signal.q, expected_q if learn_q else 0, atol=1e-12)


def network_surrogate(params, feedback, taps, x, y):
    """A scalar whose gradient is the rule's in weights and ``q``, and in the taps the error at each layer's output."""
    stop, h = lax.stop_gradient, x
    for i, (layer, f) in enumerate(zip(params, feedback, strict=True)):
        z = h @ layer["w"]
        if f is not None:  # the value is h w; the slope in h is (q p^T)^T, in w it is h, in q it is h and p
            mute = stop(h) @ f.q @ stop(f.p).T
            z = stop(h) @ layer["w"] + h @ stop(f.q @ f.p.T) - stop(mute) + mute - stop(mute)
        z = z + jnp.broadcast_to(layer["b"], z.shape) + taps[i]
        h = jnp.tanh(z) if i < len(params) - 1 else z
    return optax.softmax_cross_entropy_with_integer_labels(h, y).mean()


def potential(p, delta):
    """Minus Oja's subspace rule as a gradient: variance kept, against a penalty held at the present covariance."""
    c = jnp.cov(delta.T, bias=True)
    kept = p.T @ (c / jnp.trace(c)) @ p
    return jnp.trace(lax.stop_gradient(kept) @ p.T @ p) / 2 - jnp.trace(kept) / 2


def test_in_a_network_it_is_the_gradient_of_a_surrogate(x64):
    params, feedback = create(jaxfa.ldfa(2), KEY)
    feedback = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), feedback)
    x, y = batch()
    taps = [jnp.zeros((len(x), p["b"].size)) for p in params]
    expected, hebb, deltas = jax.jit(jax.grad(network_surrogate, argnums=(0, 1, 2)))(params, feedback, taps, x, y)
    got, slot = signals(params, feedback, x, y)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-13), got, expected)
    for i in (1, 2):
        np.testing.assert_allclose(slot[i].q, hebb[i].q, atol=1e-13)
        np.testing.assert_allclose(slot[i].p, jax.jit(jax.grad(potential))(feedback[i].p, deltas[i]), atol=1e-13)
        assert min(np.linalg.norm(slot[i].q), np.linalg.norm(slot[i].p)) > 1e-3


def test_labels_teach_p_by_their_class_alone(normal, x64):
    rule, w, x = jaxfa.ldfa(2, labels="*/head"), normal(6, 5), normal(12, 6)
    assert rule.init(KEY, w, path="net/head").labels
    assert not any(rule.init(KEY, w, path=path).labels for path in ("", "net/body", "head"))
    y = np.array([0, 1, 2, 4, 4, 4, 0, 1, 1, 2, 3, 0])
    logits = normal(12, 5)
    e = (jax.nn.softmax(logits) - jnp.eye(5)[y]) / 12
    onehot = np.eye(5)[y].T
    for path, drives in (("net/head", onehot), ("net/body", np.asarray(e).T)):
        feedback = replace(rule.init(KEY, w, path=path), p=normal(5, 2))
        dx, _, signal = backward(jaxfa.linear, x, w, feedback, e)
        np.testing.assert_allclose(signal.p, -paper_oja(np.asarray(feedback.p).T, drives).T, atol=1e-14)
        np.testing.assert_allclose(dx, e @ feedback.p @ feedback.q.T, atol=1e-14)
        np.testing.assert_allclose(signal.q, x.T @ e @ feedback.p, atol=1e-14)
        reweighed = e * jnp.exp(3 * normal(12, 1))
        same = np.allclose(backward(jaxfa.linear, x, w, feedback, reweighed)[2].p, signal.p, atol=1e-14)
        assert same == (path == "net/head")


DIRECT = {
    "dense": ((4, 6), (4, 3), (3,), (6,), "nc,cr,ir->ni"),
    "image": ((4, 2, 3, 6), (4, 3), (3,), (2, 3, 6), "nc,cr,hwir->nhwi"),
    "tokens": ((4, 5, 6), (4, 5, 3), (3,), (6,), "ntc,cr,ir->nti"),
    "sequence_one_output": ((4, 5, 6), (4, 3), (3,), (5, 6), "nc,cr,tir->nti"),
    "token_heads": ((4, 5, 2, 6), (4, 5, 3), (3,), (2, 6), "ntc,cr,air->ntai"),
    "vector_to_sequence": ((4, 6), (4, 5, 3), (5, 3), (6,), "ntc,tcr,ir->ni"),
}
every_wire = pytest.mark.parametrize("shapes", DIRECT.values(), ids=DIRECT)


@jax.jit
def inject(h, e, feedback):
    """The error delivered to ``h``, what goes on along the wire, and the signal."""
    return jax.vjp(jaxfa.direct, h, jaxfa.error_wire(e), feedback)[1]((jnp.ones_like(h), e))


@every_wire
def test_direct_it_is_the_papers_equations(shapes, normal, x64):
    h_shape, e_shape, own, to, spec = shapes
    h, e = normal(*h_shape), 2.0 + normal(*e_shape)
    p, q = normal(*own, 2), normal(*to, 2)
    arrived, rest = spec.split("->")[0].split(","), spec.split("->")[1]
    expected_q = np.einsum(f"{rest},{arrived[0]},{arrived[1]}->{arrived[2]}", h, e, p)
    D = np.asarray(e).reshape(-1, np.prod(own)).T  # tokens that h shares count as examples, those that it lacks do not
    expected_p = -paper_oja(np.asarray(p).reshape(-1, 2).T, D).T.reshape(p.shape)
    for learn_p, learn_q in VARIANTS if len(h_shape) == len(e_shape) == 2 else VARIANTS[:1]:
        made = jaxfa.dldfa(2, learn_p=learn_p, learn_q=learn_q).init(KEY, h, e)
        assert (made.p.shape, made.q.shape) == (p.shape, q.shape)
        flat = made.p.reshape(-1, 2)
        np.testing.assert_allclose(flat.T @ flat, np.eye(2), atol=1e-14)
        dh, wire, signal = inject(h, e, replace(made, p=p, q=q))
        np.testing.assert_allclose(dh, np.einsum(spec, e, p, q), atol=1e-12)
        np.testing.assert_array_equal(wire, e)
        np.testing.assert_allclose(signal.p, expected_p if learn_p else 0, atol=1e-13)
        np.testing.assert_allclose(signal.q, expected_q if learn_q else 0, atol=1e-12)


@every_wire
def test_direct_at_full_rank_it_is_direct_feedback_alignment(shapes, normal, x64):
    h_shape, e_shape, own, to, _ = shapes
    h, e, size = normal(*h_shape), normal(*e_shape), int(np.prod(own))
    b = normal(*to, *own)
    rotation = jnp.asarray(np.linalg.qr(normal(size, size))[0])
    q = (b.reshape(*to, size) @ rotation).reshape(*to, size)
    dfa = inject(h, e, jaxfa.DirectMatrix(b))[0]
    made = jaxfa.dldfa(size).init(KEY, h, e)
    assert made.p.shape[-1] == min(size, np.prod(to))
    full = replace(made, p=rotation.reshape(*own, size), q=q)
    np.testing.assert_allclose(inject(h, e, full)[0], dfa, atol=1e-12)
    assert np.linalg.norm(inject(h, e, replace(full, p=rotation.T.reshape(*own, size)))[0] - dfa) > 0.1


def test_direct_from_a_hidden_layer_the_layers_above_are_backpropagations(normal, x64):
    x, y, weights = normal(6, 4), jnp.arange(6) % 3, [normal(4, 5), normal(5, 7), normal(7, 3)]
    feedback = jaxfa.dldfa(2).init(KEY, jnp.ones((6, 5)), jnp.ones((6, 7)))
    feedback = replace(feedback, p=normal(7, 2))

    def loss(weights, feedback, tap):
        h = jnp.tanh(x @ weights[0])
        h, wire = jaxfa.direct(h, jaxfa.error_wire(tap), feedback)
        top = jnp.tanh(h @ weights[1]) + wire + tap
        return optax.softmax_cross_entropy_with_integer_labels(top @ weights[2], y).mean()

    tap = jnp.zeros((6, 7))
    got, signal = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, feedback, tap)
    true, e = jax.jit(jax.grad(loss, argnums=(0, 2)))(weights, None, tap)
    for above in (1, 2):
        np.testing.assert_allclose(got[above], true[above], atol=1e-14)
    H, E = np.tanh(np.asarray(x @ weights[0])).T, np.asarray(e).T
    P, Q = np.asarray(feedback.p).T, np.asarray(feedback.q)
    np.testing.assert_allclose(got[0].T, ((Q @ P @ E) * (1 - H**2)) @ x, atol=1e-14)
    assert np.linalg.norm(got[0] - true[0]) > 0.1 * np.linalg.norm(true[0])
    np.testing.assert_allclose(signal.q, H @ (P @ E).T, atol=1e-14)
    np.testing.assert_allclose(signal.p, -paper_oja(P, E).T, atol=1e-14)
