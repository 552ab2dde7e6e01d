"""LDFA's sweeps: every arm as it says, beside the published numbers."""

import dataclasses

import numpy as np
import pytest

from experiments.__main__ import EXPERIMENTS
from experiments.common.trainer import Trainer
from experiments.ldfa import subsets

TINY = {"epochs": 1, "batch": 16, "images": 32, "test_images": 12}
SIZES = {
    "ldfa_rank_mlp": {"ranks": (2,), "groups": ("B3",), "width": 5, "narrow": 64},
    "ldfa_subsets": {"classes": (2,), "ranks": (2,), "width": 5},
    "ldfa_vgg": {"ranks": (), "fractions": (0.5,), "widths": (4,)},
    "ldfa_vit": {"ranks": (32,), "rules": ("normative",), "width": 4, "depth": 1, "heads": 2, "patch": 4, "warmup": 0},
}


def configured(name, **options):
    experiment = EXPERIMENTS[name]
    return experiment.arms(dataclasses.replace(experiment.presets["cpu"], **(TINY | SIZES[name] | options)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "ldfa_rank_mlp",
            {"ranks": (1, 10), "groups": ("B1", "B3", "all", "direct", "fixed")},
            {
                "B1-1": 55.8,
                "B1-10": 62.6,
                "B3-1": 47.3,
                "all-10": 61.8,
                "all-1": None,
                "direct-1": 35.9,
                "fixed-1": None,
            },
        ),
        ("ldfa_subsets", {"classes": (2, 3)}, {"2-2": None, "bp-3": None, "3-2": None}),
        ("ldfa_vgg", {"ranks": (4,)}, {"Q-4": 75.2, "PQ-4": 76.7, "width-0.5": None}),
        ("ldfa_vit", {"rules": ("hebbian", "normative")}, {"hebbian-32": None, "normative-32": None}),
        ("ldfa_vit", {"rules": ("normative",), "width": 384}, {"normative-32": 90.77}),
    ],
)
def test_arms_stand_beside_the_published_numbers_and_their_rules_fit(name, options, expected, mock):
    arms = {arm.name: arm for arm in configured(name, **options)}
    assert {name: arms[name].published for name in expected} == expected
    assert "B3-10" not in arms
    for arm in list(arms.values())[-2:]:
        assert Trainer(arm.task, (0,)).coverage.rows


def test_the_first_classes_keep_their_order(mock):
    found = subsets.first_classes(mock, 2)
    np.testing.assert_array_equal(found.train_labels, mock.train_labels[mock.train_labels < 2])
    assert found.classes == 2
