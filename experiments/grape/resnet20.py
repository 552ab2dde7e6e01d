"""ResNet-20 without one true gradient: fixed and learned direct feedback, to the letter, ours, and piece by piece.

Claim (Caillon et al. 2026): learned direct feedback alone, 24.3 %, is ahead of fixed, 20.9, and far from
backpropagation's 68.7. The estimate is noisy in early layers, so that what lowers its variance should help.

Command: ``python -m experiments run grape_resnet20``; ``--preset variants`` for every variant; ``--preset
maps`` for measured maps; ``--preset gpu15`` for all images, arms side by side, some 10 minutes on one H100.

The paper's rule (normal noise, in weights where these are fewer, no tiles, no scales) is ``letter``; with noise in
activations alone, ``activations``. Ours with a Kalman-weighted mean and scales is ``full``, that with feedback that
repeats over tiles ``tiled``. The other variants have signs for perturbations and are otherwise one option, or the few
that their name tells, away from ``activations``. ``separate`` bounds what better scales could give:
it has none of the noise that layers make for each other. All arms have one rate, since the paper states none. ResNets
are tapped after every block, inside which the backward is exact.

A measured map is no rule but a bound: what direct feedback could teach if its estimate had no noise. It is the least
squares of every example's Jacobian over one batch, some twenty, or a hundred. A Jacobian depends on the example: so may
a measured map, by the probabilities of the classes or by the activation along 16 random directions.

Verdict: the order holds at the published size, in one seed: learned feedback is far ahead of fixed, and backpropagation
ahead of both. With activations perturbed it learns more than the paper's letter is said to, without one true gradient;
the letter itself was not run at that size. Tiles align better and learn less there. In short runs on a CPU the letter
is ahead of fixed feedback, too, and behind the same with activations perturbed, whose feedback is better aligned. No
other variant is ahead of that one by more than the error, however well it is aligned, not even where each layer has a
derivative of its own. Noise is not what holds learning back there: measured maps, over one batch or many, end where
learned feedback does. Nor does it help that a map sees the example: by the activation it teaches less than one map for
all, and is no better aligned beyond the error.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated

import jaxfa
from experiments.common.bounds import among
from experiments.common.experiment import Arm, Experiment, Page
from experiments.grape.measured import MEASURED
from experiments.grape.networks import CPU, NETWORKS, SIZE, Size, images, task
from experiments.grape.variants import VARIANTS

WAYS = VARIANTS | MEASURED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Size):
    """The network's size and the variants."""

    variants: Annotated[tuple[str, ...], among(WAYS)] = tuple(VARIANTS)
    """The ways of learning feedback to train, beside backpropagation, feedback alignment and DFA."""

    arms = ("variants",)


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation, feedback alignment, DFA and every variant."""
    network, plain = NETWORKS["resnet20"], task(config, images(config), "resnet20")
    rules: dict[str, tuple[str, jaxfa.Rule]] = {
        "bp": ("Backpropagation", jaxfa.backprop()),
        "fa": ("Feedback alignment", jaxfa.fa()),
        "dfa": ("DFA", jaxfa.dfa()),
    }
    for name, (title, rule) in (rules | {name: WAYS[name] for name in config.variants}).items():
        at = network.taps if isinstance(rule, jaxfa.DirectRule) else None
        yield Arm(name, title, None, plain._replace(rule=rule, at=at), network.published.get((name, 0)))


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(variants=("letter", "activations", "full", "tiled"), **CPU | {"seeds": 3}),
        "variants": Config(**CPU | {"seeds": 3}),
        "maps": Config(variants=tuple(MEASURED), **CPU | {"seeds": 3}),
        # 195 steps of some 4 ms on an H100 are .8 s, so that an epoch of the six arms, which share it, is 5 s: 70 are 6
        # minutes, compiling side by side 1 to 2 more.
        "gpu15": Config(
            variants=("letter", "full", "tiled"),
            epochs=70,
            batch=256,
            learning_rate=3e-3,
            seeds=1,
            apart=True,
            save_every=1,
            minutes=8.0,
        ),
        "paper": Config(epochs=200, batch=256),
    },
    Page(
        "Direct feedback alone in ResNet-20",
        "Caillon et al. 2026, CIFAR-100, hyper-parameters not stated",
        epoch="last",
    ),
    arms,
    size=SIZE,
)
