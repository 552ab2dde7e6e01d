"""The training loop: same bits after a kill, in either shape; refusals; a stop when training diverges."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.common import checkpoint, records
from experiments.common import trainer as trainer_module
from experiments.common.data import Dataset
from experiments.common.methods import METHODS
from experiments.common.task import Task, cross_entropy
from experiments.common.train import train
from experiments.common.trainer import Trainer
from experiments.models.networks import MLP


def tiny(classes=4):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 4, 4, 1), dtype=np.uint8)
    labels = rng.integers(0, classes, 80).astype(np.int32)
    return Dataset(images[:64], labels[:64], images[64:], labels[64:], classes)


class Normed(nnx.Module):
    """The tiny MLP behind batch normalisation, whose statistics a checkpoint must hold, too."""

    def __init__(self, width, rngs):
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.mlp = MLP((4, 4, 1), 4, (width, width), rngs=rngs)

    def __call__(self, x):
        return self.mlp(self.norm(x.reshape(len(x), -1)).reshape(x.shape))


@functools.cache  # a trainer holds no state, only compiled functions
def trainer(name="fa", *, seeds=(0, 1), width=6, loop="step", rate=1e-2, loss=cross_entropy, normed=False):
    data = tiny()

    def make(rngs):
        return Normed(width, rngs) if normed else MLP((4, 4, 1), 4, (width, width), rngs=rngs)

    task = Task(make, METHODS[name].rule(), optax.adam(rate), data, 16, loss=loss)
    return Trainer(task, seeds, loop)


def arrays(state):
    keyless = state._replace(key=jax.random.key_data(state.key))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(keyless)}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(value, b[path], err_msg=path)


def saved(folder, like):
    with checkpoint.checkpoints(folder) as manager:
        return checkpoint.restore(manager, like.init())


def metrics(folder):
    return [{**record, "seconds": None} for record in records.read(folder)]


@pytest.mark.parametrize("killed_in", ["training", "saving"])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(killed_in, tmp_path, monkeypatch):
    compiled = trainer("weight_mirror", normed=True)  # its feedback learns, and draws its own numbers
    train(compiled, 6, folder=tmp_path / "whole", config={}, save_every=2)

    def save(manager, epoch, state):
        if epoch == 4:
            raise KeyboardInterrupt
        checkpoint_save(manager, epoch, state)

    checkpoint_save, evaluate = checkpoint.save, compiled.evaluate
    with monkeypatch.context() as patch:
        if killed_in == "saving":
            patch.setattr(checkpoint, "save", save)
        else:
            patch.setattr(compiled, "evaluate", lambda state: evaluate(state) if int(state.step[0]) < 20 else 1 / 0)
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            train(compiled, 6, folder=tmp_path / "killed", config={}, save_every=2)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "half a li')
    history = train(compiled, 6, folder=tmp_path / "killed", config={}, save_every=2)

    assert [record["epoch"] for record in history] == list(range(7))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    whole, resumed = saved(tmp_path / "whole", compiled), saved(tmp_path / "killed", compiled)
    assert whole[0] == resumed[0] == 6
    assert_same_bits(arrays(whole[1]), arrays(resumed[1]))
    assert np.abs(whole[1].rest["model"]["norm"]["mean"]).max() > 0


def test_both_shapes_of_the_loop_give_the_same_bits():
    results = []
    for loop in ("step", "scan"):
        compiled = trainer("weight_mirror", loop=loop)
        state = compiled.init()
        losses = []
        for _ in range(2):
            state, loss = compiled.advance(state, compiled.shuffle(state), compiled.steps)
            losses.append(np.asarray(loss))
        results.append(arrays(state) | {"losses": np.array(losses)})
    assert_same_bits(*results)


@pytest.mark.parametrize("turns", [True, False])
def test_seeds_side_by_side_train_as_they_do_alone(turns, monkeypatch):
    monkeypatch.setattr(trainer_module, "take_turns", lambda seeds, program: turns and len(seeds) > 1)
    both, alone = trainer(), trainer(seeds=(1,))
    states = [compiled.init() for compiled in (both, alone)]
    states = [c.advance(s, c.shuffle(s), 4)[0] for c, s in zip((both, alone), states, strict=True)]
    for path, value in arrays(states[1]).items():
        np.testing.assert_allclose(arrays(states[0])[path][1:], value, rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_order_of_the_data_is_new_every_epoch_and_visits_each_example_once():
    compiled = trainer()
    state = compiled.init()
    orders = []
    for _ in range(2):
        orders.append(np.asarray(compiled.shuffle(state)))
        state, _ = compiled.advance(state, compiled.shuffle(state), compiled.steps)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order.reshape(2, -1)), np.tile(np.arange(64), (2, 1)))
    assert (orders[0] != orders[1]).any()
    assert (orders[0][0] != orders[0][1]).any()


def test_nothing_is_traced_again_from_step_to_step(tmp_path):
    traces = []

    def loss(logits, labels):
        traces.append(logits.shape)
        return cross_entropy(logits, labels)

    compiled = trainer(seeds=(0,), loss=loss)
    train(compiled, 1, folder=tmp_path / "a", config={})
    seen = len(traces)
    train(compiled, 3, folder=tmp_path / "b", config={})
    assert len(traces) == seen


def test_divergence_stops_with_the_place(tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is nan.* epoch 1, seed 0.*lower the learning rate"):
        train(trainer(rate=float("nan")), 3, folder=tmp_path / "run", config={})
    assert [record["epoch"] for record in records.read(tmp_path / "run")] == [0]


def test_run_of_another_configuration_is_refused(tmp_path):
    records.open_run(tmp_path / "run", {"rate": 0.1, "seeds": (0, 1)})
    records.open_run(tmp_path / "run", {"rate": 0.1, "seeds": (0, 1)})
    with pytest.raises(ValueError, match=r"rate was 0.1, is now 0.2.*--fresh"):
        records.open_run(tmp_path / "run", {"rate": 0.2, "seeds": (0, 1)})
    records.open_run(tmp_path / "run", {"rate": 0.2}, fresh=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"rate": 0.2}


def test_folder_that_is_no_run_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="no run's folder"):
        records.open_run(tmp_path, {}, fresh=True)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 7}, r"kernel.* is float32\[2, 6, 4\], expected float32\[2, 7, 4\]"),
        ({"name": "bp"}, "expected no such array"),
    ],
)
def test_checkpoint_of_another_network_or_method_is_refused(other, message, tmp_path):
    train(trainer(), 0, folder=tmp_path / "run", config={})
    with pytest.raises(ValueError, match=message):
        saved(tmp_path / "run", trainer(**other))


def test_truncated_checkpoint_is_refused(tmp_path):
    # Its description: truncated arrays are tried in a process of their own, in tests/experiments/compare, because
    # tensorstore's other reads then end after their event loop.
    compiled = trainer()
    train(compiled, 0, folder=tmp_path / "run", config={})
    (path,) = (tmp_path / "run" / "checkpoints" / "0").rglob("default/_METADATA")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"damaged.*Delete that folder.*--fresh"):
        train(compiled, 1, folder=tmp_path / "run", config={})


def test_no_pickles_in_a_checkpoint(tmp_path):
    train(trainer(), 0, folder=tmp_path / "run", config={})
    for path in (p for p in Path(tmp_path).rglob("*") if p.is_file()):
        assert not path.read_bytes().startswith(b"\x80\x04"), path


def test_batch_larger_than_the_data_is_refused():
    data = tiny()
    with pytest.raises(ValueError, match="batch of 65 is more than the 64"):
        Trainer(Task(lambda rngs: None, METHODS["fa"].rule(), optax.sgd(0.1), data, 65), (0,))
