"""LDFA in a VGG-like network on CIFAR-10: accuracy and time against the rank of every convolution's error.

Claim (Hanut and Kadmon 2025): accuracy rises with the rank, and an eighth of the width is too little; a step costs
less. No number could be read from their figure, whose axis starts at 85 %.

Command: ``python -m experiments run ldfa_vgg``; ``--preset paper`` for the published set-up.

The classifier's two layers keep backpropagation, as in the paper's code. Three differences from it: errors are not
clamped to [-1, 1]; ``P`` learns by plain steps, not by Adam; ``P`` starts orthonormal and ``Q`` as its product with
random weights. ``Q`` shares the weights' Adam and L2 penalty, as there.

In the preset ``cpu`` all errors have half the width.

Verdict: half of it. Both factors learned are ahead of both fixed at either rank, and behind backpropagation at either,
in every seed. A higher rank brings more, least where ``P`` learns and ``Q`` does not. At the lower rank it matters most
that ``P`` learns which few directions to carry, more than that ``Q`` learns; at the higher one no more. A ``Q`` that is
rebuilt is behind one that learns. At such widths no step costs less, most likely since products of so few channels fill
no core.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

from flax import nnx

from experiments.common.augment import crop_flip_and_cutout
from experiments.common.experiment import Arm, Experiment, Page, load
from experiments.ldfa.arms import CPU, Varied, bp, by_rank
from experiments.models.networks import Shape
from experiments.models.vgg import VGG

AT, ALLOW = ("blocks/*",), ("classifier", "head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Varied):
    """The network, the ranks, and for how long."""

    ranks: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Ranks of the feedback, as fractions of each layer's width."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each pair of convolutions."""


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation; every variant and fraction of the width."""
    dataset = load(config, "cifar10", config.shrink)
    augment = partial(crop_flip_and_cutout, size=16 // config.shrink)
    plain = bp(config, dataset, partial(network, config.widths), weight_decay=5e-5, decay=0.98, augment=augment)
    yield from by_rank(config, plain, at=AT, allow=ALLOW, axis="fraction of the width")


def network(widths: tuple[int, ...], shape: Shape, classes: int, rngs: nnx.Rngs) -> VGG:
    """Pairs of convolutions of these widths."""
    return VGG(shape, classes, widths=widths, rngs=rngs)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(ranks=(0.125, 0.5), widths=(16, 32, 64), learning_rate=2e-3, **CPU),
        "paper": Config(epochs=200, learning_rate=5e-4, seeds=5),
    },
    Page(
        "How many dimensions does a convolution's error need?",
        "Hanut and Kadmon 2025, best epoch of 200 or more, widths 64 to 512, all 50,000 images",
    ),
    arms,
)
