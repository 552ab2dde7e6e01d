"""A preset for a GPU, by its command: every arm in a process of its own, killed on the way, and gone on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.common import records, rows

ROOT = Path(__file__).parents[2]
EPOCHS = 40
SMALL = ["--variants", "B3", "--ranks", "2", "--width", "4", "--narrow", "4", "--batch", "16", "--epochs", str(EPOCHS)]
DEADLINE = 600


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command on images that are noise, three arms of one seed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 8, 8, 3), np.uint8), rng.integers(0, 10, 64)
    arrays = {"train_images": images[:48], "train_labels": labels[:48]}
    np.savez(tmp_path / "cifar10.npz", **arrays, test_images=images[48:], test_labels=labels[48:])
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--seeds", "1", "--save-every", "2"]
    return [sys.executable, "-m", "experiments", "run", "ldfa_rank_mlp", "--preset", "gpu15", *SMALL, *where]


def courses(folder):
    return {path.parent.name: [one["epoch"] for one in records.read(path.parent)] for path in folder.glob("*/*.jsonl")}


@pytest.mark.long
@pytest.mark.parametrize("cut", ["the machine", "the command"])
def test_arms_that_train_apart_go_on_after_a_cut(cut, command, tmp_path):
    folder, end = tmp_path / "run", time.monotonic() + DEADLINE
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not any(epochs and epochs[-1] >= 4 for epochs in courses(folder).values()):
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    if cut == "the machine":
        os.killpg(first.pid, signal.SIGKILL)
    else:
        first.terminate()
    assert first.wait(60) in (-signal.SIGKILL, 128 + signal.SIGTERM)
    left, before = rows.unfinished(folder), courses(folder)
    assert left
    time.sleep(1)
    assert courses(folder) == before  # no arm's process was left behind
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE)
    assert rows.unfinished(folder) == []
    assert courses(folder) == {name: list(range(EPOCHS + 1)) for name in ("bp", "B3-2", "narrow")}
    assert all(sentence.split()[0] in ("bp", "B3-2", "narrow") for sentence in left)
    assert (folder / "report.html").exists()
