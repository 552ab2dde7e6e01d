"""The command line, the comparison of all methods, its report, and a kill at a random moment."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.__main__ import main
from experiments.common import checkpoint, data, records, report, timing
from experiments.common.data import Dataset
from experiments.common.methods import METHODS
from experiments.compare import compare
from experiments.models import networks as models
from experiments.models.networks import MLP, Architecture


@pytest.fixture
def tiny(monkeypatch):
    """Two steps an epoch on mock images, with a network to match."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (48, 4, 4, 1), dtype=np.uint8), rng.integers(0, 3, 48).astype(np.int32)
    mock = Dataset(images[:32], labels[:32], images[32:], labels[32:], 3)
    monkeypatch.setattr(data, "load", lambda name, folder: mock)

    def make(shape, classes, *, rngs):
        return MLP(shape, classes, (5,), rngs=rngs)

    monkeypatch.setitem(models.MODELS, "mlp", Architecture(make, 1))


@pytest.mark.long
def test_every_method_two_steps_and_the_report(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_ROUNDS", 3)
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.001)
    config = compare.Config(epochs=1, batch=16, seeds=2, out=tmp_path / "run")
    page = compare.run(config).read_text()

    for name, method in METHODS.items():
        assert method.title in page
        folder = tmp_path / "run" / name
        last = records.read(folder)[-1]
        assert last["epoch"] == 1
        assert last["step"] == 2
        assert list(last["angle"]) == ["layers/0", "head"]
        assert len(last["test_accuracy"]) == 2
        assert last["angle"]["head"] == [0.0, 0.0]
        assert "layers/0" in (folder / "coverage.txt").read_text()
        assert json.loads((folder / "environment.json").read_text())[0]["jax"]
    times = json.loads((tmp_path / "run" / "timing.json").read_text())
    assert times["steps"].keys() == METHODS.keys()
    assert times["steps"]["bp"]["ratio"] == 1.0
    assert times["environment"]["processor"]

    assert page.count("<svg") == 2 * len(METHODS)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)|<(link|script|img|iframe)\b", page)
    assert report.write(tmp_path / "run").read_text() == page
    assert main(["report", str(tmp_path / "run")]) == 0


def test_validation_split_never_sees_the_test_images(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "Trainer", lambda task, *_: seen.append(task.data) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare.run(compare.Config(split="validation", batch=16, out=tmp_path / "run"))
    (found,) = seen
    np.testing.assert_array_equal(found.test_images, data.load("digits", None).train_images[-3:])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "No command given; choose one of list, run, report, results"),
        (["walk"], "Unknown command 'walk'; choose one of list, run, report, results"),
        (["run"], "No experiment given; choose one of compare"),
        (["run", "contrast"], "Unknown experiment 'contrast'; choose one of compare"),
        (["run", "compare", "--model", "lenet"], "lenet needs images of at least 12 x 12"),
        (["run", "compare", "--batch", "2000"], "batch of 2000 is more than the 1437"),
        (["run", "compare", "--dataset", "mnist", "--data", "/nowhere"], "No cached data set at /nowhere/mnist.npz"),
        (["report", "/nowhere"], "/nowhere holds no run of bp"),
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
        (["--methods", "fa", "hebb"], ["hebb", "kolen_pollack", "weight_mirror"]),
        (["--dataset", "imagenet"], ["imagenet", "fashion_mnist", "cifar100"]),
        (["--model", "vgg"], ["vgg", "convnet", "resnet20"]),
        (["--lerning-rate", "1"], ["lerning-rate", "--learning-rate"]),
        (["--epochs", "0"], ["epochs must be at least 1, got 0"]),
        (["--learning-rate", "-1"], ["learning_rate must be positive, got -1.0"]),
        (["--preset", "gpu"], ["gpu", "cpu", "paper"]),
    ],
)
def test_unknown_choices_are_refused_with_the_valid_ones(args, messages, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "compare", *args])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    for message in messages:
        assert message in captured.out + captured.err


def test_presets_are_configurations_that_fit():
    for config in compare.PRESETS.values():
        shape = (32, 32, 3) if config.dataset.startswith("cifar") else (8, 8, 1)
        assert models.architecture(config.model, shape) is models.MODELS[config.model]


def test_list_names_every_experiment(capsys):
    assert main(["list"]) == 0
    assert "compare" in capsys.readouterr().out


def command(folder: Path) -> list[str]:
    options = ["--methods", "dkp", "--seeds", "1", "--epochs", "25", "--save-every", "1", "--out", str(folder)]
    return [sys.executable, "-m", "experiments", "run", "compare", *options]


@pytest.mark.long
def test_killed_at_a_random_moment_and_resumed_has_the_same_bits(tmp_path):
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    # It saves after every epoch, so that most kills fall into a save.
    run = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = tmp_path / "killed" / "dkp" / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") > 2):
        assert run.poll() is None
        time.sleep(0.01)
    delay = random.SystemRandom().uniform(0, 0.5)
    time.sleep(delay)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    done = len(records.read(tmp_path / "killed" / "dkp"))
    assert done < 26, "the run ended before the kill"
    subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True)

    whole, killed = (
        [{**record, "seconds": 0} for record in records.read(tmp_path / name / "dkp")] for name in ("whole", "killed")
    )
    assert killed == whole, f"killed after {done} records and {delay} s"
    whole, killed = (_arrays(tmp_path / name / "dkp") for name in ("whole", "killed"))
    assert any("feedback" in name for name in whole)
    assert killed == whole, f"killed after {done} records and {delay} s"
    _truncated_arrays_are_refused(tmp_path / "killed")


def _arrays(folder: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint: parameters, feedback, optimizer, keys, step."""
    with checkpoint.checkpoints(folder) as manager:
        found = manager.restore(25, args=ocp.args.StandardRestore())
    return {name: np.asarray(array).tobytes() for name, array in found.items()}


def _truncated_arrays_are_refused(folder: Path) -> None:
    for path in (folder / "dkp" / "checkpoints" / "25").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused = subprocess.run(command(folder), check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "is damaged" in refused.stderr
    assert "Delete that folder" in refused.stderr
