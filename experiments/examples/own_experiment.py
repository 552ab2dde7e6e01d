"""How many numbers does the error need? LDFA of each rank on digits, beside backpropagation.

Claim: digits have ten classes, so that feedback of rank 10 should do as well as backpropagation.

Command: ``python -m experiments.examples.own_experiment``, a minute.
"""

import dataclasses

import optax
import tyro

import jaxfa
from experiments.common import sweep
from experiments.common.experiment import Arm, Config, Experiment, Page, load
from experiments.common.task import Task
from experiments.models.networks import MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks(Config):
    """The ranks, and for how long."""

    ranks: tuple[int, ...] = (1, 2, 5, 10)
    """The ranks of the feedback."""

    arms = ("ranks",)  # more of these may join the results that are there


def arms(config):
    digits = load(config, "digits")
    shape, classes = digits.train_images.shape[1:], digits.classes

    def task(rule):
        adam = optax.adam(config.learning_rate)
        return Task(lambda rngs: MLP(shape, classes, rngs=rngs), rule, adam, digits, config.batch)

    yield Arm("bp", "Backpropagation", None, task(jaxfa.backprop()))
    for rank in config.ranks:
        yield Arm(f"rank-{rank}", "LDFA", rank, task(jaxfa.ldfa(rank)))


EXPERIMENT = Experiment(
    "experiments.examples.own_experiment",
    __doc__,
    {"cpu": Ranks(epochs=10)},
    Page("How many numbers does the error need?"),
    arms,
)

if __name__ == "__main__":
    print(sweep.run(EXPERIMENT, tyro.cli(Ranks, default=EXPERIMENT.preset("cpu"))))
