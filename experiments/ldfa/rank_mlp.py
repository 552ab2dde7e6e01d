"""LDFA, accuracy against the rank of the error in a fully connected network on CIFAR-10, and which factor must learn.

Claim (Hanut and Kadmon 2025): accuracy rises with the rank of one layer's feedback, or of all, and reaches
backpropagation's at about the number of classes; a network as narrow as the error is far worse; where P learns by Oja's
rule, Q may stay random.

Command: ``python -m experiments run ldfa_rank_mlp``; ``--preset direct`` for which factor must learn at rank 4 where
the error comes directly; ``--preset gpu15`` for the published width and all images on one H100 in a quarter of an hour,
``--preset hours`` for two ranks at that width, in hours of one core, ``--preset paper`` for the published set-up.

``B1``, ``B2`` and ``B3`` carry the error to the first, second and third hidden layer, past the weights of the next one:
each alone is of low rank. As in the authors' code the feedback of all other layers is learned, too, of full rank, and
the last layer's ``P`` learns from the labels; in ``B3-exact`` the others are the weights' transpose. The direct rule
takes the error at the last hidden layer, at the output, or in the middle: the second hidden layer, whose error then
goes straight to the first. Differences from the authors' code: errors are not clamped to [-1, 1]; ``P`` learns by plain
steps, not by Adam; ``P`` starts orthonormal and ``Q`` as its product with random weights; images are normalised by the
moments of the training images used; in the direct rule the error at the last hidden layer comes through the head's
weights, theirs through a learned ``Q P`` of full rank, and their ``P`` learns from errors of which every unit has
deviation 1. ``Q`` shares the weights' Adam and L2 penalty, as there.

The preset ``direct`` asks which factor must learn where the error comes directly, from two sources, and what a
structure costs: units in a row whose ``P`` and ``Q`` reach neighbours alone, at first or for good, or by the
same weights everywhere, a convolution. There is no direct ``Q`` by reconstruction: it rebuilds one linear layer's input
from its output, and between a layer and a distant source lie others that are not linear. The factors of a convolutional
network's feedback, as in ``ldfa_cnn``, are convolutions themselves.

``--classes`` asks whether it is the number of classes that says which rank suffices, on the first so many of CIFAR-100,
whose images turn by 5 degrees; presets ``classes`` and ``classes-paper``. With 50, 75 and 100 classes the paper's
accuracy levels off at about rank 50, 75 and 100, in a figure without numbers.

Verdict: holds for the direct rule from the last hidden layer at this size: at the rank of the number of classes it is
level with backpropagation, as is the head's alone, all other errors being exact; at lower ranks both are behind. Where
all other feedback is learned, too, one layer's low rank leaves the network behind at that rank, by more than the error
in two of three layers. From the middle it is behind by hardly more than the error, from the output by more. Behind,
too, is the layer-wise rule at that rank: by little on CIFAR-10, by more with as many classes of CIFAR-100, where a
higher rank brings no more than the error, so that it is not rank that is missing, but most likely time: the feedback is
still turning to the weights when training ends. With more classes accuracy rises on beyond ten. A network as narrow as
the error is far worse. At the rank of the number of classes, behind a ``P`` that learns, a random ``Q`` is level with
one that learns; where ``P`` is fixed, learning ``Q`` helps no more than the error. Below that rank, directly from the
last hidden layer, neither which factor learns nor a structure makes a difference beyond the error; from the output a
``P`` that learns is far behind one that does not, most likely since all layers then follow the same few classes.
Otherwise at the published width, on all images, in an eighth of the epochs and at the rank of the number of classes:
low rank in the last layer's feedback alone is level with backpropagation, and far behind at rank one; in that of all
layers it is behind by more than the error, further if it comes directly, or if ``Q`` is random; where ``P`` is fixed it
is far behind, whether ``Q`` learns or not, as is a network as narrow as the error.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal, get_args

import numpy as np

import jaxfa
from experiments.common import data
from experiments.common.bounds import between
from experiments.common.experiment import Arm, Experiment, Page, load, prepare
from experiments.ldfa import arms as ldfa
from experiments.ldfa.arms import Variant, by_rank, low_rank, mlp
from jaxfa.rules import topographic

FactorName = Literal[
    "direct-hebbian", "direct-fixed", "direct-drawn", "direct-topographic", "direct-convolutional",
    "direct-output-local", "direct-output-hebbian", "direct-output-fixed",
]  # fmt: skip
GroupName = Literal[
    "B1", "B2", "B3", "B3-exact", "both", "local", "hebbian", "rebuilt", "fixed", "normative",
    "direct", "direct-local", "direct-output", "direct-middle", FactorName,
]  # fmt: skip
CLASSES = 10
FEW = CLASSES - 1  # a P of as many columns as there are classes spans all of the output, learned or not
REACH = 0.25  # of a row of units that lies along a circle, to either side
PAPER: dict[str, Any] = {"batch": 32, "learning_rate": 6e-4, "seeds": 5}
SMALL: dict[str, Any] = {"shrink": 2, "width": 128, "narrow": 10, "epochs": 8, "images": 8000, "batch": 128}
PUBLISHED_BP, PUBLISHED_NARROW = 62.76, {64: 58.1}
PUBLISHED: dict[str, dict[float, float]] = {
    "B1": {1: 55.8, 2: 59.0, 3: 59.9, 4: 60.5, 5: 61.0, 6: 61.1, 7: 61.7, 8: 62.0, 10: 62.6, 16: 62.8, 32: 62.8},
    "B2": {1: 53.9, 2: 57.3, 3: 58.6, 4: 59.6, 5: 60.2, 6: 61.0, 7: 61.2, 8: 61.7, 10: 62.4, 16: 62.6, 32: 62.8},
    "B3": {1: 47.3, 2: 54.1, 3: 56.9, 4: 58.7, 5: 59.8, 6: 60.9, 7: 61.5, 8: 62.3, 10: 62.9},
    "both": {10: 61.8, 16: 62.1, 32: 62.4, 64: 62.9},
    "direct": {1: 35.9, 2: 49.2, 3: 54.7, 4: 57.3, 5: 58.8, 6: 59.8, 7: 60.3, 8: 61.4, 9: 62.0, 10: 62.1},
    "bp": {0: PUBLISHED_BP},
}


def _only(layer: str, rank: int, rate: float) -> jaxfa.Rule:
    """One layer's feedback of low rank, the others' of full rank, as in the authors' code."""
    return low_rank({layer: rank, "*": 1.0}, rate, labels="head")


def _direct(source: str | None, rank: int, rate: float, **options: Any) -> jaxfa.Rule:
    return jaxfa.dldfa(rank, source=source, learning_rate=rate, weight_decay=0.0, **options)


FIXED: dict[str, Any] = {"learn_p": False, "learn_q": False}
NEAR: dict[str, Any] = dict.fromkeys(("projection", "distribution"), topographic(REACH))
SAME: dict[str, Any] = FIXED | dict.fromkeys(NEAR, topographic(REACH, shared=True))
LAST, OUTPUT = "Direct, from the last hidden layer", "Direct, from the output"
VARIANTS = ldfa.VARIANTS | {
    "B1": Variant("B1 only", partial(_only, "layers/1")),
    "B2": Variant("B2 only", partial(_only, "layers/2")),
    "B3": Variant("B3 only", partial(_only, "head"), most=CLASSES),
    "B3-exact": Variant("B3 only, others exact", low_rank, at=("head",), allow=("*",), most=CLASSES),
    "direct": Variant(LAST, partial(_direct, "head")),
    "direct-local": Variant(f"{LAST}, Q fixed", partial(_direct, "head", learn_q=False)),
    "direct-output": Variant(OUTPUT, partial(_direct, None), most=CLASSES),
    "direct-middle": Variant("Direct, from the middle", partial(_direct, "layers/2")),
    "direct-hebbian": Variant(f"{LAST}, P fixed", partial(_direct, "head", learn_p=False)),
    "direct-fixed": Variant(f"{LAST}, both fixed", partial(_direct, "head", **FIXED)),
    "direct-drawn": Variant(f"{LAST}, topographic at first", partial(_direct, "head", **NEAR)),
    "direct-topographic": Variant(f"{LAST}, topographic", partial(_direct, "head", structured=True, **NEAR)),
    "direct-convolutional": Variant(f"{LAST}, a fixed convolution", partial(_direct, "head", **SAME)),
    "direct-output-local": Variant(f"{OUTPUT}, Q fixed", partial(_direct, None, learn_q=False), most=FEW),
    "direct-output-hebbian": Variant(f"{OUTPUT}, P fixed", partial(_direct, None, learn_p=False), most=FEW),
    "direct-output-fixed": Variant(f"{OUTPUT}, both fixed", partial(_direct, None, **FIXED), most=FEW),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ldfa.Config):
    """The network, the ranks, and for how long."""

    ranks: tuple[float, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 32, 64)
    """Ranks of the feedback; B3's and the output's go up to the number of classes."""
    variants: tuple[GroupName, ...] = get_args(GroupName)
    """How P and Q learn, the layers whose feedback is of low rank, or how the error reaches them."""
    width: int = 512
    """Units of a hidden layer."""
    narrow: int = 64
    """Units of a hidden layer in the narrow network."""
    classes: Annotated[tuple[int, ...], between(2, 100)] = ()
    """The numbers of classes of CIFAR-100 to learn in the place of CIFAR-10, a line of the figure each."""

    arms = (*ldfa.Config.arms, "classes")

    def unread(self) -> tuple[str, ...]:
        """Subsets of classes are learned by no narrow network."""
        return (*super().unread(), *(("narrow",) if self.classes else ()))


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation, in a narrow network, too; every group at every rank. Or these on each number of classes."""
    if config.classes:
        whole = data.shrink(data.load("cifar100", config.data), config.shrink)
        for count in config.classes:
            some = mlp(config, prepare(config, first_classes(whole, count)), width=config.width, degrees=5.0)
            yield from by_rank(config, some, variants=VARIANTS, group=f"{count} classes")
        return
    plain, narrow = (
        mlp(config, load(config, "cifar10", config.shrink), width=width, degrees=10.0)
        for width in (config.width, config.narrow)
    )
    yield from by_rank(config, plain, variants=VARIANTS, published=PUBLISHED)
    title = f"A network {config.narrow} units wide"
    yield Arm("narrow", title, None, narrow, PUBLISHED_NARROW.get(config.narrow))


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
            ranks=(1, 4, 10),
            variants=tuple(name for name in get_args(GroupName) if name not in ("normative", *get_args(FactorName))),
            **SMALL,
        ),
        "direct": Config(
            ranks=(4,), variants=("direct", "direct-local", "direct-output", *get_args(FactorName)), **SMALL
        ),
        # The published width and all images, as many epochs as fit some hours of one core.
        "hours": Config(
            ranks=(1, 10),
            variants=("both", "local", "hebbian", "fixed", "B3", "direct"),
            narrow=10,
            epochs=20,
            batch=128,
            save_every=1,
        ),
        # 17 arms, one a core; a step of such small products is launches, .3 to .4 ms on an H100, where a ResNet-20's
        # takes 3.8: some 3 s for an epoch of all arms, 3 minutes for all epochs, and 2 to 3 of compiling, all at once.
        "gpu15": Config(
            ranks=(1, 4, 10),
            variants=("B1", "B2", "B3", "both", "direct"),
            epochs=60,
            batch=128,
            apart=True,
            save_every=1,
            minutes=10.0,
        ),
        "paper": Config(epochs=160, **PAPER),
        "classes": Config(
            classes=(10, 50), ranks=(2, 5, 10, 50), variants=("both",), width=128, epochs=8, images=5000, batch=128
        ),
        "classes-paper": Config(
            classes=(50, 75, 100), ranks=(5, 10, 25, 50, 75, 100), variants=("both",), epochs=100, **PAPER
        ),
    },
    Page(
        "How many dimensions does an error need?",
        "Hanut and Kadmon 2025, best epoch of 160, width 512, all 50,000 images",
    ),
    arms,
    size=("width", "shrink"),
)
