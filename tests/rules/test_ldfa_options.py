"""Low-dimensional feedback: which ranks it takes, what it refuses, what training moves, and in which precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from tests.methods import batch, create, train

KEY = jax.random.key(7)
FIXED = {"learn_p": False, "learn_q": False}


def traced(function, x):
    """The backward pass, traced only: what is refused is refused before it runs."""
    jax.eval_shape(jax.grad(lambda x: jnp.sum(function(x))), x)


@pytest.mark.parametrize(
    ("rank", "path", "w_shape", "expected"),
    [
        (3, "", (8, 6), 3),
        (1, "", (8, 6), 1),
        (1.0, "", (8, 6), 6),
        (0.5, "", (8, 6), 3),
        (0.01, "", (8, 6), 1),
        (9, "", (8, 6), 6),
        (9, "", (4, 6), 4),
        (1.0, "", (4, 6), 4),
        (64, "", (3, 3, 2, 32), 18),
        (64, "", (1, 1, 2, 32), 2),
        (0.25, "", (3, 3, 2, 32), 8),
        ({"head": 2, "*": 0.5}, "head", (8, 6), 2),
        ({"head": 2, "*": 0.5}, "blocks/0/mlp", (8, 6), 3),
        ({"blocks": 4, "*": 1}, "blocks/0/mlp", (8, 6), 4),
        ({"blocks/*/mlp": 4, "blocks": 3}, "blocks/0/mlp", (8, 6), 4),
        ({"*": 1, "head": 5}, "head", (8, 6), 1),
        ({"*": 2}, "", (8, 6), 2),
    ],
)
def test_the_rank_is_a_number_a_fraction_or_by_path_and_never_above_the_layers(rank, path, w_shape, expected):
    w = jnp.ones(w_shape)
    for rule in (jaxfa.ldfa(rank), jaxfa.ldfa(rank, **FIXED), jaxfa.normative_ldfa(rank)):
        feedback = jax.eval_shape(functools.partial(rule.init, path=path), KEY, w)
        assert feedback.p.shape == (w_shape[-1], expected)
        assert feedback.q.shape == (*w_shape[:-1], expected)
    h, e = jnp.ones((2, *w_shape[:-1])), jnp.ones((2, w_shape[-1]))
    feedback = jax.eval_shape(functools.partial(jaxfa.dldfa(rank).init, path=path), KEY, h, e)
    assert (feedback.p.shape, feedback.q.shape) == ((w_shape[-1], expected), (*w_shape[:-1], expected))


@pytest.mark.parametrize("rule", [jaxfa.ldfa, jaxfa.dldfa, jaxfa.normative_ldfa])
@pytest.mark.parametrize("rank", [0, -1, True, False, 1.5, 0.0, -0.5, float("nan"), "4", None, {"*": 0}, {"*": True}])
def test_what_is_no_rank_is_refused(rule, rank):
    with pytest.raises(ValueError, match="A rank is a whole number from 1, a fraction"):
        rule(rank)


def test_options_out_of_range_are_refused():
    for rule in (jaxfa.ldfa, jaxfa.dldfa):
        for decay in (-0.1, 1.0, 2.0):
            with pytest.raises(ValueError, match=r"weight_decay must be in \[0, 1\)"):
                rule(2, weight_decay=decay)
        rule(2, weight_decay=0.0)
    for rate in (0.0, -1.0, 1.1):
        with pytest.raises(ValueError, match=r"learning_rate in \(0, 1\]"):
            jaxfa.normative_ldfa(2, learning_rate=rate)
    w = jnp.ones((4, 3))
    for path in ("body", "", "net/head"):
        with pytest.raises(ValueError, match=f"No rank is given for the layer '{path}'"):
            jaxfa.ldfa({"head": 2}).init(KEY, w, path=path)
    with pytest.raises(ValueError, match="No rank is given"):
        jaxfa.dldfa({"head": 2}).init(KEY, w, w)


def test_numbers_of_numpy_are_numbers():
    w = jnp.ones((8, 8))
    for rank, expected in ((np.int64(3), 3), (np.float32(0.25), 2)):
        assert jaxfa.ldfa(rank).init(KEY, w).p.shape == (8, expected)
    with pytest.raises(ValueError, match="A rank is"):
        jaxfa.ldfa({})


@pytest.mark.parametrize("shape", [(4, 3), (4, 4), (3, 4)])
@pytest.mark.parametrize("rule", [jaxfa.ldfa(2), jaxfa.ldfa(2, **FIXED), jaxfa.normative_ldfa(2)])
def test_an_operation_whose_outputs_are_not_last_is_refused(shape, rule):
    w, x = jnp.ones(shape), jnp.ones((5, shape[-1]))
    op = jaxfa.with_feedback(lambda x, w: jnp.einsum("bd,ed->be", x, w))
    with pytest.raises(ValueError, match="last axis counts the outputs"):
        traced(lambda x: op(x, w, rule.init(KEY, w)), x)
    swapped = jaxfa.with_feedback(lambda x, w: jnp.einsum("bd,de->eb", x, w))
    with pytest.raises(ValueError, match="last axis counts the outputs"):
        traced(lambda x: swapped(x, w, rule.init(KEY, w)), jnp.ones((6, shape[0])))


@pytest.mark.parametrize("rule", [jaxfa.ldfa(2), jaxfa.ldfa(2, **FIXED), jaxfa.normative_ldfa(2)])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_feedback_for_all_groups_or_for_other_weights_is_refused(rule, groups):
    x, w = jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 4 // groups, 8))
    with pytest.raises(ValueError, match="groups need a feedback for each group"):
        traced(lambda x: jaxfa.conv(x, w, rule.init(KEY, w), groups=groups), x)
    whole, window = jnp.ones((3, 3, 4, 8)), jnp.ones((1, 1, 4, 8))
    traced(lambda x: jaxfa.conv(x, whole, rule.init(KEY, whole)), x)
    with pytest.raises(ValueError, match=r"made for them by rule.init"):  # it would fit but for its window
        traced(lambda x: jaxfa.conv(x, whole, rule.init(KEY, window)), x)


def test_one_error_alone_has_no_covariance():
    w, x, logits = jnp.ones((4, 3)), jnp.ones((6, 4)), jnp.ones((6, 3))

    def layer(x, feedback):
        return jaxfa.linear(x, w, feedback)

    def wire(h, feedback):
        return jaxfa.direct(h, jnp.ones((*h.shape[:-1], 3)), feedback)[1]

    for forward, rule, like in ((layer, jaxfa.ldfa, (w,)), (wire, jaxfa.dldfa, (x, logits))):
        learned, still = (rule(2, learn_p=learns).init(KEY, *like) for learns in (True, False))

        def each(x, feedback, forward=forward):
            return jax.vmap(forward, in_axes=(0, None))(x, feedback)

        for function, examples in ((forward, x[:1]), (forward, x[0]), (each, x)):
            traced(functools.partial(function, feedback=still), examples)
            with pytest.raises(ValueError, match="covariance of a batch of errors"):
                traced(functools.partial(function, feedback=learned), examples)
        traced(functools.partial(forward, feedback=learned), x)


@pytest.mark.parametrize("rule", [jaxfa.ldfa(2), jaxfa.normative_ldfa(2)])
def test_in_bfloat16_p_stays_wide_and_the_error_is_near(rule):
    rng = np.random.default_rng(0)
    x, w, delta = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 7, 6, 3), (3, 3, 3, 8), (2, 4, 3, 8)))
    op = functools.partial(jaxfa.conv, strides=2)

    def backward(x, w, delta, feedback):
        return jax.jit(lambda *primals: jax.vjp(op, *primals)[1](delta))(x, w, feedback)

    x, w, delta = (leaf.astype(jnp.bfloat16) for leaf in (x, w, delta))
    narrow = rule.init(KEY, w)
    assert narrow.p.dtype == jnp.float32
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, w, delta, narrow))
    rough, exact = backward(x, w, delta, narrow), backward(*wide)
    for a, b, like in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), jax.tree.leaves((x, w, narrow)), strict=True):
        assert a.dtype == like.dtype
        assert np.linalg.norm(np.asarray(a - b, np.float32)) <= 0.02 * np.linalg.norm(b)
    direct = jaxfa.dldfa(2).init(KEY, x, delta)
    assert (direct.p.dtype, direct.q.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_factors_have_the_weights_precision(dtype, x64):
    w = jnp.ones((4, 6), dtype)
    for feedback in (
        *(rule.init(KEY, w) for rule in (jaxfa.ldfa(2), jaxfa.ldfa(2, **FIXED), jaxfa.normative_ldfa(2))),
        jaxfa.dldfa(2).init(KEY, w, w),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(feedback)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("family", [jaxfa.ldfa, jaxfa.dldfa])
@pytest.mark.parametrize(("learn_p", "learn_q"), [(True, True), (True, False), (False, True), (False, False)])
def test_training_moves_what_learns_by_its_own_rate_and_nothing_else(family, learn_p, learn_q):
    rule = family(2, learn_p=learn_p, learn_q=learn_q, weight_decay=0.5, learning_rate=0.3)
    both, tx = create(rule, KEY), jaxfa.optimizer(optax.sgd(0.7), rule)
    signals = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), both)
    updates, _ = tx.update(signals, tx.init(both), both)
    decay = 0.5 if learn_q else 0.0
    for before, moved, signal in zip(both[0], updates[0], signals[0], strict=True):
        np.testing.assert_allclose(moved["w"], -0.7 * signal["w"] - decay * np.asarray(before["w"]), atol=1e-6)
        np.testing.assert_allclose(moved["b"], -0.7 * signal["b"], atol=1e-6)
    for before, moved, signal in zip(both[1], updates[1], signals[1], strict=True):
        if before is None:
            continue
        assert moved.q.shape == signal.q.shape
        assert moved.p.shape == signal.p.shape
        if learn_p:
            np.testing.assert_allclose(moved.p, -0.3 * signal.p, atol=1e-6)
        else:
            np.testing.assert_array_equal(moved.p, 0)
        if learn_q:
            np.testing.assert_allclose(moved.q, -0.7 * signal.q - decay * np.asarray(before.q), atol=1e-6)
        else:
            np.testing.assert_array_equal(moved.q, 0)


@pytest.mark.parametrize("family", [jaxfa.ldfa, jaxfa.dldfa])
def test_the_fixed_variant_is_unchanged_bit_for_bit(family):
    rule = family(2, **FIXED)
    init, step = train(rule, optax.adam(0.1))
    both = create(rule, KEY)
    params, feedback = jax.jit(step)(both, init(both), *batch(), KEY)[0]
    jax.tree.map(np.testing.assert_array_equal, feedback, both[1])
    assert all(np.all(np.any(a["w"] != b["w"], axis=0)) for a, b in zip(params, both[0], strict=True))


def test_seeds_side_by_side_are_seeds_one_by_one(x64):
    rng = np.random.default_rng(0)
    x, w, delta = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 4), (3, 4, 5), (3, 6, 5)))
    made = [jaxfa.ldfa(2).init(key, one) for key, one in zip(jax.random.split(KEY, 3), w, strict=True)]

    @jax.jit
    def backward(w, feedback, delta):
        return jax.vjp(jaxfa.linear, x, w, feedback)[1](delta)

    together = jax.vmap(backward)(w, jax.tree.map(lambda *leaves: jnp.stack(leaves), *made), delta)
    for i, feedback in enumerate(made):
        alone = backward(w[i], feedback, delta[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-13), together, alone)


def test_a_fixed_rule_needs_no_feedback_to_make_its_optimizer():
    for rule in (jaxfa.ldfa(2, **FIXED), jaxfa.dldfa(2, **FIXED), jaxfa.normative_ldfa(2)):
        jaxfa.optimizer(optax.sgd(0.1), rule).init({"w": jnp.ones((3, 2))})
    for rule in (jaxfa.ldfa(2), jaxfa.dldfa(2, learn_p=False), jaxfa.ldfa(2, learn_q=False)):
        with pytest.raises(ValueError, match="given none"):
            jaxfa.optimizer(optax.sgd(0.1), rule).init({"w": jnp.ones((3, 2))})


def test_topographic_factors_reach_their_neighbours_alone():
    draw = jaxfa.rules.topographic(0.21)
    b = np.asarray(draw(jax.random.key(0), (3, 10, 5), jnp.float32))
    apart = abs((np.arange(10)[:, None] / 10 - np.arange(5)[None] / 5 + 0.5) % 1 - 0.5)
    np.testing.assert_array_equal(b != 0, np.broadcast_to(apart <= 0.21, b.shape))
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, rtol=1e-6)


def test_shared_columns_are_one_column_moved():
    b = np.asarray(jaxfa.rules.topographic(0.3, shared=True)(jax.random.key(0), (12, 4), jnp.float32))
    for j in range(4):
        np.testing.assert_allclose(b[:, j], np.roll(b[:, 0], 3 * j), rtol=1e-6)
    assert len(np.unique(b[:, 0])) > 4


@pytest.mark.parametrize("reach", [0, -0.1, 0.6])
def test_a_reach_beyond_the_circle_is_refused(reach):
    with pytest.raises(ValueError, match="reach in"):
        jaxfa.rules.topographic(reach)


@pytest.mark.parametrize("family", [jaxfa.ldfa, jaxfa.dldfa])
def test_what_is_zero_stays_zero_while_the_rest_learns(family):
    local = jaxfa.rules.topographic(0.15)
    options = {"projection": local, "distribution": local, "weight_decay": 0.0}
    free, kept = (family(3, **options, structured=structured) for structured in (False, True))
    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (9, 12))
    w, delta = jax.random.normal(jax.random.key(2), (12, 8)), jax.random.normal(jax.random.key(3), (9, 8))
    direct = family is jaxfa.dldfa
    feedbacks = [rule.init(key, *((x, delta) if direct else (w,))) for rule in (free, kept)]
    signals = [one.signal(x, delta) if direct else one.signal(x, w, delta, x.T @ delta) for one in feedbacks]
    for name in ("p", "q"):
        factor, (all_of_it, some) = getattr(feedbacks[1], name), (getattr(one, name) for one in signals)
        assert 0 < (factor == 0).mean() < 1
        np.testing.assert_array_equal(some, jnp.where(factor == 0, 0, all_of_it))
        assert (all_of_it != some).any()
