"""LDFA in the authors' small convolutional network on grey CIFAR-10, where every layer's error is of low rank.

Claim (Hanut and Kadmon 2025): accuracy rises with the rank; where ``P`` learns, too, it is ahead of ``Q`` alone behind
a random ``P``, and as good as backpropagation at the full rank, 32.

Command: ``python -m experiments run ldfa_cnn``; ``--preset paper`` for the published network.

Five 9x9 convolutions of 32 channels and two fully connected layers, no normalisation, no pooling: also the network of
``ldfa_retina``. Its optimizer and epochs are ours, those of the published figure being unknown. Three differences from
the authors' code: errors are not clamped to [-1, 1]; ``P`` learns by plain steps, not by Adam; ``P`` starts orthonormal
and ``Q`` as its product with random weights. The preset ``cpu`` halves images and channels, its kernels are 5x5.

Without normalisation errors through random weights make the activations of this network grow, at full rank, too: by
Adam, at every rate tried, plain feedback alignment's loss rises to many times that of guessing, and low-rank feedback's
with it, since Adam's steps of ``Q`` are not its steps of the weights. So the optimizer here is momentum SGD, by whose
steps ``Q`` comes to the weights as fast as both decay. Rate, decay and the largest gradient norm were chosen on the
validation split, in part for another decay at rank 4, which learned there and not here.

Verdict: half of it. At full rank both factors learned and ``Q`` alone are level, and ahead of all others, though behind
backpropagation. Nothing is shown of low rank: there all variants learn for some epochs and then fall towards chance,
fixed factors first, so that it is no ``Q`` that follows too slowly; most likely steps along the same few directions
make activations grow, which nothing normalises.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import optax
from flax import nnx

from experiments.common import data, experiment
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Arm, Experiment, Page, prepare
from experiments.common.task import Task
from experiments.ldfa.arms import CPU, Varied, bp, by_rank
from experiments.models.retina import Retina

PUBLISHED: dict[str, dict[float, float]] = {
    "bp": {0: 84.3},
    "hebbian": {1: 67.7, 4: 75.2, 8: 78.2, 16: 80.0, 32: 82.1},
    "both": {1: 71.6, 4: 76.7, 8: 81.0, 16: 83.3, 32: 84.1},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network(experiment.Config):
    """The network and its images."""

    retina: tuple[int, ...] = (32, 32)
    """The channels of the first convolutions, which model the retina."""
    cortex: tuple[int, ...] = (32, 32, 32)
    """The channels of the others, which model the cortex."""
    hidden: int = 1024
    """Units of the first fully connected layer."""
    window: int = 9
    """The side of every kernel, in pixels."""
    shrink: int = 1
    """The side of the squares of pixels that are averaged."""

    def grey(self) -> data.Dataset:
        """The images: grey, shrunk, on the device."""
        found = data.load("cifar10", self.data)
        light = [
            np.round(images @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.uint8)[..., None]
            for images in (found.train_images, found.test_images)
        ]
        found = found._replace(train_images=light[0], test_images=light[1], augmented=False)
        return prepare(self, data.shrink(found, self.shrink))

    def network(self, dataset: data.Dataset, rngs: nnx.Rngs) -> Retina:
        """The network that fits these images."""
        sizes = {name: getattr(self, name) for name in ("retina", "cortex", "hidden", "window")}
        return Retina(dataset.train_images.shape[1], dataset.classes, **sizes, rngs=rngs)

    def task(self, dataset: data.Dataset) -> Task:
        """Its training by backpropagation."""
        return bp(self, dataset, lambda *given: self.network(dataset, given[-1]), weight_decay=5e-5, decay=0.975)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Varied, Network):
    """The network, the ranks, and for how long."""

    ranks: tuple[float, ...] = (1, 4, 8, 16, 32)
    """Ranks of the feedback, the same for every layer."""
    learning_rate: float = 0.02
    """The learning rate of SGD with momentum .9."""
    weight_decay: Annotated[float, FROM_ZERO] = 0.015
    """The L2 penalty, of Q as of the weights."""


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation; every variant and rank."""
    decay, steps = optax.add_decayed_weights(config.weight_decay), optax.sgd(config.learning_rate, momentum=0.9)
    plain = config.task(config.grey())._replace(optimizer=optax.chain(optax.clip_by_global_norm(1.0), decay, steps))
    yield from by_rank(config, plain, published=PUBLISHED)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            ranks=(4, 16),
            retina=(16, 16),
            cortex=(16, 16, 16),
            hidden=128,
            window=5,
            **CPU,
        ),
        "paper": Config(epochs=100, seeds=5),
    },
    Page(
        "How many dimensions does the error of a small convolutional network need?",
        "Hanut and Kadmon 2025, five 9x9 convolutions of 32 channels, grey CIFAR-10, read from a figure",
    ),
    arms,
    size=("retina", "cortex", "hidden", "window", "shrink"),
)
