"""Published numbers stand beside the published set-up alone, by one rule for every experiment."""

import dataclasses
import json

import pytest

from experiments.__main__ import EXPERIMENTS
from experiments.common.experiment import identity
from experiments.common.published import as_published, smaller

SIZED = [name for name, experiment in EXPERIMENTS.items() if experiment.size is not None]


def configured(name, preset, **changes):
    """A configuration as a folder holds it."""
    config = dataclasses.replace(EXPERIMENTS[name].presets[preset], **changes)
    return json.loads(json.dumps(identity(name, config)))


@pytest.mark.parametrize("name", SIZED)
def test_the_preset_paper_is_the_published_set_up_and_no_other_size_is(name):
    experiment = EXPERIMENTS[name]
    full = configured(name, "paper")
    assert as_published(experiment, full)
    assert smaller(experiment, full) == ""
    less = [{"images": 100}, {"test_images": 100}, {"split": "validation"}, {"epochs": 3}]
    for change in (*less, *({field: "another"} for field in experiment.size)):
        assert not as_published(experiment, full | change), change
        assert next(iter(change)).replace("_", " ") in smaller(experiment, full | change)
    assert as_published(experiment, full | {"learning_rate": 1.0, "seeds": 1})


@pytest.mark.parametrize("name", SIZED)
def test_no_run_on_a_cpu_is_the_published_set_up(name):
    assert smaller(EXPERIMENTS[name], configured(name, "cpu"))


def test_what_is_smaller_is_said_in_one_sentence():
    assert smaller(EXPERIMENTS["ldfa_cnn"], configured("ldfa_cnn", "cpu")).startswith(
        "Not the published set-up, so that numbers do not compare: images 8000, not all; test "
        "images 2000, not all; retina 16-16, not 32-32; cortex "
    )
    assert smaller(EXPERIMENTS["grape_shallow"], configured("grape_shallow", "paper", epochs=49)).endswith(
        " compare: epochs 49, not 50 or more."
    )


@pytest.mark.parametrize(("name", "preset"), [("grape_resnet20", "gpu15"), ("grape_shallow", "gpu15")])
def test_a_long_training_of_the_published_size_stands_beside_its_numbers(name, preset):
    assert as_published(EXPERIMENTS[name], configured(name, preset))


def test_where_nothing_is_published_nothing_is_smaller():
    experiment = EXPERIMENTS["compare"]
    assert not as_published(experiment, configured("compare", "paper"))
    assert smaller(experiment, configured("compare", "cpu")) == ""


def test_a_field_that_a_result_does_not_know_is_not_the_published_one():
    full = configured("ldfa_cnn", "paper")
    del full["shrink"]
    assert "shrink unknown, not 1" in smaller(EXPERIMENTS["ldfa_cnn"], full)


@pytest.mark.parametrize("name", SIZED)
def test_ours_is_of_the_epoch_that_the_published_number_is_of(name):
    page = EXPERIMENTS[name].page
    for epoch in ("last", "best"):
        assert page.epoch == epoch or f"{epoch} epoch" not in page.published
