"""Results as data, the page made of them, and arms that train apart."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from rich.progress import Progress

from experiments.__main__ import EXPERIMENTS
from experiments.common import apart, records, results, rows, spent, sweep, verdicts
from experiments.common.experiment import identity
from experiments.common.published import changed


def test_what_is_made_of_results_is_what_the_committed_files_say():
    for path, text in results.pages(EXPERIMENTS.values()).items():
        assert path.read_text() == text, f"{path} is not what its results say: run `make results`."


def test_every_committed_result_is_of_an_experiment_and_shown():
    made = "\n".join(results.pages(EXPERIMENTS.values()).values())
    for path in results.FOLDER.glob("*/results/*.json"):
        found = json.loads(path.read_text())
        assert EXPERIMENTS[found["experiment"]].paper == path.parents[1].name
        assert found["runs"][0]["commit"] in made


FULL = {"images": None, "test_images": None, "split": "test", "dataset": "cifar100", "shrink": 1, "scale": 1.0}


def folder(tmp_path, same=True):
    """Two arms of two seeds, one of which has no epoch yet."""
    arm = {"group": "Ours", "x": 1, "published": 30.0, "reference": "one", "axis": "epochs", "title": "", "note": ""}
    arm["origin"] = "the paper's own"
    described = {"title": "A title", "claim": "A claim.", "published": "A paper", "metric": "accuracy"}
    described |= {"arms": [arm | {"name": "one"}, arm | {"name": "two"}], "as_published": same}
    (tmp_path / "grape").mkdir()
    run = tmp_path / "run"
    records.open_run(run, FULL | {"experiment": "grape_deep", "epochs": 50 if same else 2, "seeds": 2})
    records.write_json(run / "sweep.json", described)
    (run / "one").mkdir()
    for epoch, accuracy in enumerate(([0.1, 0.1], [0.5, 0.3], [0.4, 0.2])):
        angles = {"first": [80.0, 60.0], "last": [0.0, 0.0]}
        record = {"epoch": epoch, "seconds": 1.5, "test_accuracy": accuracy, "angle": angles}
        records.append(run / "one", record | {"calibrations": [epoch, epoch + 1]})
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
    assert one["published"] == {"value": 30.0, "from": "the paper's own"}
    assert one["calibrations"] == 2.5
    assert found["as_published"]
    assert "findings" not in found
    assert one["course"][1] == [1, 50.0, 30.0, 70.0]
    (run,) = found["runs"]
    assert (run["commit"], run["tree"]) == (commit, tree)
    assert run["command"] == "python -m experiments run grape_deep"
    assert run["jax"]
    table = results._table(found)
    assert "| step | true gradients | best epoch | published |" in table
    assert "| Ours: epochs 1 | 30.0 ± 14.1 | 70° |  | 2.5 | 40.0 ± 14.1 | 30.0 |" in table


def test_a_smaller_set_ups_published_numbers_stand_apart_from_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    path = results.write(folder(tmp_path, same=False), EXPERIMENTS, "cpu")
    found = json.loads(path.read_text())
    assert not found["as_published"]
    found["arms"]["one"]["published"]["value"] = 31.4
    found["findings"] = [["31.4", "is what it once said."]]
    # What it says of itself does not count: its configuration does.
    records.write_json(path, found | {"as_published": True})
    made = {}
    text = results._section(EXPERIMENTS["grape_deep"], made)
    assert "fill='none'" not in made[path.with_suffix(".svg")]  # the hollow mark of a published number
    (line,) = (line for line in text.splitlines() if "31.4" in line)
    assert line == "- Published, in a set-up of its own (the paper's own; A paper): Ours: epochs 1 31.4."
    assert "Not the published set-up, so that numbers do not compare: epochs 2, not 50 or more.\n" in text
    assert "once said" not in text


def test_a_studys_file_keeps_every_seed_of_its_arms_and_its_page_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    run = folder(tmp_path)
    told = {"findings": [], "caption": "", "tables": [{"title": "", "rows": [["its own"]]}], "numbers": {}}
    records.write_json(run / "study.json", told | {"figure": "<svg></svg>"})
    path = results.write(run, EXPERIMENTS, "cpu")
    assert json.loads(path.read_text())["arms"]["one"]["last"]["seeds"] == [40.0, 20.0]
    made = {}
    text = results._section(EXPERIMENTS["grape_deep"], made)
    assert "its own" in text
    assert "Ours: epochs 1 |" not in text
    assert not made  # the figure is the study's


def test_no_blank_line_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.write(folder(tmp_path), EXPERIMENTS, "cpu")
    study = {"experiment": "grape_deep", "name": "cpu", "findings": [], "tables": [], "diverged": {}}
    study |= {"cut": [], "config": FULL | {"epochs": 50}, "seeds": [0], "runs": found_runs(tmp_path)}
    text = results._result(EXPERIMENTS["grape_deep"], study, tmp_path / "a.svg")
    assert "(cpu)\n\n![" in text
    text = results._result(EXPERIMENTS["grape_deep"], study | {"findings": [["1", "is."]]}, tmp_path / "a.svg")
    assert "(cpu)\n\n- **1** is.\n\n![" in text


def found_runs(tmp_path):
    return json.loads((tmp_path / "grape" / "results" / "deep-cpu.json").read_text())["runs"]


def known(name, published, *ours, epoch="last"):
    """An arm of a result, of one seed or several."""
    std = np.std(ours, ddof=1) if len(ours) > 1 else None
    found = {"title": name, "group": name, "note": "", "reference": "bp"}
    found[epoch] = {"mean": np.mean(ours), "std": std, "seeds": ours}
    return found | {"published": {"value": published, "from": "a third party's"}}


def result(*arms, metric="accuracy", **config):
    config = FULL | {"epochs": 70} | config
    found = {"metric": metric, "published": "A paper", "seeds": [0, 1], "config": config}
    return found | {"arms": {arm["title"]: arm for arm in arms}}


def experiment(epoch="last", **changes):
    found = EXPERIMENTS["grape_resnet20"]
    return found._replace(page=found.page._replace(epoch=epoch), **changes)


@pytest.mark.parametrize("epoch", ["last", "best"])
def test_a_verdict_tells_the_published_gaps_and_the_order_that_are_ours_from_those_that_are_not(epoch):
    found = result(
        known("bp", 80.0, 90.0, 90.0, epoch=epoch),
        known("near", 77.5, 87.5, 88.5, epoch=epoch),  # a standard error of .5
        known("level", 79.0, 88.4, 88.4, epoch=epoch),
        known("far", 79.5, 60.0, 60.0, epoch=epoch),
    )
    source, _, holds, fails, order, level, other = verdicts.verdict(experiment(epoch), found)
    assert source == (
        "Published: A paper. Whose number: a third party's. Ours: the published set-up, 70 epochs, of which the "
        f"{epoch} is compared."
    )
    assert holds == (
        "- Gaps to the reference that hold within 1 point: near -2.0 (published -2.5); level -1.6 (published -1.0)."
    )
    assert fails == "- Gaps to the reference that do not hold: far -30.0 (published -0.5)."
    assert order == "- **Order: 3 of 6 pairs of arms stand as published.**"
    assert level == "- Within twice the standard error: level before near."
    assert other == "- The other way round: far before near; far before level."


def test_of_perplexities_the_lower_is_ahead():
    found = result(known("bp", 30.0, 7.0, 7.0), known("dfa", 52.0, 6.0, 6.0), metric="perplexity")
    *_, order, other = verdicts.verdict(experiment(), found)
    assert order == "- **Order: 0 of 1 pairs of arms stand as published.**"
    assert other == "- The other way round: bp before dfa."


def test_one_seeds_accuracy_has_the_error_of_its_test_images():
    # Of 10,000 images a half is known to .5 points, a difference to .707: twice that is 1.41.
    for lead, stands in ((1.3, 0), (1.5, 1), (-1.5, 0)):
        found = result(known("bp", 80.0, 50.0 + lead), known("dfa", 70.0, 50.0))
        lines = "\n".join(verdicts.verdict(experiment(), found))
        assert f"Order: {stands} of 1 " in lines
        assert ("Within twice the standard error: bp before dfa" in lines) == (lead == 1.3)
        assert ("The other way round: bp before dfa" in lines) == (lead < 0)


def test_one_seeds_perplexity_tells_no_order():
    for ours in (6.0, 8.0):
        found = result(known("bp", 30.0, 7.0), known("dfa", 52.0, ours), metric="perplexity")
        *_, other = lines = verdicts.verdict(experiment(), found)
        assert other == "- Not told by one seed: bp before dfa."
        assert "Order" not in "\n".join(lines)
        assert verdicts.glance(experiment(), [found]).endswith(". |  |")


def test_of_a_smaller_set_up_the_order_alone_is_told_and_the_numbers_apart():
    found = result(known("bp", 80.0, 90.0, 90.0), known("dfa", 70.0, 60.0, 60.0), images=4000)
    small, _, stated, order = verdicts.verdict(experiment(), found)
    assert small == "Not the published set-up, so that numbers do not compare: images 4000, not all."
    assert stated == "- Published, in a set-up of its own (a third party's; A paper): bp 80.0; dfa 70.0."
    assert order == "- **Order of the last epochs here: 1 of 1 pairs of arms stand as published.**"
    assert verdicts.glance(experiment(), [found]).endswith(". | 1 of 1 (another set-up) |")
    assert verdicts.glance(experiment(), [found | {"seeds": [0]}]).endswith(". | 1 of 1 (one seed, another set-up) |")
    assert verdicts.verdict(experiment(size=None), found) == []


def test_one_seeds_accuracy_on_fewer_test_images_is_told_less_well():
    arms = known("bp", 80.0, 51.5), known("dfa", 70.0, 50.0)
    for change, stands in (({}, 1), ({"test_images": 500}, 0), ({"split": "validation"}, 0)):
        lines = "\n".join(verdicts.verdict(experiment(), result(*arms, **change)))
        assert f"{stands} of 1 pairs" in lines


def test_the_page_of_results_answers_every_question_and_holds_every_paper():
    text = results.pages(EXPERIMENTS.values())[results.ROOT / "docs" / "results.md"]
    for experiment in EXPERIMENTS.values():
        assert (f"| [{experiment.page.title}](#{experiment.name}) | " in text) == bool(experiment.verdict)
        assert text.count(f"{{include}} ../experiments/{experiment.paper}/README.md") == 1
        assert f"\n## {experiment.name}\n" in (results.FOLDER / experiment.paper / "README.md").read_text()


def test_a_glance_is_the_verdicts_first_two_sentences_and_the_order_of_every_table():
    asked = experiment(about="A line.\n\nVerdict: holds. It does, ``x``. And more.")
    found = result(known("bp", 8.0, 9.0), known("dfa", 2.0, 5.0))
    row = verdicts.glance(asked, [found, result(), found])
    assert row == f"| [{asked.page.title}](#grape_resnet20) | Holds. It does, `x`. | 1 of 1; 1 of 1 |"
    assert verdicts.glance(asked, [found | {"seeds": [0]}]).endswith("| 1 of 1 (one seed) |")


def test_presets_without_a_result_are_told_with_the_reason():
    experiment = EXPERIMENTS["grape_resnet20"]
    gpu, paper = (
        "`gpu15` (it takes a quarter of an hour of a GPU)",
        "`paper` (the published size takes a GPU for hours or days)",
    )
    assert verdicts.not_run(experiment, ["cpu", "variants", "maps"]) == f"Presets not run: {gpu}, {paper}.\n"
    assert (
        verdicts.not_run(experiment, ["cpu", "variants", "maps", "gpu15-160-epochs"]) == f"Presets not run: {paper}.\n"
    )
    assert verdicts.not_run(experiment, ["cpu", "variants", "maps", "gpu15", "paper"]) == ""


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


def test_one_arm_alone_must_be_one_of_the_sweep(mock, tmp_path):
    experiment = EXPERIMENTS["grape_resnet20"]
    config = dataclasses.replace(experiment.presets["cpu"], only="nothing", batch=20, out=tmp_path / "run")
    with pytest.raises(ValueError, match="No arm is called 'nothing'; choose one of bp, fa"):
        sweep.run(experiment, config)
    assert not config.out.exists()


def test_a_result_says_how_long_its_runs_took_unless_one_was_killed(tmp_path, monkeypatch):
    run = folder(tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    records.took(run, 90.0)
    found = json.loads(results.write(run, EXPERIMENTS, "cpu").read_text())
    assert spent.took(found) == ", 2 minutes"
    assert spent.took(found | {"runs": [{"minutes": 0.2}]}) == ", less than a minute"
    records.open_run(run, json.loads((run / "config.json").read_text()))  # and is killed
    found = json.loads(results.write(run, EXPERIMENTS, "cpu").read_text())
    assert spent.took(found) == ", 4 s of training"


def test_what_all_results_of_a_preset_took_is_said_with_what_is_missing():
    runs = [{"minutes": 60.0}, {"minutes": 30.0}]
    night = [{"name": "cpu", "runs": runs}, {"name": "paper", "runs": runs}]
    assert spent.together(night) == "Results of the preset `cpu` (1) took 1.5 hours."
    killed = {"name": "cpu", "runs": [{}], "arms": {"one": {"seconds": 1800.0}}}
    older = {"name": "cpu", "runs": [{}]}
    assert spent.together([*night, killed, older]) == (
        "Results of the preset `cpu` (3) took 2.0 hours; of 1 only the training was timed; 1 tell no time."
    )


def test_where_the_best_epoch_is_compared_the_table_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    found = json.loads(results.write(folder(tmp_path, same=False), EXPERIMENTS, "cpu").read_text())
    for epoch, there in (("best", True), ("last", False)):
        text = results._result(experiment(epoch), found, tmp_path / "a.svg")
        assert ("| step | true gradients | best epoch |\n" in text) == there
        assert ("| 2.5 | 40.0 ± 14.1 |\n" in text) == there


def test_what_a_preset_has_changed_since_a_result_is_said():
    experiment = EXPERIMENTS["grape_resnet20"]
    config = identity(experiment.name, experiment.presets["cpu"])
    assert changed(experiment, "cpu", config) == ""
    said = changed(experiment, "cpu", config | {"seeds": 1, "images": None})
    assert said == "The preset has changed since: seeds 3, not 1; images 4000, not all."
    assert changed(experiment, "some run", config) == ""
