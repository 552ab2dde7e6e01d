"""Calibration: now and then a step of true backpropagation, which the feedback does not notice."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxfa
import jaxfa.nn
from jaxfa.base import Alike
from tests.methods import METHODS, batch, create, loss, refine, signals
from tests.networks import MLP, TRAINED, attach, inputs
from tests.networks import loss as nnx_loss

KEY = jax.random.PRNGKey(0)
RULES = [method for method in METHODS if method.name in ("dfa", "kolen_pollack", "dkp", "grape", "ldfa")]


def true(params):
    return jax.grad(loss)(params, None, *batch())


def step(tx, rule, both, state, key):
    """One step on the batch, as a user would write it."""
    params, feedback = both
    both = params, refine(rule, params, feedback, batch()[0], key)
    updates, state = tx.update(signals(*both, *batch()), state, both, true_gradient=lambda: true(params))
    return optax.apply_updates(both, updates), state


@pytest.mark.parametrize("method", RULES, ids=str)
def test_it_is_a_step_of_backpropagation_that_leaves_the_feedback_alone(method, x64):
    adam = optax.adamw(1e-2)
    plain = jaxfa.optimizer(adam, method.rule)
    params, feedback = create(method.rule, KEY)
    decay = 1e-3 if isinstance(method.rule.transform, Alike) else 0.0  # the default of Kolen-Pollack and LDFA
    tx = jaxfa.calibrate(plain, every=1)
    state = tx.init((params, feedback))

    @jax.jit
    def calibrated(*both):
        return tx.update(signals(*both, *batch()), state, both, true_gradient=lambda: true(both[0]))

    updates, after = calibrated(params, feedback)

    @jax.jit
    def expect(p):
        steps, _ = adam.update(true(p), adam.init(p), p)
        return jax.tree.map(lambda u, w: u - decay * w if w.ndim > 1 else u, steps, p)

    expected = expect(params)
    jax.tree.map(np.testing.assert_array_equal, updates[0], expected)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), updates[1])
    jax.tree.map(np.testing.assert_array_equal, after.inner.feedback, state.inner.feedback)
    assert after.calibrations == after.step == 1


@pytest.mark.parametrize("method", RULES, ids=str)
def test_between_calibrations_it_is_the_rule_and_they_come_on_time(method, x64):
    rule, sgd = method.rule, optax.sgd(0.1)
    tx, usual = jaxfa.calibrate(jaxfa.optimizer(sgd, rule), every=3), jaxfa.optimizer(sgd, rule)
    both = create(rule, KEY)
    keys = jax.random.split(KEY, 7)

    def scanned(both):
        def run(carry, key):
            carry = step(tx, rule, *carry, key)
            return carry, carry

        return lax.scan(run, (both, tx.init(both)), keys)[1]

    track, states = jax.jit(scanned)(both)
    np.testing.assert_array_equal(states.calibrations, [0, 0, 1, 1, 1, 2, 2])
    ours = jax.tree.map(lambda leaf: leaf[1], track)  # the second step is the rule's
    state = usual.init(both)
    for key in keys[:2]:
        moved = both[0], refine(rule, *both, batch()[0], key)
        updates, state = jax.jit(usual.update)(signals(*moved, *batch()), state, moved)
        both = optax.apply_updates(moved, updates)
    chex.assert_trees_all_close(ours, both, atol=1e-13, rtol=1e-10)


@pytest.mark.parametrize("method", RULES, ids=str)
def test_an_optimizer_of_its_own_steps_while_the_rules_stands_still(method, x64):
    rule, inner, own = method.rule, optax.adam(1e-2), optax.sgd(0.3, momentum=0.9)
    usual = jaxfa.optimizer(inner, rule)
    tx = jaxfa.calibrate(usual, every=2, optimizer=own)
    both = create(rule, KEY)
    state, rules, owns = tx.init(both), usual.init(both), own.init(both[0])
    for i, key in enumerate(jax.random.split(KEY, 4)):
        refined = both[0], refine(rule, *both, batch()[0], key)
        if i % 2:
            steps, owns = jax.jit(own.update)(true(refined[0]), owns, refined[0])
            expected = optax.apply_updates(refined[0], steps), refined[1]
        else:
            steps, rules = jax.jit(usual.update)(signals(*refined, *batch()), rules, refined)
            expected = optax.apply_updates(refined, steps)
        both, state = step(tx, rule, both, state, key)
        chex.assert_trees_all_close(both, expected, atol=1e-13, rtol=1e-10)
    assert state.calibrations == 2


def test_the_control_takes_the_same_steps_and_no_others(x64):
    # What calibration does to a rule whose own steps are none is what the control does.
    rule, adam, every = jaxfa.dfa(), optax.adam(1e-2), 3
    params, feedback = create(rule, KEY)
    still = jaxfa.calibrate(jaxfa.optimizer(optax.set_to_zero(), rule), every=every, optimizer=adam)
    control = optax.conditionally_mask(adam, lambda step, **_: (step + 1) % every == 0)
    both, state, alone, masked = (params, feedback), still.init((params, feedback)), params, control.init(params)
    for key in jax.random.split(KEY, 7):
        both, state = step(still, rule, both, state, key)
        updates, masked = control.update(true(alone), masked, alone)
        alone = optax.apply_updates(alone, updates)
    chex.assert_trees_all_close(both[0], alone, atol=1e-13, rtol=1e-10)
    assert state.calibrations == 2


@pytest.mark.parametrize(("watched", "calibrated"), [((0.6, 1.0), False), ((0.4, 1.0), True), ((1.0, -1.0), True)])
def test_on_an_event_it_calibrates_where_the_estimates_find_no_alignment(watched, calibrated):
    # The event is the feedback's own; a true gradient that would be NaN shows that none is computed to decide.
    rule, w = jaxfa.grape(watch=True), jnp.ones((3, 2))
    both = w, replace(rule.init(KEY, jnp.ones((4, 3)), jnp.ones((4, 2))), watched=jnp.array(watched))
    tx = jaxfa.calibrate(jaxfa.optimizer(optax.sgd(1.0), rule), every=1, below=0.5)
    count = []
    pseudo = jax.tree.map(jnp.ones_like, both)
    with jax.disable_jit():  # so that a branch that is not taken is not traced
        updates, state = tx.update(pseudo, tx.init(both), both, true_gradient=lambda: count.append(1) or 2 * w)
    assert int(state.calibrations) == len(count) == calibrated
    np.testing.assert_allclose(updates[0], -(2.0 if calibrated else 1.0) * w)


@pytest.mark.parametrize("seeds", [None, 2], ids=["alone", "seeds side by side"])
@pytest.mark.parametrize("below", [None, 0.5], ids=["on time", "on an event"])
def test_compiled_the_true_backward_pass_runs_at_these_steps_alone_but_for_seeds_side_by_side(below, seeds):
    rule, ran = jaxfa.grape(watch=True), []
    tx = jaxfa.calibrate(jaxfa.optimizer(optax.sgd(0.1), rule), every=2 if below is None else 1, below=below)

    @jax.custom_vjp
    def loss(w):
        return jnp.sum(w)

    def backward(w, g):
        jax.debug.callback(lambda w: ran.append(1), w)
        return (g * w,)

    loss.defvjp(lambda w: (loss(w), w), backward)

    def step(both, state, cosine):
        both = both[0], replace(both[1], watched=jnp.stack([cosine, jnp.ones_like(cosine)]))
        return tx.update(both, state, both, true_gradient=lambda: jax.grad(loss)(both[0]))[1]

    both = jnp.ones((3, 2)), rule.init(KEY, jnp.ones((4, 3)), jnp.ones((4, 2)))
    state, counts = tx.init(both), []
    if seeds:
        both, state = (jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), tree) for tree in (both, state))
        step = jax.vmap(step, (0, 0, None))
    step = jax.jit(step)
    for cosine in (0.9, 0.1, -1.0, 0.6, 0.4):
        state = step(both, state, jnp.asarray(cosine))
        jax.effects_barrier()
        counts.append(len(ran))
    these = [0, 1, 1, 2, 2] if below is None else [0, 1, 2, 2, 3]
    assert np.all(state.calibrations == these[-1])
    assert counts == (these if seeds is None else [2, 4, 6, 8, 10])  # every seed at every step


def test_a_flax_model_calibrates_by_its_plain_twin():
    rule, x = jaxfa.dfa(), inputs(9, 6)
    aligned = attach(MLP(nnx.Rngs(0)), rule, x)
    tx = jaxfa.calibrate(jaxfa.optimizer(optax.sgd(0.1), rule), every=2)
    optimizer = nnx.Optimizer(aligned, tx, wrt=TRAINED)

    @nnx.jit
    def train(aligned, optimizer):
        found = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, TRAINED))(aligned, x)
        graph, state = nnx.split(jaxfa.nn.plain(aligned))

        def exact():
            return nnx.grad(nnx_loss)(nnx.merge(graph, state, copy=True), x)

        optimizer.update(aligned, found, true_gradient=exact)

    train(aligned, optimizer)
    model = nnx.clone(jaxfa.nn.plain(aligned))
    before = nnx.state(model)
    gradient = nnx.jit(nnx.grad(nnx_loss))(model, x)
    train(aligned, optimizer)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before, gradient)
    after = nnx.state(jaxfa.nn.plain(aligned))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), after, expected)


def test_wrong_use_is_refused():
    w = jnp.ones((3, 2))
    both = w, jaxfa.fa().init(KEY, w)
    tx = jaxfa.optimizer(optax.sgd(1.0), jaxfa.fa())
    with pytest.raises(ValueError, match="every >= 1"):
        jaxfa.calibrate(tx, every=0)
    with pytest.raises(TypeError, match=r"expects what jaxfa.optimizer"):
        jaxfa.calibrate(optax.sgd(1.0), every=1).init(both)
    event = jaxfa.calibrate(tx, every=1, below=0.5)
    with pytest.raises(ValueError, match=r"a rule such as grape\(watch=True\)"):
        event.update(both, event.init(both), both, true_gradient=lambda: w)
    ours = jaxfa.calibrate(tx, every=1)
    with pytest.raises(ValueError, match=r"expected \[\(3, 2\)\], got \[\(2, 3\)\]"):
        ours.update(both, ours.init(both), both, true_gradient=lambda: w.T)
