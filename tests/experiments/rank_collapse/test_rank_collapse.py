"""Rank collapse: what changes spectra, what is measured of them, and the experiment on mock images."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
from experiments.common import data, records, sweep
from experiments.common.data import Dataset
from experiments.common.optimizers import hidden_kernels
from experiments.common.task import Task
from experiments.common.trainer import Trainer
from experiments.models.cnn import PoolingCNN
from experiments.models.networks import MLP, ResNet
from experiments.rank_collapse import rank_collapse, spectra
from experiments.rank_collapse import report as rank_report
from experiments.rank_collapse.ranks import effective_rank
from experiments.rank_collapse.ranks import ranks as measure_ranks

PARAMS = {"layers": {i: {"kernel": jnp.zeros((3, 3, 4, 6)), "bias": jnp.zeros(6)} for i in range(2)}}


@pytest.fixture
def tiny(monkeypatch):
    """Colour images of 8x8 pixels in the place of CIFAR."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (72, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 72).astype(np.int32)
    mock = Dataset(images[:48], labels[:48], images[48:], labels[48:], 3, augmented=True)
    monkeypatch.setattr(data, "load", lambda name, folder: mock)
    return mock


@pytest.fixture
def optimized():
    """Without optimisations XLA:CPU compares a maximum with inputs that it computes again, in another way."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def hidden():
    def make():
        return nnx.Sequential(*(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)) for _ in range(2)))

    return hidden_kernels(nnx.eval_shape(make), but=("layers/0",))


def updates(spectrum):
    """Gradients whose hidden one has singular values in a given proportion."""
    keys = jax.random.split(jax.random.key(0), 3)
    u, v = (jnp.linalg.qr(jax.random.normal(key, (n, 6)))[0] for key, n in zip(keys, (36, 6), strict=False))
    kernel = ((u * jnp.array(spectrum)[None]) @ v.T).reshape(3, 3, 4, 6)
    first = {"kernel": jax.random.normal(keys[2], (3, 3, 4, 6)), "bias": jnp.ones(6)}
    return {"layers": {0: first, 1: {"kernel": kernel, "bias": jnp.ones(6)}}}


def changed(tx, given):
    """The singular values that a transformation makes of the hidden kernel's; all else must stay."""
    found = jax.jit(lambda given: tx.update(given, tx.init(PARAMS), PARAMS)[0])(given)
    kernel = found["layers"][1].pop("kernel").reshape(36, 6)
    others = jax.tree.map(lambda leaf: leaf, given)
    others["layers"][1].pop("kernel")
    jax.tree.map(np.testing.assert_array_equal, found, others)
    return np.linalg.svd(kernel, compute_uv=False), kernel


SPECTRUM = (5.0, 4.0, 3.0, 0.5, 0.2, 0.0)
SIZE = np.linalg.norm(SPECTRUM)


def test_truncation_keeps_the_leading_directions_and_the_size():
    given = updates(SPECTRUM)
    sigma, kernel = changed(spectra.truncated(2, hidden()), given)
    np.testing.assert_allclose(sigma, SIZE / np.hypot(5, 4) * np.array([5, 4, 0, 0, 0, 0]), atol=1e-5)
    best = updates((5.0, 4.0, 0, 0, 0, 0))["layers"][1]["kernel"].reshape(36, 6)
    np.testing.assert_allclose(kernel, SIZE / np.hypot(5, 4) * best, atol=1e-5)


def test_flattening_keeps_the_size_and_makes_no_direction_up():
    sigma, kernel = changed(spectra.flattened(hidden()), updates(SPECTRUM))
    assert np.linalg.norm(kernel) == pytest.approx(SIZE, rel=1e-5)
    assert sigma[4] > 0.5 * sigma[0]
    assert sigma[5] < 1e-4


@pytest.mark.parametrize("change", [spectra.flattened, lambda h: spectra.truncated(2, h)])
def test_spectra_under_vmap_and_of_nothing(change):
    tx = change(hidden())
    given = [updates(SPECTRUM), updates((1.0, 0.9, 0.1, 0, 0, 0)), jax.tree.map(jnp.zeros_like, PARAMS)]
    alone = [changed(tx, one)[1] for one in given]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
    found = jax.vmap(lambda one: tx.update(one, tx.init(PARAMS), PARAMS)[0])(stacked)["layers"][1]["kernel"]
    np.testing.assert_allclose(found.reshape(3, 36, 6), np.stack(alone), atol=1e-4)
    assert not np.any(found[2])


def test_a_trajectory_is_of_the_last_updates():
    tx = spectra.remember(4, 1000, hidden())
    state = tx.init(PARAMS)
    given = [jax.tree.map(lambda leaf, i=i: i + leaf, PARAMS) for i in range(1, 7)]
    for i, one in enumerate(given):
        found, state = tx.update(one, state)
        assert found is one
        (rows,) = jax.tree.leaves(state.rows)
        assert rows.shape == (4, 216)
        assert sorted(rows[:, 0]) == sorted([*range(max(1, i - 2), i + 2), *[0] * (3 - i)])


def test_a_sketch_keeps_the_effective_rank():
    directions = jax.random.normal(jax.random.key(1), (8, 20_000))
    rows = jax.random.normal(jax.random.key(0), (40, 8)) @ directions
    rows = rows + 0.3 * jax.random.normal(jax.random.key(2), rows.shape)
    thin = jax.vmap(lambda row: spectra.sketch(row, 2048))(rows)
    assert thin.shape == (40, 2048)
    ranks = [effective_rank(one) for one in (rows, thin)]
    assert ranks[0] > 10
    assert ranks[1] == pytest.approx(ranks[0], rel=0.02)
    np.testing.assert_allclose(jnp.linalg.norm(thin, axis=1), jnp.linalg.norm(rows, axis=1), rtol=0.15)


def rank(matrix):
    return float(jaxfa.diagnostics.entropy_rank(jnp.asarray(matrix, jnp.float32)))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_a_rank_by_the_gram_matrix_is_that_of_the_singular_values(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    assert effective_rank(matrix) == pytest.approx(rank(matrix), rel=1e-5)
    assert effective_rank(np.outer(matrix[:, 0], matrix[0])) == pytest.approx(1, abs=1e-5)
    assert effective_rank(np.eye(6)) == pytest.approx(6)


@pytest.mark.long
def test_measured_ranks_are_those_of_the_equations(tiny):
    def make(rngs):
        return MLP((8, 8, 3), 3, (16, 12), rngs=rngs)

    matrices = hidden_kernels(nnx.eval_shape(lambda: make(nnx.Rngs(0))), but=("layers/0", "head"))
    remember = spectra.remember(5, 4096, matrices)
    optimizer = optax.chain(remember, optax.sgd(0.05))
    task = Task(make, jaxfa.fa(), optimizer, tiny._replace(augmented=False), 16, diagnostics=True)
    trainer = Trainer(task._replace(measure=partial(measure_ranks, probe=24, blocks=("layers",))), [0])
    state = trainer.init()
    state, _ = trainer.advance(state, trainer.shuffle(state), 3)
    found = trainer.evaluate(state)
    images, labels = tiny.train_images.astype(np.float32), tiny.train_labels[:24]
    x = ((images - images.mean((0, 1, 2), keepdims=True)) / images.std((0, 1, 2), keepdims=True))[:24].reshape(24, -1)
    params, feedback = jax.tree.map(lambda leaf: np.asarray(leaf[0]), (state.params["model"], state.feedback["model"]))
    first, second, head = *params["layers"].values(), params["head"]
    h1 = np.maximum(x @ first["kernel"] + first["bias"], 0)
    h2 = np.maximum(h1 @ second["kernel"] + second["bias"], 0)
    p = np.asarray(jax.nn.softmax(h2 @ head["kernel"] + head["bias"]))
    error = p - np.eye(3)[labels]
    delta2 = error @ feedback["head"]["dot_general"]["feedback"].b.T * (h2 > 0)
    delta1 = delta2 @ feedback["layers"][1]["dot_general"]["feedback"].b.T * (h1 > 0)
    ranks = {kind: {layer: value[0] for layer, value in one.items()} for kind, one in found["rank"].items()}
    assert ranks["error"] == pytest.approx(
        {"head": rank(error), "layers/1": rank(delta2), "layers/0": rank(delta1)}, rel=1e-3
    )
    assert rank(error) < 2.01  # the rows of softmax less one-hot sum to zero
    assert ranks["gradient"]["layers/1"] == pytest.approx(rank(h1.T @ delta2), rel=1e-3)
    assert ranks["gradient"]["layers/0"] == pytest.approx(rank(x.T @ delta1), rel=1e-3)
    assert ranks["channels"]["layers/1"] == pytest.approx(rank(delta2), rel=1e-3)  # one pixel
    assert ranks["activations"] == pytest.approx({"layers/0": rank(h1), "layers/1": rank(h2)}, rel=1e-3)
    assert found["update_rank"]["layers/0"][0] > 1
    assert list(ranks["trajectory"]) == ["layers/1"]
    assert 1.5 < ranks["trajectory"]["layers/1"] < 3.01


@pytest.mark.long
def test_ranks_over_channels_count_every_pixel(tiny, optimized):
    def make(rngs):
        return PoolingCNN((8, 8, 3), 3, (4, 6), normalised=False, rngs=rngs)

    remember = spectra.remember(5, 64, hidden_kernels(nnx.eval_shape(lambda: make(nnx.Rngs(0))), but=("head",)))
    optimizer = optax.chain(remember, optax.sgd(0.05))
    trainer = Trainer(Task(make, jaxfa.fa(), optimizer, tiny, 16), [0])
    state = trainer.init()
    found = measure_ranks(trainer, probe=24, blocks=("layers",))(state)["rank"]
    assert max(found["channels"]["layers/0/conv"]) <= 4 < max(found["error"]["layers/0/conv"])
    model = jaxfa.nn.plain(trainer.model(jax.tree.map(lambda leaf: leaf[0], state)))
    h = nnx.relu(model.layers[0](trainer.inputs(trainer.data[0][:24])))
    assert found["activations"]["layers/0"][0] == pytest.approx(rank(h.reshape(-1, 4)), rel=1e-3)


SMALL = {"widths": (4, 6), "epochs": 2, "steps": 1, "batch": 8, "window": 2, "sketch": 64, "probe": 8}


@pytest.mark.long
def test_the_experiment_and_its_report(tiny, optimized, tmp_path):
    arms = ("fa-muon", "bp-norm-rank-1")
    config = rank_collapse.Config(**SMALL, trainings=arms, images=None, test_images=None, out=tmp_path / "run")
    text = sweep.run(rank_collapse.EXPERIMENT, config).read_text()
    assert all(word in text for word in ("activations over channels", *arms))
    history = records.read(config.out / "fa-muon")
    assert len(history) == 3
    assert history[-1]["rank"]["trajectory"]["layers/1/conv"][0] > 1
    with pytest.raises(ValueError, match="another configuration: window was 2, is now 3"):
        sweep.run(rank_collapse.EXPERIMENT, dataclasses.replace(config, window=3))


@pytest.mark.long
def test_resnet18_runs_and_stands_beside_the_published_numbers(tiny, optimized, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_collapse, "as_published", lambda *_: True)
    options = SMALL | {"widths": (2, 3), "epochs": 1, "images": None, "test_images": None}
    config = rank_collapse.Config(**options, network="resnet18", trainings=("fa", "fa-norm"), out=tmp_path / "run")
    text = sweep.run(rank_collapse.EXPERIMENT, config).read_text()
    assert all(f">{number}<" in text for number in ("1.4", "37.1"))
    assert "accuracy, published (a third party" in text
    found = records.read(config.out / "fa-norm")[-1]["rank"]
    assert len(found["error"]) == 1 + 2 * 4 + 1 + 1  # the stem, four blocks, one shortcut, the head
    assert set(found["error"]) - set(found["trajectory"]) == {"stem/layers/0/conv", "head"}


def history(losses, ranks):
    return [
        {
            "probe_loss": [loss],
            "test_accuracy": [0.1],
            "rank": {kind: {"a": [rank], "b": [3 * rank], "head": [9.0]} for kind in rank_report.KINDS},
        }
        for loss, rank in zip(losses, ranks, strict=True)
    ]


def test_ranks_at_a_matched_loss_lie_between_epochs():
    slow, fast = history([2.3, 2.1, 1.8], [10, 20, 30]), history([2.3, 1.9, 1.0], [10, 50, 60])
    controls = {"bp-norm-rank-1": history([2.3, 2.2], [1, 1]), "fa-muon": history([2.4, 2.5], [1, 1])}
    assert rank_report.matched_loss({"fa": slow, "bp": fast} | controls, 10) == 1.8
    assert np.isnan(rank_report.matched_loss({"fa": slow, "bp": fast}, 2))
    # Hardly below the loss of guessing among ten, 2.303, nothing is learned.
    assert rank_report.matched_loss({"fa": slow, "bp": history([2.4, 2.29], [1, 1])}, 10) == 1.8

    def at(one, level):
        return rank_report.at_loss(one, np.array([[10.0, 20.0, 30.0]]), level)[0]

    assert at(slow, 2.0) == pytest.approx(20 + 10 / 3)
    assert at(slow, 2.5) == 10
    assert at(fast, 1.9) == 20
    assert np.isnan(at(slow, 1.7))
    assert np.isnan(at(slow, np.nan))
    _, fa, bp = rank_report.table({"fa": slow, "bp": fast}, 1.8, False)
    assert fa[1:] == ["10.0", "10.0", "1.8", *["60.0 / 60.0"] * 5]
    assert bp[4] == "102.2 / 120.0"
    assert rank_report.table({"fa": slow}, 1.8, True)[1][-1] == "1.4"


@pytest.mark.parametrize("normalised", [True, False])
def test_normalisation_can_be_left_out(normalised):
    def shapes(network, classes):
        def make():
            return network((32, 32, 3), classes, normalised=normalised, rngs=nnx.Rngs(0))

        logits = nnx.eval_shape(lambda: make()(jnp.ones((2, 32, 32, 3))))
        params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        assert logits.shape == (2, classes)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}

    params = shapes(partial(ResNet, widths=(64, 128, 256, 512), repeats=2), 100)
    assert sum(name.endswith("kernel") for name in params) == 18 + 3
    assert 11.1e6 < sum(leaf.size for leaf in params.values()) < 11.3e6
    assert any("norm" in name for name in params) == normalised
    assert ("stem/layers/0/conv/bias" in params) != normalised
    assert shapes(PoolingCNN, 10)["head/kernel"].shape == (2 * 2 * 128, 10)


def test_findings_are_the_gains_and_the_ratios_of_ranks():
    histories = {"fa": history([2.3, 1.9], [10, 20]), "bp": history([2.3, 1.9], [10, 40])}
    found = rank_report.findings(histories, 1.9, False)
    assert found[0][0] == "0.50"
    assert "fa's rank of errors over channels to bp's at loss 1.90" in found[0][1]
    better = [record | {"test_accuracy": [0.3]} for record in history([2.3, 1.9], [10, 20])]
    assert not rank_report.findings(histories, np.nan, False)
    pair = {"fa-norm": history([2.3, 1.9], [10, 20]), "fa-norm-muon": better}
    (gain,) = rank_report.findings(pair, 1.9, False)
    assert gain == ("+20.0", "points by Muon on top of normalisation.")
    assert rank_report.findings(pair, 1.9, True)[0][1].endswith("normalisation; the paper's own is +9.")


def test_epochs_without_ranks_leave_the_others_where_they_are():
    every = history([2.3, 2.1, 1.8], [10, 20, 30])
    rarely = [every[0], {"test_accuracy": [0.5]}, every[2]]
    assert rank_report.matched_loss({"fa": rarely}, 10) == 1.8
    np.testing.assert_array_equal(rank_report.hidden(rarely, "error"), [[20, 60]])
    assert rank_report.at_loss(rarely, np.array([[10.0, 30.0]]), 2.05)[0] == pytest.approx(20)
    _, fa = rank_report.table({"fa": rarely}, 1.8, False)
    assert fa[1:4] == ["10.0", "50.0", "1.8"]


def test_ranks_are_measured_at_the_start_at_the_end_and_between_as_often_as_asked():
    trainer = SimpleNamespace(
        of_seeds=lambda function, axes: lambda *_: (np.ones(1), {}),
        coverage=SimpleNamespace(rows=[]),
        data=(np.ones(2), np.ones(2)),
        steps=3,
    )
    measure = measure_ranks(trainer, probe=1, blocks=(), epochs=7, every=3)
    optimizer = spectra.Trajectory(jnp.zeros(()), {})
    states = [SimpleNamespace(step=np.array([3 * epoch]), optimizer=optimizer) for epoch in range(8)]
    assert [epoch for epoch, state in enumerate(states) if "rank" in measure(state)] == [0, 1, 4, 7]
