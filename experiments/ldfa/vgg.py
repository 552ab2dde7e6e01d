"""LDFA in a convolutional network on CIFAR-10: accuracy and time against the rank of every convolution's error.

Claim (Hanut and Kadmon 2025): accuracy rises with the rank; where ``P`` learns too, it is ahead of ``Q`` alone behind a
random ``P``, and at rank 32 as good as backpropagation; an eighth of the width is too little; a step costs less.

Command: ``python -m experiments run ldfa_vgg``, 13 minutes; ``--preset paper`` for the published set-up.

The classifier's two layers keep backpropagation, as in the paper's code. Three differences from it: errors are not
clamped to [-1, 1]; ``P`` learns by plain steps, not by Adam; ``P`` starts orthonormal and ``Q`` as its product with
random weights. ``Q`` shares the weights' Adam and L2 penalty, as there.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jaxfa
from experiments.common.augment import crop_flip_and_cutout
from experiments.common.experiment import Arm, Experiment, Page, load
from experiments.common.optimizers import adam
from experiments.common.task import Task
from experiments.ldfa.arms import Config as LowRank
from experiments.ldfa.arms import by_rank, low_rank
from experiments.models.vgg import VGG

AT, ALLOW = ("blocks/*",), ("classifier", "head")
PUBLISHED_BP = 84.3
PUBLISHED: dict[str, dict[float, float]] = {
    "Q": {1: 67.7, 4: 75.2, 8: 78.2, 16: 80.0, 32: 82.1},
    "PQ": {1: 71.6, 4: 76.7, 8: 81.0, 16: 83.3, 32: 84.1},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LowRank):
    """The network, the ranks, and for how long."""

    ranks: tuple[int, ...] = (1, 4, 8, 16, 32)
    """Ranks of the feedback, the same for every layer."""
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Ranks as fractions of each layer's width."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each pair of convolutions."""

    arms = ("ranks", "fractions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks and not self.fractions:
            raise ValueError("ranks and fractions must name one rank or more, got none.")


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation; every rank and fraction of the width."""
    bp = _task(config)
    yield Arm("bp", "Backpropagation", None, bp, PUBLISHED_BP)
    for name, title, learn_p in (("Q", "Q learned", False), ("PQ", "P and Q learned", True)):
        rules = {rank: low_rank(rank, config.feedback_rate, learn_p=learn_p) for rank in config.ranks}
        yield from by_rank(name, title, rules, bp, published=PUBLISHED[name], at=AT, allow=ALLOW)
    shares = {fraction: low_rank(fraction, config.feedback_rate) for fraction in config.fractions}
    title, axis = "P and Q learned, by width", "fraction of the width"
    yield from by_rank("width", title, shares, bp, at=AT, allow=ALLOW, axis=axis)


def _task(config: Config) -> Task:
    dataset = load(config, "cifar10")
    shape, classes = dataset.train_images.shape[1:], dataset.classes
    steps = len(dataset.train_labels) // config.batch
    return Task(
        make=lambda rngs: VGG(shape, classes, widths=config.widths, rngs=rngs),
        rule=jaxfa.backprop(),
        optimizer=adam(config.learning_rate, weight_decay=5e-5, decay=0.98, steps=steps),
        data=dataset,
        batch=config.batch,
        augment=partial(crop_flip_and_cutout, size=16),
    )


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        # One seed: on a CPU, XLA runs the convolutions of several seeds at once many times slower.
        "cpu": Config(
            ranks=(1, 4, 16),
            fractions=(0.125, 0.5),
            widths=(8, 16, 32, 64),
            epochs=6,
            images=5000,
            test_images=2000,
            learning_rate=2e-3,
            seeds=1,
        ),
        "paper": Config(epochs=200, learning_rate=5e-4, seeds=5),
    },
    Page(
        "How many dimensions does a convolution's error need?",
        "Low-dimensional feedback in a VGG-like network on CIFAR-10. The paper: accuracy rises with the rank, a "
        "learned P is ahead of a random one, and an eighth of each layer's width is too little.",
        "Hanut and Kadmon 2025, best epoch of 200 or more, widths 64 to 512, all 50,000 images",
    ),
    arms,
)
