"""GrAPE in deep networks: direct feedback with one true gradient per epoch, with none, and those gradients alone.

Claim (Caillon et al. 2026, CIFAR-100): learned direct feedback is ahead of fixed, and one mini-batch of backpropagation
per epoch lifts both by tens of points: ResNet-20 to 64.8 % (fixed: 59.8) of backpropagation's 68.7.

Command: ``python -m experiments run grape_deep``, 6 to 25 minutes a network; ``--preset paper`` for CIFAR-100.

The control that the paper lacks stands beside every network: as many steps of backpropagation, and no others. ResNets
are tapped after every block, inside which the backward is exact; the others after every layer. The paper states neither
taps nor rates.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jaxfa
from experiments.common import data, records
from experiments.common.experiment import Arm, Experiment, Page
from experiments.grape.networks import CPU_RATES, NETWORKS, PAPER, NetworkName, Rates, images, task

AXIS = "true gradients per epoch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Rates):
    """The networks, and what calibration needs."""

    networks: tuple[NetworkName, ...] = ("alexnet", "vgg16", "resnet20", "resnet56")
    """The networks to train."""
    control_rate: float = 1e-3
    """The learning rate of Adam where a few steps of backpropagation are all there is."""
    tile: int | None = 4
    """The side of GrAPE's repeated feedback, in pixels; None is the whole map."""

    arms = ("networks",)

    def __post_init__(self) -> None:
        super().__post_init__()
        records.refuse_empty(self, "networks")
        records.refuse_below_one(self, "tile")


def arms(config: Config) -> Iterator[Arm]:
    """The arms of every network."""
    dataset = images(config)
    for name in config.networks:
        yield from _arms(config, dataset, name)


def _arms(config: Config, dataset: data.Dataset, name: NetworkName) -> Iterator[Arm]:
    network = NETWORKS[name]
    published = network.published if config.as_published else {}
    bp, axis, reference = task(config, dataset, name), f"{AXIS}, {network.title}", f"{name}-bp"
    yield Arm(reference, f"{network.title}: backpropagation", None, bp, published.get(("bp", 0)), reference, axis)
    every = partial(jaxfa.calibrate, every=len(dataset.train_labels) // config.batch)
    grape = jaxfa.grape(tile=config.tile, averaging=jaxfa.rules.kalman())
    rules = {"dfa": ("DFA", jaxfa.dfa(), config.dfa_rate), "grape": ("GrAPE", grape, config.grape_rate)}
    for rule, (title, value, rate) in rules.items():
        plain = task(config, dataset, name, rate)._replace(rule=value, at=network.taps)
        for count, chosen in enumerate((plain, plain._replace(calibrate=every))):
            arm, number = f"{name}-{rule}-{count}", published.get((rule, count))
            yield Arm(arm, f"{network.title}: {title}", count, chosen, number, reference, axis)
    alone = task(config, dataset, name, config.control_rate, steps=1)
    yield Arm(f"{name}-alone-1", f"{network.title}: those steps alone", 1, alone, None, reference, axis)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(**CPU_RATES, control_rate=1e-2), "paper": Config(**PAPER)},
    Page(
        "How much backpropagation does a deep network need?",
        "Direct feedback, fixed (DFA) or learned (GrAPE), with one mini-batch of backpropagation per epoch or none, "
        "and as many of those mini-batches alone. In the paper that one in some 195 lifts ResNet-20 from 24.3 to "
        "64.8 %.",
        "Caillon et al. 2026, CIFAR-100",
    ),
    arms,
)
