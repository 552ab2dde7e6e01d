"""A training of a small network on images drawn at random."""

import numpy as np
import optax

import jaxfa
from experiments.common.data import Dataset
from experiments.common.task import Task
from experiments.models.networks import MLP


def mock(classes=4):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 4, 4, 1), dtype=np.uint8), rng.integers(0, classes, 80).astype(np.int32)
    return Dataset(images[:64], labels[:64], images[64:], labels[64:], classes)


def task(rule=None, tx=None, **options):
    def make(rngs):
        return MLP((4, 4, 1), 4, (6, 5), rngs=rngs)

    return Task(make, rule or jaxfa.fa(), tx or optax.sgd(0.1), mock(), 16, **options)
