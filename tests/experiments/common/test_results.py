"""Results as data, the page made of them, and arms that train apart."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from rich.progress import Progress

from experiments.__main__ import EXPERIMENTS
from experiments.common import apart, data, records, results, rows, sweep, verdicts


def test_what_is_made_of_results_is_what_the_committed_files_say():
    for path, text in results.pages(EXPERIMENTS.values()).items():
        assert path.read_text() == text, f"{path} is not what its results say: run `make results`."


def test_every_committed_result_is_of_an_experiment_and_shown():
    made = "\n".join(results.pages(EXPERIMENTS.values()).values())
    for path in results.FOLDER.glob("*/results/*.json"):
        found = json.loads(path.read_text())
        assert EXPERIMENTS[found["experiment"]].paper == path.parents[1].name
        shown = found["notes"][0].replace("``", "`") if found["kind"] == results.OLDER else found["runs"][0]["commit"]
        assert shown in made


def folder(tmp_path):
    """Two arms of two seeds, one of which has no epoch yet."""
    arm = {"group": "Ours", "x": 1, "published": 30.0, "reference": "one", "axis": "epochs", "title": "", "note": ""}
    arm["origin"] = "the paper's own"
    described = {"title": "A title", "claim": "A claim.", "published": "A paper", "metric": "accuracy"}
    described["arms"] = [arm | {"name": "one"}, arm | {"name": "two"}]
    (tmp_path / "grape").mkdir()
    run = tmp_path / "run"
    records.open_run(run, {"experiment": "grape_deep", "epochs": 2, "seeds": 2})
    records.write_json(run / "sweep.json", described)
    (run / "one").mkdir()
    for epoch, accuracy in enumerate(([0.1, 0.1], [0.5, 0.3], [0.4, 0.2])):
        angles = {"first": [80.0, 60.0], "last": [0.0, 0.0]}
        records.append(run / "one", {"epoch": epoch, "seconds": 1.5, "test_accuracy": accuracy, "angle": angles})
    return run


@pytest.mark.parametrize(("commit", "tree"), [("abc", "clean"), ("abc-dirty", "changed")])
def test_a_result_has_every_arm_its_spread_and_where_it_was_run(commit, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("JAXFA_COMMIT", commit)
    monkeypatch.setattr(sys, "argv", ["/home/me/experiments/__main__.py", "run", "grape_deep", "--out", "/elsewhere"])
    found = json.loads(results.write(folder(tmp_path), EXPERIMENTS, "cpu").read_text())
    (one,) = found["arms"].values()
    assert one["last"] == {"seeds": [40.0, 20.0], "mean": 30.0, "std": 14.142}
    assert one["best"]["mean"] == 40.0
    assert (one["epochs"], one["seconds"], one["angle"]["mean"]) == (2, 4.5, 70.0)
    assert one["published"] == {"value": 30.0, "from": "the paper's own", "ours": "another set-up"}
    assert one["course"][1] == [1, 50.0, 30.0, 70.0]
    (run,) = found["runs"]
    assert (run["commit"], run["tree"]) == (commit, tree)
    assert run["command"] == "python -m experiments run grape_deep"
    assert run["jax"]
    assert "| Ours: epochs 1 | 30.0 ± 14.1 | 70° |  | 40.0 ± 14.1 | 30.0 |" in results._table(found)


@pytest.mark.parametrize("epoch", ["last", "best"])
def test_a_verdict_tells_the_published_gaps_and_the_order_that_are_ours_from_those_that_are_not(epoch):
    def arm(name, published, *ours):
        std = np.std(ours, ddof=1) if len(ours) > 1 else None
        found = {
            "title": name,
            "group": name,
            "note": "",
            "reference": "bp",
            epoch: {"mean": np.mean(ours), "std": std},
        }
        found[epoch] |= {"seeds": ours}
        return found | {"published": {"value": published, "from": "a third party's", "ours": "another set-up"}}

    arms = {
        "bp": arm("bp", 80.0, 90.0, 90.0),
        "near": arm("near", 77.5, 87.5, 88.5),  # a standard error of .5
        "level": arm("level", 79.0, 88.4, 88.4),
        "far": arm("far", 79.5, 60.0, 60.0),
    }
    source, _, holds, fails, order, level, other = verdicts.verdict(
        {"metric": "accuracy", "published": "A paper", "arms": arms}, epoch
    )
    assert source == f"Published: A paper. Whose number: a third party's. Ours: another set-up, {epoch} epochs."
    assert holds == (
        "- Gaps to the reference that hold within 1 point: near -2.0 (published -2.5); level -1.6 (published -1.0)."
    )
    assert fails == "- Gaps that do not: far -30.0 (published -0.5)."
    assert order == "- **Order: 3 of 6 pairs of arms stand as published.**"
    assert level == "- Within twice the standard error: level before near."
    assert other == "- The other way round: far before near; far before level."


def test_of_perplexities_the_lower_is_ahead():
    def arm(name, published, ours):
        found = {"title": name, "group": name, "note": "", "reference": "bp", "last": {"mean": ours, "std": None}}
        return found | {"published": {"value": published, "from": "theirs", "ours": "another"}}

    arms = {"bp": arm("bp", 30.0, 7.0), "dfa": arm("dfa", 52.0, 6.0)}
    *_, order, other = verdicts.verdict({"metric": "perplexity", "published": "A paper", "arms": arms}, "last")
    assert order == "- **Order: 0 of 1 pairs of arms stand as published.**"
    assert other == "- The other way round: bp before dfa."


def test_presets_without_a_result_are_told_with_the_reason():
    experiment = EXPERIMENTS["grape_resnet20"]
    gpu, paper = (
        "`gpu15` (it takes a quarter of an hour of a GPU)",
        "`paper` (the published size takes a GPU for hours or days)",
    )
    assert verdicts.not_run(experiment, ["cpu"]) == f"Presets not run: {gpu}, {paper}.\n"
    assert verdicts.not_run(experiment, ["gpu15-160-epochs"]) == f"Presets not run: {paper}.\n"
    assert verdicts.not_run(experiment, ["gpu15", "paper"]) == ""


def test_a_verdict_is_of_the_docstring_and_repeats_no_measured_number():
    for experiment in EXPERIMENTS.values():
        assert not re.search(r"\d+(\.\d+)? (%|points?|degrees)", experiment.verdict), experiment.name


def test_a_copy_without_its_repository_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("JAXFA_COMMIT", "abc")
    assert records.environment()["commit"] == "abc"


def test_arms_that_fail_or_are_cut_are_told_and_the_others_go_on(tmp_path, monkeypatch):
    script = "import sys, time; time.sleep(60 * (sys.argv[-1] == 'slow')); sys.exit(sys.argv[-1] != 'quick')"
    monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-c", script))
    (tmp_path / "done").mkdir()
    records.append(tmp_path / "done", {"epoch": 5})  # its process fails for another's divergence
    with Progress(disable=True) as progress:
        told = apart.train_apart(tmp_path, ["quick", "bad", "slow", "done"], 5, 0.05, progress)
    assert told == [
        f"bad failed with exit status 1; {tmp_path}/bad.log says why.",
        "slow was cut at epoch 0 of 5; the same command goes on.",
    ]


def test_after_a_cut_at_any_moment_a_folder_tells_which_arms_are_not_done(tmp_path):
    records.write_json(tmp_path / "config.json", {"epochs": 2})
    assert rows.unfinished(tmp_path) == []  # before there are arms
    records.write_json(tmp_path / "sweep.json", {"arms": [{"name": name} for name in ("done", "half", "none", "lost")]})
    for name, epochs in {"done": 3, "half": 2, "lost": 1}.items():
        (tmp_path / name).mkdir()
        for epoch in range(epochs):
            records.append(tmp_path / name, {"epoch": epoch})
    with (tmp_path / "half" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2')  # the kill fell into this line
    records.replace(tmp_path / "lost" / records.DIVERGED, "diverged")
    assert rows.unfinished(tmp_path) == [
        "half was cut at epoch 1 of 2; the same command goes on.",
        "none was cut at epoch 0 of 2; the same command goes on.",
    ]


def test_published_numbers_stand_beside_the_published_setting_alone(monkeypatch):
    images, labels = np.zeros((256, 32, 32, 3), np.uint8), np.zeros(256, np.int32)
    monkeypatch.setattr(data, "load", lambda name, folder: data.Dataset(images, labels, images, labels, 100))
    arms, full = EXPERIMENTS["grape_resnet20"].arms, EXPERIMENTS["grape_resnet20"].presets["gpu15"]
    assert [arm.published for arm in arms(full)] == [68.72, None, 20.94, 24.28, None, None]
    for change in ({"dataset": "cifar10"}, {"scale": 0.5}, {"shrink": 2}):
        assert not any(arm.published for arm in arms(dataclasses.replace(full, **change)))


def test_one_arm_alone_must_be_one_of_the_sweep(mock, tmp_path):
    experiment = EXPERIMENTS["grape_resnet20"]
    config = dataclasses.replace(experiment.presets["cpu"], only="nothing", batch=20, out=tmp_path / "run")
    with pytest.raises(ValueError, match="No arm is called 'nothing'; choose one of bp, fa"):
        sweep.run(experiment, config)
    assert not config.out.exists()
