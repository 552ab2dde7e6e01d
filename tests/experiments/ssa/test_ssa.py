"""The SSA experiments on mock images: they run, ranks fall between epochs, a killed run goes on."""

import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxfa
from experiments.common import checkpoint, data, records, sweep
from experiments.common.train import train
from experiments.common.trainer import State, Trainer
from experiments.models.networks import MLP
from experiments.ssa import ablation, networks
from experiments.ssa import arms as ssa_arms

TINY = {"epochs": 2, "batch": 16, "images": 32, "test_images": 12, "seeds": 1, "multiple": 2, "energy": 0.7}


@pytest.fixture
def tiny(mock, monkeypatch):
    """A small fully connected network in the place of each convolutional one."""

    def make(rngs):
        return MLP((8, 8, 3), 3, (12, 12), rngs=rngs)

    monkeypatch.setattr(ssa_arms, "maker", lambda name, config, dataset: make)
    return mock


@pytest.mark.long
def test_ranks_fall_and_costs_with_them(tiny, tmp_path):
    config = networks.Config(**TINY, networks=("mlp",), out=tmp_path)
    sweep.run(networks.EXPERIMENT, config)
    history = records.read(tmp_path / "mlp-parallel-weights")
    first, last = (sum(np.ravel(list(record["rank"].values()))) for record in (history[0], history[-1]))
    assert last < first
    assert all(top >= one for top, one in zip(history[-1]["top_five"], history[-1]["test_accuracy"], strict=True))
    numbers = records.read_json(tmp_path / "study.json")["numbers"]
    costs = numbers["costs"]
    assert set(costs) == {f"mlp-{arm}" for arm in networks.COUNTED}
    for arm in ("svd_bp", "parallel-weights", "sequential-feedback"):
        assert costs[f"mlp-{arm}"]["inference"] < costs["mlp-bp"]["inference"]
    assert numbers["ends"]["mlp-parallel-weights"]["rank"] < 0.9


def test_hoyers_penalty_on_the_papers_schedule_lowers_the_ranks_that_pruning_keeps(tiny):
    options = {"epochs": 4, "batch": 4, "multiple": 1, "energy": 0.95, "learning_rate": 0.05}
    config = networks.Config(**(TINY | options))
    ranks = {}
    for weight in (0.0, config.hoyer):
        task = ssa_arms.ssa(
            "mlp", dataclasses.replace(config, hoyer=weight), data.first(tiny, 32, 12), jaxfa.ssa(beta=0.0)
        )
        trainer = Trainer(task, [0])
        state = trainer.init()
        for epoch in range(1, 3):  # the penalty is on in the first epoch, pruning begins after the second
            state, _ = trainer.advance(state, trainer.shuffle(state), trainer.steps)
            state = task.between(state, epoch)
        ranks[weight] = sum(jaxfa.factored.ranks(state.params).values())
    assert ranks[config.hoyer] < ranks[0.0]


@pytest.mark.parametrize(
    ("preset", "epochs"), [("paper", [0, 10, 20, 30, 40]), ("imagenet", [0, 10, 20]), ("cpu", [0, 1])]
)
def test_hoyers_penalty_is_on_in_every_tenth_epoch_of_the_first_thirty_percent_or_in_both_of_two(preset, epochs):
    config, steps = dataclasses.replace(networks.EXPERIMENT.presets[preset], hoyer=0.3), 7
    found = ssa_arms.hoyer(jnp.arange(config.epochs * steps), config=config, steps=steps)
    by_epoch = np.asarray(found).reshape(config.epochs, steps)
    assert set(by_epoch.ravel().tolist()) == {0.0, float(np.float32(0.3))}
    np.testing.assert_array_equal(by_epoch.min(1), by_epoch.max(1))  # an epoch's steps are alike
    assert np.flatnonzero(by_epoch[:, 0]).tolist() == epochs


def test_hoyers_penalty_changes_a_tasks_steps_by_that_schedule_and_pruning_begins_where_it_has_ended(tiny):
    # It is on in the epochs 0 and 2 of the first three.
    config = networks.Config(**(TINY | {"epochs": 10, "multiple": 1, "period": 2, "hoyer": 0.3}))
    task = ssa_arms.ssa("mlp", config, data.first(tiny, 32, 12), jaxfa.ssa(beta=0.0))
    w = jaxfa.factored.factorise(jnp.asarray(np.random.default_rng(0).normal(size=(6, 5))), name="w")
    s, zero = np.asarray(w.s), jax.tree.map(jnp.zeros_like, w)
    own = 0.3 * (1 / np.linalg.norm(s) - s.sum() * s / np.linalg.norm(s) ** 3)
    tx, update = task.optimizer, jax.jit(task.optimizer.update)
    state, moved = tx.init(w), []
    for _ in range(4 * 2):  # two steps an epoch
        before = state[1][0].mu.s
        _, state = update(zero, state, w)
        moved.append(np.asarray((state[1][0].mu.s - 0.9 * before) / 0.1))  # what Adam was given
    for step, given in enumerate(moved):
        np.testing.assert_allclose(given, own if step // 2 in (0, 2) else 0 * own, atol=1e-6)
    start = State(w, None, None, state, None, None)
    ranks = [task.between(start, epoch).params.s.size for epoch in (1, 2, 3, 4)]
    assert ranks[:3] == [w.s.size] * 3
    assert ranks[3] < w.s.size


def test_ssas_published_number_stands_beside_the_literal_reading_in_the_published_set_up_alone(tiny):
    config = networks.Config(**TINY, networks=("vgg13",))
    group = list(networks.arms(config))
    end = {"top_one": [1.0], "top_five": [1.0], "angle": [1.0], "rank": None}
    ends = {arm.name: end for arm in group}
    head, *table = networks._rows(config, group, ends, {})
    assert "published" not in " ".join(head)
    full = dataclasses.replace(networks.EXPERIMENT.presets["paper"], networks=("vgg13",))
    head, *table = networks._rows(full, group, ends, {})
    assert head[-1] == "top-1, published (the paper's own)"
    assert {row[0]: row[-1] for row in table if "SSA" in row[0] and row[-1]} == {
        "SSA, parallel, weights pulled": "92.7"
    }
    assert [row[-1] for row in table[:2]] == ["93.75", "92.8"]


def test_every_reading_is_an_arm_and_says_what_alignment_moves(tiny):
    found = {arm.name: arm for arm in networks.arms(networks.Config(**TINY, networks=("mlp",)))}
    kinds = {"parallel-weights", "parallel-feedback", "sequential-weights", "sequential-feedback"}
    assert found.keys() == {f"mlp-{kind}" for kind in ("bp", "svd_bp", "dfa", "predsim", "auglocal", *kinds)}
    for kind in kinds:
        arm, (way, moved) = found[f"mlp-{kind}"], kind.split("-")
        assert ("transport" in arm.title) == (moved == "feedback")
        assert isinstance(arm.task.rule, jaxfa.DirectRule) == (way == "parallel")


def test_every_reading_is_an_arm_at_each_of_several_betas_and_pulls_as_hard_as_they_say(tiny):
    config = networks.Config(**TINY, networks=("mlp",), betas=(0.0, 0.01, 0.1))
    found = {arm.name: arm for arm in networks.arms(config)}
    one = {arm.name for arm in networks.arms(dataclasses.replace(config, betas=config.betas[:1]))}
    readings = ("parallel-weights", "parallel-feedback", "sequential-weights", "sequential-feedback")
    assert {name for name in found if name.count("-") > 1} == {
        f"mlp-{reading}-{beta:g}" for reading in readings for beta in (0.01, 0.1)
    }
    without = {name for name in found if name.count("-") == 1}
    assert {"mlp-parallel", "mlp-sequential"} < without  # whatever alignment would move
    assert one == without

    def pull(name):
        trainer = Trainer(found[name].task._replace(optimizer=optax.identity()), [0])
        state = trainer.begin(jax.random.key(0))[1]
        learned = (state.params, state.feedback)
        zero = jax.tree.map(jnp.zeros_like, learned)
        (updates, _), _ = trainer.optimizer().update(zero, trainer.optimizer().init(learned), learned)
        return sum(float(jnp.abs(one).sum()) for one in jax.tree.leaves(updates))

    strong, weak = (pull(f"mlp-sequential-weights-{beta:g}") for beta in (0.1, 0.01))
    assert strong > 1e3 * pull("mlp-sequential")
    np.testing.assert_allclose(strong, 10 * weak, rtol=0.05)  # the way back onto the manifold bends a step


def test_without_cross_entropy_hidden_factors_alone_lose_its_gradient():
    names = ("layers/0", "head")
    params = [{"w": jaxfa.factored.factorise(jnp.eye(3), name=name), "b": jnp.zeros(3)} for name in names]
    rule = ablation.without_cross_entropy(jaxfa.ssa(parallel=False, beta=0.0, project=False, retract=False))
    tx = jaxfa.optimizer(optax.sgd(1.0), rule)
    both = params, [None, jaxfa.ssa(parallel=False).init(jax.random.key(0), params[1]["w"])]
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, both), tx.init(both), both)
    hidden, head = updates[0]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(hidden["w"]))
    assert all(np.all(leaf == -1) for leaf in jax.tree.leaves((hidden["b"], head)))


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_ranks_it_had(tiny, tmp_path):
    config = networks.Config(**(TINY | {"epochs": 3}), out=tmp_path)
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
    config = dataclasses.replace(networks.Config(**TINY), scale=0.05)
    dataset = mock._replace(train_images=np.zeros((32, 32, 32, 3), np.uint8), train_labels=np.zeros(32, np.int32))
    layers = {}
    for parallel in (True, False):
        trainer = Trainer(ssa_arms.ssa(name, config, dataset, jaxfa.ssa(parallel=parallel)), [0])
        layers[parallel] = [row.layer for row in trainer.coverage.rows]
        assert trainer.coverage.violations == ()
    assert layers[True] == layers[False]
    assert len(layers[True]) == {"vgg13": 12, "resnet32": 34}[name]
    svd = Trainer(ssa_arms.svd_bp(name, config, dataset), [0])
    assert jax.eval_shape(svd.begin, jax.random.key(0))[1].params


@pytest.mark.long
def test_the_imagenet_preset_takes_two_steps_on_images_of_tfds(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def load(source, *, split, batch_size):
        images = rng.integers(0, 256, (8 if split == "train" else 2, 64, 64, 3), dtype=np.uint8)
        return {"image": images, "label": 990 + np.arange(len(images))}

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", SimpleNamespace(load=load, as_numpy=lambda tree: tree))
    preset = networks.EXPERIMENT.presets["imagenet"]
    config = dataclasses.replace(preset, batch=4, scale=0.05, data=tmp_path)
    arms = {arm.name: arm for arm in networks.arms(config)}
    assert len(arms) == 2 * 9
    assert not any(arm.published for arm in arms.values())  # of images of another size
    trainer = Trainer(arms["vgg13-parallel-weights"].task, [0])
    state = trainer.init()
    state, losses = trainer.advance(state, trainer.shuffle(state), trainer.steps)
    assert losses.shape == (1, 2)
    assert np.isfinite(losses).all()
    assert state.params["model"]["head"]["kernel"].shape[-1] == 1000
