"""LDFA on the first n classes of CIFAR-100: is it the number of classes that says which rank suffices?

Claim (Hanut and Kadmon 2025): with 50, 75 and 100 classes, accuracy levels off at about rank 50, 75 and 100. They give
it as a figure; we have no numbers of theirs.

Command: ``python -m experiments run ldfa_subsets``, 7 minutes; ``--preset paper`` for the published set-up.

The network and the rule are those of ``ldfa_rank_mlp``, all layers' feedback being of low rank; images turn by 5
degrees.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from experiments.common import data
from experiments.common.experiment import Arm, Experiment, Page, prepare
from experiments.ldfa.arms import VariantName, Varied, by_rank, mlp

DEGREES = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Varied):
    """The classes, the ranks, and for how long."""

    classes: tuple[int, ...] = (50, 75, 100)
    """Numbers of classes to learn, one line of the figure each."""
    ranks: tuple[float, ...] = (5, 10, 25, 50, 75, 100)
    """Ranks of the feedback."""
    variants: tuple[VariantName, ...] = ("both",)
    """How P and Q learn."""
    width: int = 512
    """Units of a hidden layer."""

    arms = (*Varied.arms, "classes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.classes or not all(1 < n <= 100 for n in self.classes):
            raise ValueError(f"classes must be numbers from 2 to 100, got {self.classes}.")


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation and every rank, on each number of classes."""
    whole = data.shrink(data.load("cifar100", config.data), config.shrink)
    for count in config.classes:
        bp = mlp(config, prepare(config, first_classes(whole, count)), width=config.width, degrees=DEGREES)
        yield from by_rank(config, bp, group=f"{count} classes")


def first_classes(dataset: data.Dataset, count: int) -> data.Dataset:
    """The part of a data set with the labels below ``count``, in the same order."""
    train, test = (np.flatnonzero(labels < count) for labels in (dataset.train_labels, dataset.test_labels))
    return dataset._replace(
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train],
        test_images=dataset.test_images[test],
        test_labels=dataset.test_labels[test],
        classes=count,
    )


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            classes=(10, 50), ranks=(2, 5, 10, 50), width=128, epochs=8, images=5000, batch=128, learning_rate=1e-3
        ),
        "paper": Config(epochs=100, batch=32, learning_rate=6e-4, seeds=5),
    },
    Page(
        "Does the number of classes set the rank?",
        "Low-dimensional feedback in a fully connected network on the first n classes of CIFAR-100. The paper: "
        "accuracy levels off at a rank of about n.",
        "none: the paper gives a figure alone",
    ),
    arms,
)
