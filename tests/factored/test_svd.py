"""Factored weights: the same function as the dense ones, exact gradients, and a rank that falls."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from jaxfa.factored import pruning
from jaxfa.factored.pruning import by_name
from jaxfa.factored.svd import Factors

KEY = jax.random.PRNGKey(0)
drift, standardise = jax.jit(pruning.drift), jax.jit(pruning.standardise)
# name: (weights' shape, input's shape, options of jaxfa.conv)
CONVOLUTIONS = {
    "one dimension": ((3, 4, 5), (2, 9, 4), {"strides": 2}),
    "stride 1": ((3, 3, 4, 5), (2, 8, 8, 4), {}),
    "stride 2": ((3, 3, 4, 5), (2, 8, 8, 4), {"strides": 2}),
    "stride 2, odd": ((3, 5, 4, 5), (2, 9, 7, 4), {"strides": 2}),
    "explicit, dilated": ((3, 2, 4, 5), (2, 9, 8, 4), {"padding": [(1, 2), (0, 3)], "dilation": (2, 1)}),
    "valid": ((3, 3, 4, 5), (2, 8, 8, 4), {"padding": "VALID", "strides": (1, 2)}),
    "1 x 1": ((1, 1, 4, 5), (2, 8, 8, 4), {"strides": 2}),
    "three dimensions": ((3, 2, 3, 2, 4), (1, 5, 6, 5, 2), {"strides": (2, 1, 2)}),
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


@pytest.mark.parametrize(("shape", "x", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_factored_convolution_is_the_dense_one(shape, x, options, x64):
    w, x = normal(*shape), normal(*x)
    factors = jaxfa.factored.factorise(w)
    chex.assert_trees_all_close(factors.dense(), w, atol=1e-13)
    expected = jaxfa.conv(x, w, **options)
    assert jnp.std(expected) > 0.5
    chex.assert_trees_all_close(jaxfa.conv(x, factors, **options), expected, atol=1e-12)


def test_its_two_kernels_are_a_vertical_and_a_horizontal_convolution(x64):
    first, second = jaxfa.factored.factorise(normal(3, 5, 4, 6)).kernels()
    assert first.shape == (3, 1, 4, 12)
    assert second.shape == (1, 5, 12, 6)


def test_a_factored_layer_costs_what_its_rank_does():
    x, w = normal(64, 128), normal(128, 128)
    operations = [
        jaxfa.diagnostics.flops(jaxfa.linear, x, weights)
        for weights in (w, jaxfa.factored.factorise(w, 16), jaxfa.factored.factorise(w, 128))
    ]
    assert operations[1] < 0.3 * operations[0]
    assert operations[2] > 1.9 * operations[0]


@pytest.mark.parametrize("shape", [(7, 5), (3, 3, 4, 5)])
@pytest.mark.parametrize("feedback", [False, True])
def test_the_factors_gradients_are_those_of_their_product(shape, feedback, x64):
    # With a feedback they are the true ones for the error that arrives, and the error leaves through the feedback.
    x = normal(6, 7) if len(shape) == 2 else normal(2, 6, 6, 4)
    w, b = jaxfa.factored.factorise(normal(*shape), 4), jaxfa.factored.factorise(normal(*shape, seed=1), 3)
    op = jaxfa.linear if len(shape) == 2 else jaxfa.conv

    def thin(x, w):
        return (op(x, w, jaxfa.FixedFeedback(b) if feedback else None) ** 3).sum()

    def whole(x, w):
        return (op(x, w.dense()) ** 3).sum()

    dx, dw = jax.jit(jax.grad(thin, argnums=(0, 1)))(x, w)
    expected_x, expected = jax.grad(whole, argnums=(0, 1))(x, w)
    chex.assert_trees_all_close(dw, expected, atol=1e-8, rtol=1e-9)
    _, pull = jax.vjp(lambda x: op(x, b.dense()), x)
    through = pull(3 * op(x, w.dense()) ** 2)[0]
    chex.assert_trees_all_close(dx, through if feedback else expected_x, atol=1e-8, rtol=1e-9)
    assert jnp.linalg.norm(through - expected_x) > 0.1 * jnp.linalg.norm(expected_x)


def test_gradients_of_a_dense_layers_factors_are_the_closed_form(x64):
    x, d = normal(6, 7), normal(6, 5, seed=2)
    w = jaxfa.factored.factorise(normal(7, 5), 3)
    got = jax.vjp(lambda w: jaxfa.linear(x, w), w)[1](d)[0]
    u, s, v = w.u, w.s[None], w.v
    chex.assert_trees_all_close(got.u, x.T @ (d @ v * s), atol=1e-12)
    chex.assert_trees_all_close(got.s, ((x @ u) * (d @ v)).sum(0), atol=1e-12)
    chex.assert_trees_all_close(got.v, d.T @ (x @ u * s), atol=1e-12)


def test_a_lower_rank_is_the_best_one(x64):
    w = normal(9, 6)
    s = jnp.linalg.svd(w, compute_uv=False)
    for rank, r in ((2, 2), (0.5, 3), (1.0, 6), (99, 6), (np.int64(1), 1), (np.float64(0.5), 3)):
        found = jaxfa.factored.factorise(w, rank)
        assert found.s.shape == (r,)
        np.testing.assert_allclose(jnp.sum((found.dense() - w) ** 2), jnp.sum(s[r:] ** 2), atol=1e-12)
    for wrong in (0, -1, 0.0, 1.5, True, np.int64(0), np.True_):
        with pytest.raises(ValueError, match="whole number from 1, or a fraction"):
            jaxfa.factored.factorise(w, wrong)
    with pytest.raises(ValueError, match="expects weights"):
        jaxfa.factored.factorise(w[0])
    with pytest.raises(ValueError, match="in groups has no factors"):
        jaxfa.conv(normal(2, 8, 8, 4), jaxfa.factored.factorise(normal(3, 3, 2, 4)), groups=2)


def test_decomposing_anew_keeps_the_product_and_ends_the_drift(x64):
    w = jaxfa.factored.factorise(normal(9, 6), 4, name="a")
    assert drift(w) < 1e-13
    bent = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), w)
    assert drift(bent) > 0.05
    again = standardise(bent)
    assert drift(again) < 1e-13
    assert again.name == "a"
    chex.assert_trees_all_close(again.dense(), bent.dense(), atol=1e-12)
    np.testing.assert_allclose(-jnp.sort(-again.s), jnp.linalg.svd(bent.dense(), compute_uv=False)[:4], atol=1e-12)


def test_decomposing_anew_leaves_each_column_where_it_is(x64):
    w = jaxfa.factored.factorise(normal(9, 6), 4)
    order, signs = jnp.array([2, 0, 3, 1]), jnp.array([1, -1, 1, -1])
    w = Factors(w.u[:, order], signs * w.s[order], w.v[:, order] * signs[None], w.shape)
    bent = jax.tree.map(lambda leaf: leaf + 1e-3 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), w)
    assert drift(bent) > 1e-3
    chex.assert_trees_all_close(standardise(bent), w, atol=2e-2)
    assert drift(standardise(bent)) < 1e-13
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), bent, w)  # as of two seeds
    chex.assert_trees_all_close(standardise(pair), jax.tree.map(lambda *x: jnp.stack(x), standardise(bent), w))


def test_hoyers_measure_ignores_scale_and_its_penalty_makes_small_values_smaller(x64):
    s = jnp.array([3.0, 1.0, 0.2])
    np.testing.assert_allclose(pruning.hoyer(7 * s), pruning.hoyer(s), rtol=1e-14)
    np.testing.assert_allclose([pruning.hoyer(jnp.eye(3)[0]), pruning.hoyer(jnp.ones(9))], [1, 3], rtol=1e-14)
    w = {"w": jaxfa.factored.factorise(jnp.diag(s)), "b": jnp.ones(3)}
    tx = jaxfa.factored.hoyer_penalty(lambda step: jnp.where(step == 0, 0.5, 0.0))
    zeros, state = jax.tree.map(jnp.zeros_like, w), tx.init(w)
    updates, state = tx.update(zeros, state, w)
    np.testing.assert_allclose(updates["w"].s, 0.5 * jax.jit(jax.grad(pruning.hoyer))(w["w"].s), rtol=1e-12)
    np.testing.assert_allclose(updates["w"].s @ w["w"].s, 0, atol=1e-14)
    assert updates["w"].s[0] < 0 < updates["w"].s[2]
    chex.assert_trees_all_equal((updates["w"].u, updates["b"]), (zeros["w"].u, zeros["b"]))
    assert not np.any(tx.update(zeros, state, w)[0]["w"].s)
    feedback = {"b": jaxfa.ssa(parallel=False).init(KEY, w["w"])}
    chex.assert_trees_all_equal(tx.update(feedback, tx.init(feedback), feedback)[0], feedback)
    nothing = {"w": jaxfa.factored.factorise(jnp.zeros((3, 3)))}
    assert not np.any(jaxfa.factored.hoyer_penalty(1.0).update(nothing, tx.init(w), nothing)[0]["w"].s)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(zeros, state)


def factored_pair(sizes=(12, 10, 8)):
    layers = {}
    for i in range(len(sizes) - 1):
        w = jaxfa.factored.factorise(normal(sizes[i], sizes[i + 1], seed=i), name=f"layer {i}")
        layers[w.name] = {"w": Factors(w.u, 0.5 ** jnp.arange(w.s.size), w.v, w.shape, w.name), "b": jnp.ones(3)}
    return layers


def test_pruning_keeps_the_energy_and_rounds_ranks_up(x64):
    params = factored_pair()
    s = params["layer 0"]["w"].s
    (pruned,) = jaxfa.factored.prune(params, energy=0.95, multiple=1)
    kept = pruned["layer 0"]["w"].s
    assert jnp.sum(kept**2) >= 0.95 * jnp.sum(s**2) > jnp.sum(jnp.sort(s)[::-1][: kept.size - 1] ** 2)
    assert jaxfa.factored.ranks(jaxfa.factored.prune(params, energy=0.95, multiple=3)[0]) == {
        "layer 0": 3,
        "layer 1": 3,
    }
    assert jaxfa.factored.ranks(jaxfa.factored.prune(params, energy=0.95, multiple=64)[0]) == {
        "layer 0": 10,
        "layer 1": 8,
    }


def test_pruning_at_all_the_energy_changes_nothing_and_bad_input_is_told(x64):
    params = factored_pair()
    bent = jax.tree.map(lambda leaf: leaf * 1.1, params)
    assert jaxfa.factored.prune(bent, 1, energy=1.0) == (bent, 1)
    params = {"w": jaxfa.factored.factorise(normal(9, 6), name="a")}
    tx = optax.adam(0.1)
    state = tx.update(params, tx.init(params), params)[1]
    same = jaxfa.factored.prune(params, state, energy=1 - 1e-12, multiple=1)
    chex.assert_trees_all_equal(same, (params, state))
    chex.assert_trees_all_equal(tx.update(params, same[1], same[0]), tx.update(params, state, params))
    for wrong in ({"energy": 0.0}, {"energy": 1.1}, {"multiple": 0}):
        with pytest.raises(ValueError, match="prune needs energy"):
            jaxfa.factored.prune(params, **wrong)
    with pytest.raises(ValueError, match="found no factored weights"):
        jaxfa.factored.prune({"w": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="a name of its own"):
        by_name([jaxfa.factored.factorise(jnp.eye(2)), jaxfa.factored.factorise(jnp.eye(3))])


@pytest.mark.parametrize("pull_feedback", [False, True])
def test_optimizer_and_feedback_follow_the_surviving_columns(pull_feedback, x64):
    rule = jaxfa.ssa(parallel=False, pull_feedback=pull_feedback)
    params = factored_pair()
    feedback = {name: rule.init(KEY, layer["w"]) for name, layer in params.items()}
    tx = jaxfa.optimizer(optax.adam(0.1), rule)
    x = normal(5, 12)

    def loss(both):
        params, feedback = both
        h = jnp.tanh(jaxfa.linear(x, params["layer 0"]["w"], feedback["layer 0"]))
        return (jaxfa.linear(h, params["layer 1"]["w"], feedback["layer 1"]) ** 2).sum()

    @jax.jit
    def train(both):
        state = tx.init(both)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(both), state, both)
            both = optax.apply_updates(both, updates)
        return both, state

    both, state = train((params, feedback))
    params, feedback, smaller = jaxfa.factored.prune(*both, state, energy=0.9, multiple=1)
    assert jaxfa.factored.ranks(params) != jaxfa.factored.ranks(both[0])
    chex.assert_trees_all_equal(jaxfa.factored.prune(*both, state, energy=0.9, multiple=64), (*both, state))

    def of(tree, name):
        return [node for node in nodes(tree) if node.name == name]

    for name, w in by_name(params).items():
        before = both[0][name]["w"]
        columns = [int(jnp.argmin(jnp.abs(before.s - value))) for value in w.s]
        for old, new in zip(
            [before, both[1][name].b, *of(state, name)], [w, feedback[name].b, *of(smaller, name)], strict=True
        ):
            expected = Factors(old.u[:, columns], old.s[jnp.array(columns)], old.v[:, columns], old.shape, name)
            chex.assert_trees_all_equal(new, expected)
        assert len(of(state, name)) == 2 * (1 + pull_feedback)  # Adam's two moments


def nodes(tree):
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Factors))
    return [node for node in found if isinstance(node, Factors) and jax.tree.leaves(node)]


def drifted(w, by):
    return Factors(w.u * (1 + by), w.s, w.v * (1 + by), w.shape, w.name)


def test_drifted_layers_are_decomposed_anew_where_they_lose_columns(x64):
    params = factored_pair()
    whole = params["layer 0"]["w"]
    params["layer 0"]["w"] = drifted(whole, 0.5)
    (pruned,) = jaxfa.factored.prune(params, energy=0.99, multiple=1)
    w = pruned["layer 0"]["w"]
    np.testing.assert_allclose(w.s, 1.5**2 * whole.s[: w.s.size], rtol=1e-12)
    assert drift(w) < 1e-12
    chex.assert_trees_all_equal(jaxfa.factored.prune(params, energy=0.99, multiple=64)[0], params)


def test_pruning_a_drifted_layer_changes_neither_the_step_nor_averages(x64):
    params, tx = {"w": factored_pair()["layer 0"]["w"]}, optax.adam(1e-3)
    update = jax.jit(tx.update)
    rng, state = np.random.default_rng(0), tx.init(params)

    def steps(params, state, count):
        for _ in range(count):
            grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(1.0, 0.1, leaf.shape)), params)
            updates, state = update(grads, state, params)
        return updates, state

    _, state = steps(params, state, 500)
    average = params
    params = {"w": drifted(params["w"], 0.01)}
    pruned, state, kept = jaxfa.factored.prune(params, state, average, energy=0.99, multiple=1)
    k = pruned["w"].s.size
    assert k < params["w"].s.size
    chex.assert_trees_all_equal(kept["w"].u, average["w"].u[:, :k])
    chex.assert_trees_all_close(kept["w"].dense(), pruned["w"].dense() / 1.01**2, atol=1e-12)
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(steps(pruned, state, 5)[0])]
    assert max(sizes) < 1.2e-3


def test_a_dtypes_own_rounding_is_no_drift():
    w = factored_pair()["layer 0"]["w"].astype(jnp.bfloat16)
    assert 1e-3 < drift(w) < 0.06
    (pruned,) = jaxfa.factored.prune(w, energy=0.99, multiple=1)
    chex.assert_trees_all_equal(pruned.u, w.u[:, : pruned.s.size])
    (pruned,) = jaxfa.factored.prune(drifted(w, 0.1), energy=0.99, multiple=1)
    assert drift(pruned) < 0.06


@pytest.mark.parametrize("tx", [optax.adafactor(1e-3), optax.scale_by_lbfgs(3)], ids=["adafactor", "lbfgs"])
def test_states_of_other_shapes_than_the_parameters_are_refused(tx):
    params = factored_pair()
    with pytest.raises(ValueError, match=r"weights of layer 'layer 0'.* needs a new one"):
        jaxfa.factored.prune(params, tx.init(params), energy=0.9, multiple=1)


def test_seeds_side_by_side_keep_one_rank(x64):
    one, other = factored_pair()["layer 0"]["w"], factored_pair()["layer 0"]["w"]
    other = Factors(other.u, jnp.ones_like(other.s), other.v, other.shape, other.name)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    (pruned,) = jaxfa.factored.prune(both, energy=0.8, multiple=1)
    assert pruned.s.shape == (2, 8)
    np.testing.assert_allclose(pruned.u[1], other.u[:, :8])
