"""Trainings whose loss is no finite number: recorded, shown, not tried again; all others go on."""

import re

import numpy as np
import optax
import pytest

import jaxfa
from experiments.__main__ import main
from experiments.common import data, page, plots, records, rows, sweep
from experiments.common.experiment import Arm, Config, Experiment, Page, Study, Table
from experiments.common.metrics import METRICS
from experiments.common.task import Task
from experiments.common.trainer import Trainer
from experiments.compare import compare
from experiments.ldfa import cost as ldfa_cost
from experiments.ldfa import linear as ldfa_linear
from experiments.models.networks import MLP

NOTE = r"diverged: the training loss is (nan|inf) at step \d, epoch 1, seed 0"


@pytest.fixture
def trained(mock, monkeypatch):
    """Every epoch that is trained."""
    found, advance = [], Trainer.advance

    def counted(trainer, state, order, count):
        found.append(trainer)
        return advance(trainer, state, order, count)

    monkeypatch.setattr(Trainer, "advance", counted)
    return found


def arms(config=None):
    """A reference, an arm beside it at an absurd rate, and one whose reference that is."""

    def task(rate):
        def make(rngs):
            return MLP((8, 8, 3), 3, (4,), rngs=rngs)

        return Task(make, jaxfa.backprop(), optax.sgd(rate), data.load("digits", None), 16)

    return [
        Arm("bp", "calm", None, task(0.1)),
        Arm("wild", "wild", 1, task(1e30)),
        Arm("calm", "calm", 1, task(0.1), reference="wild"),
    ]


def experiment(arms, **options):
    return Experiment("experiments.some.thing", "A line.", {}, Page("Title", "nobody"), arms, **options)


def test_a_sweep_goes_on_past_an_arm_that_diverges_and_does_not_train_it_again(trained, tmp_path, capsys):
    config = Config(epochs=2, batch=16, seeds=1, out=tmp_path / "run")
    text = sweep.run(experiment(arms), config).read_text()
    (note,) = records.diverged(config.out).values()
    assert re.fullmatch(NOTE, note)
    assert records.diverged(config.out).keys() == {"wild"}
    assert [record["epoch"] for record in records.read(config.out / "wild")] == [0]
    assert not (config.out / "wild" / "timing.json").exists()
    bp, calm = rows.read(config.out)
    assert (bp.name, calm.name) == ("bp", "calm")
    assert bp.step["ratio"] == 1
    assert (calm.gap, calm.step) == (None, None)
    assert re.search(rf">wild<.*{NOTE}", text)
    assert "nan" not in text.replace(note, "")
    assert re.search(r"wild\W+diverged", capsys.readouterr().out)

    before = len(trained)
    again = sweep.run(experiment(arms), config).read_text()
    assert re.search(rf">wild<.*{NOTE}", again)
    assert len(trained) == before
    assert main(["report", str(config.out)]) == 0


def test_a_sweep_in_which_all_diverge_says_so(mock, tmp_path):
    config = Config(epochs=1, batch=16, seeds=1, out=tmp_path / "run")
    text = sweep.run(experiment(lambda config: arms()[1:2]), config).read_text()
    assert re.search(rf">wild<.*{NOTE}", text)


def test_a_study_is_made_without_what_diverged_or_not_at_all(mock, tmp_path):
    seen = []

    def study(config, histories):
        seen.append(list(histories))
        return Study(plots.Figure(), "caption", [Table("", [["head"], ["cell"]])])

    config = Config(epochs=1, batch=16, seeds=1, out=tmp_path / "run")
    text = sweep.run(experiment(lambda config: arms()[:2], study=study), config).read_text()
    assert seen == [["bp"]]
    assert re.search(rf">wild<.*{NOTE}", text)
    config = Config(epochs=1, batch=16, seeds=1, out=tmp_path / "all")
    with pytest.raises(FloatingPointError, match=rf"Nothing in .* is left to draw: wild {NOTE}"):
        sweep.run(experiment(lambda config: arms()[1:2], study=study), config)


OPTIONS = ["--methods", "fa", "--epochs", "1", "--batch", "16", "--seeds", "1", "--hidden", "4"]


def test_the_command_ends_with_the_names_and_a_status(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.RATES, "fa", 1e30)
    command = ["run", "compare", *OPTIONS, "--out", str(tmp_path / "run")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "Report: " in said.out
    assert said.err.splitlines()[-1].endswith("Some trainings diverged, and are not in the report's figures: fa.")
    before = len(trained)
    assert main(command) == 1
    assert len(trained) == before


def test_without_its_reference_a_comparison_is_told_all_the_same(mock, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.RATES, "bp", 1e30)
    assert main(["run", "compare", *OPTIONS, "--out", str(tmp_path / "one")]) == 1
    assert re.search(rf">bp<.*{NOTE}", (tmp_path / "one" / "report.html").read_text())
    assert not (tmp_path / "one" / "fa" / "timing.json").exists()
    assert capsys.readouterr().err.splitlines()[-1].endswith("figures: bp.")


@pytest.mark.parametrize(
    ("args", "refused"),
    [
        (["ldfa_vit", "--variants", "normative", "--feedback-rate", "0.1"], "--feedback-rate"),
        (["ldfa_rank_mlp", "--variants", "fixed", "--feedback-rate", "0.1"], "--feedback-rate"),
        (["compare", "--model", "lenet", "--dataset", "mnist", "--hidden", "3"], "--hidden"),
        (["pipeline", "--rounds", "0", "--timed-width", "3"], "--timed-width"),
        (["rank_collapse", "--trainings", "fa", "--adam-rate", "0.1"], "--adam-rate"),
    ],
)
def test_an_option_that_no_arm_reads_is_refused(args, refused, capsys):
    assert main(["run", *args]) == 2
    assert f"No arm of this run reads {refused}: leave" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["bp", "rank-2"])
def test_costs_are_drawn_without_a_training_that_diverged(missing, tmp_path):
    found = {"steps": [5.0], "operations": [1e12], "accuracy": [0.6]}
    missed = {key: [None] for key in found}
    curve = {name: missed if name == missing else found for name in ("bp", "rank-2", "rank-4")}
    curve = {name: one | {"rank": rank} for (name, one), rank in zip(curve.items(), (None, 2, 4), strict=True)}
    page.save(tmp_path, Study(ldfa_cost.figure({}, curve), "", []))
    shown = [row[0] for row in ldfa_cost.reach_rows(curve)[1:]]
    assert shown == [name for name in curve if name != missing]


def test_a_linear_student_at_an_absurd_rate_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ldfa_linear, "VARIANTS", {"P and Q learned": ({}, "#0072b2")})
    options = ["--ranks", "2", "--iterations", "20", "--seeds", "1", "--learning-rate", "1e9"]
    assert main(["run", "ldfa_linear", *options, "--out", str(tmp_path / "run")]) == 1
    assert "diverged, and are not in the report's figures: P and Q learned, rank 2, " in capsys.readouterr().err


def test_a_perplexity_beyond_all_numbers_is_cut():
    found = METRICS["perplexity"].values([{"test_loss": [1e5, np.log(4.0)]}])
    np.testing.assert_allclose(found, [[1e9, 4]])
