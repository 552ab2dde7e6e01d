"""The comparison of all methods: which there are, that tuning never sees a test image, a kill at a random moment."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.common import checkpoint, data, records
from experiments.common.methods import METHODS
from experiments.compare.compare import EXPERIMENT, Config, arms
from experiments.models import networks
from tests import methods

# What the tests call them where that is not what the comparison does, and what is one more option of the same rule.
NAMES = {"backprop": "bp", "dfa_shared": "shared_dfa", "ldfa_fixed": "ldfa"}
NAMES |= {"local_classifier_fixed": "local_classifier", "pepita_mirrored": "mirrored_pepita"}
NAMES["dfa_hashed"] = "shared_dfa"


def test_every_rule_of_the_table_of_tests_is_compared():
    found = {name: METHODS[name].rule() for name in METHODS}
    for row in methods.METHODS:
        name = NAMES.get(row.name, row.name)
        assert found[name].init.__qualname__ == row.rule.init.__qualname__, name
    assert [arm.name for arm in arms(Config(images=20))] == list(METHODS)


def test_an_unknown_method_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"methods must be one of bp, fa, .*, got \('hebb',\)"):
        Config(methods=("hebb",))


def test_the_validation_split_holds_no_test_image(mock):
    for arm in arms(Config(split="validation", images=None)):
        np.testing.assert_array_equal(arm.task.data.test_images, data.load("digits", None).train_images[-4:])


def test_presets_are_configurations_that_fit():
    for config in EXPERIMENT.presets.values():
        shape = (32, 32, 3) if config.dataset.startswith("cifar") else (8, 8, 1)
        assert networks.architecture(config.model, shape) is networks.MODELS[config.model]


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
