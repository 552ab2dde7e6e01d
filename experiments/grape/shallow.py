"""GrAPE in shallow convolutional networks: how much of the gap between fixed feedback and backpropagation it closes.

Claim (Caillon et al. 2026): on MNIST, CIFAR-10 and CIFAR-100 learned direct feedback is ahead of fixed, direct or layer
by layer, and .2, 1.6 and 6.2 points below backpropagation.

Command: ``python -m experiments run grape_shallow``; ``--preset hours`` for all images of MNIST, ``--preset gpu15`` for
those of both CIFARs in a quarter of an hour on one H100, ``--preset paper`` for all.

The paper states neither networks nor rates. The network is that of its ancestor, two convolutions and a hidden layer.
Every rule may have a rate of its own; none was tuned.

Beside the literal rule, whose noise is in the weights of the first layer, stand that with noise in activations alone,
the library's with a Kalman mean, on the full map and with tiles of 4 pixels, and the paper's other baselines, forward
gradients and PEPITA, of whose numbers we have none. PEPITA's own paper trains by SGD: here it has Adam like the others.

Verdict: learned feedback is far ahead of fixed and behind backpropagation on both data sets, in short trainings: a race
of speed, which says nothing of where learning ends. Which of the learned forms comes first is within the errors, but
for one pair: on CIFAR-10 tiles are ahead of the letter, by hardly more, most likely since less noise tells more in so
few steps. Forward gradients are behind fixed feedback, and PEPITA is far behind. On all of MNIST and in few epochs, all
being close to the end there, the paper's order holds: learned feedback is ahead of fixed and behind backpropagation,
each by more than the error; its two forms are level.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, get_args

import optax

import jaxfa
from experiments.common import data, experiment
from experiments.common.experiment import Arm, Experiment, Page
from experiments.common.task import Task
from experiments.grape.variants import VARIANTS
from experiments.models.cnn import ShallowCNN

Name = Literal["mnist", "cifar10", "cifar100"]
RuleName = Literal["fa", "dfa", "letter", "activations", "full", "tiled", "forward", "pepita"]
TITLES: dict[Name, str] = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
PUBLISHED: dict[Name, dict[str, float]] = {
    "mnist": {"bp": 99.03, "fa": 98.7, "dfa": 98.6, "letter": 98.8},
    "cifar10": {"bp": 74.66, "fa": 71.05, "dfa": 69.34, "letter": 73.1},
    "cifar100": {"bp": 44.22, "fa": 35.0, "dfa": 34.53, "letter": 38.0},
}
# Each rule's title, its value, and what holds its rate.
RULES: dict[RuleName, tuple[str, jaxfa.Rule, str]] = {
    "fa": ("FA", jaxfa.fa(), "fa_rate"),
    "dfa": ("DFA", jaxfa.dfa(), "dfa_rate"),
    "letter": (*VARIANTS["letter"], "grape_rate"),
    "activations": (*VARIANTS["activations"], "grape_rate"),
    "full": (*VARIANTS["full"], "grape_rate"),
    "tiled": (*VARIANTS["tiled"], "grape_rate"),
    "forward": ("Forward gradients", jaxfa.forward_gradient(), "forward_rate"),
    "pepita": ("PEPITA", jaxfa.pepita(), "pepita_rate"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(experiment.Config):
    """The data sets, every rule's rate, and for how long."""

    datasets: tuple[Name, ...] = ("mnist", "cifar10", "cifar100")
    """The data sets to learn."""
    rules: tuple[RuleName, ...] = get_args(RuleName)
    """The rules beside backpropagation."""
    fa_rate: float = 1e-3
    """The learning rate of Adam under FA."""
    dfa_rate: float = 1e-3
    """The learning rate of Adam under DFA."""
    grape_rate: float = 1e-3
    """The learning rate of Adam under GrAPE."""
    forward_rate: float = 1e-3
    """The learning rate of Adam under forward gradients."""
    pepita_rate: float = 1e-3
    """The learning rate of Adam under PEPITA."""

    arms = ("datasets", "rules")

    def unread(self) -> tuple[str, ...]:
        """The rates of rules that are left out."""
        every, read = ({RULES[name][2] for name in names} for names in (RULES, self.rules))
        return (*super().unread(), *sorted(every - read))


def arms(config: Config) -> Iterator[Arm]:
    """Every rule on every data set."""
    rules: dict[str, tuple[str, jaxfa.Rule, str]] = {"bp": ("backpropagation", jaxfa.backprop(), "learning_rate")}
    rules |= {name: RULES[name] for name in config.rules}
    for name in config.datasets:
        dataset = experiment.load(config, name)
        for rule, (title, value, rate) in rules.items():
            made, number = task(config, dataset, value, getattr(config, rate)), PUBLISHED[name].get(rule)
            yield Arm(f"{name}-{rule}", TITLES[name], None, made, number, f"{name}-bp", title=title)


def task(config: experiment.Config, dataset: data.Dataset, rule: jaxfa.Rule, rate: float) -> Task:
    """The training of the shallow network by a rule."""
    shape, classes = dataset.train_images.shape[1:], dataset.classes
    steps = len(dataset.train_labels) // config.batch
    # The ancestor's: 5 % less every epoch of a hundred, and no augmentation.
    schedule = optax.exponential_decay(rate, steps * config.epochs / 100, 0.95)
    return Task(
        make=lambda rngs: ShallowCNN(shape, classes, rngs=rngs),
        rule=rule,
        optimizer=optax.adam(schedule),
        data=dataset,
        batch=config.batch,
        augment=lambda key, images: images,
    )


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        # In so short a training nothing learns the hundred classes.
        "cpu": Config(datasets=("mnist", "cifar10"), epochs=4, images=4000, test_images=2000),
        # All images, the letter and ours, in some hours of one core.
        "hours": Config(datasets=("mnist",), rules=("dfa", "letter", "full"), epochs=5, save_every=1),
        # 18 arms on 16 cores, with steps of 1 ms or less on an H100, where a ResNet-20's of twice the images takes 3.8:
        # at most 6 s for an epoch of all, so that 60 are some 6 minutes, and compiling side by side 2.
        "gpu15": Config(
            datasets=("cifar10", "cifar100"), epochs=60, batch=128, seeds=1, apart=True, save_every=1, minutes=10.0
        ),
        "paper": Config(epochs=100, seeds=5),
    },
    Page(
        "Does learned direct feedback close the gap?",
        "Caillon et al. 2026, networks and rates not stated",
        epoch="last",
    ),
    arms,
    size=(),
)
