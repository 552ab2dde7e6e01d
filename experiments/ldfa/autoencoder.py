"""LDFA where the output has many dimensions: an autoencoder of MNIST, light or dark for every pixel.

Claim (ours; Hanut and Kadmon 2025 leave such outputs open): the rank that suffices follows the dimension of the error,
here that of the digits' own variation and not of ten classes.

Command: ``python -m experiments run ldfa_autoencoder``, 6 minutes.

Accuracy is over pixels, 14 x 14 of them, binary at half the brightness; to call all dark is right for most. The narrow
layer has ``hidden[1]`` units, which bounds what any rank can carry past it.

Verdict: holds. A rank of the number of classes falls short of backpropagation; a higher one comes close.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from experiments.common import data
from experiments.common.experiment import Arm, Experiment, Page, load
from experiments.ldfa.arms import Varied, bp, by_rank
from experiments.models.autoencoder import Autoencoder
from experiments.models.networks import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Varied):
    """The network, the ranks, and for how long."""

    hidden: tuple[int, ...] = (128, 32, 128)
    """Units of the hidden layers."""


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation; every variant and rank."""
    dataset = pixels(load(config, "mnist", config.shrink))

    def make(shape: Shape, classes: int, rngs: nnx.Rngs) -> Autoencoder:
        return Autoencoder(shape, config.hidden, rngs=rngs)

    yield from by_rank(config, bp(config, dataset, make, weight_decay=0.0, decay=0.95))


def pixels(dataset: data.Dataset) -> data.Dataset:
    """The images, every pixel labelled 1 where it is light."""

    def light(images: Any) -> Any:
        return (images.reshape(len(images), -1) > 127).astype(jnp.int32)

    labels = {"train_labels": light(dataset.train_images), "test_labels": light(dataset.test_images)}
    return dataset._replace(**labels, classes=2)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            ranks=(2, 10, 32),
            variants=("both",),
            shrink=2,
            epochs=8,
            images=10_000,
            test_images=2000,
            batch=100,
            learning_rate=2e-3,
        ),
        "full": Config(ranks=(1, 2, 4, 10, 32, 64, 128), hidden=(512, 64, 512), epochs=40),
    },
    Page("How many dimensions does the error of an image need?"),
    arms,
)
