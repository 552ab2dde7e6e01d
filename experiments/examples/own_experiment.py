"""How many numbers does the error need? LDFA of each rank on digits, beside backpropagation.

Claim: digits have ten classes, so that feedback of rank 10 should do as well as backpropagation.
"""

import dataclasses
import sys
from pathlib import Path

import optax
import tyro

import jaxfa
from experiments.common import data, sweep
from experiments.common.task import Task
from experiments.models.networks import MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(sweep.Config):
    """The ranks, and for how long."""

    ranks: tuple[int, ...] = (1, 2, 5, 10)
    """The ranks of the feedback."""
    out: Path = Path("runs/own_experiment")
    """The folder of the results."""

    arms = ("ranks",)  # more of these may join the results that are there


PRESETS = {"cpu": Config(epochs=10)}
PAGE = sweep.Page("How many numbers does the error need?", "Feedback of rank 10 should do for ten classes.", "none")


def run(config):
    digits = sweep.prepare(config, data.load("digits"))
    shape, classes = digits.train_images.shape[1:], digits.classes

    def task(rule):
        adam = optax.adam(config.learning_rate)
        return Task(lambda rngs: MLP(shape, classes, rngs=rngs), rule, adam, digits, config.batch)

    ranks = [sweep.Arm(f"rank-{rank}", "LDFA", rank, task(jaxfa.ldfa(rank))) for rank in config.ranks]
    return sweep.run(config, PAGE, [sweep.Arm("bp", "Backpropagation", None, task(jaxfa.backprop())), *ranks])


if __name__ == "__main__":
    print(run(tyro.cli(Config, default=PRESETS["cpu"], args=sys.argv[1:])))
