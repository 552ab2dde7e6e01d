"""LDFA on the first n classes of CIFAR-100: is it the number of classes that says which rank suffices?

Claim (Hanut and Kadmon 2025): with 50, 75 and 100 classes, accuracy levels off at about rank 50, 75 and 100. They give
it as a figure; we have no numbers of theirs.

Command: ``python -m experiments run ldfa_subsets`` (``--preset paper`` for the published set-up).

The network and the rule are those of ``ldfa_rank_mlp``, all layers' feedback being of low rank; images turn by 5
degrees.

Measured with the preset ``cpu`` (MLP 3072-128-128-128-n, 5000 training images, 8 epochs of 39 steps, 3 seeds; test
accuracy, mean +- std; the angle is that of the first layer's update to backpropagation), in 6 min 30 s on two CPU cores
that others used, too:

===========  ============  ============  =====  ============  ============  =====
.            10 classes    .             .      50 classes    .             .
-----------  ------------  ------------  -----  ------------  ------------  -----
rank         last epoch    best epoch    angle  last epoch    best epoch    angle
===========  ============  ============  =====  ============  ============  =====
bp           57.1 +- 0.0   57.1 +- 0.0   0      22.4 +- 0.6   22.7 +- 0.2   0
2            33.8 +- 1.6   34.5 +- 2.7   76     8.0 +- 1.2    8.5 +- 1.0    76
5            40.8 +- 4.4   42.5 +- 1.5   59     10.1 +- 0.5   10.7 +- 0.4   71
10           54.0 +- 1.0   54.0 +- 1.0   54     13.0 +- 0.6   13.2 +- 0.4   76
50           54.9 +- 0.4   54.9 +- 0.4   52     16.5 +- 0.7   16.6 +- 0.7   73
===========  ============  ============  =====  ============  ============  =====

So 10 classes need about rank 10, and 50 classes more than 10; whether 50 suffice for them 312 steps can't tell, after
which the feedback has hardly aligned. Both stay below backpropagation. The preset ``paper`` has not been run.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import jaxfa
from experiments.common import data, records, sweep
from experiments.ldfa import rank_mlp as ldfa_rank_mlp

DEGREES = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sweep.Config):
    """The classes, the ranks, and for how long."""

    classes: tuple[int, ...] = (50, 75, 100)
    """Numbers of classes to learn, one line of the figure each."""
    ranks: tuple[int, ...] = (5, 10, 25, 50, 75, 100)
    """Ranks of the feedback."""
    width: int = 512
    """Units of a hidden layer."""
    feedback_rate: float = ldfa_rank_mlp.FEEDBACK_RATE
    """The learning rate of P, the projection of the error; it is the best of ldfa_rank_mlp, not tuned here."""
    out: Path = Path("runs/ldfa_subsets")
    """The folder of the results."""

    arms = ("ranks", "classes")

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_empty(self, "ranks")
        if not self.classes or not all(1 < n <= 100 for n in self.classes):
            raise ValueError(f"classes must be numbers from 2 to 100, got {self.classes}.")


PRESETS = {
    "cpu": Config(
        classes=(10, 50), ranks=(2, 5, 10, 50), width=128, epochs=8, images=5000, batch=128, learning_rate=1e-3
    ),
    "paper": Config(epochs=100, batch=32, learning_rate=6e-4, seeds=5, out=Path("runs/ldfa_subsets-paper")),
}
PAGE = sweep.Page(
    "Does the number of classes set the rank?",
    "Low-dimensional feedback in a fully connected network on the first n classes of CIFAR-100. The paper: accuracy "
    "levels off at a rank of about n.",
    "none: the paper gives a figure alone",
)


def run(config: Config) -> Path:
    """Trains every arm and writes the report.

    Args:
      config: a :class:`Config`.

    Returns:
      The path of the report.
    """
    return sweep.run(config, PAGE, list(_arms(config)))


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


def _arms(config: Config) -> Iterator[sweep.Arm]:
    whole = data.load("cifar100", config.data)
    for count in config.classes:
        dataset = sweep.prepare(config, first_classes(whole, count))
        bp = ldfa_rank_mlp.task(config, dataset, width=config.width, degrees=DEGREES)
        group, reference = f"{count} classes", f"bp-{count}"
        yield sweep.Arm(reference, group, None, bp, reference=reference)
        for rank in config.ranks:
            rule = jaxfa.ldfa(rank, learning_rate=config.feedback_rate, weight_decay=0.0)
            yield sweep.Arm(f"{count}-{rank}", group, rank, bp._replace(rule=rule), reference=reference)
