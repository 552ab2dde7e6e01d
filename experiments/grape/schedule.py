"""GrAPE's calibration: accuracy against the epochs from one true gradient to the next, fixed or on measured alignment.

Claim (Caillon et al. 2026): accuracy falls steadily as calibration becomes rarer, the more so the deeper the network.

Command: ``python -m experiments run grape_schedule``, half an hour; ``--preset paper`` for CIFAR-100.

Beside the fixed schedule stands the paper's open question: a true gradient is computed once an epoch, and used where
its cosine with the rule's has fallen under a threshold; true gradients with an optimizer of their own, since in the
rule's Adam one of many weighs little; and the control: as many steps of backpropagation, no others.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import optax

import jaxfa
from experiments.common.experiment import Arm, Experiment, Page
from experiments.grape.networks import CPU_RATES, NETWORKS, PAPER, NetworkName, Rates, images, task

AXIS = "epochs from one true gradient to the next"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Rates):
    """The network and many schedules."""

    network: NetworkName = "resnet20"
    """The network to train."""
    periods: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Epochs from one true gradient to the next."""
    below: float = 0.3
    """Arms that measure the cosine with the true gradient calibrate where it is below this."""
    own_rate: float = 0.1
    """The learning rate of SGD with momentum, in the arms that give the true gradients an optimizer of their own."""
    control_rate: float = 1e-3
    """The learning rate of Adam where a few steps of backpropagation are all there is."""
    tile: int | None = 4
    """The side of GrAPE's repeated feedback, in pixels; None is the whole map."""

    arms = ("periods",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.periods, default=0) < 1:
            raise ValueError(f"periods must be one or more numbers of epochs from 1, got {self.periods}.")


def arms(config: Config) -> Iterator[Arm]:
    """Backpropagation; both rules never, at every period, on measured cosine, and apart; the controls."""
    dataset, name = images(config), config.network
    epoch = len(dataset.train_labels) // config.batch
    yield Arm("bp", "Backpropagation", None, task(config, dataset, name))
    grape = jaxfa.grape(tile=config.tile, averaging=jaxfa.rules.kalman())
    rules = {"dfa": ("DFA", jaxfa.dfa(), config.dfa_rate), "grape": ("GrAPE", grape, config.grape_rate)}
    for rule, (title, value, rate) in rules.items():
        plain = task(config, dataset, name, rate)._replace(rule=value, at=NETWORKS[name].taps)
        yield Arm(rule, f"{title}, never calibrated", None, plain)
        for period in config.periods:
            fixed = plain._replace(calibrate=partial(jaxfa.calibrate, every=period * epoch))
            yield Arm(f"{rule}-{period}", title, period, fixed, axis=AXIS)
        event = plain._replace(calibrate=partial(jaxfa.calibrate, every=epoch, below=config.below))
        yield Arm(f"{rule}-below", f"{title}, on measured cosine", 1, event, axis=AXIS)
        own = optax.sgd(config.own_rate, momentum=0.9)
        apart = plain._replace(calibrate=partial(jaxfa.calibrate, every=epoch, optimizer=own))
        yield Arm(f"{rule}-own", f"{title}, an optimizer of its own", 1, apart, axis=AXIS)
    for period in config.periods:
        # One step an epoch, of which all but every so many are left out.
        taken = dataclasses.replace(config, epochs=max(1, config.epochs // period))
        alone = task(taken, dataset, name, config.control_rate, steps=1)
        rare = optax.conditionally_mask(alone.optimizer, lambda step, n=period, **_: (step + 1) % n == 0)
        yield Arm(f"alone-{period}", "Those steps alone", period, alone._replace(optimizer=rare), axis=AXIS)


EXPERIMENT = Experiment(
    __name__,
    __doc__,
    {"cpu": Config(**CPU_RATES, control_rate=1e-2, periods=(1, 5)), "paper": Config(**PAPER)},
    Page(
        "How rarely may the true gradient come?",
        "A deep network under direct feedback, with one mini-batch of backpropagation every so many epochs. The paper: "
        "accuracy falls steadily as they become rarer.",
        "Caillon et al. 2026, CIFAR-100, one per epoch",
    ),
    arms,
)
