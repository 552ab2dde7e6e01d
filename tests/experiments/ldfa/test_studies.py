"""LDFA's figures: modes of a linear teacher, receptive fields, operations. Small, and against what is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
from experiments.common import data, operations, records, sweep
from experiments.common.data import Dataset
from experiments.common.experiment import Arm
from experiments.common.task import Task
from experiments.common.trainer import Trainer
from experiments.ldfa import cost as ldfa_cost
from experiments.ldfa import linear as ldfa_linear
from experiments.ldfa import receptive_fields, representations
from experiments.ldfa import retina as ldfa_retina
from experiments.models.networks import MLP
from experiments.models.vgg import VGG

RETINA = {"retina": (3, 4), "cortex": (4,), "hidden": 8, "window": 3, "shrink": 2, "ranks": (2,)}


def retina_config(**options):
    return dataclasses.replace(ldfa_retina.EXPERIMENT.presets["cpu"], **(RETINA | options))


@pytest.fixture
def tiny(monkeypatch):
    """Colour images of 8x8 pixels in the place of CIFAR-10."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (160, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 160).astype(np.int32)
    mock = Dataset(images[:128], labels[:128], images[128:], labels[128:], 3, augmented=True)
    monkeypatch.setattr(data, "load", lambda name, folder: mock)
    return mock


@pytest.mark.long
def test_linear_students_learn_what_the_theory_says(tmp_path, monkeypatch):
    variants = {name: ldfa_linear.VARIANTS[name] for name in ("P and Q learned", "P and Q fixed")}
    monkeypatch.setattr(ldfa_linear, "VARIANTS", variants)
    rates = {"learning_rate": 1e-2, "feedback_rate": 4e-2}
    config = ldfa_linear.Config(iterations=1000, seeds=2, ranks=(2,), **rates, out=tmp_path / "run")
    text = sweep.run(ldfa_linear.EXPERIMENT, config).read_text()
    assert all(word in text for word in ("backpropagation", "P and Q fixed", "recovers the teacher"))
    numbers = records.read_json(tmp_path / "run" / "study.json")["numbers"]
    last = {name: np.array(values) for name, values in numbers.items()}
    np.testing.assert_allclose(last["0 backpropagation"], 1, atol=0.01)
    np.testing.assert_allclose(last["2 P and Q learned"], 1, atol=0.05)
    assert last["2 P and Q fixed"][:, 1].max() < 0.6
    with pytest.raises(ValueError, match="another configuration: seeds was 2, is now 1"):
        sweep.run(ldfa_linear.EXPERIMENT, dataclasses.replace(config, seeds=1))


def patterns():
    y, x = np.mgrid[-8:9, -8:9]
    distance = x**2 + y**2
    surround = np.exp(-distance / 4) - 0.25 * np.exp(-distance / 16)
    edge = x * np.exp(-distance / 8)
    grating = np.cos(0.8 * (x + y)) * np.exp(-distance / 30)
    return np.stack([surround, edge, grating, np.roll(surround, (2, 1), (0, 1)), np.zeros_like(surround)])


def test_orientation_and_symmetry_of_known_fields():
    selectivity = receptive_fields.orientation_selectivity(patterns())
    symmetry = receptive_fields.radial_symmetry(patterns())
    assert selectivity[[0, 3]].max() < 0.01
    assert selectivity[1] == pytest.approx(0.5, abs=0.1)  # of a derivative, cos^2 of the angle
    assert selectivity[2] > 0.8
    assert symmetry[[0, 3]].min() > 0.95
    assert symmetry[1] < 0.01
    assert symmetry[2] < 0.6
    assert np.isnan([selectivity[4], symmetry[4]]).all()
    turned = receptive_fields.orientation_selectivity(3 * patterns().swapaxes(1, 2))
    np.testing.assert_allclose(turned, selectivity, atol=1e-9)


def test_the_receptive_field_of_a_convolution_is_its_kernel():
    conv = nnx.Conv(1, 2, (5, 5), rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    fields = receptive_fields.receptive_fields(conv, images, 5)
    np.testing.assert_allclose(fields, jnp.moveaxis(conv.kernel[...][:, :, 0], -1, 0), rtol=1e-5)
    wide = receptive_fields.receptive_fields(conv, images, 9)
    np.testing.assert_allclose(wide[:, 2:7, 2:7], fields, rtol=1e-5)
    assert float(abs(wide).sum()) == pytest.approx(float(abs(fields).sum()), rel=1e-5)


@pytest.mark.long
def test_only_the_error_to_the_retina_is_of_low_rank(tiny):
    config = retina_config(batch=64)
    trainer = Trainer(next(arm.task for arm in ldfa_retina.arms(config) if arm.x == 2), [0])
    (only,) = (row for row in trainer.coverage.rows if "LowRank" in row.feedback)
    assert only.layer == "cortex/0"
    state = trainer.init()
    before = state.params["model"]["retina"][1]["kernel"] + 0
    state, _ = trainer.advance(state, trainer.shuffle(state), 1)
    assert float(abs(state.params["model"]["retina"][1]["kernel"] - before).max()) > 0


def test_grey_is_the_mean_brightness(tiny):
    grey = retina_config(images=100, test_images=None).grey()
    assert grey.train_images.shape == (100, 4, 4, 1)
    assert grey.test_images.shape == (32, 4, 4, 1)
    expected = (tiny.train_images[0, :2, :2] @ [0.299, 0.587, 0.114]).mean()
    assert abs(float(grey.train_images[0, 0, 0, 0]) - expected) <= 0.51
    assert not grey.augmented


def network(name, dataset, rule=None, **options):
    shape = dataset.train_images.shape[1:]
    make = {
        "mlp": lambda rngs: MLP(shape, 3, (32, 32, 32), rngs=rngs),
        "vgg": lambda rngs: VGG(shape, 3, widths=(8, 16), rngs=rngs),
    }[name]
    return Task(make, rule or jaxfa.backprop(), optax.sgd(0.1), dataset, 128, **options)


@pytest.mark.parametrize("learn", [(True, True), pytest.param((False, False), marks=pytest.mark.long)])
def test_counted_operations_are_those_of_the_theory(tiny, learn):
    products = operations.dense(128, (192, 32, 32, 32, 3))
    assert operations.theory(products, None) == 2 * 128 * (192 * 32 + 2 * 2 * 32 * 32 + 2 * 32 * 3)
    rule = jaxfa.ldfa(0.25, learn_p=learn[0], learn_q=learn[1])
    found = operations.count(network("mlp", tiny, rule))
    expected = operations.theory(products, 0.25, learn_p=learn[0], learn_q=learn[1])
    assert 0 < found.backward - expected < 0.12 * expected  # what is pointwise, and terms in r^2
    assert found.forward == pytest.approx(2 * 128 * (192 * 32 + 2 * 32 * 32 + 32 * 3), rel=0.05)
    assert found.step == found.forward + found.backward + found.update


@pytest.mark.long
def test_convolutions_cost_what_the_theory_says(tiny):
    products = operations.vgg(128, 8, (8, 16), 3)
    assert [one.feedback for one in products] == [None, True, True, True, False, False]
    chosen = network("vgg", tiny, jaxfa.ldfa(0.25), at=("blocks/*",), allow=("classifier", "head"))
    ratio = operations.count(chosen).backward / operations.count(network("vgg", tiny)).backward
    expected = operations.theory(products, 0.25) / operations.theory(products, None)
    assert ratio == pytest.approx(expected, rel=0.15)
    assert operations.theory(products, 0.0) < 0.75 * operations.theory(products, None)


def test_a_target_that_one_seed_misses_is_not_reached():
    run = {"rank": None, "steps": [5.0, 10.0], "operations": [1e12, 3e12], "accuracy": [0.5, 0.6]}
    missed = run | {"rank": 2, "steps": [5.0, None], "operations": [1e12, None]}
    _, reference, row = ldfa_cost.reach_rows({"bp": run, "rank-2": missed})
    assert reference[2:4] == ["2.00 ± 1.41", "1.00 ± 0.71"]
    assert row[1:4] == ["not reached"] * 3


def test_operations_to_a_target_are_those_of_the_first_epoch_that_reaches_it(tiny, monkeypatch):
    monkeypatch.setattr(operations, "count", lambda task: operations.Count(1.0, 2.0, 0.5))  # tested above
    config = ldfa_cost.Config(ranks=(2, 4), target=0.3, seeds=2, width=8)
    chances = ([0.1, 0.4], [0.5, 0.4])
    history = [{"step": 0, "test_accuracy": [0.9, 0.9]}]
    history += [{"step": 5 + i, "test_accuracy": chance} for i, chance in enumerate(chances)]
    found = ldfa_cost.reach(config, tiny, {"bp": history, "rank-2": history[:2]})
    assert found["bp"]["steps"] == [6.0, 5.0]
    assert found["bp"]["operations"] == [6 * 3.5, 5 * 3.5]
    assert found["rank-2"]["steps"] == [None, 5.0]
    assert found["rank-4"]["accuracy"] == [None, None]  # it diverged


def test_cka_knows_no_rotation_and_no_scale():
    rng = np.random.default_rng(0)
    x, other = rng.normal(size=(200, 6)), rng.normal(size=(200, 6))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert representations.cka(x, 3 * x @ turn + 1) == pytest.approx(1)
    assert representations.cka(x, other) < 0.2
    gram, both = (one @ one.T for one in (x - x.mean(0, keepdims=True), other - other.mean(0, keepdims=True)))
    expected = (gram * both).sum() / np.sqrt((gram**2).sum() * (both**2).sum())
    assert representations.cka(x, other) == pytest.approx(expected)


def test_modes_have_factors_and_shares():
    config = ldfa_linear.Config(iterations=2, seeds=1, ranks=(2,))
    np.testing.assert_allclose(ldfa_linear.modes(config, jaxfa.backprop())[:, :, 1:], 1, atol=1e-5)
    found = ldfa_linear.modes(config, ldfa_linear.rule(config, 64, "P and Q fixed"))
    np.testing.assert_allclose(found[:, :, 2], 1, atol=1e-5)  # an orthonormal P of full rank keeps all
    assert abs(found[:, 0, 1]).max() < 0.5  # and a random Q knows nothing of the weights


def test_how_much_of_the_weakest_mode_is_learned_is_told_where_the_paper_stops():
    config = ldfa_linear.Config(ranks=(2,), iterations=15_000)
    steps = np.array([2500, 5000, 15_000])
    overlaps = dict(zip(ldfa_linear.VARIANTS, (0.9, 0.2, 0.1), strict=True))
    found = {(2, name): np.zeros((2, 3, 3, 2)) for name in overlaps}
    for name, overlap in overlaps.items():
        found[2, name][:, 1, 0, 1] = [overlap - 0.05, overlap + 0.05]
    ((learned, said),) = ldfa_linear.findings(config, steps, found)
    assert learned == "0.90"
    assert said.startswith(
        "of the weakest mode is learned by iteration 5000 through feedback of rank 2, P and Q learned;"
    )
    assert said.endswith("; P fixed, Q learned: 0.20; P and Q fixed: 0.10.")


def test_likeness_is_told_at_the_highest_rank_beside_the_lowest():
    chosen = [Arm("bp", "Backpropagation", None, None), *(Arm(f"both-{rank}", "Both", rank, None) for rank in (10, 1))]
    found = {"bp": np.full((2, 3), 0.8), "both-10": np.full((2, 3), 0.7), "both-1": np.full((2, 3), 0.2)}
    assert representations.findings(chosen, found) == [
        ("0.70", "is the likeness of the last hidden layer at rank 10, Both; at rank 1: 0.20."),
        ("0.80", "is that of two backpropagations from other starts."),
    ]


def test_fields_are_told_at_the_least_rank_beside_backpropagations():
    def seen(*selectivity):
        return receptive_fields.Result(np.zeros(0), np.array(selectivity), np.full((2, 2), 0.5), np.zeros(1))

    results = {
        "untrained": seen((0, 0), (0, 0)),
        "backpropagation": seen((0.2, 0.4), (0.5, 0.5)),
        "rank 4": seen((9, 9), (9, 9)),
        "rank 1": seen((0.1, np.nan), (np.nan, np.nan)),
    }
    (number, said), (symmetry, _) = ldfa_retina._findings(results)
    assert (number, symmetry) == ("0.100", "0.500 ± 0.000")
    assert said == "is the selectivity of fields at rank 1, beside 0.400 ± 0.141 by backpropagation."
    assert not list(ldfa_retina._findings({"untrained": seen((0, 0)), "rank 4": seen((1, 1))}))


def test_operations_are_told_at_their_least():
    steps = {"mlp": {"fractions": (1.0, 0.5, 0.25), "P and Q learned": [2.0, 1.5, 0.9]}}
    runs = {"bp": [None, [1.0, 3.0]], "rank-2": [2, [None, 1]], "rank-4": [4, [3.0, 3.0]], "rank-8": [8, [5.0, 5.0]]}
    curve = {name: {"rank": rank, "operations": spent} for name, (rank, spent) in runs.items()}
    assert list(ldfa_cost.findings(steps, curve, "42 %")) == [
        ("0.90 x", "backpropagation's operations of a backward pass: mlp at rank 0.25 m."),
        (
            "1.50 ± 0.00 x",
            "backpropagation's operations to 42 %, at the cheapest rank: rank-4; backpropagation's own: 1.00 ± 0.71.",
        ),
    ]
