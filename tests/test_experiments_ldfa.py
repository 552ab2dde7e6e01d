"""The LDFA experiments on mock images, what all sweeps share, and the networks and augmentations that they brought."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
from experiments.__main__ import main
from experiments.common import augment, data, records, sweep, sweep_report, timing
from experiments.common.data import Dataset
from experiments.common.task import Task
from experiments.common.trainer import Trainer
from experiments.ldfa import rank_mlp as ldfa_rank_mlp
from experiments.ldfa import subsets as ldfa_subsets
from experiments.ldfa import vgg as ldfa_vgg
from experiments.ldfa import vit as ldfa_vit
from experiments.models.vgg import VGG
from experiments.models.vit import ViT

TINY = {"epochs": 1, "batch": 16, "images": 32, "test_images": 12}
CASES = {
    "ldfa_rank_mlp": (ldfa_rank_mlp, {"ranks": (2,), "groups": ("B3",), "width": 5, "narrow": 64}),
    "ldfa_subsets": (ldfa_subsets, {"classes": (2,), "ranks": (2,), "width": 5, "seeds": 1}),
    "ldfa_vgg": (ldfa_vgg, {"ranks": (), "fractions": (0.5,), "widths": (4,), "seeds": 1}),
    "ldfa_vit": (
        ldfa_vit,
        {
            "ranks": (32,),
            "rules": ("normative",),
            "width": 4,
            "depth": 1,
            "heads": 2,
            "dropout": 0.0,
            "warmup": 0,
            "seeds": 1,
        },
    ),
}
ARMS = {
    "ldfa_rank_mlp": ["bp", "narrow", "B3-2"],
    "ldfa_subsets": ["bp-2", "2-2"],
    "ldfa_vgg": ["bp", "width-0.5"],
    "ldfa_vit": ["bp", "normative-32"],
}
PUBLISHED = {
    "ldfa_rank_mlp": ["62.8", "58.1", "54.1", "-4.7", "-8.7"],
    "ldfa_subsets": [],
    "ldfa_vgg": ["84.3"],
    "ldfa_vit": ["91.3", "weight transport"],
}


@pytest.fixture
def tiny(monkeypatch):
    """Two steps an epoch on mock images, timed hardly at all."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 120).astype(np.int32)
    mock = Dataset(images[:90], labels[:90], images[90:], labels[90:], 3, augmented=True)
    monkeypatch.setattr(data, "load", lambda name, folder: mock)
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.001)


def configured(name, folder, **options):
    experiment, size = CASES[name]
    return experiment, experiment.Config(**{"seeds": 2, **TINY, **size, "out": folder, **options})


HEAVY = ("ldfa_vit", "ldfa_vgg", "ldfa_subsets")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in HEAVY else n for n in CASES])
def test_every_experiment_two_steps_and_the_report(name, tiny, tmp_path, capsys):
    experiment, config = configured(name, tmp_path / "run")
    page = experiment.run(config).read_text()

    rows = sweep_report.read_rows(config.out)
    assert [row.name for row in rows] == ARMS[name]
    for row in rows:
        last = records.read(config.out / row.name)[-1]
        assert last["step"] == 2
        assert row.last.mean == pytest.approx(100 * np.mean(last["test_accuracy"]))
        assert f"{row.last}" in page
        assert row.step["ratio"] > 0
        assert "LowRank" in row.coverage or row.name.startswith(("bp", "narrow"))
    for number in PUBLISHED[name]:
        assert number in page
    assert "//" not in page.replace("</", "")
    assert main(["report", str(config.out)]) == 0
    assert (config.out / "report.html").read_text() == page
    assert ARMS[name][-1] in capsys.readouterr().out


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
def test_arms_stand_beside_the_published_numbers_and_their_rules_fit(name, options, expected, tiny):
    experiment, config = configured(name, None, **options)
    dataset = () if experiment is ldfa_subsets else (sweep.prepare(config, data.load("cifar10", None)),)
    arms = {arm.name: arm for arm in experiment._arms(config, *dataset)}
    assert {name: arms[name].published for name in expected} == expected
    assert "B3-10" not in arms
    for arm in list(arms.values())[-2:]:
        assert Trainer(arm.task, (0,)).coverage.rows


class Dropping(nnx.Module):
    """A linear layer behind dropout."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(192, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(x.reshape(len(x), -1)))


def linear_arms(*names):
    task = Task(
        Dropping, jaxfa.backprop(), optax.sgd(0.1), sweep.prepare(sweep.Config(), data.load("cifar10", None)), 30
    )
    return [sweep.Arm(name, "linear", rank or None, task) for rank, name in enumerate(names)]


@pytest.mark.long
def test_a_killed_sweep_goes_on_and_more_arms_join_it(tiny, tmp_path, monkeypatch):
    config, page = sweep.Config(epochs=1, seeds=1, out=tmp_path / "run"), sweep.Page("Title", "claim", "nobody")
    trained, advance = [], Trainer.advance

    def counted(trainer, state, order, count):
        trained.append(trainer)
        return 1 / 0 if len(trained) == 2 else advance(trainer, state, order, count)

    monkeypatch.setattr(timing, "measure", lambda *_, **__: None)
    monkeypatch.setattr(Trainer, "advance", counted)
    with pytest.raises(ZeroDivisionError):
        sweep.run(config, page, linear_arms("bp", "one"))
    sweep.run(config, page, linear_arms("bp", "one"))
    assert len(trained) == 3
    assert [len(records.read(config.out / name)) for name in ("bp", "one")] == [2, 2]
    sweep.run(config, page, linear_arms("bp", "one", "two"))
    assert len(trained) == 4
    assert [row.name for row in sweep_report.read_rows(config.out)] == ["bp", "one", "two"]
    with pytest.raises(ValueError, match=r"epochs was 1, is now 2.*--fresh"):
        sweep.run(dataclasses.replace(config, epochs=2), page, linear_arms("bp"))


def written(folder, accuracies, arms):
    """A sweep's folder with records of these accuracies, ``(epochs, seeds)`` each."""
    for name, found in accuracies.items():
        records.open_run(folder / name, {})
        for epoch, accuracy in enumerate(found):
            records.append(
                folder / name, {"epoch": epoch, "test_accuracy": accuracy, "angle": {"a": [1.0], "b": [0.0]}}
            )
    keys = ("name", "group", "x", "published", "reference", "axis")
    described = [dict(zip(keys, arm, strict=True)) for arm in arms]
    records.write_json(folder / "sweep.json", {"title": "", "claim": "", "published": "", "arms": described})
    records.write_json(folder / "config.json", {"split": "test", "seeds": 2})


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
    bp, a, b = sweep_report.read_rows(tmp_path)
    assert (bp.last.mean, bp.best.mean) == pytest.approx((50.0, 65.0))
    assert (a.last.mean, a.best.mean, a.gap, a.published_gap) == pytest.approx((30.0, 40.0, -25.0, -1.5))
    assert a.last.std == pytest.approx(np.std([40, 20], ddof=1))
    assert (bp.gap, b.published_gap, a.step) == (None, None, None)
    assert sweep_report.findings([bp, a, b])[0][0] == "none"
    assert sweep_report.findings([bp, a._replace(gap=-0.9), b])[0][0] == "4"
    assert "published: none of these" in sweep_report.findings([bp, a, b])[0][1]
    assert sweep_report.findings([bp, a]) == []  # of one there is no least
    page = sweep_report.write(tmp_path).read_text()
    assert page.count("<svg") == 3


def test_an_arm_that_has_not_run_is_left_out(tmp_path):
    written(
        tmp_path, {"bp": [[0.5], [0.5]]}, [("bp", "BP", None, None, "bp", "rank"), ("a", "low", 4, None, "bp", "rank")]
    )
    assert [row.name for row in sweep_report.read_rows(tmp_path)] == ["bp"]
    with pytest.raises(FileNotFoundError, match="no trained arm"):
        sweep_report.read_rows(tmp_path / "bp")


def test_two_arms_of_one_name_are_refused(tmp_path):
    arm = sweep.Arm("bp", "BP", None, None)
    with pytest.raises(ValueError, match=r"name of its own, got \['bp', 'bp'\]"):
        sweep.run(sweep.Config(out=tmp_path / "run"), sweep.Page("", "", ""), [arm, arm])


def test_validation_split_holds_no_test_image(tiny):
    held = sweep.prepare(sweep.Config(split="validation", test_images=5), data.load("cifar10", None))
    np.testing.assert_array_equal(held.test_images, data.load("cifar10", None).train_images[81:86])


@pytest.mark.parametrize("name", CASES)
def test_presets_are_configurations_that_fit(name):
    experiment = CASES[name][0]
    assert set(experiment.PRESETS) == {"cpu", "paper"}
    for config in experiment.PRESETS.values():
        assert config.split == "test"
        assert json.dumps(records.identity(name, config, ("out", "data")))
    assert experiment.PRESETS["paper"].images is None
    assert len({config.out for config in experiment.PRESETS.values()}) == 2


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (["ldfa_rank_mlp", "--groups", "B4"], ["B4", "direct"]),
        (["ldfa_rank_mlp", "--images", "0"], ["images must be at least 1, got 0"]),
        (["ldfa_subsets", "--classes", "1"], ["classes must be numbers from 2 to 100, got (1,)"]),
        (["ldfa_vgg", "--learning-rate", "0"], ["learning_rate must be positive, got 0.0"]),
        (["ldfa_vit", "--rules", "oja"], ["oja", "normative"]),
    ],
)
def test_unknown_choices_are_refused_with_the_valid_ones(args, messages, capsys):
    with pytest.raises(SystemExit):
        main(["run", *args])
    captured = capsys.readouterr()
    for message in messages:
        assert message in captured.out + captured.err


def test_networks_of_the_published_sizes():
    def parameters(make):
        return jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make((32, 32, 3), 10, rngs=nnx.Rngs(0)), nnx.Param)))

    made = parameters(VGG)
    assert [made["blocks"][i]["conv"]["kernel"].shape[-1] for i in range(8)] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert made["classifier"]["kernel"].shape == (512, 256)
    # A block of width d holds 4 d^2 in its attention and 2 * 2 d^2 in its layers, and biases and norms.
    d = 8
    block = 4 * d * d + 4 * d + 4 * d * d + 3 * d + 4 * d
    expected = 8 * block + (48 * d + d) + (65 + 1) * d + 2 * d + (10 * d + 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters(partial(ViT, width=d)))) == expected


def test_vit_without_positions_does_not_know_where_a_patch_stands():
    model = ViT((8, 8, 3), 5, width=8, depth=1, heads=2, dropout=0.0, rngs=nnx.Rngs(0))
    forward = nnx.jit(lambda model, image: model(image))
    image = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    swapped, inside = jnp.roll(image, (4, 4), (1, 2)), jnp.roll(image, (2, 2), (1, 2))
    assert jnp.abs(forward(model, image) - forward(model, swapped)).max() > 1e-3
    model.positions[...] = jnp.zeros_like(model.positions[...])
    np.testing.assert_allclose(forward(model, image), forward(model, swapped), rtol=1e-4, atol=1e-5)
    assert jnp.abs(forward(model, image) - forward(model, inside)).max() > 1e-3


def test_vit_refuses_parts_of_patches():
    with pytest.raises(ValueError, match="whole patches of 4 pixels, got 8 x 10"):
        ViT((8, 10, 3), 5, rngs=nnx.Rngs(0))


def test_dropout_is_new_every_step_and_off_in_evaluation(tiny):
    task = Task(Dropping, jaxfa.backprop(), optax.sgd(0.0), data.load("cifar10", None)._replace(augmented=False), 90)
    trainer = Trainer(task, (0,))
    state, losses = trainer.init(), []
    for _ in range(2):
        state, loss = trainer.advance(state, trainer.shuffle(state), 1)
        losses.append(float(loss[0][0]))
    assert abs(losses[0] - losses[1]) > 1e-3
    found = [trainer.evaluate(state)["test_loss"] for _ in range(2)]
    assert found[0] == found[1]


def pictures():
    return jnp.asarray(np.random.default_rng(0).integers(1, 200, (32, 9, 9, 3), dtype=np.uint8))


def test_cutout_paints_a_square_at_most():
    images = jnp.full((64, 12, 12, 1), 100, jnp.uint8).at[:, 0, 0].set(200)
    out = augment.crop_flip_and_cutout(jax.random.key(0), images, size=5)
    plain = augment.crop_and_flip(jax.random.split(jax.random.key(0))[0], images)
    changed = np.asarray((out != plain).any(-1))
    assert out.dtype == images.dtype
    assert changed.sum((1, 2)).max() <= 25
    assert all(np.ptp(np.nonzero(image.any(axis))[0]) <= 4 for image in changed for axis in (0, 1) if image.any())


def test_rotation_turns_by_the_nearest_pixel_and_no_angle_only_mirrors():
    images = pictures()
    still = np.asarray(augment.flip_and_rotate(jax.random.key(0), images, degrees=0.0))
    mirrored = [(a == b[:, ::-1]).all() for a, b in zip(still, np.asarray(images), strict=True)]
    same = [(a == b).all() for a, b in zip(still, np.asarray(images), strict=True)]
    assert 5 < sum(mirrored) < 27
    assert np.logical_or(mirrored, same).all()

    turned = np.asarray(augment.flip_and_rotate(jax.random.key(0), images, degrees=30.0))
    assert turned.dtype == np.uint8
    np.testing.assert_array_equal(turned[:, 4, 4], np.asarray(images)[:, 4, 4])
    assert (turned == 0).all(-1).any((1, 2)).mean() > 0.5
    for before, after in zip(np.asarray(images), turned, strict=True):
        assert set(after[after > 0]) <= set(before.ravel())


@pytest.mark.parametrize(
    "vary",
    [partial(augment.flip_and_rotate, degrees=10.0), partial(augment.crop_flip_and_cutout, size=4)],
)
def test_augmentations_are_functions_of_their_keys(vary):
    images = pictures()
    np.testing.assert_array_equal(vary(jax.random.key(1), images), vary(jax.random.key(1), images))
    assert (vary(jax.random.key(1), images) != vary(jax.random.key(2), images)).any()
