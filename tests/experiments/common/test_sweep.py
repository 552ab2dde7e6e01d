"""What every sweep does: goes on after a kill, lets arms join, tells the last epoch from the best."""

import dataclasses
import re

import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
from experiments.common import courses, page, records, rows, sweep, timing
from experiments.common.experiment import Arm, Config, Experiment, Page, prepare
from experiments.common.task import Task
from experiments.common.trainer import Trainer


class Dropping(nnx.Module):
    """A linear layer behind dropout."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(192, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(x.reshape(len(x), -1)))


def experiment(mock, *names):
    def arms(config):
        task = Task(Dropping, jaxfa.backprop(), optax.sgd(0.1), prepare(config, mock), 40)
        return [Arm(name, "linear", rank or None, task) for rank, name in enumerate(names)]

    return Experiment("experiments.some.thing", "A line.", {}, Page("Title", "nobody"), arms)


def test_a_killed_sweep_goes_on_and_more_arms_join_it(mock, tmp_path, monkeypatch):
    config = Config(epochs=1, seeds=1, out=tmp_path / "run")
    trained, advance = [], Trainer.advance

    def counted(trainer, state, order, count):
        trained.append(trainer)
        return 1 / 0 if len(trained) == 2 else advance(trainer, state, order, count)

    monkeypatch.setattr(timing, "measure", lambda *_, **__: None)
    monkeypatch.setattr(Trainer, "advance", counted)
    with pytest.raises(ZeroDivisionError):
        sweep.run(experiment(mock, "bp", "one"), config)
    sweep.run(experiment(mock, "bp", "one"), config)
    assert len(trained) == 3
    assert [len(records.read(config.out / name)) for name in ("bp", "one")] == [2, 2]
    sweep.run(experiment(mock, "bp", "one", "two"), config)
    assert len(trained) == 4
    assert [row.name for row in rows.read(config.out)] == ["bp", "one", "two"]
    with pytest.raises(ValueError, match=r"epochs was 1, is now 2.*--fresh"):
        sweep.run(experiment(mock, "bp"), dataclasses.replace(config, epochs=2))


def written(folder, accuracies, arms, *, same=True, small="", measured=None):
    """A sweep's folder with records of these accuracies, ``(epochs, seeds)`` each."""
    for name, found in accuracies.items():
        records.open_run(folder / name, {})
        for epoch, accuracy in enumerate(found):
            record = {"epoch": epoch, "seconds": 1.0, "test_accuracy": accuracy, "angle": {"a": [1.0], "b": [0.0]}}
            records.append(folder / name, record | (measured or {}))
    keys = ("name", "group", "x", "published", "reference", "axis", "title", "note", "origin")
    described = [dict(zip(keys, (*arm, "", "", "theirs"), strict=True)) for arm in arms]
    page = {"title": "", "claim": "", "published": "", "metric": "accuracy", "epoch": "best"}
    records.write_json(folder / "sweep.json", page | {"as_published": same, "smaller": small, "arms": described})
    records.write_json(folder / "config.json", {"split": "test", "seeds": 2, "epochs": 2})
    records.write_json(folder / "environment.json", [{"jax": "1"}])


def test_rows_tell_the_last_epoch_from_the_best_and_ours_from_the_published(tmp_path):
    # Epoch 0, before training, is no epoch to choose.
    accuracies = {
        "bp": [[0.9, 0.9], [0.5, 0.7], [0.6, 0.4]],
        "a": [[0.1, 0.1], [0.3, 0.4], [0.4, 0.2]],
        "b": [[0.1] * 2] * 2,
    }
    arms = [
        ("bp", "BP", None, 62.0, "bp", "rank"),
        ("a", "low", 4, 60.5, "bp", "rank"),
        ("b", "low", 2, None, "bp", "rank"),
    ]
    written(tmp_path, accuracies, arms)
    bp, a, b = rows.read(tmp_path)
    assert (bp.last.mean, bp.best.mean) == pytest.approx((50.0, 65.0))
    assert (a.last.mean, a.best.mean, a.gap, a.published_gap) == pytest.approx((30.0, 40.0, -25.0, -1.5))
    assert a.last.std == pytest.approx(np.std([40, 20], ddof=1))
    assert (bp.gap, b.published_gap, a.step) == (None, None, None)
    text = page.write(tmp_path).read_text()
    assert text.count("<svg") == 2 + 3  # against the rank accuracy and angle, and a course for every arm
    assert "<b>none</b>is the least rank" in text
    assert "published: none of these" in text
    assert "true gradients" not in text.lower()


@pytest.mark.parametrize("told", [{"same": False, "small": "A smaller set-up."}, {"same": None}])
def test_no_published_number_is_on_the_page_of_a_smaller_set_up_or_of_one_that_does_not_say(told, tmp_path):
    arms = [("bp", "BP", None, 62.0, "bp", "rank"), ("a", "low", 4, 60.5, "bp", "rank")]
    written(tmp_path, {"bp": [[0.9], [0.5]], "a": [[0.1], [0.3]]}, arms, **told)
    assert [(row.arm["published"], row.published_gap) for row in rows.read(tmp_path)] == [(None, None)] * 2
    text = page.write(tmp_path).read_text()
    assert not re.search("60.5|62.0|published|stroke-dasharray", text, re.IGNORECASE)
    assert ("A smaller set-up." in text) == (told["same"] is False)


def test_the_true_gradients_that_a_training_took_are_on_its_page(tmp_path):
    arms = [("bp", "BP", None, None, "bp", "rank"), ("a", "low", 4, None, "bp", "rank")]
    written(tmp_path, {"bp": [[0.9], [0.5]]}, arms)
    written(tmp_path, {"a": [[0.1], [0.3]]}, arms, measured={"calibrations": [7]})
    assert [row.calibrations for row in rows.read(tmp_path)] == [None, 7.0]
    text = page.write(tmp_path).read_text()
    assert "True gradients<small>" in text
    assert '<td class="number">7</td>' in text
    (printed,) = page.tables(tmp_path)
    assert [(column.header, list(column.cells)) for column in printed.columns][-1] == ("true gradients", ["", "7"])


def test_an_arm_that_has_not_run_is_left_out(tmp_path):
    written(
        tmp_path, {"bp": [[0.5], [0.5]]}, [("bp", "BP", None, None, "bp", "rank"), ("a", "low", 4, None, "bp", "rank")]
    )
    assert [row.name for row in rows.read(tmp_path)] == ["bp"]
    with pytest.raises(FileNotFoundError, match="no trained arm"):
        rows.read(tmp_path / "bp")


def test_two_arms_of_one_name_are_refused(mock, tmp_path):
    with pytest.raises(ValueError, match=r"name of its own, got \['bp', 'bp'\]"):
        sweep.run(experiment(mock, "bp", "bp"), Config(out=tmp_path / "run"))


def test_validation_split_holds_no_test_image(mock):
    held = prepare(Config(split="validation", test_images=3), mock)
    np.testing.assert_array_equal(held.test_images, mock.train_images[36:39])


def test_dropout_is_new_every_step_and_off_in_evaluation(mock):
    task = Task(Dropping, jaxfa.backprop(), optax.sgd(0.0), mock, 40)
    trainer = Trainer(task, (0,))
    state, losses = trainer.init(), []
    for _ in range(2):
        state, loss = trainer.advance(state, trainer.shuffle(state), 1)
        losses.append(float(loss[0][0]))
    assert abs(losses[0] - losses[1]) > 1e-3
    found = [trainer.evaluate(state)["test_loss"] for _ in range(2)]
    assert found[0] == found[1]


def test_an_angle_that_is_not_there_yet_hides_no_others():
    def record(epoch, angle):
        return {"epoch": epoch, "test_accuracy": [0.1], "test_loss": [1.0], "angle": {"a": [angle], "b": [0.0]}}

    assert "<svg" in courses.angles(rows.by_part([record(0, None), record(1, 60.0)]), 100)
    assert np.isnan(rows.by_part([record(0, None)])[0]["angle"]["a"][0])


def test_a_part_of_the_network_has_the_mean_angle_of_its_layers():
    angles = {
        "blocks/0/fc1": [10.0, 20.0],
        "blocks/0/norm/fc": [30.0, None],
        "blocks/1/fc1": [5.0, 5.0],
        "head": [0, 0],
    }
    (record,) = rows.by_part([{"epoch": 0, "angle": angles}])
    np.testing.assert_array_equal(record["angle"]["blocks/0"], [20.0, np.nan])
    assert list(record["angle"]) == ["blocks/0", "blocks/1", "head"]
