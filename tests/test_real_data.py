"""MNIST itself, where the data pack lies beside the checkout (``../shared/data``); elsewhere nothing here runs.

The pack's own ``unpack.py`` fills the cache, as a user without a network would.
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from experiments.common import data
from tests.methods import METHODS, create, forward, train

PACK = Path(__file__).parents[2] / "shared" / "data" / "unpack.py"

if PACK.exists():

    @pytest.fixture(scope="module")
    def mnist(tmp_path_factory):
        folder = tmp_path_factory.mktemp("cache")
        subprocess.run([sys.executable, str(PACK), str(folder), "--npz", "--only", "mnist"], check=True)
        return data.load("mnist", folder)

    def test_the_pack_is_mnist(mnist):
        assert mnist.train_images.shape == (60000, 28, 28, 1)
        assert mnist.test_images.shape == (10000, 28, 28, 1)
        assert np.bincount(mnist.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

    @pytest.mark.long
    @pytest.mark.parametrize("method", METHODS, ids=str)
    def test_every_rule_learns_mnist_far_above_chance(mnist, method):
        images = (mnist.train_images.reshape(len(mnist.train_images), -1) / 127.5 - 1).astype(np.float32)
        rng = np.random.default_rng(0)
        init, step = train(method.rule, optax.adam(1e-3))
        both = create(method.rule, jax.random.key(0), (784, 64, 64, 10))
        state, step = init(both), jax.jit(step)
        for i in range(400):
            chosen = rng.integers(0, len(images), 64)
            both, state = step(both, state, images[chosen], mnist.train_labels[chosen], jax.random.key(i))
        test = (mnist.test_images.reshape(len(mnist.test_images), -1) / 127.5 - 1).astype(np.float32)
        accuracy = np.mean(np.argmax(forward(both[0], None, test), -1) == mnist.test_labels)
        assert accuracy > 0.6
