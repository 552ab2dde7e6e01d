"""FA, DFA and sign-symmetry in LeNet on MNIST and CIFAR-10, beside the table of a third party, BioTorch.

Claim (Sanfiz and Akrout 2021): in LeNet sign-symmetry, in all three forms, is level with backpropagation on MNIST and
some two points below it on CIFAR-10, where feedback alignment and DFA, fixed and random, lose more than 30.

Command: ``python -m experiments run compare_lenet``; ``--preset paper`` for all images.

The network is LeNet-5 with ReLU and max-pooling, theirs is not known to us to the letter; nor are their epochs. The
optimizer is SGD with momentum, as their heading says. Fixed random feedback asks for a rate ten times smaller: at
backpropagation's the loss grows without end.

Verdict: sign-symmetry is between backpropagation and fixed random feedback, far ahead of the latter, on both data sets.
No rule is done in so few steps.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

import optax

from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Arm, Experiment, Page, Training, load
from experiments.common.methods import METHODS
from experiments.common.task import Task
from experiments.models.networks import LeNet

Name = Literal["mnist", "cifar10"]
TITLES: dict[Name, str] = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
# BioTorch's test errors in percent.
ERRORS: dict[Name, dict[str, float]] = {
    "mnist": {"bp": 0.91, "fa": 1.7, "dfa": 1.61, "usf": 0.94, "brsf": 0.91, "frsf": 0.97},
    "cifar10": {"bp": 14.23, "fa": 46.69, "dfa": 54.21, "usf": 16.22, "brsf": 16.02, "frsf": 16.86},
}

# From .03, .01 and .003, for bp, fa and dfa from .1 to .0001, by accuracy on MNIST's validation split (4000 images, 3
# epochs, one seed); frSF's is brSF's. CIFAR-10 has the same.
RATES = {"bp": 0.03, "fa": 0.003, "dfa": 0.003, "usf": 0.03, "brsf": 0.01, "frsf": 0.01}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Training):
    """The data sets, the rate, and for how long."""

    datasets: tuple[Name, ...] = ("mnist", "cifar10")
    """The data sets to learn."""
    batch: int = 64
    """How many examples a step has."""
    learning_rate: float | None = None
    """The learning rate of SGD, before it decays; None takes the one that was found for each rule."""
    momentum: Annotated[float, FROM_ZERO] = 0.9
    """The momentum of SGD."""

    arms = ("datasets",)


def arms(config: Config) -> Iterator[Arm]:
    """Every rule of the table on every data set."""
    for name in config.datasets:
        dataset = load(config, name)
        shape, classes = dataset.train_images.shape[1:], dataset.classes
        steps = config.epochs * (len(dataset.train_labels) // config.batch)
        sizes: dict[str, Any] = {"shape": shape, "classes": classes}
        for rule, error in ERRORS[name].items():
            schedule = optax.cosine_decay_schedule(config.learning_rate or RATES[rule], steps)
            task = Task(
                make=partial(_make, **sizes),
                rule=METHODS[rule].rule(),
                optimizer=optax.sgd(schedule, momentum=config.momentum),
                data=dataset,
                batch=config.batch,
            )
            known: dict[str, Any] = {"published": round(100 - error, 2), "reference": f"{name}-bp"}
            yield Arm(
                f"{name}-{rule}", TITLES[name], None, task, title=METHODS[rule].title, origin="a third party's", **known
            )


def _make(rngs: Any, *, shape: Any, classes: int) -> LeNet:
    return LeNet(shape, classes, rngs=rngs)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(epochs=4, images=8000, test_images=4000),
        "paper": Config(epochs=100, batch=128),
    },
    Page(
        "Which feedback trains LeNet?",
        "BioTorch (Sanfiz and Akrout 2021), a third party: LeNet by SGD, epochs not known to us",
        epoch="last",
    ),
    arms,
    size=(),
)
