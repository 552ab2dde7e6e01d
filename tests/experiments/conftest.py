"""What the tests of the experiments share: tiny data in the place of all data sets, timed hardly at all."""

import lzma

import numpy as np
import pytest

from experiments.common import data, timing
from experiments.common.data import Dataset


@pytest.fixture
def mock(monkeypatch):
    """Colour images of 8 x 8 pixels and three classes in the place of every data set; two steps an epoch."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 60).astype(np.int32)
    found = Dataset(images[:40], labels[:40], images[40:], labels[40:], 3)
    monkeypatch.setattr(data, "load", lambda name, folder=None: found)
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.001)
    return found


@pytest.fixture
def play(tmp_path, monkeypatch):
    """A short text in the place of Shakespeare's, and the folder that it lies in."""
    content = "To be, or not to be:\nthat is the question.\n" * 12
    (tmp_path / "tinyshakespeare.txt.xz").write_bytes(lzma.compress(content.encode()))
    monkeypatch.setattr(timing, "_ROUNDS", 2)
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 0.001)
    return tmp_path
