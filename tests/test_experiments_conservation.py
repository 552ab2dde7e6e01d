"""The diagnostics that any training can log, and the experiment on what is conserved: small, against what is known."""

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
from experiments import (
    conservation,
    conservation_figure,
    conservation_laws,
    data,
    ldfa_cost,
    ldfa_linear,
    ldfa_retina,
    memory,
    pipeline,
    rank_collapse,
    records,
    ssa_ablation,
    ssa_alignment,
    ssa_arms,
    ssa_cost,
    sweep,
)
from experiments.__main__ import EXPERIMENTS
from experiments.data import Dataset
from experiments.models import MLP
from experiments.task import Task
from experiments.train import train
from experiments.trainer import Trainer
from jaxfa.measure.conservation import half_square
from tests.networks import MODELS, attach, loss


def mock(classes=4):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 4, 4, 1), dtype=np.uint8), rng.integers(0, classes, 80).astype(np.int32)
    return Dataset(images[:64], labels[:64], images[64:], labels[64:], classes)


def task(rule=None, tx=None, **options):
    def make(rngs):
        return MLP((4, 4, 1), 4, (6, 5), rngs=rngs)

    return Task(make, rule or jaxfa.fa(), tx or optax.sgd(0.1), mock(), 16, **options)


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
        (jaxfa.fa(), optax.adam(1e-2), False, ["layers/0", "layers/1"]),
        (jaxfa.fa(), optax.sgd(0.1), True, ["layers/0", "layers/1"]),
        (jaxfa.dfa(), optax.sgd(0.1), False, ["layers/1"]),
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


TINY = {"images": 32, "test_images": 32, "seeds": 1}
FAMILIES = {
    "conservation": (conservation, {"datasets": ("digits",), "batch": 16}),
    "ldfa_cost": (ldfa_cost, {"networks": ()}),
    "ldfa_retina": (ldfa_retina, {"ranks": (2,), "batch": 16}),
    "rank_collapse": (rank_collapse, {"trainings": ("fa",), "batch": 16}),
    "ssa_ablation": (ssa_ablation, {"batch": 16}),  # a sweep, as most
    "ssa_alignment": (ssa_alignment, {"batch": 16, "network": "vgg13"}),
    "ssa_cost": (ssa_cost, {"batch": 16}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_experiment_hands_the_flag_to_its_trainings(name, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "train", lambda trainer, *_, **__: seen.append(trainer.task.diagnostics) or 1 / 0)
    monkeypatch.setattr(ssa_arms, "maker", lambda *_: task().make)
    monkeypatch.setattr(rank_collapse, "task", lambda *_: task())
    monkeypatch.setattr(ldfa_cost, "task", lambda *_: task())
    monkeypatch.setattr(ldfa_retina, "task", lambda *_: task())
    monkeypatch.setattr(ldfa_retina, "grey", lambda dataset, config: dataset)
    monkeypatch.setattr(data, "load", lambda *_: mock())
    experiment, options = FAMILIES[name]
    for on in (True, False):
        with pytest.raises(ZeroDivisionError):
            experiment.run(experiment.Config(**TINY, **options, diagnostics=on, out=tmp_path))
    assert seen == [True, False]


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_no_experiment_that_trains_lacks_the_flag(experiment):
    assert hasattr(experiment.Config, "diagnostics") == (experiment not in (ldfa_linear, memory, pipeline))


@pytest.mark.long
def test_the_experiment_reports_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, folder=None: mock() if name != "digits" else DIGITS)
    monkeypatch.setattr(conservation, "STARTS", {"aligned": conservation.STARTS["aligned"]})
    cases = {name: conservation_laws.CASES[name] for name in ("ReLU", "DFA, layer below")}
    monkeypatch.setattr(conservation_laws, "CASES", cases)
    monkeypatch.setattr(conservation_figure, "CASES", cases)
    monkeypatch.setattr(conservation, "RATES", (0.1, 0.05))
    monkeypatch.setattr(conservation, "HORIZON", 0.5)
    sizes = {"datasets": ("mnist",), "hidden": (6, 5), "images": 48, "batch": 16}
    config = conservation.Config(steps=60, iterations=1500, epochs=1, seeds=2, **sizes, out=tmp_path / "run")
    page = conservation.run(config)
    assert page.read_text().count("<svg") == 1
    assert (page.parent / "figure.png").stat().st_size > 1000
    found = records.read_json(page.parent / "results.json")
    assert found["residual"]["ReLU"] < 1e-12
    assert found["residual"]["DFA, layer below"] > 1e-3
    assert found["drift"]["0.1"] / found["drift"]["0.05"] == pytest.approx(2, rel=0.2)
    assert max(found["least"]["zero"] + found["least"]["in the span of the data"]) < 1e-10
    assert min(found["least"]["random"]) > 0.05
    assert len(records.read(page.parent / "mnist" / "aligned")) == 2
    with pytest.raises(ValueError, match="another configuration: seeds was 2, is now 1"):
        conservation.run(dataclasses.replace(config, seeds=1))


DIGITS = data.load("digits")


def test_the_control_of_an_aligned_start_has_its_norms_and_no_alignment():
    kernels = {}
    for start in ("random", "aligned", "random, norms as aligned"):
        rule, prepare = conservation.STARTS[start]
        state = Trainer(task(rule(), prepare=prepare), (0,)).init()
        kernels[start] = np.asarray(state.params["model"]["layers"][1]["kernel"][0])
        angle = float(
            jaxfa.diagnostics.angle(
                kernels[start], state.feedback["model"]["layers"][1]["dot_general"]["feedback"].b[0]
            )
        )
        assert (angle < 30) == (start == "aligned")
    norms = {start: np.linalg.norm(kernel, axis=0) for start, kernel in kernels.items()}
    np.testing.assert_allclose(norms["aligned"], norms["random, norms as aligned"], rtol=1e-5)
    assert abs(norms["aligned"] - norms["random"]).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps must be at least 1, got 0"), ({"learning_rate": -1.0}, "learning_rate must be positive")],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        conservation.Config(**options)
