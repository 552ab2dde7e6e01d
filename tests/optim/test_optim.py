"""One optimizer for parameters and feedback, which never touches what is fixed."""

import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from jaxfa.base import is_direct

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
    rule = replace(jaxfa.fa(), transform=optax.sgd(0.5))
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


def run(tx, both, steps, signals=None):
    """All trees of a run, from the first; by default nothing is taught."""
    track, state = [both], tx.init(both)
    for t in range(steps):
        given = jax.tree.map(jnp.zeros_like, both) if signals is None else signals(both, t)
        updates, state = tx.update(given, state, both)
        both = optax.apply_updates(both, updates)
        track.append(both)
    return track


def test_weights_decay_when_the_users_optimizer_steps_and_only_then():
    rule, w = jaxfa.kolen_pollack(weight_decay=0.1), jnp.ones((2, 2))
    both = w, rule.init(KEY, w)
    inside = jaxfa.optimizer(optax.MultiSteps(optax.sgd(1.0), 4), rule)
    outside = optax.MultiSteps(jaxfa.optimizer(optax.sgd(1.0), rule), 4)
    for tx in (inside, outside):
        seen = [float(one[0][0, 0]) for one in run(tx, both, 8)[1:]]
        np.testing.assert_allclose(seen, [1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.81], rtol=1e-6)
    for still in (optax.set_to_zero(), optax.sgd(0.0)):
        jax.tree.map(np.testing.assert_array_equal, run(jaxfa.optimizer(still, rule), both, 3)[-1], both)


def kolen_pollack_lesson(both, t):
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf + t), both[0])
    return grads, {name: jaxfa.kolen_pollack().init(KEY, W).__class__(grads[name]["w"]) for name in both[1]}


@pytest.mark.parametrize(
    ("tx", "fall"),
    [
        (lambda name, _: optax.adamw(0.01, weight_decay=5.0, mask=name), 0.9 - 0.05),
        (lambda name, tree: optax.adamw(0.01, weight_decay=5.0, mask=tree), 0.9 - 0.05),
        (lambda name, _: optax.partition({True: optax.sgd(0.1), False: optax.sgd(0.3)}, name), 0.9),
        (lambda name, _: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)), 0.9),
        (lambda name, _: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), 0.9),
        (lambda name, _: optax.contrib.muon(0.1, weight_decay=0.0), 0.9),
        (lambda name, _: optax.lion(0.1, weight_decay=0.0), 0.9),
    ],
    ids=["mask by name", "mask tree", "labels by name", "global norm", "noise", "muon", "lion"],
)
def test_kolen_pollacks_difference_falls_at_every_step_whatever_goes_by_names(tx, fall, x64):
    rule, w = jaxfa.kolen_pollack(weight_decay=0.1), W.astype(jnp.float64)
    params = {name: {"w": w / (i + 1), "bias": jnp.ones(2)} for i, name in enumerate(("in", "mid", "out"))}
    both = params, {name: rule.init(key, w) for name, key in zip(("mid", "out"), jax.random.split(KEY), strict=True)}

    def name(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1] == jax.tree_util.DictKey("w"), tree)

    track = run(jaxfa.optimizer(tx(name, name(params)), rule), both, 5, kolen_pollack_lesson)
    for before, after in itertools.pairwise(track):
        for layer in ("mid", "out"):
            apart = [weights[layer]["w"] - feedback[layer].b for weights, feedback in (before, after)]
            np.testing.assert_allclose(apart[1], fall * apart[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("later", [optax.clip_by_global_norm(0.1), optax.normalize_by_update_norm()])
@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_weights_do_not_decay_though_others_gradients_scale_their_zero_step(later, compiled):
    rule, params = jaxfa.kolen_pollack(weight_decay=0.1), {"frozen": jnp.ones((2, 2)), "learns": jnp.ones((2, 2))}
    both = params, {name: rule.init(jax.random.key(0), w) for name, w in params.items()}
    frozen = optax.masked(optax.set_to_zero(), lambda tree: {name: name == "frozen" for name in tree})
    tx = jaxfa.optimizer(optax.chain(frozen, optax.adam(0.1), later), rule)
    update = jax.jit(tx.update) if compiled else tx.update
    (steps, _), _ = update(jax.tree.map(jnp.ones_like, both), tx.init(both), both)
    assert not steps["frozen"].any()
    assert steps["learns"].all()


def test_an_injected_rate_is_one_for_weights_and_feedback(x64):
    rule = jaxfa.kolen_pollack(weight_decay=0.1)
    both = {"out": {"w": W}}, {"out": rule.init(KEY, W)}
    tx = jaxfa.optimizer(optax.inject_hyperparams(optax.adam)(0.1), rule)
    state = tx.init(both)
    state.params.hyperparams["learning_rate"] = jnp.asarray(0.7)
    updates, _ = tx.update(kolen_pollack_lesson(both, 0), state, both)
    after = optax.apply_updates(both, updates)
    np.testing.assert_allclose(after[0]["out"]["w"] - after[1]["out"].b, 0.9 * (W - both[1]["out"].b), atol=1e-6)


def test_a_feedback_whose_weights_can_not_be_told_is_refused_with_its_path():
    rule = jaxfa.kolen_pollack()
    b = rule.init(KEY, W)
    for params, feedback in (({"w1": W, "w2": W}, {"b2": b}), ({"w": W.T}, {"w": rule.init(KEY, jnp.ones((5, 5)))})):
        with pytest.raises(ValueError, match=r"The feedback at .* learns as the weights .* beside it"):
            jaxfa.optimizer(optax.sgd(0.1), rule).init((params, feedback))


LEARN = {"dkp": jaxfa.dkp(), "brsf": jaxfa.brsf(), "ldfa": jaxfa.ldfa(2), "kolen_pollack": jaxfa.kolen_pollack()}


@pytest.mark.parametrize("rule", LEARN.values(), ids=list(LEARN))
def test_a_batch_of_nan_leaves_all_as_it_is_inside_apply_if_finite(rule):
    made = rule.init(KEY, jnp.ones((5, 3)), jnp.ones((5, 2))) if is_direct(rule) else rule.init(KEY, W)
    both = {"out": {"w": W}}, {"out": made}
    tx = jaxfa.optimizer(optax.apply_if_finite(optax.adam(0.1), 5), rule)
    state = tx.init(both)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), both)
    updates, after = tx.update(bad, state, both)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), updates)
    jax.tree.map(np.testing.assert_array_equal, after.feedback, state.feedback)
    good = jax.tree.map(jnp.ones_like, both)
    updates, _ = tx.update(good, after, both)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_a_transformation_that_does_nothing_is_one_like_any_other():
    assert jaxfa.fa().transform is None
    rule = jaxfa.LayerRule(jaxfa.fa().init, transform=optax.set_to_zero())
    both = pair(rule)
    tx = jaxfa.optimizer(optax.sgd(1.0), rule)
    updates, _ = tx.update(both, tx.init(both), both)
    np.testing.assert_array_equal(updates[1]["layer"].b, 0)


@pytest.mark.parametrize("inside", [True, False])
def test_accumulation_donates_scans_and_is_traced_once(inside):
    rule = jaxfa.kolen_pollack(weight_decay=0.1)
    both, sgd = pair(rule), optax.sgd(0.1, momentum=0.5)
    tx = jaxfa.optimizer(optax.MultiSteps(sgd, 2), rule) if inside else optax.MultiSteps(jaxfa.optimizer(sgd, rule), 2)
    traces = []

    def step(carry, _):
        traces.append(None)
        both, state = carry
        updates, state = tx.update(jax.tree.map(jnp.sin, both), state, both)
        return (optax.apply_updates(both, updates), state), None

    run = jax.jit(lambda carry: step(carry, None)[0], donate_argnums=0)
    scanned, _ = jax.lax.scan(step, (both, tx.init(both)), None, 4)
    carry, before = jax.tree.map(jnp.copy, (both, tx.init(both))), len(traces)
    for _ in range(4):
        carry = run(carry)
    assert len(traces) == before + 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), carry[0], scanned[0])


def test_the_count_of_redrawn_magnitudes_is_the_optimizers_whatever_happens_to_the_feedback():
    rule = jaxfa.brsf()
    tx = jaxfa.optimizer(optax.sgd(0.1), rule)
    both = pair(rule)
    state, seed = tx.init(both), int(both[1]["layer"].seed)
    for t in range(3):
        spoilt = both[0], jax.tree.map(lambda leaf: 0.3 * leaf + 1, both[1])  # as a decay outside would do
        updates, state = tx.update(jax.tree.map(jnp.ones_like, both), state, spoilt)
        both = optax.apply_updates(spoilt, updates)
        assert (int(both[1]["layer"].step), int(both[1]["layer"].seed)) == (t + 1, seed)


@pytest.mark.parametrize("rule", [jaxfa.kolen_pollack(), jaxfa.ldfa(0.25)], ids=["kolen_pollack", "ldfa"])
def test_a_donated_state_is_written_where_it_lies(rule):
    params = {"w": jnp.ones((256, 128))}
    both = params, {"w": rule.init(KEY, params["w"])}
    tx = jaxfa.optimizer(optax.adam(1e-3), rule)
    update = jax.jit(lambda signals, both, state: optax_step(tx, signals, both, state), donate_argnums=(1, 2))
    program = update.lower(both, both, tx.init(both)).compile().as_text()
    assert not re.search(r"f32\[256,128\]\S* copy\(", program)


def optax_step(tx, signals, both, state):
    updates, state = tx.update(signals, state, both)
    return optax.apply_updates(both, updates), state
