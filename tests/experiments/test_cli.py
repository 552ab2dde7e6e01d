"""What every experiment's command line promises: help, options that are read, trainings that diverge."""

import ast
import collections
import contextlib
import ctypes
import dataclasses
import inspect
import itertools
import json
import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.__main__ import EXPERIMENTS, main, run_all
from experiments.benchmarks import growth, memory, pipeline, pipeline_worker, starts, steps
from experiments.common import bounds, data, operations, plots, programs, records, results, sweep, text, timing
from experiments.common.experiment import identity
from experiments.common.programs import keep_programs
from experiments.common.train import DivergenceError
from experiments.common.trainer import Trainer
from experiments.conservation import conservation, laws
from experiments.grape import bound
from experiments.ldfa import cost as ldfa_cost
from experiments.ldfa import linear as ldfa_linear
from experiments.ldfa import receptive_fields
from experiments.ldfa import representations as ldfa_representations
from experiments.ldfa import retina as ldfa_retina
from experiments.rank_collapse import report as rank_report
from experiments.ssa import networks as ssa_networks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_is_one_line_the_claim_and_the_options(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main(["run", name, "--help"])
    usage, first, claim, preset, options = capsys.readouterr().out.strip().replace("\n\n\n", "\n\n").split("\n\n")
    assert usage.startswith(f"usage: python -m experiments run {name}")
    assert first == EXPERIMENTS[name].paragraphs()[0].replace("``", "")
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
    config = type(EXPERIMENTS[name].presets["cpu"])
    found = documented(config)
    for field in dataclasses.fields(config):
        sentence = found[field.name]
        assert sentence[0].isupper(), field.name
        assert sentence[-1] == ".", field.name
        assert sentence.split()[0] not in ("Of", "On", "In", "Its", "Whether", "What", "Which"), sentence
        assert len(sentence.split()) > 2, sentence
        assert "``" not in sentence


def test_nothing_names_a_path_outside_of_the_project():
    for path in [*ROOT.glob("experiments/**/*.py"), *ROOT.glob("jaxfa/**/*.py"), ROOT / "README.md"]:
        assert "../" not in path.read_text(), path


class Recorded:
    """In the place of a configuration: the fields that were read of it, but by checks and by copying."""

    def __new__(cls, config):
        read = set()
        fields = {field.name for field in dataclasses.fields(config)}

        def get(self, name):
            caller = sys._getframe(1)
            checks = caller.f_code.co_name in ("__post_init__", "unread") or caller.f_code is bounds.check.__code__
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
    trainer.task, trainer.data = task, (np.zeros(4), np.zeros(4))
    model = nnx.eval_shape(lambda: task.make(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.eval_shape(lambda params: task.optimizer.update(params, task.optimizer.init(params), params), params)
    if task.between:
        task.between(Trees(), 1000)


class Trees:
    params = feedback = optimizer = rest = None

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
    monkeypatch.setattr(Trainer, "init", lambda trainer: Trees())
    monkeypatch.setattr(Trainer, "begin", lambda trainer, key: (None, Trees()))
    monkeypatch.setattr(jaxfa.factored, "prune", lambda *trees, **_: trees)
    monkeypatch.setattr(sweep, "train", diverging)
    count = operations.Count(1.0, 2.0, 0.5)
    monkeypatch.setattr(operations, "count", lambda task: look(Trees(), task) or count)
    monkeypatch.setattr(memory, "_measure", lambda *_: [])
    for benchmark in (starts, steps):
        monkeypatch.setattr(benchmark, "measure", lambda *_: {})
        monkeypatch.setattr(benchmark, "report", lambda *_: None)
    for name in ("measure", "rows", "draw", "findings"):
        monkeypatch.setattr(growth, name, lambda *_: [])
    monkeypatch.setattr(memory, "findings", lambda _: [])
    monkeypatch.setattr(rank_report, "study", lambda *_: None)
    for name in ("figure", "step_rows", "reach_rows"):
        monkeypatch.setattr(ldfa_cost, name, lambda *_: [])
    monkeypatch.setattr(timing, "measure", lambda *_, **__: {"steps": collections.defaultdict(lambda: {"ratio": 1.0})})
    counted = {"arm": "backpropagation", "stages": 2, "microbatches": 2, "sent": {}, "kept": 0}
    connection = SimpleNamespace(recv=lambda: counted)
    monkeypatch.setattr(pipeline_worker, "process", lambda *_, **__: contextlib.nullcontext(connection))
    for name in ("figure", "findings"):
        monkeypatch.setattr(pipeline, name, lambda *_: None)
    monkeypatch.setattr(jaxfa.nn, "attach", lambda model, *_, **__: model)
    monkeypatch.setattr(ldfa_linear, "VARIANTS", {"P and Q learned": ({}, "")})
    monkeypatch.setattr(ldfa_representations, "representations", lambda *_: [[np.eye(3)], [np.eye(3)]])
    monkeypatch.setattr(ldfa_retina, "last_state", lambda folder, start: start)
    monkeypatch.setattr(ldfa_retina, "fields", lambda config, *_: (config.window, config.retina))
    monkeypatch.setattr(receptive_fields, "describe", lambda *_: None)
    monkeypatch.setattr(ldfa_retina, "_rows", lambda results: [])
    monkeypatch.setattr(ldfa_retina, "_findings", lambda results: [])
    for name in ("draw", "_rows", "_findings", "_end"):
        monkeypatch.setattr(ssa_networks, name, lambda *_: [])
    monkeypatch.setattr(laws, "follow", lambda *_, **__: laws.Followed(*4 * [np.zeros((1, 1))]))
    monkeypatch.setattr("experiments.conservation.conservation.convergence", lambda **_: {})
    followed = {"cosines": np.full((4, 2, 3), 0.5), "bias": np.ones(4), "accuracy": np.ones(4)}
    monkeypatch.setattr(bound, "follow", lambda rule, config, seed: followed if config.batch else {})
    monkeypatch.setattr(bound, "_figure", lambda *_: None)
    monkeypatch.setattr(conservation, "_figure", lambda *_: None)
    for module in (ldfa_linear, receptive_fields):
        monkeypatch.setattr(module, "figure", lambda *_: None)
    monkeypatch.setattr(sweep.page, "save", lambda folder, study: None)
    monkeypatch.setattr(sweep.page, "tables", lambda folder: [])
    monkeypatch.setattr(sweep.page, "write", lambda folder: folder)
    monkeypatch.setattr(plots, "svg", lambda figure: "")


RECORD = {"step": 1, "test_accuracy": [0.1], "rank": {"head": [2.0]}, "angle": {"head": [0.0]}}


SMALL = {"images": 48, "test_images": 8}
DEEP = SMALL | {"batch": 16, "networks": ("alexnet",)}
USUAL = [SMALL | {"batch": 16}]
GPT = {"context": 4, "width": 4, "depth": 1, "heads": 1}
CASES = {
    "compare": [{"methods": ("fa",), "batch": 16}],
    "compare_lenet": [SMALL | {"batch": 16, "datasets": ("cifar10",)}],
    "conservation_aligned_start": [{"datasets": ("digits",), "batch": 16}],
    "grape_deep": [DEEP],
    "grape_first_layer": [SMALL | {"batch": 16, "variants": ("letter",)}],
    "grape_shallow": [SMALL | {"batch": 16, "datasets": ("cifar10",)}],
    "grape_transformer": [GPT | {"calibrations": (0, 1), "steps": 2}, GPT | {"calibrations": (0,)}],
    "ldfa_cost": [
        SMALL | {"networks": networks, "fractions": (0.5,), "batch": 16} for networks in ((), ("mlp",), ("vgg",))
    ],
    "ldfa_linear": [{"ranks": (1,), "iterations": 1, "seeds": 1}],
    "ldfa_rank_mlp": [
        SMALL | {"ranks": (1,), "variants": variants, "classes": classes, "batch": 16}
        for variants, classes in ((("fixed",), ()), (("B1", "direct"), (50,)))
    ],
    "ldfa_retina": [SMALL | {"ranks": (1,), "batch": 16, "seeds": 1}],
    "grape_resnet20": [SMALL | {"batch": 16, "variants": ("letter",)}],
    "ldfa_vgg": [SMALL],
    "ldfa_vit": [SMALL | {"variants": (name,), "ranks": (3,), "batch": 16} for name in ("both", "normative")],
    "growth": [{"depth": (1,), "width": (8,), "batch": (4,), "classes": (3,), "length": (4,), "rounds": 2}],
    "memory": [{"depths": (2,), "timed": 2, "repeats": (1,), "timed_repeats": 1, "batch": 4, "images": 2}],
    "pipeline": [{"rounds": 0}],
    "starts": [{"networks": ("mlp",), "methods": ("fa",), "rounds": 1}],
    "steps": [{"networks": ("mlp",), "rounds": 2}],
    "rank_collapse": [SMALL | {"trainings": (arm,), "batch": 16} for arm in ("fa", "bp-norm-rank-1", "fa-muon")],
    "ssa_networks": [SMALL | {"batch": 16, "networks": (name,)} for name in ("smallconv", "vgg13")],
    "ssa_transformer": [GPT | {"steps": 2}],
}


def test_every_case_is_of_an_experiment():
    assert {*CASES} <= {*EXPERIMENTS}


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(name, one, id=name) for name in EXPERIMENTS for one in CASES.get(name, USUAL)]
)
def test_every_option_is_read_by_an_arm_of_the_run_or_listed_as_unread(name, options, untrained, tmp_path):
    experiment = EXPERIMENTS[name]
    known = {key: value for key, value in options.items() if hasattr(experiment.presets["cpu"], key)}
    config = Recorded(dataclasses.replace(experiment.presets["cpu"], **known, out=tmp_path))
    with contextlib.suppress(FloatingPointError):  # where nothing is left to draw
        sweep.run(experiment, config)
    if experiment.arms and experiment.study:
        # What studies do not understand of a record that is of no training they need no option for.
        with contextlib.suppress(KeyError, IndexError, TypeError):
            experiment.study(config, {arm.name: [RECORD, RECORD] for arm in experiment.arms(config)})
    assert {field.name for field in dataclasses.fields(config)} - config.read == set(config.unread())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_presets_are_configurations_that_fit(name):
    experiment = EXPERIMENTS[name]
    assert next(iter(experiment.presets)) == "cpu"
    for preset in experiment.presets:
        config = experiment.preset(preset)
        assert str(config.out) == f"runs/{name}-{preset}"
        assert getattr(config, "split", "test") == "test"
        assert json.dumps(records.identity(name, config, ("out", "data")))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "No command given; choose one of list, run, report, results"),
        (["walk"], "Unknown command 'walk'; choose one of list, run, report, results"),
        (["run"], "No experiment given; choose all, or one of compare"),
        (["run", "contrast"], "Unknown experiment 'contrast'; choose all, or one of compare"),
        (["run", "compare", "--model", "lenet"], "lenet needs images of at least 12 x 12"),
        (["run", "compare", "--batch", "2000"], "batch of 2000 is more than the 400"),
        (["run", "compare", "--dataset", "mnist", "--data", "/nowhere"], "No cached data set at /nowhere/mnist.npz"),
        (["report", "/nowhere"], "/nowhere holds no trained arm"),
    ],
)
def test_wrong_use_is_told_what_to_do(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert main(args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (["compare", "--methods", "fa", "hebb"], ["hebb", "kolen_pollack", "weight_mirror"]),
        (["compare", "--dataset", "imagenet"], ["imagenet", "fashion_mnist", "cifar100"]),
        (["compare", "--model", "vgg"], ["vgg", "convnet", "resnet20"]),
        (["compare", "--lerning-rate", "1"], ["lerning-rate", "--learning-rate"]),
        (["compare", "--epochs", "0"], ["epochs must be at least 1, got 0"]),
        (["compare", "--learning-rate", "-1"], ["learning_rate must be positive, got -1.0"]),
        (["compare", "--preset", "gpu"], ["gpu", "cpu", "paper"]),
        (["ldfa_rank_mlp", "--variants", "B4"], ["B4", "direct"]),
        (["ldfa_rank_mlp", "--images", "0"], ["images must be at least 1, got 0"]),
        (["ldfa_rank_mlp", "--classes", "1"], ["classes must be from 2 to 100, got (1,)"]),
        (["ldfa_vgg", "--learning-rate", "0"], ["learning_rate must be positive, got 0.0"]),
        (["ldfa_vit", "--variants", "oja"], ["oja", "normative"]),
        (["ldfa_linear", "--ranks", "65"], ["from 1 to 64, got (65,)"]),
        (["ldfa_linear", "--strengths", "1", "0"], ["strengths must be positive, got (1.0, 0.0)"]),
        (["ldfa_cost", "--fractions", "0"], ["fractions must be in (0, 1]"]),
        (["ldfa_cost", "--target", "42"], ["target must be an accuracy between 0 and 1, got 42"]),
        (["grape_deep", "--periods", "0"], ["periods must be at least 1, got (0,)"]),
        (["grape_resnet20", "--variants", "none"], ["variants must be one of letter, ", "got ('none',)"]),
        (["grape_deep", "--scale", "0"], ["scale must be positive"]),
        (["ssa_networks", "--energy", "0"], ["energy must be in"]),
        (["rank_collapse", "--window", "0"], ["window must be at least 1, got 0"]),
        (["rank_collapse", "--trainings"], ["trainings must name one or more, got none"]),
        (["ssa_networks", "--seed", "-1"], ["seed must be at least 0, got -1"]),
        (["grape_transformer", "--calibrations", "-1"], ["calibrations must be at least 0, got (-1,)"]),
        (["pipeline", "--rounds", "1"], ["rounds must be 0, which leaves timing out, or at least 2, got 1"]),
        (["ldfa_retina", "--ranks", "33"], ["ranks must be from 1 to the cortex's"]),
        (["rank_collapse", "--rate", "0"], ["rate must be positive"]),
        (["conservation", "--steps", "0"], ["steps must be at least 1, got 0"]),
        (["memory", "--timed", "3"], ["timed must be one of (4, 8, 16, 32, 64, 128, 256), got 3"]),
        (["pipeline", "--stages", "3"], ["must divide the 64 layers, got (3,)"]),
        (["steps", "--networks", "vgg"], ["networks must be one of mlp, lenet"]),
    ],
)
def test_unknown_choices_are_refused_with_the_valid_ones(args, messages, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        main(["run", *args])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    for message in messages:
        assert message in captured.out + captured.err


def test_list_names_every_experiment(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in EXPERIMENTS)


def test_all_are_run_one_after_the_other_and_the_next_time_those_that_were_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "write", lambda folder, experiments, name: f"{folder.name}.json")
    seen = []

    def run(name, preset):
        seen.append(name)
        folder = EXPERIMENTS[name].preset(preset).out
        folder.mkdir(parents=True, exist_ok=True)
        if name == "memory" and seen.count(name) == 1:
            return 137  # killed
        (folder / "report.html").touch()
        config = identity(name, EXPERIMENTS[name].presets[preset])
        older = name == "grape_deep" and seen.count(name) == 1  # a preset that has changed since
        records.write_json(folder / "config.json", config | ({"seed": 5} if older else {}))
        records.write_json(folder / "sweep.json", {"arms": [{"name": "fa"}] if "epochs" in config else []})
        (folder / "fa").mkdir(exist_ok=True)
        cut = name == "compare" and seen.count(name) == 1
        records.append(folder / "fa", {"epoch": 0 if cut else config.get("epochs", 0)})
        return 0

    with pytest.raises(FloatingPointError, match=r"compare \(.* 0\), grape_deep \(.* 0\), memory \(.* 137\)"):
        run_all([], run)
    run_all([], run)
    assert seen == [*EXPERIMENTS, "compare", "grape_deep", "memory"]
    assert "compare-cpu.json" in capsys.readouterr().out
    with pytest.raises(ValueError, match="No experiment has the preset 'tpu'"):
        run_all(["--preset", "tpu"], run)


def test_compiled_programs_are_kept_where_nobody_said_otherwise(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(jax, "config", SimpleNamespace(update=told.__setitem__))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs()
    assert told == {"jax_compilation_cache_dir": str(tmp_path / "jaxfa")}
    monkeypatch.setattr(jax, "config", SimpleNamespace(jax_compilation_cache_dir="elsewhere"))
    keep_programs()  # and tells JAX nothing
    assert not starts.Config().keep_programs


_FREE = """
import pathlib, sys, threading
from experiments.common.programs import keep_memory

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

if sys.argv[1] == "kept":
    keep_memory()
before = resident()
# More than any threshold below which memory is kept anyway; in a thread, as XLA allocates; freed at once.
thread = threading.Thread(target=lambda: b"1" * 2**26)
thread.start()
thread.join()
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not GNU's")
def test_a_process_keeps_the_memory_that_it_frees(monkeypatch):
    def kept(how, **told):
        command = [sys.executable, "-c", _FREE, how]
        return int(subprocess.run(command, env=os.environ | told, check=True, capture_output=True, text=True).stdout)

    pages = 2**26 // resource.getpagesize()
    name, value = re.findall(r"^(\w+)=(\S+) python train.py$", (ROOT / "docs/devices.md").read_text(), re.MULTILINE)[0]
    monkeypatch.delenv(name, raising=False)
    assert kept("kept") > 0.9 * pages
    assert kept("as it is", **{name: value}) > 0.9 * pages
    assert kept("as it is") < 0.1 * pages


def test_the_command_line_keeps_its_memory(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(programs, "keep_memory", lambda: called.append(True))
    monkeypatch.setattr(sys, "argv", ["experiments", "list"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(inspect.getfile(main), run_name="__main__")
    assert called
    assert "compare" in capsys.readouterr().out
