"""LDFA, accuracy against the rank of the error in a fully connected network on CIFAR-10.

Claim (Hanut and Kadmon 2025): accuracy rises with the rank of one layer's feedback, or of all, and reaches
backpropagation's at about the number of classes; a network as narrow as the error is far worse.

Command: ``python -m experiments run ldfa_rank_mlp``, 14 minutes; ``--preset paper`` for the published set-up.

``B1``, ``B2`` and ``B3`` carry the error to the first, second and third hidden layer, past the weights of the next one:
each alone is of low rank, all other errors return by backpropagation. Then all three, and the direct rule, whose error
is taken at the last hidden layer. Five differences from the paper's code: errors are not clamped to [-1, 1]; ``P``
learns by plain steps, not by Adam; the last layer's ``P`` learns from the error, as in the paper's equation, not from
the labels; ``P`` starts orthonormal and ``Q`` as its product with random weights; images are normalised by the moments
of the training images used. ``Q`` shares the weights' Adam and L2 penalty, as there.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jaxfa
from experiments.common import records
from experiments.common.experiment import Arm, Experiment, Page, load
from experiments.ldfa.arms import Config as LowRank
from experiments.ldfa.arms import by_rank, low_rank, mlp

GroupName = Literal["B1", "B2", "B3", "all", "direct", "fixed"]


class Group(NamedTuple):
    """Arms that differ in their rank alone.

    Attributes:
      title: how the report calls them.
      at: the layers whose feedback is of low rank; None for all.
      published: the published accuracy by rank.
    """

    title: str
    at: tuple[str, ...] | None
    published: dict[int, float]


DEGREES = 10.0
PUBLISHED_BP = 62.76
PUBLISHED_NARROW = {64: 58.1}
GROUPS: dict[GroupName, Group] = {
    "B1": Group(
        "B1 only",
        ("layers/1",),
        {1: 55.8, 2: 59.0, 3: 59.9, 4: 60.5, 5: 61.0, 6: 61.1, 7: 61.7, 8: 62.0, 10: 62.6, 16: 62.8, 32: 62.8},
    ),
    "B2": Group(
        "B2 only",
        ("layers/2",),
        {1: 53.9, 2: 57.3, 3: 58.6, 4: 59.6, 5: 60.2, 6: 61.0, 7: 61.2, 8: 61.7, 10: 62.4, 16: 62.6, 32: 62.8},
    ),
    "B3": Group(
        "B3 only",
        ("head",),
        {1: 47.3, 2: 54.1, 3: 56.9, 4: 58.7, 5: 59.8, 6: 60.9, 7: 61.5, 8: 62.3, 10: 62.9},
    ),
    "all": Group("All layers", None, {10: 61.8, 16: 62.1, 32: 62.4, 64: 62.9}),
    "direct": Group(
        "Direct",
        None,
        {1: 35.9, 2: 49.2, 3: 54.7, 4: 57.3, 5: 58.8, 6: 59.8, 7: 60.3, 8: 61.4, 9: 62.0, 10: 62.1},
    ),
    "fixed": Group("All layers, fixed", None, {}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LowRank):
    """The network, the ranks, and for how long."""

    ranks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 32, 64)
    """Ranks of the feedback; B3's go up to the number of classes."""
    groups: tuple[GroupName, ...] = tuple(GROUPS)
    """The layers whose feedback is of low rank, or how it reaches them."""
    width: int = 512
    """Units of a hidden layer."""
    narrow: int = 64
    """Units of a hidden layer in the narrow network."""

    arms = ("ranks", "groups")

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_empty(self, "ranks", "groups")

    def unread(self) -> tuple[str, ...]:
        """Fixed feedback learns at no rate."""
        return (*super().unread(), *(("feedback_rate",) if set(self.groups) == {"fixed"} else ()))


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation, in a narrow network, too; every group at every rank."""
    dataset = load(config, "cifar10")
    bp = mlp(config, dataset, width=config.width, degrees=DEGREES)
    yield Arm("bp", "Backpropagation", None, bp, PUBLISHED_BP)
    narrow = mlp(config, dataset, width=config.narrow, degrees=DEGREES)
    published = PUBLISHED_NARROW.get(config.narrow)
    yield Arm("narrow", f"Backpropagation, width {config.narrow}", None, narrow, published)
    for name in config.groups:
        group = GROUPS[name]
        rules = {rank: _rule(config, name, rank) for rank in config.ranks if name != "B3" or rank <= dataset.classes}
        # Where one layer's feedback is of low rank, the others keep the weights' transpose.
        yield from by_rank(
            name, group.title, rules, bp, published=group.published, at=group.at, allow=("*",) if group.at else ()
        )


def _rule(config: Config, name: GroupName, rank: int) -> jaxfa.Rule:
    if name == "direct":
        return jaxfa.dldfa(rank, source="head", learning_rate=config.feedback_rate, weight_decay=0.0)
    if name == "fixed":
        return jaxfa.ldfa(rank, learn_p=False, learn_q=False)
    return low_rank(rank, config.feedback_rate)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(
            ranks=(1, 4, 10), width=128, narrow=10, epochs=8, images=8000, batch=128, learning_rate=1e-3, seeds=3
        ),
        "paper": Config(epochs=160, batch=32, learning_rate=6e-4, seeds=5),
    },
    Page(
        "How many dimensions does an error need?",
        "Low-dimensional feedback in a fully connected network on CIFAR-10. The paper: accuracy rises with the rank "
        "of the error and reaches backpropagation's at about the number of classes, 10; a network that narrow is far "
        "worse.",
        "Hanut and Kadmon 2025, best epoch of 160, width 512, all 50,000 images",
    ),
    arms,
)
