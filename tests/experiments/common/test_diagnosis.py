"""The diagnostics that any training can log: small, against what is known."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.__main__ import EXPERIMENTS
from experiments.common import sweep
from experiments.common.experiment import Training
from experiments.common.train import train
from experiments.common.trainer import Trainer
from experiments.models.networks import MLP
from jaxfa.measure.conservation import half_square
from tests.experiments.tasks import task
from tests.networks import MODELS, attach, loss


@pytest.mark.parametrize("rule", [jaxfa.fa(), jaxfa.dfa(), jaxfa.backprop()], ids=["fa", "dfa", "backprop"])
@pytest.mark.parametrize("name", ["mlp", "conv, batch norm, dropout"])
def test_errors_add_up_to_the_gradient_of_the_bias(name, rule):
    make, x, at = MODELS[name]
    model = attach(make(nnx.Rngs(0)), rule, x, at)

    @nnx.jit
    def both(model):
        gradient = nnx.grad(lambda model: loss(model, x))(nnx.clone(model))["model"]
        return jaxfa.nn.layer_errors(model, lambda model: loss(model, x)), nnx.to_pure_dict(gradient)

    errors, gradient = both(model)
    assert len(errors) == 3
    for layer, error in errors.items():
        expected = gradient[layer]["bias"]
        assert error.shape[0] == len(x)
        # A bias before a batch normalisation has no gradient, for the error that arrives there has no mean.
        assert (jnp.abs(expected).max() > 1e-4) == (layer != "conv1")
        assert jnp.abs(error).max() > 1e-4
        np.testing.assert_allclose(error.reshape(-1, error.shape[-1]).sum(0), expected, atol=1e-6)


def test_diagnostics_are_those_of_the_matrices_and_leave_the_training_alone(tmp_path):
    trainers = {on: Trainer(task(diagnostics=on), (0, 1)) for on in (True, False)}
    histories = {on: train(trainer, 1, folder=tmp_path / str(on), config={}) for on, trainer in trainers.items()}
    with pytest.raises(ValueError, match="trained without diagnostics: choose another --out"):
        train(trainers[True], 2, folder=tmp_path / "False", config={})
    first, last = histories[True]
    names = ("error_rank", "update_rank", "drift", "imbalance")
    for record in histories[False]:
        assert not set(names) & set(record)
    for record, plain in zip(histories[True], histories[False], strict=True):
        kept = {key: value for key, value in record.items() if key not in (*names, "seconds")}
        assert kept == {key: value for key, value in plain.items() if key != "seconds"}
        assert list(record["error_rank"]) == list(record["update_rank"]) == ["layers/0", "layers/1", "head"]
        assert list(record["drift"]) == list(record["imbalance"]) == ["layers/0", "layers/1"]
        assert all(1 <= rank <= 6 for ranks in record["error_rank"].values() for rank in ranks)
        assert max(max(found) for found in record["imbalance"].values()) < 1e-5
    assert max(max(found) for found in first["drift"].values()) < 1e-6
    assert min(min(found) for found in last["drift"].values()) > 1e-5
    assert json.dumps(last)


def test_drift_and_update_rank_are_what_the_steps_say():
    trainer = Trainer(task(diagnostics=True), (0,))
    state = start = trainer.init()
    start = jax.tree.map(jnp.copy, start.params["model"])
    seen, order = [start], trainer.shuffle(state)
    for _ in range(trainer.steps):
        state, _ = trainer.advance(state, order, 1)
        seen.append(jax.tree.map(jnp.copy, state.params["model"]))

    def pair(params):
        first, second = (params["layers"][i] for i in (0, 1))
        return jaxfa.conservation.Pair(first["kernel"][0], second["kernel"][0], first["bias"][0])

    pairs = [pair(params) for params in seen]
    steps = [half_square(jax.tree.map(jnp.subtract, b, a)) for a, b in itertools.pairwise(pairs)]
    found = trainer.evaluate(state)
    expected = sum(steps).sum() / half_square(pairs[0]).sum()
    np.testing.assert_allclose(found["drift"]["layers/0"], expected, rtol=1e-2)
    # The head's error has rows that sum to zero, so that its step has one direction less than outputs.
    assert 1 < found["update_rank"]["head"][0] < 3


@pytest.mark.parametrize(
    ("rule", "tx", "normalised", "layers"),
    [
        pytest.param(jaxfa.fa(), optax.adam(1e-2), False, ["layers/0", "layers/1"], marks=pytest.mark.long),
        (jaxfa.fa(), optax.sgd(0.1), True, ["layers/0", "layers/1"]),
        pytest.param(jaxfa.dfa(), optax.sgd(0.1), False, ["layers/1"], marks=pytest.mark.long),
    ],
    ids=["adam", "batch_norm", "dfa"],
)
def test_imbalance_tells_what_the_network_breaks_from_what_the_optimizer_does(rule, tx, normalised, layers):
    def make(rngs):
        return MLP((4, 4, 1), 4, (6, 5), normalised=normalised, rngs=rngs)

    trainer = Trainer(task(rule, tx, diagnostics=True)._replace(make=make), (0,))
    found = trainer.evaluate(trainer.init())["imbalance"]
    assert list(found) == layers
    assert (max(found.values()) > 1e-2) == normalised
    assert normalised or max(found.values()) < 1e-5


def test_the_sweep_hands_the_flag_to_its_trainings(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "train", lambda trainer, *_, **__: seen.append(trainer.task.diagnostics) or 1 / 0)
    for on in (True, False):
        config = EXPERIMENTS["compare"].presets["cpu"]
        config = dataclasses.replace(config, methods=(), hidden=(4,), diagnostics=on, out=tmp_path / "run")
        with pytest.raises(ZeroDivisionError):
            sweep.run(EXPERIMENTS["compare"], config)
    assert seen == [True, False]


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_no_experiment_that_trains_lacks_the_flag(experiment):
    trains = isinstance(experiment.presets["cpu"], Training)
    others = ("conservation", "grape_bound", "growth", "ldfa_linear", "memory", "pipeline", "starts", "steps")
    assert trains == (experiment.name not in others)
    assert trains == (experiment.arms is not None)
