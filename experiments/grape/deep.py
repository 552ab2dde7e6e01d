"""GrAPE in deep networks: direct feedback with a true gradient now and then, with none, and those gradients alone.

Claim (Caillon et al. 2026, CIFAR-100): learned direct feedback is ahead of fixed, and one mini-batch of backpropagation
per epoch lifts both by tens of points: ResNet-20 to 64.8 % (fixed: 59.8) of backpropagation's 68.7; accuracy falls
steadily as they become rarer.

Command: ``python -m experiments run grape_deep`` for ResNet-20; ``--networks alexnet vgg16 resnet56`` for the others,
``--periods 1 2 4 8 16`` for a schedule.

Published numbers stand beside the paper's rule to the letter; ours, with scales and a Kalman mean, is another arm. It
also calibrates on an event: at an epoch's end, where its own forward-mode estimates find the feedback's cosine with the
Jacobian below a threshold, so that no true gradient is computed to decide. The control that the paper lacks: as many
steps of backpropagation, and no others. ResNets are tapped after every block, inside which the backward is exact; the
others after every layer. The paper states neither taps nor rates.

Verdict: half of it, in short trainings of one network; the schedule of rarer true gradients was not run. Learned
feedback is ahead of fixed, to the letter and more so in our form. A true gradient an epoch changes no rule's accuracy
beyond its error. In the paper DFA that is calibrated passes GrAPE that is not; not so here, which five true gradients
in all cannot deny. Asked by its own estimate GrAPE takes one gradient less, and is where it was.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Annotated

import optax

import jaxfa
from experiments.common import data
from experiments.common.bounds import FROM_ZERO
from experiments.common.experiment import Arm, Experiment, Page
from experiments.common.task import Task
from experiments.grape.networks import CPU_RATES, NETWORKS, PAPER, SIZE, NetworkName, Rates, images, task
from experiments.grape.variants import VARIANTS, WATCHED

AXIS = "epochs from one true gradient to the next"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Rates):
    """The networks, and what calibration needs."""

    networks: tuple[NetworkName, ...] = ("alexnet", "vgg16", "resnet20", "resnet56")
    """The networks to train."""
    periods: tuple[int, ...] = (1,)
    """Epochs from one true gradient to the next, beside never."""
    below: Annotated[float, FROM_ZERO] = 0.3
    """The cosine with the Jacobian below which the arm that measures it calibrates."""
    control_rate: float = 1e-3
    """The learning rate of Adam where a few steps of backpropagation are all there is."""

    arms = ("networks", "periods")


def arms(config: Config) -> Iterator[Arm]:
    """The arms of every network."""
    dataset = images(config)
    for name in config.networks:
        yield from _arms(config, dataset, name)


def _arms(config: Config, dataset: data.Dataset, name: NetworkName) -> Iterator[Arm]:
    network, epoch = NETWORKS[name], len(dataset.train_labels) // config.batch
    reference, axis = f"{name}-bp", f"{AXIS}, {network.title}"

    def arm(key: str, title: str, period: int | None, value: Task, count: int = 0) -> Arm:
        number = network.published.get((key.partition("-")[0], count))
        said = f"a true gradient {_often(period, most=key == 'event')}" if period else ""
        return Arm(f"{name}-{key}", f"{network.title}: {title}", period, value, number, reference, axis, title=said)

    yield arm("bp", "backpropagation", None, task(config, dataset, name))
    rules = {
        "dfa": ("DFA", jaxfa.dfa(), config.dfa_rate),
        **{name: (*VARIANTS[name], config.grape_rate) for name in ("letter", "full")},
    }
    for rule, (title, value, rate) in rules.items():
        plain = task(config, dataset, name, rate)._replace(rule=value, at=network.taps)
        yield arm(rule, f"{title}, never calibrated", None, plain)
        for period in config.periods:
            fixed = partial(jaxfa.calibrate, every=period * epoch)
            yield arm(f"{rule}-{period}", title, period, plain._replace(calibrate=fixed), int(period == 1))
    event = plain._replace(rule=WATCHED, calibrate=partial(jaxfa.calibrate, every=epoch, below=config.below))
    yield arm("event", "GrAPE on its own estimate", 1, event)
    for period in config.periods:
        # One step an epoch, of which all but every so many are left out.
        taken = dataclasses.replace(config, epochs=max(1, config.epochs // period))
        alone = task(taken, dataset, name, config.control_rate, steps=1)
        rare = optax.conditionally_mask(alone.optimizer, lambda step, n=period, **_: (step + 1) % n == 0)
        yield arm(f"alone-{period}", "those steps alone", period, alone._replace(optimizer=rare))


def _often(period: int, *, most: bool) -> str:
    return ("at most " if most else "") + ("every epoch" if period == 1 else f"every {period} epochs")


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {
        "cpu": Config(**CPU_RATES | {"networks": ("resnet20",), "seeds": 3}, control_rate=1e-2),
        "paper": Config(**PAPER),
    },
    Page("How much backpropagation does a deep network need?", "Caillon et al. 2026, CIFAR-100", epoch="last"),
    arms,
    size=SIZE,
)
