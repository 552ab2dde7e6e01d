"""GrAPE's tables: every arm as it says, one table trained on mock images, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.__main__ import EXPERIMENTS
from experiments.common import data
from experiments.common.data import Dataset
from experiments.common.experiment import Arm
from experiments.grape import shallow
from experiments.grape.first_layer import findings, linear, repeated
from experiments.grape.networks import NETWORKS
from experiments.grape.variants import BEST, TILED, VARIANTS, WATCHED

CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10}


@pytest.fixture
def images(monkeypatch):
    rng = np.random.default_rng(0)

    def load(name, folder=None):
        shape = (28, 28, 1) if name == "mnist" else (32, 32, 3)
        images = rng.integers(0, 256, (60, *shape), dtype=np.uint8)
        labels = np.arange(60, dtype=np.int32) % CLASSES[name]
        return Dataset(images[:48], labels[:48], images[48:], labels[48:], CLASSES[name])

    monkeypatch.setattr(data, "load", load)


def arms(name, **changes):
    experiment = EXPERIMENTS[name]
    sizes = {"images": 48, "test_images": 12, "batch": 12}
    return list(experiment.arms(dataclasses.replace(experiment.presets["cpu"], **sizes, **changes)))


def test_the_published_numbers_are_those_of_the_papers_arms(images):
    full = {"dataset": "cifar100", "shrink": 1, "scale": 1.0, "networks": tuple(NETWORKS)}
    published = {arm.name: arm.published for arm in arms("grape_deep", **full)}
    assert published["resnet20-bp"] == 68.72
    assert published["vgg16-dfa"] == 1.0
    assert published["resnet56-letter-1"] == 66.92
    assert published["alexnet-alone-1"] is None


def test_no_rule_but_the_papers_own_has_its_numbers(images):
    for arm in arms("grape_deep", dataset="cifar100", shrink=1, scale=1.0) + arms("grape_shallow"):
        assert not (arm.published and arm.task.rule in (BEST, TILED, WATCHED))


def test_every_arm_is_compared_with_its_own_network_and_data(images):
    for arm in arms("grape_deep", networks=tuple(NETWORKS)) + arms("grape_shallow"):
        assert (arm.reference or arm.name).split("-")[0] == arm.name.split("-")[0]
        assert (arm.reference or arm.name).endswith("-bp")


def test_the_control_has_as_many_steps_as_there_are_calibrations(images):
    found = {arm.name: arm.task for arm in arms("grape_deep", networks=("resnet20",), periods=(1, 5))}
    for name, task in found.items():
        assert task.steps == (1 if "alone" in name else None)
        assert (task.calibrate is not None) == (name[-2:] in ("-1", "-5", "nt") and "alone" not in name)
    taken = found["resnet20-alone-5"].optimizer  # of five steps, one an epoch, the fifth
    params = {"w": jnp.ones(3)}
    state, moved = taken.init(params), []
    for _ in range(5):
        updates, state = taken.update(params, state, params)
        moved.append(bool(jnp.any(updates["w"] != 0)))
    assert moved == [False] * 4 + [True]


def test_direct_rules_reach_every_hidden_layer_of_a_plain_network(images):
    (arm,) = (arm for arm in arms("grape_deep", networks=("vgg16",), scale=0.05) if arm.name == "vgg16-full")

    def attach():
        example = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
        return jaxfa.nn.attach(arm.task.make(nnx.Rngs(0)), arm.task.rule, rngs=nnx.Rngs(1), example=example)

    feedback = nnx.to_pure_dict(nnx.state(jax.eval_shape(attach), jaxfa.nn.Feedback))
    assert len(jax.tree.leaves(feedback, is_leaf=lambda node: isinstance(node, jaxfa.DirectFeedback))) == 14


def test_variants_of_the_ablation_are_rules_of_their_own(images):
    found = arms("grape_resnet20", variants=tuple(VARIANTS))
    assert [arm.name for arm in found] == ["bp", "fa", "dfa", *VARIANTS]
    h, logits = jax.ShapeDtypeStruct((4, 8, 8, 2), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32)
    made = {name: rule.init(jax.random.key(0), h, logits) for name, (_, rule) in VARIANTS.items()}
    assert made["tile-4"].b.shape == (4, 4, 2, 3)
    assert made["tile-1"].b.shape == (1, 1, 2, 3)
    assert made["mean-0.9"].mean is not None
    assert not made["fdfa"].b.any()


def test_shrinking_averages_squares():
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    found = data.shrink(Dataset(images, np.zeros(2), images, np.zeros(2), 2), 2)
    np.testing.assert_array_equal(found.train_images[0, :, :, 0], np.rint([[2.5, 4.5], [10.5, 12.5]]))
    with pytest.raises(ValueError, match=r"Images of 4 x 4 pixels have no whole squares of 3"):
        data.shrink(found._replace(train_images=images), 3)


def test_what_repeats_of_a_feedback_is_its_projection():
    b, other = np.random.default_rng(0).normal(size=(2, 3, 8, 12, 2))
    tiled = np.array(repeated(b))
    np.testing.assert_allclose(repeated(tiled), tiled, rtol=1e-6)
    np.testing.assert_array_equal(tiled[:, :4], tiled[:, 4:])
    np.testing.assert_array_equal(tiled[:, :, :8], tiled[:, :, 4:])
    left, anything = b - tiled, np.array(repeated(other))
    assert abs((left * anything).sum()) < 1e-4 < abs((b * anything).sum())


class Pooled(nnx.Module):
    """Linear, so that one feedback gives every error; the mean of all positions, or one that knows each."""

    def __init__(self, everywhere, rngs):
        self.conv1, self.everywhere = nnx.Conv(3, 4, (3, 3), rngs=rngs), everywhere
        self.head = nnx.Linear(4 if everywhere else 4 * 64, 3, rngs=rngs)

    def __call__(self, x):
        h = self.conv1(x)
        return self.head(h.mean((1, 2)) if self.everywhere else h.reshape(len(h), -1))


@pytest.mark.parametrize("everywhere", [True, False])
def test_linear_feedback_fits_a_linear_network_and_tiles_what_repeats_alone(everywhere, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (40, 8, 8, 3), np.uint8), rng.integers(0, 3, 40)
    dataset = Dataset(images, labels, images, labels, 3)
    config = dataclasses.replace(EXPERIMENTS["grape_first_layer"].presets["cpu"], seeds=2, out=tmp_path)
    task = shallow.task(config, dataset, jaxfa.dfa(), 1e-3)._replace(
        make=lambda rngs: Pooled(everywhere, rngs), batch=20
    )
    found = linear(config, Arm("dfa", "DFA", None, task))
    np.testing.assert_allclose(found.fitted, 0, atol=0.1)
    if everywhere:
        np.testing.assert_allclose(found.tiled, 0, atol=0.1)
        np.testing.assert_allclose(found.share, 1, rtol=1e-4)
    else:
        assert (np.array(found.tiled) > 10).all()
        assert (np.array(found.share) < 0.6).all()


def test_what_came_of_the_first_layer_is_how_far_the_options_turn_it():
    angles = {
        name: np.array(of) for name, of in (("bp", (0, 0)), ("activations", (60, 70)), ("a", (90, 80)), ("b", (50, 60)))
    }
    far, near = findings("conv1", {"a": "Tiles", "b": "Scales"}, angles)
    assert far == ("+20 ± 14°", "from the angle without options in conv1: Tiles, farthest from the truth.")
    assert near == ("-10 ± 0°", "from the angle without options in conv1: Scales, closest to the truth.")
    assert not findings("conv1", {}, {"activations": angles["activations"]})
    assert not findings("conv1", {"a": "Tiles"}, {"a": angles["a"]})
