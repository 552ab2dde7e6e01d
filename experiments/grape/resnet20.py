"""ResNet-20 on all of CIFAR-100 without one true gradient: fixed and learned direct feedback, to the letter and ours.

Claim (Caillon et al. 2026): learned direct feedback alone, 24.3 %, is ahead of fixed, 20.9, and far from
backpropagation's 68.7.

Command: ``python -m experiments run grape_resnet20 --preset gpu15``, some 10 minutes on one H100, arms side by side.

The paper's rule and ours are two arms: the one has its estimator to the letter (activations perturbed by normal noise,
no tiles, no scales), the other takes a Kalman-weighted mean, on the full map or with feedback that repeats over tiles.
All arms have one rate, since the paper states none. ResNets are tapped after every block, inside which the backward is
exact.
"""

from collections.abc import Iterator

import jaxfa
from experiments.common.experiment import Arm, Experiment, Page
from experiments.grape.networks import BEST, CPU, LITERAL, NETWORKS, TILED, Size, images, task


def arms(config: Size) -> Iterator[Arm]:
    """Backpropagation, feedback alignment, DFA, GrAPE to the letter, GrAPE at its best."""
    published = {"bp": ("bp", 0), "dfa": ("dfa", 0), "letter": ("letter", 0)}
    network, plain = NETWORKS["resnet20"], task(config, images(config), "resnet20")
    rules = {
        "bp": ("Backpropagation", jaxfa.backprop(), None),
        "fa": ("Feedback alignment", jaxfa.fa(), None),
        "dfa": ("DFA", jaxfa.dfa(), network.taps),
        "letter": ("GrAPE, the paper's estimator", LITERAL, network.taps),
        "ours": ("GrAPE, tiles and a Kalman mean", TILED, network.taps),
        "full": ("GrAPE, a Kalman mean on the full map", BEST, network.taps),
    }
    for name, (title, rule, at) in rules.items():
        number = network.published[published[name]] if name in published and config.as_published else None
        yield Arm(name, title, None, plain._replace(rule=rule, at=at), number)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Size(**CPU),
        "gpu15": Size(epochs=70, batch=256, learning_rate=3e-3, seeds=1, apart=True, minutes=8.0),
    },
    Page(
        "Direct feedback alone in ResNet-20",
        "Fixed (DFA) and learned (GrAPE) direct feedback and feedback alignment, no true gradient anywhere. In the "
        "paper learned feedback alone reaches 24.3 % where fixed feedback has 20.9 and backpropagation 68.7.",
        "Caillon et al. 2026, CIFAR-100, hyper-parameters not stated",
        epoch="last",
    ),
    arms,
)
