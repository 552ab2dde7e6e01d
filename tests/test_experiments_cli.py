"""What every experiment's command line promises: help, options that are read, trainings that diverge."""

import ast
import contextlib
import dataclasses
import inspect
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.__main__ import EXPERIMENTS, main
from experiments.benchmarks import memory, memory_figure, pipeline_report, pipeline_worker
from experiments.common import data, figures, operations, records, sweep, text, timing
from experiments.common.train import DivergenceError
from experiments.common.trainer import Trainer
from experiments.compare import compare
from experiments.conservation import figure as conservation_figure
from experiments.conservation import laws as conservation_laws
from experiments.ldfa import cost as ldfa_cost
from experiments.ldfa import linear as ldfa_linear
from experiments.ldfa import receptive_fields

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_is_one_line_the_claim_and_the_options(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main(["run", name, "--help"])
    usage, first, claim, preset, options = capsys.readouterr().out.strip().replace("\n\n\n", "\n\n").split("\n\n")
    assert usage.startswith(f"usage: python -m experiments run {name}")
    assert first == EXPERIMENTS[name].__doc__.splitlines()[0]
    assert claim.startswith("Claim")
    assert len((first + claim + preset).splitlines()) == 1
    assert "--out" in options
    assert not any(mark in first + claim for mark in ("``", ":func:", "==", "Measured"))


def documented(config):
    """The sentence below every field of a configuration, as tyro shows it."""
    found = {}
    for kind in reversed(config.__mro__[:-1]):
        (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body)
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                found[field.target.id] = ast.literal_eval(doc.value)
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_option_has_a_sentence_that_stands_alone(name):
    config = EXPERIMENTS[name].Config
    found = documented(config)
    for field in dataclasses.fields(config):
        sentence = found[field.name]
        assert sentence[0].isupper(), field.name
        assert sentence[-1] == ".", field.name
        assert sentence.split()[0] not in ("Of", "On", "In", "Its", "Whether", "What", "Which"), sentence
        assert len(sentence.split()) > 2, sentence
        assert "``" not in sentence


def test_nothing_names_a_path_outside_of_the_project():
    for path in [*ROOT.glob("experiments/*"), *ROOT.glob("jaxfa/**/*.py"), ROOT / "README.md"]:
        if path.is_file():
            assert "../" not in path.read_text(), path


class Recorded:
    """In the place of a configuration: the fields that were read of it, but by checks and by copying."""

    def __new__(cls, config):
        read = set()
        fields = {field.name for field in dataclasses.fields(config)}

        def get(self, name):
            caller = sys._getframe(1)
            checks = caller.f_code.co_name in ("__post_init__", "unread", "refuse_below_one", "refuse_empty")
            if name in fields and not checks and caller.f_globals["__name__"] != "dataclasses":
                read.add(name)
            return object.__getattribute__(self, name)

        kind = type("Config", (type(config),), {"__getattribute__": get, "__module__": type(config).__module__})
        values = {field: getattr(config, field) for field in fields}
        spy = kind(**values)
        read.clear()
        object.__setattr__(spy, "read", read)
        return spy


def pictures(name, folder):
    del folder
    shape = (8, 8, 1) if name in ("digits", "mnist") else (32, 32, 3)
    images, labels = np.zeros((80, *shape), np.uint8), np.arange(80, dtype=np.int32) % 100
    images[::2] = 255
    return data.Dataset(images[:64], labels[:64], images[64:], labels[64:], 100, augmented=True)


def tokens(name, folder, *, context, vocabulary):
    del name, folder
    windows = np.zeros((64, context), np.uint8)
    return data.Dataset(windows, windows.astype(np.int32), windows, windows.astype(np.int32), vocabulary or 5)


def look(trainer, task, *_, **__):
    """In the place of a trainer's ``__init__``: asks the task for all that a training would, without a gradient."""
    trainer.task, trainer._train = task, (np.zeros(4), np.zeros(4))
    model = nnx.eval_shape(lambda: task.make(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.eval_shape(lambda params: task.optimizer.update(params, task.optimizer.init(params), params), params)
    if task.between:
        task.between(Trees(), 1000)


class Trees:
    params = feedback = optimizer = None

    def _replace(self, **changes):
        return changes


def diverging(trainer, epochs, *, folder, config, save_every, progress):
    del trainer, epochs, config, save_every, progress
    folder.mkdir(parents=True, exist_ok=True)
    records.replace(folder / records.DIVERGED, "diverged: always")
    records.write_json(folder / "environment.json", [{}])
    raise DivergenceError(f"{folder} diverged: always")


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is compiled, trained, timed or drawn; every training diverges at once."""
    monkeypatch.setattr(data, "load", pictures)
    monkeypatch.setattr(text, "load", tokens)
    monkeypatch.setattr(Trainer, "__init__", look)
    monkeypatch.setattr(jaxfa.factored, "prune", lambda *trees, **_: trees)
    for module in (sweep, compare):
        monkeypatch.setattr(module, "train", diverging)
    monkeypatch.setattr(timing, "measure", lambda *_, **__: {"steps": {}})
    count = operations.Count(1.0, 2.0, 0.5)
    monkeypatch.setattr(operations, "count", lambda task: look(Trees(), task) or count)
    monkeypatch.setattr(ldfa_cost.cost_report, "write", lambda folder, *_: folder)
    monkeypatch.setattr(memory, "_measure", lambda *_: [])
    for module in (memory_figure, pipeline_report):
        monkeypatch.setattr(module, "write", lambda config, *_: config.out)
    monkeypatch.setattr(pipeline_worker, "count", lambda task: [])
    monkeypatch.setattr(jaxfa.nn, "attach", lambda model, *_, **__: model)
    monkeypatch.setattr(ldfa_linear, "VARIANTS", {"P and Q learned": ({}, "")})
    for name in ("follow", "least_solutions"):
        monkeypatch.setattr(conservation_laws, name, lambda *_, **__: None)
    for name in ("numbers", "table", "figure"):
        monkeypatch.setattr(conservation_figure, name, lambda *_: [])
    for module in (ldfa_linear, receptive_fields):
        monkeypatch.setattr(module, "figure", lambda *_: None)
    monkeypatch.setattr(figures, "write", lambda folder, *_, **__: folder)


SMALL = {"images": 48, "test_images": 8}
DEEP = SMALL | {"batch": 16, "networks": ("alexnet",)}
GPT = {"context": 4, "width": 4, "depth": 1, "heads": 1}
CASES = {
    "compare": [{"methods": ("fa",), "batch": 16}],
    "conservation": [{"datasets": ("digits",), "batch": 16}, {"datasets": ()}],
    "grape_ablation": [DEEP | {"networks": ("resnet20",), "variants": ("literal",)}],
    "grape_deep": [DEEP],
    "grape_schedule": [DEEP],
    "grape_shallow": [SMALL | {"batch": 16, "datasets": ("cifar10",)}],
    "grape_transformer": [GPT | {"calibrations": (0, 1), "steps": 2}, GPT | {"calibrations": (0,)}],
    "ldfa_cost": [SMALL | {"networks": networks, "fractions": (0.5,)} for networks in ((), ("mlp",), ("vgg",))],
    "ldfa_linear": [{"ranks": (1,), "iterations": 1, "seeds": 1}],
    "ldfa_rank_mlp": [
        SMALL | {"ranks": (1,), "groups": groups, "batch": 16} for groups in (("fixed",), ("B1", "direct"))
    ],
    "ldfa_retina": [SMALL | {"ranks": (1,), "batch": 16, "seeds": 1}],
    "ldfa_subsets": [SMALL | {"classes": (50,), "ranks": (5,), "batch": 16}],
    "grape_resnet20": [SMALL | {"batch": 16}],
    "ldfa_vgg": [SMALL | {"ranks": (1,), "fractions": ()}],
    "ldfa_vit": [SMALL | {"rules": (rule,), "ranks": (3,), "batch": 16} for rule in ("hebbian", "normative")],
    "memory": [{"depths": (2,), "timed": 2, "repeats": (1,), "timed_repeats": 1, "batch": 4, "images": 2}],
    "pipeline": [{"rounds": 0}],
    "rank_collapse": [SMALL | {"trainings": (arm,), "batch": 16} for arm in ("fa", "bp-norm-rank-1", "fa-norm-sized")],
    "ssa_ablation": [SMALL | {"batch": 16}],
    "ssa_cifar10": [SMALL | {"batch": 16, "networks": (name,)} for name in ("smallconv", "vgg13")],
    "ssa_alignment": [SMALL | {"batch": 16}],
    "ssa_cost": [SMALL | {"batch": 16}],
}


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(name, one, id=name) for name in EXPERIMENTS for one in CASES[name]]
)
def test_every_option_is_read_by_an_arm_of_the_run_or_listed_as_unread(name, options, untrained, tmp_path):
    config = Recorded(dataclasses.replace(EXPERIMENTS[name].PRESETS["cpu"], **options, out=tmp_path))
    with contextlib.suppress(FloatingPointError):  # where nothing is left to draw
        EXPERIMENTS[name].run(config)
    unread = config.unread() if hasattr(config, "unread") else ()
    assert {field.name for field in dataclasses.fields(config)} - config.read == set(unread)
