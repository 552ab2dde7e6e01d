"""How each feedback learns, as the table says it, and what is said if the phase in which it does was forgotten."""

import warnings
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxfa
from jaxfa.rules.shared.redrawn import redraw
from tests.methods import METHODS
from tests.networks import BLOCKS, MLP, TRAINED, Residual, attach, inputs, loss

X = inputs(9, 6)
LEARNS = {
    "backprop": "",
    "brsf": "drawn at every update",
    "kolen_pollack": "from the batch",
    "dkp": "from the batch",
    "ldfa": "from the batch",
    "dldfa": "from the batch",
    "local_classifier": "from the batch",
    "predsim": "from the batch",
    "auglocal": "from the batch",
    "weight_mirror": "by refine",
    "normative_ldfa": "by refine",
    "grape": "by refine",
    "fdfa": "by refine",
    "forward_gradient": "drawn at every update",
    "pepita_mirrored": "by refine",
    "ssa_transported": "from the weights",
}
PHASES = {
    "grape": jaxfa.grape,
    "fdfa": jaxfa.fdfa,
    "weight_mirror": jaxfa.weight_mirror,
    "normative_ldfa": lambda: jaxfa.normative_ldfa(2),
    "pepita": lambda: jaxfa.pepita(mirror=0.1),
}
every_phase = pytest.mark.parametrize(("name", "make"), PHASES.items(), ids=PHASES)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_table_says_how_each_feedback_learns(method):
    coverage = attach(MLP(nnx.Rngs(0)), method.rule, X).coverage()
    assert {row.learns for row in coverage.rows if row.feedback} <= {LEARNS.get(method.name, "fixed")}
    assert any(row.learns for row in coverage.rows) != method.exact
    assert str(coverage).splitlines()[0].endswith("learns")


def told(action, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action(*args)
    return [str(one.message) for one in caught]


@every_phase
def test_the_first_gradient_of_a_rule_that_was_never_refined_warns_once(name, make):
    model = attach(MLP(nnx.Rngs(0)), make(), X)
    gradient = nnx.jit(nnx.grad(loss))
    # What is no gradient, or measures one, says nothing.
    assert not told(lambda: (model(X), nnx.jit(lambda model: model(X))(model), jaxfa.nn.alignment(model, by_loss)))
    (message,) = told(gradient, nnx.clone(model), X)
    assert message.startswith(f"{name} learns")
    assert "model.refine(key, x)" in message
    assert not told(nnx.grad(loss), model, X)


def test_a_phase_that_ran_on_one_model_did_not_run_on_another_with_the_same_rule():
    rule = jaxfa.grape()
    first, second = (attach(MLP(nnx.Rngs(0)), rule, X) for _ in range(2))
    first.refine(jax.random.key(0), X)
    assert not told(nnx.grad(loss), first, X)
    assert len(told(nnx.grad(loss), second, X)) == 1


@every_phase
def test_a_step_that_refines_says_nothing_and_is_traced_once(name, make):
    traces = []

    @nnx.jit
    def step(model, key):
        traces.append(key)
        model.refine(key, X)
        return nnx.grad(loss)(model, X)

    model = attach(MLP(nnx.Rngs(0)), make(), X)
    for key in jax.random.split(jax.random.key(0), 2):
        step(model, key)
    graphdef, state = nnx.split(model)
    step(nnx.merge(graphdef, state), jax.random.key(1))
    assert len(traces) == 1


def test_streamed_models_and_rules_of_ones_own_are_told_and_rules_without_a_phase_are_not():
    streamed = attach(Residual(nnx.Rngs(0)), jaxfa.grape(), X, BLOCKS, schedule=jaxfa.stacks.stream)
    assert len(told(nnx.jit(nnx.grad(loss)), streamed, X)) == 1

    def mirror():
        return replace(jaxfa.fa(), refine=lambda forward, feedback, key: feedback)

    (message,) = told(nnx.grad(loss), attach(MLP(nnx.Rngs(0)), mirror(), X), X)
    assert message.startswith("test_")  # where the function was made: it has no other name
    assert not told(nnx.grad(loss), attach(MLP(nnx.Rngs(0)), jaxfa.fa(), X), X)


BY_THE_OPTIMIZER = {
    "brsf": jaxfa.brsf(),
    "kolen_pollack": jaxfa.kolen_pollack(),
    "ldfa": jaxfa.ldfa(2),
    "dkp": jaxfa.dkp(),
    "dldfa": jaxfa.dldfa(2),
    "local_classifier": jaxfa.local_classifier(),
    "forward_gradient": jaxfa.forward_gradient(),
}
FIXED = {
    "usf": jaxfa.usf(),
    "ssa": jaxfa.ssa(),
    "local_classifier": jaxfa.local_classifier(fixed=True),
    "dldfa": jaxfa.dldfa(2, learn_p=False, learn_q=False),
}
every_learner = pytest.mark.parametrize(("name", "rule"), BY_THE_OPTIMIZER.items(), ids=BY_THE_OPTIMIZER)


def mean_loss(model, x):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), jnp.arange(len(x)) % 3).mean()


@every_learner
def test_a_step_that_leaves_out_the_feedback_that_learns_warns_once(name, rule):
    alone, both = nnx.grad(mean_loss), nnx.grad(mean_loss, argnums=nnx.DiffState(0, TRAINED))
    model, looked, trained = (attach(MLP(nnx.Rngs(0)), rule, X) for _ in range(3))
    (message,) = told(nnx.jit(alone), model, X)
    assert message.startswith(f"The feedback of {name} {'is drawn' if rule.transform is redraw else 'learns'}")
    assert "DiffState" in message
    # Outside of jit one gradient may be a look, two are steps.
    assert [len(told(alone, looked, X)) for _ in range(3)] == [0, 1, 0]
    assert not told(lambda: (nnx.jit(both)(trained, X), nnx.jit(alone)(trained, X), alone(trained, X)))


@pytest.mark.parametrize("name", FIXED)
def test_fixed_feedback_may_be_left_out(name):
    model = attach(MLP(nnx.Rngs(0)), FIXED[name], X)
    assert not told(lambda: [nnx.jit(nnx.grad(mean_loss))(model, X) for _ in range(2)])


@every_learner
def test_an_optimizer_of_a_rule_that_leaves_feedback_as_it_is_refuses_feedback_that_learns(name, rule):
    model, fixed = attach(MLP(nnx.Rngs(0)), rule, X), jaxfa.optimizer(optax.adam(0.1), jaxfa.fa())
    with pytest.raises(ValueError, match=r"given fa, which .*learns"):
        nnx.Optimizer(model, fixed, wrt=TRAINED)
    nnx.Optimizer(model, jaxfa.optimizer(optax.adam(0.1), rule), wrt=TRAINED)


@pytest.mark.parametrize("name", FIXED)
def test_an_optimizer_takes_feedback_that_does_not_learn(name):
    rule = FIXED[name]
    model = attach(MLP(nnx.Rngs(0)), rule, X)
    optimizer = nnx.Optimizer(model, jaxfa.optimizer(optax.adam(0.1), rule), wrt=TRAINED)
    before = jax.tree.map(jnp.copy, nnx.state(model, TRAINED))
    optimizer.update(model, nnx.grad(mean_loss, argnums=nnx.DiffState(0, TRAINED))(model, X))
    kept, moved = (nnx.split_state(one, jaxfa.nn.Feedback, ...) for one in (before, nnx.state(model, TRAINED)))
    chex.assert_trees_all_equal(moved[0], kept[0])
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (moved[1], kept[1])), strict=True))


def by_loss(model):
    return jnp.square(model(X)).sum()
