"""Options of the training loop: calibration, the control beside it, epochs of fewer steps, one seed."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
from experiments.common.data import Dataset
from experiments.common.task import Task
from experiments.common.trainer import Trainer


class Net(nnx.Module):
    def __init__(self, rngs):
        # No bias before the normalisation: its gradient is rounding alone, of which Adam makes whole steps.
        first = nnx.Linear(16, 8, use_bias=False, rngs=rngs)
        self.layers = nnx.List([first, nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)])
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        first, second, last = self.layers
        h = nnx.relu(self.norm(first(x.reshape(len(x), -1))))
        return last(self.dropout(nnx.relu(second(h))))


def task(rule, **options):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 4, 4, 1), dtype=np.uint8), rng.integers(0, 4, 80).astype(np.int32)
    data = Dataset(images[:64], labels[:64], images[64:], labels[64:], 4)
    return Task(Net, rule, optax.adam(1e-2), data, 16, **options)


def trained(task, epochs=2, seeds=(0,)):
    trainer = Trainer(task, seeds, "step")
    state = trainer.init()
    for _ in range(epochs):
        state, _ = trainer.advance(state, trainer.shuffle(state), trainer.steps)
    return trainer, state


def assert_close(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seeds", [(0,), pytest.param((0, 1), marks=pytest.mark.long)])
def test_calibrating_at_every_step_is_backpropagation(seeds):
    _, bp = trained(task(jaxfa.backprop()), 1, seeds)
    always, state = trained(task(jaxfa.dfa(), calibrate=partial(jaxfa.calibrate, every=1)), 1, seeds)
    assert_close(state.params, bp.params)
    assert_close(state.rest["model"]["norm"], bp.rest["model"]["norm"])
    np.testing.assert_array_equal(always.evaluate(state)["calibrations"], [4] * len(seeds))


@pytest.mark.long
def test_never_calibrating_is_the_rule():
    _, rule = trained(task(jaxfa.dfa()), 1)
    _, state = trained(task(jaxfa.dfa(), calibrate=partial(jaxfa.calibrate, every=5)), 1)
    assert_close(state.params, rule.params)
    np.testing.assert_array_equal(state.optimizer.calibrations, [0])


def test_an_epoch_of_fewer_steps_draws_a_new_batch_each_time():
    trainer, state = trained(task(jaxfa.backprop(), steps=1), epochs=3)
    assert trainer.steps == 1
    np.testing.assert_array_equal(state.step, [3])
    orders = []
    state = trainer.init()
    for _ in range(2):
        order = trainer.shuffle(state)
        orders.append(np.asarray(order))
        state, _ = trainer.advance(state, order, 1)
    assert orders[0].shape == (1, 1, 16)
    assert np.any(orders[0] != orders[1])


@pytest.mark.long
def test_one_seed_trains_as_it_does_beside_another():
    _, alone = trained(task(jaxfa.grape()), seeds=(1,))
    _, both = trained(task(jaxfa.grape()), seeds=(0, 1))
    assert_close(jax.tree.map(lambda leaf: leaf[0], alone.params), jax.tree.map(lambda leaf: leaf[1], both.params))
