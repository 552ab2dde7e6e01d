"""Trainings whose loss is no finite number: recorded, shown, not tried again; all others go on."""

import re

import numpy as np
import optax
import pytest

import jaxfa
from experiments.__main__ import main
from experiments.common import data, records, sweep, sweep_report, timing
from experiments.common.data import Dataset
from experiments.common.metrics import METRICS
from experiments.common.task import Task
from experiments.common.trainer import Trainer
from experiments.compare import compare
from experiments.ldfa import cost_report
from experiments.ldfa import linear as ldfa_linear
from experiments.models import networks as models
from experiments.models.networks import MLP, Architecture
from experiments.ssa import alignment as ssa_alignment

NOTE = r"diverged: the training loss is (nan|inf) at step \d, epoch 1, seed 0"


@pytest.fixture
def mock(monkeypatch):
    """Four steps an epoch on mock images, with a network to match, timed hardly at all; counts the epochs trained."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 4, 4, 1), dtype=np.uint8), rng.integers(0, 3, 80).astype(np.int32)
    found, trained, advance = Dataset(images[:64], labels[:64], images[64:], labels[64:], 3), [], Trainer.advance
    monkeypatch.setattr(data, "load", lambda name, folder: found)
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.001)

    def counted(trainer, state, order, count):
        trained.append(trainer)
        return advance(trainer, state, order, count)

    def make(shape, classes, *, rngs):
        return MLP(shape, classes, (5,), rngs=rngs)

    monkeypatch.setitem(models.MODELS, "mlp", Architecture(make, 1))
    monkeypatch.setattr(Trainer, "advance", counted)
    return trained


def arms():
    """A reference, an arm beside it at an absurd rate, and one whose reference that is."""

    def task(rate):
        def make(rngs):
            return MLP((4, 4, 1), 3, (5,), rngs=rngs)

        return Task(make, jaxfa.backprop(), optax.sgd(rate), data.load("digits", None), 16)

    return [
        sweep.Arm("bp", "calm", None, task(0.1)),
        sweep.Arm("wild", "wild", 1, task(1e30)),
        sweep.Arm("calm", "calm", 1, task(0.1), reference="wild"),
    ]


def test_a_sweep_goes_on_past_an_arm_that_diverges_and_does_not_train_it_again(mock, tmp_path, capsys):
    config = sweep.Config(epochs=2, batch=16, seeds=1, out=tmp_path / "run")
    page = sweep.run(config, sweep.Page("Title", "claim", "nobody", course=True), arms()).read_text()
    (note,) = records.diverged(config.out).values()
    assert re.fullmatch(NOTE, note)
    assert records.diverged(config.out).keys() == {"wild"}
    assert [record["epoch"] for record in records.read(config.out / "wild")] == [0]
    assert not (config.out / "wild" / "timing.json").exists()
    bp, calm = sweep_report.read_rows(config.out)
    assert (bp.name, calm.name) == ("bp", "calm")
    assert bp.step["ratio"] == 1
    assert (calm.gap, calm.step) == (None, None)
    assert re.search(rf">wild<.*{NOTE}", page)
    assert "nan" not in page.replace(note, "")
    assert re.search(r"wild\W+diverged", capsys.readouterr().out)

    before = len(mock)
    again = sweep.run(config, sweep.Page("Title", "claim", "nobody", course=True), arms()).read_text()
    assert re.search(rf">wild<.*{NOTE}", again)
    assert len(mock) == before
    assert main(["report", str(config.out)]) == 0


def test_a_sweep_in_which_all_diverge_says_so(mock, tmp_path):
    (_, wild, _) = arms()
    config = sweep.Config(epochs=1, batch=16, seeds=1, out=tmp_path / "run")
    page = sweep.run(config, sweep.Page("Title", "claim", "nobody", course=True), [wild]).read_text()
    assert re.search(rf">wild<.*{NOTE}", page)


OPTIONS = ["--methods", "fa", "--epochs", "1", "--batch", "16", "--seeds", "1"]


def test_the_command_ends_with_the_names_and_a_status(mock, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.RATES, "fa", 1e30)
    command = ["run", "compare", *OPTIONS, "--out", str(tmp_path / "run")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "Report: " in said.out
    assert said.err.splitlines()[-1].endswith("Some trainings diverged, and are not in the report's figures: fa.")
    page = (tmp_path / "run" / "report.html").read_text()
    assert re.search(rf"<b>Feedback alignment</b></td><td colspan=\"6\">{NOTE}", page)
    assert records.read_json(tmp_path / "run" / "timing.json")["steps"].keys() == {"bp"}
    before = len(mock)
    assert main(command) == 1
    assert len(mock) == before


def test_without_its_reference_a_comparison_is_told_all_the_same(mock, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.RATES, "bp", 1e30)
    assert main(["run", "compare", *OPTIONS, "--out", str(tmp_path / "one")]) == 1
    page = (tmp_path / "one" / "report.html").read_text()
    assert re.search(rf"<b>Backpropagation</b></td><td colspan=\"6\">{NOTE}", page)
    assert not (tmp_path / "one" / "timing.json").exists()
    assert main(["run", "compare", "--methods", *OPTIONS[2:], "--out", str(tmp_path / "all")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("figures: bp.")


@pytest.mark.parametrize(
    ("args", "refused"),
    [
        (["ldfa_vit", "--rules", "normative", "--feedback-rate", "0.1"], "--feedback-rate"),
        (["ldfa_rank_mlp", "--groups", "fixed", "--feedback-rate", "0.1"], "--feedback-rate"),
        (["conservation", "--epochs", "1", "--batch", "3", "--datasets"], "--epochs, --batch"),
        (["pipeline", "--rounds", "0", "--timed-width", "3"], "--timed-width"),
        (["rank_collapse", "--trainings", "fa", "--adam-rate", "0.1"], "--adam-rate"),
    ],
)
def test_an_option_that_no_arm_reads_is_refused(args, refused, capsys):
    assert main(["run", *args]) == 2
    assert f"No arm of this run reads {refused}: leave" in capsys.readouterr().err


def lost(folder, name):
    (folder / name).mkdir(parents=True)
    records.replace(folder / name / records.DIVERGED, "diverged: the training loss is nan at step 1, epoch 1, seed 0")


@pytest.mark.parametrize("missing", ["bp", "rank-2"])
def test_costs_are_drawn_without_a_training_that_diverged(missing, tmp_path):
    found = {"steps": [5.0], "operations": [1e12], "accuracy": [0.6]}
    missed = {key: [None] for key in found}
    curve = {name: missed if name == missing else found for name in ("bp", "rank-2", "rank-4")}
    curve = {name: one | {"rank": rank} for (name, one), rank in zip(curve.items(), (None, 2, 4), strict=True)}
    lost(tmp_path, missing)
    page = cost_report.write(tmp_path, {}, curve, 0.5).read_text()
    assert re.search(rf"<td>{missing}</td><td>{NOTE}</td>", page)


def test_angles_are_drawn_without_a_training_that_diverged(tmp_path):
    record = {"epoch": 0, "test_accuracy": [0.5], "angle": {"a": [40.0], "b": [50.0], "head": [0.0]}}
    lost(tmp_path, "dfa")
    page = ssa_alignment.write(tmp_path, {"ssa": [record], "sequential": [record]}).read_text()
    assert re.search(rf"<td>dfa</td><td>{NOTE}</td>", page)
    with pytest.raises(FloatingPointError, match=rf"Nothing in .* is left to draw: dfa {NOTE}"):
        ssa_alignment.write(tmp_path, {})


def test_a_linear_student_at_an_absurd_rate_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ldfa_linear, "VARIANTS", {"P and Q learned": ({}, "#0072b2")})
    options = ["--ranks", "2", "--iterations", "20", "--seeds", "1", "--learning-rate", "1e9"]
    assert main(["run", "ldfa_linear", *options, "--out", str(tmp_path / "run")]) == 1
    assert "diverged, and are not in the report's figures: P and Q learned, rank 2, " in capsys.readouterr().err


def test_a_perplexity_beyond_all_numbers_is_cut():
    found = METRICS["perplexity"].values([{"test_loss": [1e5, np.log(4.0)]}])
    np.testing.assert_allclose(found, [[1e9, 4]])
