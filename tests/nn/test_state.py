"""What an attached model is on disk: the arrays of its state; the same call of attach makes all the rest."""

import copy
import functools
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
from experiments.models import networks
from jaxfa.base import FixedFeedback
from jaxfa.nn.weights.contraction import contractions_of
from tests.methods import METHODS
from tests.networks import MLP, TRAINED, Scanned, attach, inputs, loss

X = inputs(9, 6)
CASES = [(MLP, method.rule, None) for method in METHODS]
CASES += [
    (Scanned, rule, ("stem", "blocks"))
    for rule in (jaxfa.brsf(), jaxfa.grape(averaging=jaxfa.rules.kalman(), tile=1, watch=True))
]
every_case = pytest.mark.parametrize(("make", "rule", "at"), CASES, ids=[*map(str, METHODS), "brsf, scanned", "tiles"])


@functools.cache
def transformation(rule):
    return jaxfa.optimizer(optax.adam(1e-2), rule)


def prepare(make, rule, at):
    """An attached model and its optimizer, as one module."""
    model = attach(make(nnx.Rngs(0)), rule, X, at)
    return nnx.List([model, nnx.Optimizer(model, transformation(rule), wrt=TRAINED)])


def arrays_of(both):
    return jax.tree.leaves(nnx.state(both))


def restore(both, saved):
    arrays = np.load(io.BytesIO(saved), allow_pickle=False)
    nnx.update(both, jax.tree.unflatten(jax.tree.structure(nnx.state(both)), list(arrays.values())))


def save(both):
    saved = io.BytesIO()
    np.savez(saved, *arrays_of(both))
    return saved.getvalue()


@every_case
def test_the_arrays_of_the_state_are_the_whole_of_it(make, rule, at):
    both, again = prepare(make, rule, at), prepare(make, rule, at)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in arrays_of(both)]
    assert len(set(pointers)) == len(pointers)  # all can be donated
    nnx.update(both, jax.tree.map(lambda leaf: leaf + 1, nnx.state(both)))
    restore(again, save(both))
    for one in (again, copy.deepcopy(both)):
        assert nnx.graphdef(one) == nnx.graphdef(both)  # the same program, then
        for ours, theirs in zip(arrays_of(both), arrays_of(one), strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_a_restored_model_goes_on_bit_for_bit_and_is_not_traced_again():
    traces = []

    @nnx.jit
    def step(both):
        traces.append(both)
        model, optimizer = both
        model.refine(jax.random.key(1), X)
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, TRAINED))(model, X))

    both, again = prepare(*CASES[-1]), prepare(*CASES[-1])
    step(both)
    restore(again, save(both))
    step(both)
    step(again)
    assert [one.tobytes() for one in arrays_of(both)] == [one.tobytes() for one in arrays_of(again)]
    assert len(traces) == 1


@pytest.mark.parametrize("make", [jaxfa.fa, lambda: jaxfa.ldfa(2), jaxfa.dfa, jaxfa.local_classifier])
def test_an_equal_rule_draws_what_the_first_drew_and_compiles_nothing(make, caplog):
    model, x = networks.MLP((2, 2, 2), 3, hidden=(8, 8, 6), rngs=nnx.Rngs(0)), inputs(6, 2, 2, 2)

    def draw():
        attached = jaxfa.nn.attach(model, make(), rngs=nnx.Rngs(1), example=x)
        return nnx.to_pure_dict(nnx.state(attached, jaxfa.nn.Feedback))

    first = draw()
    with caplog.at_level("WARNING", logger="jax"), jax.log_compiles():
        second = draw()
    assert "ompiling" not in caplog.text
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("nested", [False, True])
def test_rules_of_the_same_equations_have_each_its_own_arrays(nested):
    def draw(value):
        array = jnp.full((4, 3), value)

        def constant(w):
            return w * array

        scaled = jax.jit(constant) if nested else constant
        rule = jaxfa.LayerRule(lambda key, w: FixedFeedback(scaled(jnp.ones_like(w))))
        attached = jaxfa.nn.attach(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rule, rngs=nnx.Rngs(1))
        return contractions_of(attached.model)[""].feedback.get_value().b

    np.testing.assert_array_equal([draw(value)[0, 0] for value in (1.0, 2.0, 3.0)], [1.0, 2.0, 3.0])
