"""LDFA's sweeps: every arm as it says, beside the published numbers, and Q by reconstruction."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfa
from experiments.__main__ import EXPERIMENTS
from experiments.common.trainer import Trainer
from experiments.ldfa import arms as ldfa
from experiments.ldfa import autoencoder, rank_mlp

TINY = {"epochs": 1, "batch": 16, "images": 32, "test_images": 12, "ranks": (2,)}
SIZES = {
    "ldfa_autoencoder": {"hidden": (4, 3)},
    "ldfa_cnn": {"retina": (3,), "cortex": (3,), "hidden": 4, "window": 3, "shrink": 1},
    "ldfa_rank_mlp": {"width": 5, "narrow": 64},
    "ldfa_rnn": {"width": 5},
    "ldfa_vgg": {"ranks": (0.5,), "widths": (4,), "shrink": 1},
    "ldfa_vit": {"width": 4, "depth": 1, "heads": 2, "patch": 4, "warmup": 0},
}
DIRECT = ("direct", "direct-local", "direct-output", "direct-middle")


def configured(name, **options):
    experiment = EXPERIMENTS[name]
    return experiment.arms(dataclasses.replace(experiment.presets["cpu"], **(TINY | SIZES[name] | options)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "ldfa_rank_mlp",
            {"ranks": (1, 10, 16), "variants": ("B1", "B3", "both", "direct", "fixed")},
            {"bp": 62.76, "B1-1": 55.8, "B1-10": 62.6, "B3-1": 47.3, "both-10": 61.8, "both-1": None, "direct-1": 35.9},
        ),
        ("ldfa_rank_mlp", {"variants": ("B3-exact",)}, {"B3-exact-2": None, "narrow": 58.1}),
        ("ldfa_rank_mlp", {"variants": DIRECT[2:]}, {"direct-output-2": None}),
        ("ldfa_rank_mlp", {"variants": DIRECT[:2]}, {"direct-2": 49.2, "direct-local-2": None}),
        ("ldfa_rank_mlp", {"variants": get_args(rank_mlp.FactorName)[:5]}, {"direct-convolutional-2": None}),
        ("ldfa_rank_mlp", {"variants": get_args(rank_mlp.FactorName)[3:]}, {"direct-output-fixed-2": None}),
        ("ldfa_rank_mlp", {"classes": (2, 3), "variants": ("both",)}, {"2-classes-both-2": None, "3-classes-bp": None}),
        ("ldfa_autoencoder", {}, {"both-2": None}),
        ("ldfa_cnn", {"retina": (32,) * 2, "cortex": (32,) * 3, "ranks": (4,)}, {"bp": 84.3, "hebbian-4": 75.2}),
        ("ldfa_rnn", {"variants": ("both", "rebuilt")}, {"rebuilt-2": None}),
        ("ldfa_vgg", {"variants": ("local", "rebuilt")}, {"bp": None, "local-0.5": None}),
        ("ldfa_vit", {"variants": ("local", "normative"), "ranks": (32,)}, {"local-32": None, "normative-32": 90.77}),
    ],
)
def test_arms_stand_beside_the_published_numbers_and_their_rules_fit(name, options, expected, mock):
    arms = {arm.name: arm for arm in configured(name, **options)}
    assert {name: arms[name].published for name in expected} == expected
    assert "B3-16" not in arms
    for arm in list(arms.values())[-3:-1]:
        assert Trainer(arm.task, (0,)).coverage.rows


@pytest.mark.long
def test_all_other_layers_learn_a_feedback_of_full_rank_as_in_the_authors_code(mock):
    arms = {arm.name: arm for arm in configured("ldfa_rank_mlp", variants=("B1", "B3-exact"), width=4)}
    ranks = {
        name: jax.tree.map(jnp.shape, Trainer(arms[name].task, (0,)).init().feedback["model"])
        for name in ("B1-2", "B3-exact-2")
    }
    shapes = str(ranks["B1-2"])
    assert all(f"p=(1, 4, {rank})" in shapes for rank in (2, 4))
    assert "p=(1, 3, 3)" in shapes  # the head's
    assert list(ranks["B3-exact-2"]) == ["head"]


def test_the_first_classes_keep_their_order(mock):
    found = rank_mlp.first_classes(mock, 2)
    np.testing.assert_array_equal(found.train_labels, mock.train_labels[mock.train_labels < 2])
    assert found.classes == 2


def test_pixels_are_labelled_by_their_brightness(mock):
    found = autoencoder.pixels(mock)
    assert found.train_labels.shape == (40, 192)
    assert found.classes == 2
    np.testing.assert_array_equal(found.test_labels[3], mock.test_images[3].ravel() > 127)


def test_the_dimension_of_an_outputs_error_is_that_of_the_losss_gradient(mock):
    trainer = Trainer(next(configured("ldfa_autoencoder")).task, (0, 1))
    state = trainer.init()
    found = autoencoder.output_error(trainer)(state)["error_dimension"]
    model = trainer.model(jax.tree.map(lambda leaf: leaf[1], state))
    model.eval()
    images, labels = trainer.data
    errors = jax.grad(trainer.task.loss)(model(trainer.inputs(images)), labels)
    assert found.shape == (2,)
    assert found[1] == pytest.approx(float(jaxfa.diagnostics.participation_ratio(errors[..., 1])), rel=1e-3)


@pytest.mark.parametrize("shape", [(9, 5), pytest.param((3, 3, 2, 5), marks=pytest.mark.long)])
def test_a_rebuilt_q_is_the_pseudo_inverse_of_what_p_sees(shape):
    rule = ldfa.rebuilt(2, step=0.1 if len(shape) == 2 else 0.5)
    w = jax.random.normal(jax.random.key(0), shape)
    dense = len(shape) == 2
    op = jaxfa.linear if dense else lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # fmt: skip
    layer = jaxfa.Layer(op, jax.ShapeDtypeStruct((256, 9) if dense else (16, 5, 5, 2), jnp.float32), w)
    feedback = rule.init(jax.random.key(1), w)
    keys = jax.random.split(jax.random.key(2), 200 if dense else 1000)
    feedback, _ = jax.lax.scan(lambda feedback, key: (rule.refine(layer, feedback, key), None), feedback, keys)
    x = jax.random.normal(jax.random.key(3), layer.x.shape)
    missing = jnp.mean((x - feedback.transport(op, x, w, op(x, w))) ** 2)
    if dense:
        seen = np.asarray(w @ feedback.p)
        np.testing.assert_allclose(feedback.q, np.linalg.pinv(seen).T, atol=0.02)
        assert missing == pytest.approx(1 - 2 / 9, abs=0.03)  # 2 of 9 directions come back
    else:
        assert missing < 0.95
