"""The SSA experiments on mock images: they run, ranks fall between epochs, a killed run goes on."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxfa
from experiments.__main__ import EXPERIMENTS
from experiments.common import checkpoint, data, records, sweep, timing
from experiments.common.data import Dataset
from experiments.common.train import train
from experiments.common.trainer import Trainer
from experiments.models.networks import MLP
from experiments.ssa import ablation as ssa_ablation
from experiments.ssa import alignment as ssa_alignment
from experiments.ssa import arms as ssa_arms
from experiments.ssa import cifar10 as ssa_cifar10
from experiments.ssa import cost as ssa_cost

TINY = {"epochs": 2, "batch": 16, "images": 32, "test_images": 12, "seeds": 1, "multiple": 2, "energy": 0.7}


@pytest.fixture
def mock(monkeypatch):
    """Two steps an epoch on mock images, timed hardly at all."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 120).astype(np.int32)
    mock = Dataset(images[:90], labels[:90], images[90:], labels[90:], 3, augmented=True)
    monkeypatch.setattr(data, "load", lambda name, folder: mock)
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.001)
    return mock


@pytest.fixture
def tiny(mock, monkeypatch):
    """A small fully connected network in the place of each convolutional one."""

    def make(rngs):
        return MLP((8, 8, 3), 3, (12, 12), rngs=rngs)

    monkeypatch.setattr(ssa_arms, "maker", lambda name, config, dataset: make)
    return mock


RUNS = {
    "ssa_ablation": (ssa_ablation, {}, ["all", "no-ce", "no-align", "no-ortho", "retraction", "transport"]),
    "ssa_alignment": (ssa_alignment, {"network": "vgg13"}, list(ssa_alignment.TITLES)),
    "ssa_cifar10": (
        ssa_cifar10,
        {"networks": ("vgg13",)},
        [f"vgg13-{arm}" for arm in ("bp", "svd_bp", "dfa", "ssa", "ssa-sequential")],
    ),
    "ssa_cost": (ssa_cost, {"fractions": (0.125,)}, ["ssa"]),
}


@pytest.mark.long
@pytest.mark.parametrize(("experiment", "options", "arms"), RUNS.values(), ids=RUNS)
def test_every_experiment_runs_and_reports(experiment, options, arms, tiny, tmp_path):
    page = experiment.run(experiment.Config(**TINY, **options, out=tmp_path)).read_text()
    assert "svg" in page or "published" in page.lower()
    for arm in arms:
        history = records.read(tmp_path / arm)
        assert len(history) == TINY["epochs"] + 1
        if "ssa" in arm or arm in ("all", "sequential"):
            first, last = (sum(np.ravel(list(record["rank"].values()))) for record in (history[0], history[-1]))
            assert last < first
    if experiment is ssa_cost:
        found = json.loads((tmp_path / "results.json").read_text())
        assert found["curve"][-1]["training"] < found["curve"][0]["training"]
        assert found["curve"][-1]["memory"] < found["curve"][0]["memory"]
        assert found["curve"][0]["inference"] > found["costs"]["backpropagation"]["inference"]
        assert found["costs"]["SSA, 0.125 of full rank"]["training"] < found["costs"]["backpropagation"]["training"]


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_ranks_it_had(tiny, tmp_path):
    config = ssa_cifar10.Config(**(TINY | {"epochs": 3}), out=tmp_path)
    dataset = data.first(tiny, 32, 12)
    task = ssa_arms.ssa("vgg13", config, dataset, jaxfa.ssa())
    options = {"config": {}, "save_every": 1}
    whole = train(Trainer(task, [0]), 3, folder=tmp_path / "whole", **options)
    train(Trainer(task, [0]), 2, folder=tmp_path / "part", **options)
    resumed = train(Trainer(task, [0]), 3, folder=tmp_path / "part", **options)
    assert resumed[-2]["rank"] != resumed[0]["rank"]
    for a, b in zip(whole, resumed, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    with checkpoint.checkpoints(tmp_path / "whole") as manager:
        other = ssa_arms.dense("vgg13", config, dataset, jaxfa.fa())
        with pytest.raises(ValueError, match="checkpoint"):
            checkpoint.restore(manager, Trainer(other, [0]).init())


@pytest.mark.long
@pytest.mark.parametrize("name", ["vgg13", "resnet32"])
def test_the_published_networks_take_both_readings(name, mock):
    config = dataclasses.replace(ssa_cifar10.Config(**TINY), scale=0.05)
    dataset = mock._replace(train_images=np.zeros((32, 32, 32, 3), np.uint8), train_labels=np.zeros(32, np.int32))
    layers = {}
    for parallel in (True, False):
        trainer = Trainer(ssa_arms.ssa(name, config, dataset, jaxfa.ssa(parallel=parallel)), [0])
        layers[parallel] = [row.layer for row in trainer.coverage.rows]
        assert trainer.coverage.violations == ()
    assert layers[True] == layers[False]
    assert len(layers[True]) == {"vgg13": 12, "resnet32": 34}[name]
    svd = Trainer(ssa_arms.svd_bp(name, config, dataset), [0])
    assert jax.eval_shape(svd.init).params


@pytest.mark.long
def test_the_imagenet_preset_takes_two_steps_on_images_of_tfds(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def load(source, *, split, batch_size):
        images = rng.integers(0, 256, (8 if split == "train" else 2, 64, 64, 3), dtype=np.uint8)
        return {"image": images, "label": 990 + np.arange(len(images))}

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", SimpleNamespace(load=load, as_numpy=lambda tree: tree))
    preset = ssa_cifar10.PRESETS["imagenet"]
    config = dataclasses.replace(preset, batch=4, scale=0.05, data=tmp_path)
    dataset = sweep.prepare(config, data.load(config.dataset, config.data))
    arms = {arm.name: arm for name in config.networks for arm in ssa_cifar10._arms(config, name, dataset)}
    rules = ("bp", "svd_bp", "dfa", "ssa", "ssa-sequential", "ssa-transport")
    assert list(arms) == [f"{name}-{rule}" for name in ("vgg13", "resnet32") for rule in rules]
    assert not any(arm.published for arm in arms.values())  # of images of another size
    trainer = Trainer(arms["vgg13-ssa"].task, [0])
    state = trainer.init()
    state, losses = trainer.advance(state, trainer.shuffle(state), trainer.steps)
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert state.params["model"]["head"]["kernel"].shape[-1] == 1000


def test_they_are_registered_and_refuse_an_impossible_energy():
    assert set(RUNS) <= set(EXPERIMENTS)
    with pytest.raises(ValueError, match="energy must be in"):
        ssa_cifar10.Config(energy=0.0)
