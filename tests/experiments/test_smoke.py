"""Every experiment runs at a tiny preset: trains, times, records, reports, and its results become data."""

import dataclasses
import html
import json
import re

import jax.numpy as jnp
import pytest
from flax import nnx

from experiments.__main__ import EXPERIMENTS, main
from experiments.benchmarks import workloads
from experiments.common import page, records, results, rows, sweep
from experiments.conservation import angle_against_depth, laws
from experiments.grape import networks as grape_networks
from experiments.ldfa import linear as ldfa_linear
from experiments.ldfa import vgg as ldfa_vgg
from experiments.models.networks import MLP, ResNet
from experiments.ssa import arms as ssa_arms

# Most have the same network and data, so that most of what is compiled is compiled once. An experiment needs no row if
# it is quick with these alone.
TRAINED = {"epochs": 1, "images": 32, "test_images": 16, "batch": 16, "seeds": 1, "loop": "step"}
SWEEPS = {
    "compare": {"methods": ("ssa",), "hidden": (4,)},
    "compare_lenet": {"datasets": ("mnist",)},
    "conservation_aligned_start": {"datasets": ("mnist",), "hidden": (4,)},
    "grape_deep": {"networks": ("alexnet",), "shrink": 1},
    "grape_resnet20": {"shrink": 1, "variants": ("letter", "activations")},
    "grape_shallow": {"datasets": ("cifar10",)},
    "grape_transformer": {
        "calibrations": (1,),
        "context": 6,
        "width": 8,
        "depth": 1,
        "heads": 2,
        "batch": 4,
        "images": 9,
    },
    "ldfa_cnn": {"variants": ("local",), "ranks": (2,), "retina": (2,), "cortex": (2,), "hidden": 4, "window": 3},
    "ldfa_rank_mlp": {"ranks": (2,), "variants": ("B3",), "width": 4, "narrow": 64, "shrink": 1},
    "ldfa_rnn": {"variants": ("rebuilt",), "ranks": (2,), "width": 4, "shrink": 4},
    "ldfa_vgg": {"variants": ("both",), "widths": (4,), "shrink": 1},
    "ldfa_vit": {"variants": ("normative",), "width": 4, "depth": 1, "heads": 2, "patch": 4, "warmup": 0},
    "ssa_ablation": {"energy": 0.7, "multiple": 2, "shrink": 1},
    "ssa_transformer": {"context": 6, "width": 8, "depth": 1, "heads": 2, "steps": 2, "batch": 4, "images": 9},
}
STUDIES = {
    "conservation": {"steps": 2, "iterations": 2, "seeds": 1},
    "conservation_angle_against_depth": {"depths": (1,), "factors": (0.25,), "depth": 1},
    "growth": {"depth": (1,), "width": (8,), "batch": (4,), "classes": (3,), "length": (4,), "rounds": 2},
    "grape_bound": {"steps": 4, "batch": 8, "seeds": 1},
    "grape_first_layer": {"shrink": 1, "variants": ("letter", "scaled")},
    "grape_gates": {"shrink": 1},
    "ldfa_autoencoder": {"ranks": (2,), "hidden": (4,), "shrink": 4},
    "ldfa_cost": {
        "networks": ("mlp",),
        "fractions": (0.5,),
        "ranks": (2,),
        "width": 4,
    },
    "ldfa_linear": {"ranks": (2,), "iterations": 4, "seeds": 1},
    "ldfa_representations": {"ranks": (2,), "variants": ("both",), "width": 4, "shrink": 1},
    "ldfa_retina": {"ranks": (2,), "retina": (3, 4), "cortex": (4,), "hidden": 4, "window": 3},
    "memory": {"depths": (2, 3), "timed": 2, "width": 4, "batch": 8, "repeats": (1,), "timed_repeats": 1, "images": 2},
    "pipeline": {
        "layers": 2,
        "width": 4,
        "outputs": 2,
        "examples": 4,
        "stages": (2,),
        "microbatches": (2,),
        "rounds": 0,
    },
    "rank_collapse": {
        "trainings": ("fa",),
        "widths": (4, 4),
        "shrink": 1,
        "steps": 1,
        "window": 2,
        "sketch": 64,
        "probe": 8,
    },
    "starts": {"networks": ("mlp",), "methods": ("dfa",), "rounds": 1},
    "steps": {"networks": ("mlp",), "rounds": 2},
    "ssa_networks": {"networks": ("mlp",), "energy": 0.7, "multiple": 2, "shrink": 1},
}
# The presets for a quarter of an hour on a GPU, with their own arms; every one in this process, one after the other.
GPU15 = {
    "grape_resnet20": {},
    "grape_shallow": {"datasets": ("cifar100",)},
    "grape_transformer": {"context": 6, "width": 8, "depth": 1, "heads": 2, "batch": 4, "images": 9, "steps": 2},
    "ldfa_rank_mlp": {"ranks": (2,), "width": 4, "narrow": 4},
    "rank_collapse": {"widths": (4, 4), "steps": 1, "window": 2, "sketch": 64, "probe": 8},
    "ssa_networks": {"energy": 0.7, "multiple": 2},
}
ARMS = [name for name, experiment in EXPERIMENTS.items() if experiment.study is None]
SHOWN = [name for name in EXPERIMENTS if name not in ARMS]
# What takes more than a few seconds is run by `make test-all` alone: it is compiling that takes them.
LONG_SWEEPS = {*ARMS} - {"compare"}
LONG_ARMS = {"grape_transformer", "ldfa_vit", "ssa_ablation", "ssa_transformer"}
LONG_STUDIES = {*STUDIES} - {"ldfa_linear"}


def small(shape, classes, *_, rngs=None, **__):
    """The same network in the place of many."""
    return MLP(shape, classes, (4,), rngs=rngs or _[-1])


def shallowest(shape, classes, scale, rngs):
    """A ResNet of two blocks."""
    return ResNet(shape, classes, (2, 2), repeats=1, rngs=rngs)


class Mapped(nnx.Module):
    """The smallest with a first layer over a map, of whole tiles."""

    def __init__(self, shape, classes, rngs):
        self.conv1, self.head = nnx.Conv(shape[-1], 2, (1, 1), rngs=rngs), nnx.Linear(2, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.conv1(x).mean((1, 2)))


@pytest.fixture
def tiny(mock, play, monkeypatch):
    """Networks to match tiny data."""
    for name, network in grape_networks.NETWORKS.items():
        monkeypatch.setitem(grape_networks.NETWORKS, name, network._replace(make=small, taps=None))
    monkeypatch.setattr(ssa_arms, "maker", lambda name, config, found: lambda rngs: small((8, 8, 3), 3, rngs=rngs))
    for network in ("compare.lenet.LeNet", "grape.shallow.ShallowCNN"):
        monkeypatch.setattr(f"experiments.{network}", small)
    workload = workloads.Workload(lambda rngs: MLP((2, 2, 1), workloads.CLASSES, (4, 4), rngs=rngs), (2, 2, 1), batch=4)
    for name in ("mlp", "lenet"):
        monkeypatch.setitem(workloads.WORKLOADS, name, workload)
    monkeypatch.setattr(angle_against_depth, "_network", lambda *size: small((4, 4, 3), 3, size[-1]))
    monkeypatch.setattr(laws, "_digits", lambda: (jnp.ones((60, 8, 8, 1)), jnp.arange(60) % 10))
    monkeypatch.setattr(ldfa_vgg, "VGG", lambda shape, classes, *, widths, rngs: small(shape, classes, rngs=rngs))
    monkeypatch.setattr(ldfa_vgg, "AT", None)
    monkeypatch.setattr(ldfa_vgg, "ALLOW", ())
    monkeypatch.setattr(ldfa_linear, "VARIANTS", {"P and Q learned": ({}, "#0072b2")})
    return play


def configured(name, folder, options, preset="cpu"):
    preset = EXPERIMENTS[name].presets[preset]
    extra = {"data": folder} if name.endswith("transformer") else {}
    known = {key: value for key, value in TRAINED.items() if hasattr(preset, key)}
    return dataclasses.replace(preset, **(known | options | extra), out=folder / "run")


def marked(names, long):
    return [pytest.param(name, marks=pytest.mark.long) if name in long else name for name in names]


@pytest.mark.parametrize("name", marked(ARMS, LONG_SWEEPS))
def test_every_sweep_trains_times_and_reports(name, tiny, monkeypatch, capsys):
    config = configured(name, tiny, SWEEPS.get(name, {}))
    text = sweep.run(EXPERIMENTS[name], config).read_text()
    arms = list(EXPERIMENTS[name].arms(config))
    found = rows.read(config.out)
    assert [row.name for row in found] == [arm.name for arm in arms]
    for row, arm in zip(found, arms, strict=True):
        last = records.read(config.out / row.name)[-1]
        assert last["step"] == (arm.task.steps or 2)
        # The last layer's update is the true one; PEPITA's is of the second pass's activities.
        assert list(last["angle"].values())[-1][0] <= (5.0 if "pepita" in row.name else 0.0)
        assert row.step["ratio"] > 0
        assert row.coverage
    assert EXPERIMENTS[name].page.title in html.unescape(text)
    assert EXPERIMENTS[name].claim in html.unescape(text)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)|<(link|script|img|iframe)\b", text)
    assert page.write(config.out).read_text() == text
    _is_data(name, config.out, tiny, monkeypatch)
    assert found[-1].name in capsys.readouterr().out


@pytest.mark.parametrize("name", marked(sorted(LONG_SWEEPS), LONG_ARMS))
def test_the_last_arm_of_every_sweep_trains_and_reports(name, tiny):
    """What the gate runs of a sweep: its data, network, rule and optimizer, of one arm."""
    experiment = EXPERIMENTS[name]
    config = configured(name, tiny, SWEEPS.get(name, {}))
    *_, last = experiment.arms(config)
    text = sweep.run(experiment._replace(arms=lambda _: [last._replace(reference=None)]), config).read_text()
    (row,) = rows.read(config.out)
    assert [record["step"] for record in row.history] == [0, last.task.steps or 2]
    assert row.coverage
    assert experiment.claim in html.unescape(text)


@pytest.mark.parametrize("name", marked(SHOWN, LONG_STUDIES))
def test_every_study_reports(name, tiny, monkeypatch, capsys):
    if name == "grape_first_layer":
        monkeypatch.setattr("experiments.grape.shallow.ShallowCNN", Mapped)
    if name == "grape_gates":
        monkeypatch.setattr("experiments.grape.forms.STEPS", 2)
        network = grape_networks.NETWORKS["resnet20"]._replace(make=shallowest, taps=("stem", "blocks/*"))
        monkeypatch.setitem(grape_networks.NETWORKS, "resnet20", network)
    config = configured(name, tiny, STUDIES.get(name, {}))
    text = sweep.run(EXPERIMENTS[name], config).read_text()
    assert text.count("<svg") == 1
    assert "<td" in text
    assert page.write(config.out).read_text() == text
    _is_data(name, config.out, tiny, monkeypatch)
    assert capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", GPU15)
def test_every_preset_for_a_gpu_trains_its_arms_and_reports(name, tiny, monkeypatch):
    preset = EXPERIMENTS[name].presets["gpu15"]
    assert preset.apart
    assert preset.minutes <= 12  # a quarter of an hour, less what compiling and the report take
    config = configured(name, tiny, GPU15[name] | {"apart": False, "minutes": None}, "gpu15")
    assert EXPERIMENTS[name].page.title in html.unescape(sweep.run(EXPERIMENTS[name], config).read_text())
    assert rows.unfinished(config.out) == []
    assert len(list(config.out.glob("*/metrics.jsonl"))) == len(list(EXPERIMENTS[name].arms(config)))
    _is_data(name, config.out, tiny, monkeypatch)


def test_every_published_table_has_a_preset_for_a_gpu():
    assert {*GPU15} == {name for name, experiment in EXPERIMENTS.items() if "gpu15" in experiment.presets}


def _is_data(name, folder, root, monkeypatch):
    """What a run left becomes a file of results, and that a section of its paper's README."""
    experiment = EXPERIMENTS[name]
    monkeypatch.setattr(results, "FOLDER", root)
    monkeypatch.setattr(results, "ROOT", root)
    (root / experiment.paper).mkdir(exist_ok=True)
    (root / experiment.paper / "__init__.py").write_text('"""A paper."""\n')
    (root / "README.md").write_text("")
    assert main(["report", str(folder), "--save", "tiny"]) == 0
    (path,) = (root / experiment.paper / "results").glob("*.json")
    assert json.loads(path.read_text())["runs"][0]["jax"]
    made = results.pages([experiment])
    readme = made[root / experiment.paper / "README.md"]
    assert experiment.page.title in readme
    figure = path.with_suffix(".svg")
    assert f"results/{figure.name}" in readme
    assert made.get(figure) or figure.read_text()


def test_every_row_is_of_an_experiment():
    assert {*SWEEPS} <= {*ARMS}
    assert {*STUDIES} <= {*SHOWN}
