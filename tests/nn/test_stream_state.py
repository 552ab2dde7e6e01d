"""Streamed blocks that write, return or keep something of their own beside their output."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxfa
import jaxfa.nn
from jaxfa.jaxprs.versions import equations, opened
from tests.networks import TRAINED, inputs, loss

SCHEDULES = jaxfa.stacks.stored, jaxfa.stacks.stream
MESH = jaxfa.stacks.mesh(data=2, layer=2)


class Odd(nnx.Module):
    """Residual blocks called in ways that not every schedule knows."""

    def __init__(self, rngs, way="plainly"):
        self.blocks = nnx.List([nnx.Sequential(nnx.Linear(6, 6, rngs=rngs), jnp.tanh) for _ in range(3)])
        self.dropout, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.blocks.append(nnx.Sequential(self.dropout, self.norm))
        self.head, self.way = nnx.Linear(6, 3, rngs=rngs), way

    def __call__(self, h, skips=False):
        for i, block in enumerate(self.blocks):
            if not (skips and i == 1):
                h = nnx.remat(lambda block, h: block(h))(block, h) if self.way == "remat" else block(h)
        return self.head(h)


class Noisy(Odd):
    """Blocks that share their weights and get their noise as an argument."""

    def __init__(self, rngs):
        super().__init__(rngs)
        layer, noise = nnx.Linear(6, 6, rngs=rngs), nnx.Dropout(0.5)
        self.blocks = nnx.List([nnx.Sequential(layer, one) for one in (noise, nnx.Dropout(0.5))])

    def __call__(self, h):
        for block in self.blocks:
            h = block(h, rngs=self.dropout.rngs)
        return self.head(h)


class Penalty(nnx.Variable):
    """A term of the loss."""


class Balanced(nnx.Module):
    """A block that writes a penalty and a statistic, and hands a sum of others on beside its output."""

    def __init__(self, rngs):
        self.layer, self.gate = (nnx.Linear(6, n, rngs=rngs) for n in (6, 1))
        self.penalty, self.mean = Penalty(jnp.zeros(())), nnx.BatchStat(jnp.zeros(()))

    def __call__(self, given):
        h, total = given
        gate, h = nnx.sigmoid(self.gate(h)), jnp.tanh(self.layer(h))
        self.penalty[...], self.mean[...] = (gate**2).mean(), gate.mean()
        return h * gate.repeat(6, -1), total + (h**2).mean()


class Penalised(nnx.Module):
    """A model that keeps terms of its loss in variables, or returns them."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Balanced(rngs) for _ in range(3)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, h):
        total = jnp.zeros(())
        for block in self.blocks:
            h, total = block((h, total))
        return self.head(h), total


def odd(schedule, way="plainly"):
    options = {"rngs": nnx.Rngs(1), "example": inputs(9, 6), "at": "blocks/*", "schedule": schedule}
    return jaxfa.nn.attach(Odd(nnx.Rngs(0), way), jaxfa.dfa(), **options)


DISPATCHED = jaxfa.stacks.dispatch(jaxfa.stacks.mesh(layer=2))
every_order = pytest.mark.parametrize("schedule", [jaxfa.stacks.stream, DISPATCHED], ids=repr)


@pytest.mark.parametrize("schedule", [jaxfa.stacks.stream, pytest.param(DISPATCHED, marks=pytest.mark.long)], ids=repr)
def test_batches_side_by_side_learn_from_their_own_errors(schedule):
    def learned(model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def run(params, x):
            return loss(nnx.merge(graphdef, params, rest, copy=True), x)

        x = jnp.stack([inputs(9, 6), -inputs(9, 6)])
        total = jax.jit(jax.grad(lambda params: jax.vmap(run, (None, 0))(params, x).sum()))(params)
        return total, jax.tree.map(jnp.add, *(jax.jit(jax.grad(run))(params, one) for one in x))

    total, sums = learned(odd(schedule))
    chex.assert_trees_all_close(total, sums, rtol=1e-4, atol=1e-6)


TERMS = {
    "a penalty": lambda block, total: block.penalty[...] ** 2,
    "an output": lambda block, total: total**2,
    "a statistic": lambda block, total: block.mean[...] ** 2,
    "none": lambda block, total: 0.0,
}


def penalised(schedule):
    options = {"rngs": nnx.Rngs(1), "example": inputs(9, 6), "at": "blocks/*", "logits": lambda out: out[0]}
    return jaxfa.nn.attach(Penalised(nnx.Rngs(0)), jaxfa.dfa(), schedule=schedule, **options)


def with_term(term):
    def objective(model):
        y, total = model(inputs(9, 6))
        return 1e-3 * (y**2).sum() + sum(TERMS[term](block, total) for block in model.model.blocks)

    return nnx.grad(objective)


@pytest.mark.parametrize("term", TERMS)
@every_order
def test_what_a_block_writes_or_returns_beside_its_output_has_its_gradient(schedule, term):
    learned = nnx.jit(with_term(term))
    got, want = (nnx.to_pure_dict(learned(penalised(one))) for one in (schedule, jaxfa.stacks.stored))
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


def of_parts(schedule, around):
    """The gradient of a batch in two parts, each of which has statistics of its own."""
    graphdef, both, rest = nnx.split(penalised(schedule), nnx.Any(*TRAINED), ...)

    def value(both, x):
        model = nnx.merge(graphdef, both, rest, copy=True)
        y, total = model(x)
        return 1e-3 * (y**2).sum() + total + model.model.blocks[0].penalty[...]

    return nnx.to_pure_dict(jax.jit(around(jax.grad(value)))(both, inputs(8, 6)))


def on_devices(gradient):
    return jax.shard_map(gradient, mesh=MESH, in_specs=(P(), P("data")), out_specs=P(), axis_names={"data"})


def one_by_one(gradient):
    return lambda both, x: jax.tree.map(jnp.add, gradient(both, x[:4]), gradient(both, x[4:]))


def test_parts_of_a_batch_are_added_up_once():
    got, want = of_parts(jaxfa.stacks.stream, on_devices), of_parts(jaxfa.stacks.stored, one_by_one)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"over \['data'\]: jaxfa.stacks.dispatch is a shard_map of its own"):
        of_parts(jaxfa.stacks.dispatch(MESH), on_devices)


@every_order
def test_a_block_runs_twice_though_it_writes_statistics_that_no_loss_reads(schedule):
    graphdef, state = nnx.split(odd(schedule))
    jaxpr = jax.make_jaxpr(lambda state: nnx.grad(loss)(nnx.merge(graphdef, state), inputs(9, 6)))(state)
    assert sum(eqn.primitive.name == "tanh" for eqn in equations(opened(jaxpr))) == 2 * 3


@every_order
def test_a_block_that_is_left_out_learns_nothing(schedule):
    learned = nnx.jit(nnx.grad(lambda model: (model(inputs(9, 6), skips=True) ** 2).sum()))
    got, want = (learned(odd(one)) for one in (schedule, jaxfa.stacks.stored))
    chex.assert_trees_all_close(nnx.to_pure_dict(got), nnx.to_pure_dict(want), rtol=1e-4, atol=1e-5)
    assert not got["model"]["blocks"][1]["layers"][0]["kernel"][...].any()


@every_order
def test_state_in_any_type_of_variable(schedule):
    got, want = (
        jaxfa.nn.layer_errors(odd(one), lambda model: loss(model, inputs(9, 6)))
        for one in (schedule, jaxfa.stacks.stored)
    )
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)
    assert all(error.any() for error in got.values())


@every_order
def test_inputs_that_are_empty_or_no_numbers(schedule):
    model = odd(schedule)
    keys = [jax.random.key_data(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.RngKey))]
    model.eval()
    assert jnp.isnan(model(inputs(9, 6).at[0].set(jnp.nan))).any(1).tolist() == [True] + [False] * 8
    after = [jax.random.key_data(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.RngKey))]
    chex.assert_trees_all_equal(keys, after)
    assert model(inputs(9, 6)[:0]).shape == (0, 3)
    # In evaluation nothing is written, so that a jitted function may close over the model.
    # A logit that nearly cancels out has the others' rounding: in double precision the two agree to 2e-16.
    np.testing.assert_allclose(jax.jit(model.__call__)(inputs(9, 6)), model(inputs(9, 6)), rtol=1e-5, atol=1e-7)


@every_order
def test_blocks_inside_transformations_are_refused(schedule):
    with pytest.raises(ValueError, match=r"'blocks/0' inside a transformation \(remat, jit, scan, cond\)"):
        odd(schedule, "remat")
