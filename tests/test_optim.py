"""One optimizer for parameters and feedback, which never touches what is fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa

KEY = jax.random.PRNGKey(0)
W = jnp.arange(1.0, 7.0).reshape(3, 2)


def pair(rule):
    return {"layer": {"w": W, "b": jnp.ones(2)}}, {"layer": rule.init(KEY, W)}


def test_the_parameters_see_the_users_optimizer_exactly():
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.3))
    params, feedback = pair(jaxfa.fa())
    both, ours = (params, feedback), jaxfa.optimizer(tx, jaxfa.fa())
    signals = jax.tree.map(lambda leaf: jnp.sin(7 * leaf), both)
    state, plain = ours.init(both), tx.init(params)
    for _ in range(3):
        updates, state = ours.update(signals, state, both)
        expected, plain = tx.update(signals[0], plain, both[0])
        jax.tree.map(np.testing.assert_array_equal, updates[0], expected)
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), updates[1])
        both = optax.apply_updates(both, updates)


def test_clipping_measures_the_parameters_alone():
    ours = jaxfa.optimizer(optax.clip_by_global_norm(1.0), jaxfa.fa())
    both = pair(jaxfa.fa())
    small = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), both[0])
    for size in (0.0, 1e6):
        signals = small, jax.tree.map(lambda leaf, size=size: jnp.full_like(leaf, size), both[1])
        updates, _ = ours.update(signals, ours.init(both), both)
        jax.tree.map(np.testing.assert_array_equal, updates[0], small)


def test_a_feedback_is_found_anywhere_in_any_tree():
    rule = jaxfa.fa()
    b = rule.init(KEY, W)
    for tree in ([W, b], {"net": {"w": W, "fa": b}}, (b, [b, {"x": W}]), {"only": b}, {"none": W}, b):
        ours = jaxfa.optimizer(optax.sgd(1.0), rule)
        signals = jax.tree.map(jnp.ones_like, tree)
        updates, _ = ours.update(signals, ours.init(tree), tree)
        flat = jax.tree.leaves(updates, is_leaf=lambda node: isinstance(node, jaxfa.FixedFeedback))
        for node in flat:
            fixed = isinstance(node, jaxfa.FixedFeedback)
            np.testing.assert_array_equal(node.b if fixed else node, 0.0 if fixed else -1.0)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)


def test_the_rules_own_transformation_moves_its_feedback():
    rule = jaxfa.fa()._replace(transform=optax.sgd(0.5))
    both = pair(rule)
    ours = jaxfa.optimizer(optax.sgd(1.0), rule)
    updates, _ = ours.update(jax.tree.map(jnp.ones_like, both), ours.init(both), both)
    np.testing.assert_array_equal(updates[0]["layer"]["w"], -1.0)
    np.testing.assert_array_equal(updates[1]["layer"].b, -0.5)


def test_it_composes_with_optax_around_it():
    rule = jaxfa.kolen_pollack()
    both = pair(rule)
    accumulated = optax.MultiSteps(jaxfa.optimizer(optax.sgd(1.0), rule), every_k_schedule=2)
    signals = jax.tree.map(jnp.ones_like, both)
    state = accumulated.init(both)
    first, state = accumulated.update(signals, state, both)
    second, _ = accumulated.update(signals, state, both)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first))
    np.testing.assert_allclose(second[1]["layer"].b, -1.0 - 1e-3 * both[1]["layer"].b, rtol=1e-6)


def test_what_is_no_rule_is_refused():
    for wrong in (jaxfa.fa, "fa", optax.sgd(0.1), None):
        with pytest.raises(TypeError, match=r"expects a jaxfa\.Rule such as jaxfa\.fa\(\)"):
            jaxfa.optimizer(optax.sgd(0.1), wrong)
