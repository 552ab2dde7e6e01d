"""Results as data, the page made of them, and arms that train apart."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from rich.progress import Progress

from experiments.common import apart, data, records, results, sweep
from experiments.grape import resnet20 as grape_resnet20


def test_the_page_of_results_is_what_the_committed_files_say():
    assert results.PAGE.read_text() == results.page()


@pytest.fixture
def folder(tmp_path):
    """Two arms of two seeds, one of which has no epoch yet."""
    arm = {"group": "Ours", "x": 1, "published": 30.0, "reference": "one", "axis": "epochs"}
    page = {"title": "A title", "claim": "A claim.", "published": "A paper", "metric": "accuracy"}
    records.write_json(tmp_path / "sweep.json", page | {"arms": [arm | {"name": "one"}, arm | {"name": "two"}]})
    records.open_run(tmp_path / "run", {"epochs": 2, "seeds": 2})
    for name in ("config.json", "environment.json"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    (tmp_path / "one").mkdir()
    for epoch, accuracy in enumerate(([0.1, 0.1], [0.5, 0.3], [0.4, 0.2])):
        angles = {"first": [80.0, 60.0], "last": [0.0, 0.0]}
        records.append(tmp_path / "one", {"epoch": epoch, "seconds": 1.5, "test_accuracy": accuracy, "angle": angles})
    return tmp_path


def test_a_result_has_every_arm_its_spread_and_where_it_was_run(folder, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", folder)
    found = json.loads(results.write(folder, "paper/some-cpu").read_text())
    one, two = found["arms"]["one"], found["arms"]["two"]
    assert one["last"] == {"seeds": [40.0, 20.0], "mean": 30.0, "std": 14.142}
    assert one["best"]["mean"] == 40.0
    assert (one["epochs"], one["seconds"], one["angle"]) == (2, 4.5, 70.0)
    assert two == {"title": "Ours", "published": 30.0, "epochs": 0}
    assert found["runs"][0]["jax"]
    assert "| Ours | 30.0 ± 14.1 | 40.0 | 30.0 | 70° | 2 | 4 |" in results.page()


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


def test_published_numbers_stand_beside_the_published_setting_alone():
    images, labels = np.zeros((256, 32, 32, 3), np.uint8), np.zeros(256, np.int32)
    dataset = data.Dataset(images, labels, images, labels, 100)
    full = grape_resnet20.PRESETS["gpu15"]
    assert [arm.published for arm in grape_resnet20.arms(full, dataset)] == [68.72, None, 20.94, 24.28, None]
    for change in ({"dataset": "cifar10"}, {"scale": 0.5}, {"shrink": 2}):
        found = grape_resnet20.arms(dataclasses.replace(full, **change), dataset)
        assert not any(arm.published for arm in found)


def test_one_arm_alone_must_be_one_of_the_sweep(tmp_path):
    config = dataclasses.replace(grape_resnet20.PRESETS["cpu"], only="nothing", out=tmp_path / "run")
    with pytest.raises(ValueError, match="No arm is called 'nothing'; choose one of"):
        sweep.run(config, grape_resnet20.PAGE, [sweep.Arm("one", "One", 1, task=None)])
    assert not config.out.exists()
